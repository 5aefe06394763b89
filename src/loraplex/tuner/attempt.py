"""A change of a model that succeeds, or leaves the model as it was if an error or Ctrl-C ends it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_attempts: ContextVar[tuple[Attempt, ...]] = ContextVar("attempts", default=())


class Attempt:
    """The state of a model when an attempt to change it begins.

    It holds every module's attributes, and the contents of its dictionaries, lists and sets (submodules, parameters,
    hooks, names of adapters). That is cheap, since no tensor is copied; `back_up` copies those that a load overwrites.
    """

    def __init__(self, model: nn.Module, needs_us: bool = False, weights: Any = None) -> None:
        self._modules = [(m, dict(m.__dict__), _contents(m.__dict__)) for m in model.modules()]
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        self._known = {id(module) for module, _, _ in self._modules}
        self._tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._values: list[tuple[Tensor, Tensor]] = []
        self.ours = not needs_us
        """Whether an adapter of ours takes part. Only then is the change undone."""
        self.weights = weights
        """The file or tensors that are about to be loaded, if the caller knows better than the adapter's config."""

    def covers(self, model: nn.Module) -> bool:
        """Whether undoing this attempt restores `model` too."""
        return id(model) in self._known

    def back_up(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of `tensors`, which are about to be overwritten, if the model had them at the beginning."""
        self._values += [(t, t.detach().clone()) for t in tensors if id(t) in self._tensors]

    def undo(self) -> None:
        """Restore the model. Doing it twice does no harm."""
        for module, attributes, contents in self._modules:
            now = module.__dict__
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update(attributes)
            for container, content in contents:
                _refill(container, content)
        for parameter, requires_grad in self._trainable:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def all_or_nothing(model: nn.Module, change: Callable[[], T], needs_us: bool = False, weights: Any = None) -> T:
    """Return `change()`; if it fails, restore `model` first.

    Args:
        model: the model that is changed, with all its submodules.
        change: changes it.
        needs_us: restore only if an adapter of ours took part (`Attempt.ours`); others keep PEFT's own behaviour.
        weights: see `Attempt.weights`.
    """
    if any(attempt.covers(model) for attempt in _attempts.get()) and weights is None:
        return change()
    attempt = Attempt(model, needs_us, weights)
    token = _attempts.set((*_attempts.get(), attempt))
    try:
        return change()
    except BaseException:
        if attempt.ours:
            try:
                attempt.undo()
            except BaseException:
                # A second Ctrl-C has come in the middle of it.
                attempt.undo()
                raise
        raise
    finally:
        _attempts.reset(token)


def running() -> tuple[Attempt, ...]:
    """The attempts under way, the outermost first."""
    return _attempts.get()


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    kinds = (dict, OrderedDict, list, set)
    return [(value, value.copy()) for value in attributes.values() if type(value) in kinds]


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        # By identity: values may be tensors, which have no single truth value.
        if [(k, id(v)) for k, v in container.items()] != [(k, id(v)) for k, v in content.items()]:
            container.clear()
            container.update(content)
    elif isinstance(container, list):
        if list(map(id, container)) != list(map(id, content)):
            container[:] = content
    elif container != content:
        container.clear()
        container.update(content)
