"""Notices that a schedule's parameters are trained by an optimizer whose steps can't be observed.

The schedule would stand still for ever: ASLoRA would never merge, Dual LoRA would train nothing. Such an optimizer
leaves traces: the gradient is reset, or the parameter changes, though no step was observed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from loraplex.runtime.optimizer_steps import holds
from loraplex.runtime.parallel import is_sharded, to_local

MISSED_STEPS = 3
"""Steps of other optimizers, each after a backward pass through an adapter, that prove its own one is hidden."""
RESETS = 8
"""Resets of the gradient between two backward passes that prove it. Gradient accumulation resets none."""
CHANGES = 3
"""Changes of the parameter between two looks at it that prove it."""
FIRST_LOOK = 8
"""The backward pass after which the parameter's value is first looked at; the next looks are after twice as many each.
A look waits for the device."""
BACKWARDS = 4096
"""Backward passes without an observed optimizer step that prove it; more than any gradient accumulation makes."""


class Watched(Protocol):
    """A schedule, as the watch sees it."""

    def finished(self) -> bool:
        """Whether nothing is left to change."""

    def describe(self) -> str:
        """The schedule's settings."""

    def is_held(self, held: set[int]) -> bool:
        """Whether one of its trained parameters is among these ids."""

    def known_optimizers(self) -> Iterable[Optimizer]:
        """The optimizers that were seen to step its parameters, if they still exist."""


class Watch:
    """Watches the gradient of one parameter of a schedule."""

    def __init__(self, owner: Watched) -> None:
        self._owner = weakref.ref(owner)
        self._handle: Any = None
        self._cdata = 0
        self.fresh = False
        """Whether a backward pass has reached the parameter since the last step was counted."""
        self.counted()

    def counted(self) -> None:
        """A step was counted, which explains all traces before it."""
        self.fresh = False
        self._backwards = self._other_steps = self._resets = self._changes = 0
        self._version: int | None = None
        self._sample: Tensor | None = None

    def attach(self, parameter: nn.Parameter) -> None:
        """Watch `parameter` from now on; casts, loading and sharding may have put it in place of another."""
        # Recognised by its hooks, not by a weak reference, for which torch would refuse to swap the parameter.
        hooks = parameter._post_accumulate_grad_hooks
        if self._handle is not None and hooks is not None and self._handle.hooks_dict_ref() is hooks:
            if self._cdata != parameter._cdata:
                # A swapped parameter has kept the list of its hooks, but its new memory does not call them.
                parameter._post_accumulate_grad_hooks = hooks
                self._cdata = parameter._cdata
            return
        if self._handle is not None:
            self._handle.remove()
        me = weakref.ref(self)
        self._handle = parameter.register_post_accumulate_grad_hook(lambda p: _backward_seen(me(), p))
        self._cdata = parameter._cdata
        self._version = self._sample = None

    def backward_seen(self, parameter: nn.Parameter) -> None:
        """A gradient has been added to `parameter.grad`."""
        self.fresh = True
        self._backwards += 1
        # Accumulation adds in place, which counts one version; a new tensor, or one zeroed in place, has another.
        if self._version is not None and parameter.grad is not None:
            self._resets += parameter.grad._version != self._version + 1
        self._version = None
        if not is_sharded(parameter):
            # After the pass, since some engines take the gradient away in its course, under accumulation too.
            _after_backward(partial(_note_version, weakref.ref(self), weakref.ref(parameter)))
        if self._backwards >= FIRST_LOOK and self._backwards & (self._backwards - 1) == 0:
            self._look_at(parameter)
        if self._resets >= RESETS:
            self._raise(f"the gradient was reset {RESETS} times after a backward pass")
        if self._changes >= CHANGES:
            # An optimizer that has yet to step can't explain it: something else trains the parameter.
            evidence = f"the adapter's parameters changed in the course of {self._backwards} backward passes"
            self._raise(evidence, look_for_idle=False)
        if self._backwards > BACKWARDS:
            self._raise(f"{BACKWARDS} backward passes went by")

    def _look_at(self, parameter: nn.Parameter) -> None:
        if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        sample = to_local(parameter).flatten()[:64].clone()
        self._changes += self._sample is not None and not torch.equal(sample, self._sample)
        self._sample = sample

    def note_version(self, parameter: nn.Parameter) -> None:
        """Note the gradient's version when a backward pass is over."""
        self._version = None if parameter.grad is None else parameter.grad._version

    def other_step(self) -> None:
        """An optimizer has stepped that holds none of the schedule's parameters."""
        owner = self._owner()
        if self._backwards and owner is not None and not owner.finished():
            self._backwards = 0
            self._other_steps += 1
            if self._other_steps >= MISSED_STEPS:
                self._raise(f"{MISSED_STEPS} optimizer steps went by after backward passes through the adapter")

    def _raise(self, evidence: str, look_for_idle: bool = True) -> None:
        self.counted()
        self.fresh = True
        owner = self._owner()
        if owner is None or owner.finished() or any(owner.is_held(holds(o)) for o in owner.known_optimizers()):
            return
        # Last, since it looks at every object there is: an optimizer that has yet to step is not hidden.
        if look_for_idle and any(issubclass(type(o), Optimizer) and owner.is_held(holds(o)) for o in gc.get_objects()):
            return
        raise RuntimeError(
            f"The schedule ({owner.describe()}) never advances: {evidence}, but no optimizer that holds the "
            "adapter's parameters was seen to step. Remedy: pass callbacks=[loraplex.ScheduleCallback()] to the "
            "trainer, or call loraplex.step(model) after every optimizer step. To look at gradients without training, "
            "use torch.autograd.grad."
        )


def _backward_seen(watch: Watch | None, parameter: nn.Parameter) -> None:
    if watch is not None:
        watch.backward_seen(parameter)


def _after_backward(call: Callable[[], None]) -> None:
    """Call when the pass has ended and DDP has put reduced gradients in place, which it does in a first callback."""
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(call))


def _note_version(watch: weakref.ref[Watch], parameter: weakref.ref[nn.Parameter]) -> None:
    found, p = watch(), parameter()
    if found is not None and p is not None:
        found.note_version(p)
