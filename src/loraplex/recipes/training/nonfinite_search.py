"""Which module's output, or gradient, first stops being finite in a pass through a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.tuner.bank import BANK

_WRAPPERS = ("", "base_model", "base_model.model")


@dataclass
class Finding:
    """What is at fault."""

    text: str
    """In words, to stand after a colon."""
    module: str | None = None
    """The module or parameter at fault; None if it is none, or not known."""
    sure: bool = True
    """False if the fault was looked for and not found."""
    lasting: bool = False
    """Whether the next update meets it too, because it is in a parameter."""


class Trace:
    """Hooks for one pass through `model` that find the first module in which numbers stop being finite.

    Forward: a module whose output is not finite although its inputs are. Backward: a module that gets a finite gradient
    for its output and passes on one that is not. Where modules lie in each other, the innermost is meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.finding: Finding | None = None
        self._calls: list[_Call] = []
        self._open: dict[str, list[_Call]] = {}
        self._forward = True

    def __enter__(self) -> Trace:
        self._handles = []
        for name, module in self.model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                module.register_forward_hook(partial(self._leave, name), with_kwargs=True),
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._forward:
            return None  # gradient checkpointing computes it again
        call = _Call(name)
        self._calls.append(call)
        self._open.setdefault(name, []).append(call)
        return tuple(map(call.alias, args)), {key: call.alias(value) for key, value in kwargs.items()}

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not self._forward:
            return
        call = self._open[name].pop()
        outputs = list(tensors_in(out))
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(call.saw_output_gradient)
        # Masks are left aside: they hold -inf by design.
        inputs = tensors_in([args, {k: v for k, v in kwargs.items() if "mask" not in k}])
        if self.finding is None and (kind := kind_of(outputs)) and not kind_of(inputs):
            self.finding = Finding(_in_forward(name, module, kind), readable(name))

    def backward(self, loss: Tensor) -> None:
        """Go on with the backward pass of `loss`, if the forward pass was finite; no `.grad` is touched."""
        self._forward = False
        if self.finding is not None:
            return
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        at_fault = [call for call in self._calls if call.input_kind and not call.output_kind]
        if at_fault:
            call = at_fault[-1]
            where = readable(call.name)
            self.finding = Finding(f"the gradient becomes {call.input_kind} on its way back through {where}", where)
            return
        for (name, _), gradient in reversed(list(zip(named, gradients, strict=True))):
            if gradient is not None and (kind := kind_of([gradient])):
                self.finding = Finding(f"the gradient of {readable(name)} is {kind}", readable(name))
                return


@dataclass
class _Call:
    """One call of a module, and what its gradients hold: "NaN", "Inf", or nothing of the kind."""

    name: str
    input_kind: str = ""
    output_kind: str = ""

    def alias(self, value: Any) -> Any:
        # An alias has a gradient of its own, the part that comes from this module alone.
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        alias = value.view_as(value)
        alias.register_hook(self.saw_input_gradient)
        return alias

    def saw_input_gradient(self, gradient: Tensor) -> None:
        self.input_kind = self.input_kind or kind_of([gradient])

    def saw_output_gradient(self, gradient: Tensor) -> None:
        self.output_kind = self.output_kind or kind_of([gradient])


def readable(name: str) -> str:
    """A parameter's or module's name as people say it: "lora_B of model.layers.3.self_attn.q_proj"."""
    name = name.removeprefix("base_model.model.")
    if match := re.fullmatch(rf"{BANK}\.\w+\.[^.]+\.(\w+)__(lora_\w+)", name):
        return f"{match[2]} of {match[1].replace('__', '.')}"
    if match := re.fullmatch(r"(.+)\.(lora_\w+)\.[^.]+(\.weight)?", name):
        return f"{match[2]} of {match[1]}"
    if match := re.fullmatch(r"(.+)\.\w+_factors\.[^.]+(?:\.(\w+))?", name):
        return f"{match[2] or 'the adapter'} of {match[1]}"
    return name


def _in_forward(name: str, module: nn.Module, kind: str) -> str:
    if name in _WRAPPERS:
        return f"{type(module).__name__} gives {kind}, outside its parts, whose outputs are finite (its loss, say)"
    return f"{readable(name)} gives {kind}, and its inputs are finite"


def kind_of(tensors: Iterable[Tensor]) -> str:
    """ "NaN" or "Inf" if one of them holds it, else ""."""
    # Detached: gradient checkpointing counts what is saved for the backward pass.
    floating = [t for t in map(Tensor.detach, tensors) if t.is_floating_point() and not t.isfinite().all()]
    if not floating:
        return ""
    return "NaN" if any(t.isnan().any() for t in floating) else "Inf"


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
