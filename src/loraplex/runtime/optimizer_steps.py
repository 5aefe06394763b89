"""Tells schedules of every step by which an optimizer updates their parameters, once for nested optimizers.

torch calls a hook before and after the step of every optimizer. Optimizers may wrap others that hold the same
parameters (Lookahead, ZeroRedundancyOptimizer), and a subclass may call the hooked step of its base class. So an update
is made when the outermost step that holds the parameters ends. The hooks are registered while any schedule exists.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Subscriber(Protocol):
    """A schedule, which is told of the steps that update its parameters."""

    def is_held(self, held: set[int]) -> bool:
        """Whether one of its trained parameters is among these ids."""

    def on_step(self, optimizer: Optimizer, inner: list[Optimizer], idle: bool) -> None:
        """An optimizer that holds its parameters has stepped.

        Args:
            optimizer: the outermost one that holds the parameters.
            inner: those that stepped inside its step and hold any of the parameters, the innermost first.
            idle: the step changed nothing, unless a backward pass went before it. torch takes such a step to create an
                optimizer's state, into which it then loads a distributed checkpoint.
        """

    def on_other_step(self) -> None:
        """An optimizer has stepped that holds none of its parameters."""


_subscribers: weakref.WeakSet[Any] = weakref.WeakSet()
_handles: list[Any] = []


def subscribe(subscriber: Subscriber) -> None:
    """Tell `subscriber` of steps for as long as it exists; this does not keep it alive."""
    _subscribers.add(subscriber)
    weakref.finalize(subscriber, _unsubscribe).atexit = False
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def _unsubscribe() -> None:
    # Listed, since len() may still count the subscriber that has just died.
    if not list(_subscribers):
        while _handles:
            _handles.pop().remove()


@dataclass
class _Step:
    """A step that has begun."""

    optimizer: Optimizer
    frame: FrameType | None
    """The frame of torch's wrapper, which calls the step."""
    inner: list[Optimizer] = field(default_factory=list)
    skipped: bool = False
    """Whether a step inside it was skipped by the gradient scaler, and none was taken."""

    def is_running(self) -> bool:
        """Whether its frame is still executed: an exception, or Ctrl-C in a notebook, ends a step without a hook."""
        if self.frame is None:
            return True
        try:
            self.frame.clear()  # refused for a frame that is being executed
        except RuntimeError:
            return True
        return False


class _Steps(threading.local):
    def __init__(self) -> None:
        self.running: list[_Step] = []


_steps = _Steps()


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    frame = inspect.currentframe()
    _steps.running = [step for step in _steps.running if step.is_running()]
    _steps.running.append(_Step(optimizer, frame and frame.f_back))


@torch.compiler.disable  # a compiled step calls it, and would trace the schedule's work
def _after_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    running = _steps.running
    while running and running[-1].optimizer is not optimizer:
        running.pop()  # ended by an exception that the optimizer caught
    # Empty where the hooks were registered while the step ran.
    step = running.pop() if running else _Step(optimizer, None)
    outer = running[-1] if running else None
    if step.skipped or _is_skipped(optimizer):
        if outer is not None:
            outer.skipped = not outer.inner
        return
    if outer is not None:
        outer.inner += [*step.inner, optimizer]
        outer.skipped = False
    # torch.distributed.checkpoint.state_dict._init_optim_state; accelerate's optimizer hands the None on by position.
    no_closure = kwargs == {"closure": None} or (not kwargs and args[1:] == (None,))
    idle = no_closure and all(group.get("lr") == 0 for group in optimizer.param_groups)
    held = holds(optimizer)
    outer_held = [holds(other.optimizer) for other in running]
    for subscriber in list(_subscribers):
        if any(subscriber.is_held(others) for others in outer_held):
            continue
        if subscriber.is_held(held):
            inner = [other for other in step.inner if other is not optimizer and subscriber.is_held(holds(other))]
            subscriber.on_step(optimizer, inner, idle)
        else:
            subscriber.on_other_step()


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has left out its step, since the gradient scaler has found an overflow."""
    found_inf = optimizer.__dict__.get("found_inf")
    return isinstance(found_inf, Tensor) and bool(found_inf.item())


def holds(optimizer: Any) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
