"""The loss scale S under which a backward pass runs, for methods that clip a gradient on its way.

Training in float16 multiplies the loss by S, so that small gradients don't underflow, and divides the factors'
gradients by S afterwards. A clip to [−1, 1] in between is meant for the gradient of the loss itself: under a scale it
is a clip to [−S, S].

A backward pass does not know S. So `watch` wraps those methods of torch's and DeepSpeed's gradient scalers that scale a
loss. The loss that they return has a hook, which puts S in force when its backward pass begins; a callback of the
autograd engine ends that when the pass ends. So exactly that pass sees S. For a loss that is scaled by other means,
the user passes S to `loss_scale`.

The clip reads S inside an operator, from a tensor whose address does not change, so that compiled backward passes and
CUDA graphs see the current value, and no device waits for another.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Scale = float | Tensor


@dataclass
class _Pass:
    """A backward pass of a scaled loss that has begun."""

    scale: Scale
    graph: int
    """The engine's number of the pass."""
    caller: int
    """The thread that scaled the loss, and waits for the pass to end."""


_passes: list[_Pass] = []
_given: list[Scale | Callable[[], Scale]] = []
"""What `loss_scale` was given, the innermost last."""
_bounds: dict[torch.device, Tensor] = {}
_written: Scale = 1.0
_watched: set[type] = set()


@contextmanager
def loss_scale(scale: Scale | Callable[[], Scale]) -> Iterator[None]:
    """State the factor by which losses are multiplied whose backward passes run in this block.

    Dual LoRA needs it if a loss is scaled by other means than torch's gradient scalers or DeepSpeed, and for training
    in float16 without a scale, which is an error otherwise:

        with loraplex.loss_scale(1024.0):
            (1024.0 * loss).backward()

    Args:
        scale: the factor; or a function that returns it, such as a scaler's `get_scale`, asked in each backward pass.

    Raises:
        ValueError: a number that is not positive.
    """
    if isinstance(scale, (int, float)) and not scale > 0:
        raise ValueError(f"The loss scale must be positive, not {scale}. Without scaling it is 1.0.")
    _given.append(scale)
    _write()
    try:
        yield
    finally:
        # The last entry that is this object: other entries may be equal numbers.
        del _given[max(i for i, given in enumerate(_given) if given is scale)]
        _write()


def bound(device: torch.device, half: bool) -> Tensor:
    """S, float32 without dimensions on `device`; 1 if no loss is scaled. The tensor must not be written to.

    Args:
        device: the device on which it is read.
        half: whether the gradient was computed in float16.

    Raises:
        RuntimeError: the gradient was computed in float16, and S is unknown.
    """
    if half and not _passes and not _given:
        raise RuntimeError(
            "Dual LoRA is trained in float16, but no loss scale is known: the gradient of Sign is clipped to [−1, 1], "
            "and the clip has to see the gradient of the loss without its scale. torch.amp.GradScaler, accelerate, "
            "transformers.Trainer and DeepSpeed (ZeRO) tell it by themselves. Remedy: run the backward pass in "
            "`with loraplex.loss_scale(scale):`, where scale is 1.0 if the loss is not scaled; or train in bfloat16."
        )
    tensor = _bounds.get(device)
    if tensor is None:
        with torch.inference_mode(False):
            tensor = _bounds[device] = torch.ones((), device=device)
        _write(anew=True)
    elif not _passes and _given and callable(_given[-1]):
        _write()
    return tensor


def forward_begins() -> None:
    """Drop what an interrupted backward pass has left behind: a thread in a forward pass is in no backward pass."""
    if _passes and torch._C._current_graph_task_id() == -1:
        caller = threading.get_ident()
        _passes[:] = [one for one in _passes if one.caller != caller]
        _write()


@torch.library.custom_op("loraplex::loss_scale", mutates_args=())
def _in_force(gradient: Tensor, half: bool) -> Tensor:
    return bound(gradient.device, half).to(gradient.dtype, copy=True)


@_in_force.register_fake
def _(gradient: Tensor, half: bool) -> Tensor:
    return gradient.new_empty(())


def clip(gradient: Tensor, half: bool) -> Tensor:
    """`gradient` clipped to [−S, S] where it is finite. An overflow stays, so that the scaler finds it."""
    scale = torch.ops.loraplex.loss_scale(gradient.detach(), half)
    return torch.where(gradient.isfinite(), torch.clamp(gradient, -scale, scale), gradient)


def _value() -> Scale:
    if _passes:
        return _passes[-1].scale
    value = _given[-1] if _given else 1.0
    return value if isinstance(value, (Tensor, int, float)) else value()


@torch.no_grad()
def _write(anew: bool = False) -> None:
    """Write the current value into the tensors; a number only if it has changed, or if `anew`."""
    global _written
    if not _bounds:
        return
    value, before = _value(), _written
    _written = value
    if isinstance(value, Tensor):
        for tensor in _bounds.values():
            tensor.copy_(value, non_blocking=True)
    elif anew or isinstance(before, Tensor) or value != before:
        for tensor in _bounds.values():
            tensor.fill_(value)


# Noticing that a loss is scaled


def watch() -> None:
    """Wrap the classes of scalers that exist by now. It is called when an adapter needs S, never at import."""
    for cls in (torch.amp.GradScaler, *_subclasses(torch.amp.GradScaler)):
        if cls not in _watched and "scale" in cls.__dict__:
            _wrap_scale(cls)
    deepspeed = sys.modules.get("deepspeed.runtime.fp16.loss_scaler")
    if deepspeed is not None and deepspeed.LossScalerBase not in _watched:
        _wrap_deepspeed(deepspeed.LossScalerBase)


def _subclasses(cls: type) -> Iterator[type]:
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _wrap_scale(cls: type) -> None:
    _watched.add(cls)
    scale: Any = cls.scale  # type: ignore[attr-defined]

    @wraps(scale)
    @torch.compiler.disable
    def scale_and_tell(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        # A copy: `scaler.update()` may change the scale before the backward pass.
        return _with_scale(scaled, lambda: scaler._scale.clone()) if scaler.is_enabled() else scaled  # type: ignore[union-attr]

    cls.scale = scale_and_tell  # type: ignore[attr-defined]


def _wrap_deepspeed(cls: Any) -> None:
    _watched.add(cls)
    scale_loss, backward = cls.scale_loss, cls.backward  # the second by itself before DeepSpeed 0.19

    @wraps(scale_loss)
    def scale_and_tell(scaler: Any, loss: Tensor) -> Any:
        return _with_scale(scale_loss(scaler, loss), lambda: scaler.loss_scale)

    @wraps(backward)
    def backward_and_tell(scaler: Any, *args: Any, **kwargs: Any) -> Any:
        with loss_scale(scaler.loss_scale):
            return backward(scaler, *args, **kwargs)

    cls.scale_loss, cls.backward = scale_and_tell, backward_and_tell


def _with_scale(scaled: Any, read: Callable[[], Scale]) -> Any:
    """`scaled`, a tensor or an iterable of tensors, with a hook that puts the scale in force."""
    if isinstance(scaled, Tensor):
        if scaled.requires_grad:
            scale, caller = read(), threading.get_ident()
            scaled.register_hook(lambda _: _begin(scale, caller))
        return scaled
    if isinstance(scaled, (list, tuple)):
        for one in scaled:
            _with_scale(one, read)
        return scaled
    return (_with_scale(one, read) for one in scaled)


def _begin(scale: Scale, caller: int) -> None:
    graph = torch._C._current_graph_task_id()
    if not any(one.graph == graph for one in _passes):
        begun = _Pass(scale, graph, caller)
        _passes.append(begun)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _end(begun))
        _write()


def _end(begun: _Pass) -> None:
    if begun in _passes:
        _passes.remove(begun)
        _write()
