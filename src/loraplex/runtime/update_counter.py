"""Which optimizer steps make one update of a schedule's parameters.

An update is complete when all optimizers that hold trained parameters have stepped. It is counted once, whether the
steps were observed by torch's hooks (`optimizer_steps.py`), announced by a call of `loraplex.step`, or both.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Protocol

from torch import nn
from torch.autograd import Variable
from torch.optim import Optimizer

from loraplex.runtime.hidden_optimizer import Watch, Watched
from loraplex.runtime.optimizer_steps import holds


class Counted(Watched, Protocol):
    """A schedule, as its counter sees it."""

    def trained(self) -> Iterator[nn.Parameter]:
        """Parameters by which the optimizer is recognised; the first that is trained is watched."""

    def note_optimizer(self, optimizer: Optimizer, inner: list[Optimizer]) -> None:
        """Note in which optimizer's state the parameters' training state is saved."""

    def advance_by_one(self) -> None:
        """Advance the schedule by one update."""


class UpdateCounter:
    """Tells one schedule of every update of its parameters."""

    def __init__(self, schedule: Counted) -> None:
        self._schedule = schedule
        self._watch = Watch(schedule)
        self._stepped: set[int] = set()
        """Ids of the parameters that were stepped in the update that is under way."""
        self._absent: set[int] = set()
        """Ids of the parameters that were not stepped in the last update."""
        self._in_backward = False
        """Whether the last observed step was made in the course of a backward pass."""
        self._announced = False
        """Whether the last update was counted because `announce` was called."""
        self._observed = False
        """Whether a step was observed since the last announcement."""
        self._observed_since: set[int] = set()
        """Ids of the optimizers whose steps were observed after their announcement."""

    def observe(self, optimizer: Optimizer, inner: list[Optimizer], idle: bool) -> None:
        """Take an observed optimizer step into account; see `optimizer_steps.Subscriber.on_step`."""
        in_backward = self._complete_after_backward()
        if idle and not (self._watch.fresh or self._stepped or in_backward):
            return
        self._schedule.note_optimizer(optimizer, inner)
        if self._announced and not self._watch.fresh and id(optimizer) not in self._observed_since:
            # loraplex.step(model) was called before this step, and has counted it.
            self._observed_since.add(id(optimizer))
            self._observed = True
            return
        held = holds(optimizer)
        stepped = {id(p) for p in self._schedule.trained() if p.requires_grad and id(p) in held}
        if self._stepped and (stepped & self._stepped or (self._watch.fresh and not in_backward)):
            self._count()  # the update before, in which other optimizers did not step
        self._stepped |= stepped
        self._observed, self._in_backward = True, in_backward
        self._watch.counted()
        if not in_backward and not self._is_waiting():
            self._count()

    def announce(self) -> None:
        """Count an update that the caller knows of, unless its steps were observed and counted already."""
        if self._observed and not self._watch.fresh:
            self.complete()
            self._observed = False
            return
        self.complete()
        self._announced, self._observed = True, False
        self._observed_since = set()
        self._watch.counted()
        self._schedule.advance_by_one()

    def complete(self) -> None:
        """Count the update that is under way: no further optimizer belongs to it."""
        if self._stepped:
            self._count()

    def forward_begins(self) -> None:
        """Complete the update that is under way: all its optimizers step before the next forward."""
        if not self._in_backward:
            self.complete()
        self.watch()

    def watch(self) -> None:
        """Watch the first trained parameter, by which a hidden optimizer is noticed."""
        first = next((p for p in self._schedule.trained() if p.requires_grad), None)
        if first is not None:
            self._watch.attach(first)

    def observe_other(self) -> None:
        """Take a step into account of an optimizer that holds none of the parameters."""
        self.watch()  # torch calls no hook of a compiled forward
        self._watch.other_step()

    def _complete_after_backward(self) -> bool:
        """Complete the update at the end of the backward pass under way, in which one optimizer steps for each layer.

        Returns:
            Whether a backward pass is under way.
        """
        try:
            Variable._execution_engine.queue_callback(partial(_complete, weakref.ref(self)))
        except RuntimeError:
            return False
        return True

    def _is_waiting(self) -> bool:
        """Whether another optimizer has yet to step: a parameter that used to be stepped still has its gradient."""
        return any(
            p.requires_grad and p.grad is not None and id(p) not in self._stepped and id(p) not in self._absent
            for p in self._schedule.trained()
        )

    def _count(self) -> None:
        self._absent = {id(p) for p in self._schedule.trained()} - self._stepped
        self._stepped = set()
        self._announced = False
        self._watch.counted()
        self._schedule.advance_by_one()


def _complete(counter: weakref.ref[UpdateCounter]) -> None:
    if (found := counter()) is not None:
        found.complete()
