"""What changes as training advances: ASLoRA's merges and Dual LoRA's warm-up.

A schedule advances once per update, by itself: torch tells of every optimizer's step (`optimizer_steps`), and an update
is complete when all optimizers that hold the adapter's parameters have stepped (`update_counter`). Under gradient
accumulation that is once per update; a step that a gradient scaler skips does not count. Engines that flatten
parameters hide them: there `ScheduleCallback` or `loraplex.step(model)` advances the schedule, and a run that goes on
without is stopped with an error (`hidden_optimizer`).

What belongs to the adapter (ASLoRA's merge map, Dual LoRA's warm-up step) is in its state dict, so that weights and map
can't part. What belongs to training (ASLoRA's running averages) is in the parameters' training state
(`training_state`), which trainers save with the optimizer's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from loraplex.runtime.optimizer_steps import subscribe
from loraplex.runtime.parallel import ddp_group, first_decides, is_sharded, ranks_of
from loraplex.runtime.update_counter import UpdateCounter
from loraplex.tuner.sharing import SharedFactors
from loraplex.tuner.training_state import TrainingState

StateOf = Callable[[nn.Parameter], dict[str, Any]]

_UNKNOWN = object()


class Scheduled(SharedFactors):
    """Shared factors with a schedule. A method says which parameters it trains and what an update changes."""

    state_keys: ClassVar[dict[str, bool]] = {}
    """What a method stores in the training state of each parameter: key → whether it counts steps."""
    config: Any
    unknown_length: ClassVar[dict[str, int]] = {}
    """Field of the config → steps, where neither the user nor the run's length says how many."""
    callback: Any = None
    """The callback that drives this schedule, where a trainer has several that could."""
    in_checkpoint = False
    """Whether a trainer saves a checkpoint in the middle of its run, after which the schedule goes on."""

    def __init__(self, config: Any, *args: Any) -> None:
        self.config = config
        self.total_steps: int | None = None
        self._left_open: list[str] | None = None
        self._configs: dict[str, Any] = {}
        self._name = ""
        self.training_state = TrainingState(self.state_keys)
        self._start_counting()
        super().__init__(config, *args)
        first = next(self.member_factors())
        # Casts, loading and sharding put new parameters in place, and a loop need not call train().
        first.register_forward_pre_hook(self._before_forward)
        subscribe(self)
        self._updates.watch()

    def _start_counting(self) -> None:
        self._updates = UpdateCounter(self)
        self.has_advanced = False
        self.group: Any = _UNKNOWN
        """The process group whose ranks train the adapter together; None: this rank alone."""

    @abstractmethod
    def trained(self) -> Iterator[nn.Parameter]:
        """Parameters by which the adapter's optimizer is recognised; the first is watched for backward passes."""

    @abstractmethod
    def advance(self, state_of: StateOf) -> None:
        """Change what one update changes.

        Args:
            state_of: where the training state of a parameter is kept.
        """

    @abstractmethod
    def last_step(self) -> int | None:
        """The optimizer step at which the schedule ends; None if that is a fraction of an unknown length."""

    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing is left to change."""

    @abstractmethod
    def describe(self) -> str:
        """The schedule's settings, for errors: "warmup_steps=100"."""

    @abstractmethod
    def default_steps(self, total_steps: int) -> dict[str, int]:
        """Field of `unknown_length` → its default in a run of `total_steps`."""

    def restart_averages(self) -> None:
        """Forget what was gathered in training, to begin another run. Nothing by default."""

    # Its settings

    def belongs_to(self, configs: dict[str, Any], name: str) -> None:
        """Note where the model keeps the config that is saved with the adapter `name`."""
        self._configs, self._name = configs, name

    def change_config(self, config: Any) -> None:
        """Go by another config from now on. The state that was reached stays, unless it is loaded too."""
        self.config, self._left_open = config, None

    def setting(self, name: str) -> int | float:
        """A field of the config; the steps of `unknown_length` if it is left open."""
        value = getattr(self.config, name)
        return self.unknown_length[name] if value is None else value

    def set_total_steps(self, total_steps: int) -> None:
        """Give fractions a meaning, and defaults to the fields that the user left open."""
        self.total_steps = total_steps
        if self._left_open is None:
            self._left_open = [name for name in self.unknown_length if getattr(self.config, name) is None]
        if self._left_open:
            # A copy, since the user's config may serve another run. It is saved, so that a resume makes the same of it.
            self.config = copy(self.config)
            if self._name:
                self._configs[self._name] = self.config
            for name, steps in self.default_steps(total_steps).items():
                if name in self._left_open:
                    setattr(self.config, name, steps)

    def is_left_open(self) -> bool:
        """Whether all the schedule's steps are defaults."""
        return self._left_open is not None and len(self._left_open) == len(self.unknown_length)

    def resolve(self, value: int | float) -> int | None:
        """A number of steps as it is; a fraction of the run gives at least 1; None while its length is unknown."""
        if isinstance(value, int):
            return value
        return max(1, round(value * self.total_steps)) if self.total_steps else None

    # Its optimizers and updates

    def is_trained(self) -> bool:
        """Whether the adapter is being trained; a frozen one stands still, even if an optimizer holds it."""
        return any(p.requires_grad for p in self.trained())

    def is_held(self, held: set[int]) -> bool:
        """Whether a parameter that is trained is among these ids."""
        return any(p.requires_grad and id(p) in held for p in self.trained())

    def known_optimizers(self) -> Iterator[Optimizer]:
        """The optimizers that were seen to step the adapter's parameters, if they still exist."""
        return self.training_state.optimizers()

    def on_step(self, optimizer: Optimizer, inner: list[Optimizer], idle: bool) -> None:
        """An optimizer that holds trained parameters has stepped; the update may consist of several such steps."""
        self._updates.observe(optimizer, inner, idle)

    def on_other_step(self) -> None:
        """An optimizer has stepped that holds none of the trained parameters."""
        self._updates.observe_other()

    def note_optimizer(self, optimizer: Optimizer, inner: list[Optimizer]) -> None:
        """Note in which optimizer's state the parameters' training state is saved."""
        trained = {id(p) for p in self.trained()}
        self.training_state.note_optimizer(optimizer, inner, trained, dict(self.named_parameters()))

    def step(self) -> None:
        """Advance by one update whose steps may be hidden; if they were observed, it was counted already."""
        self._updates.announce()

    def advance_by_one(self) -> None:
        """Advance by one update.

        Raises:
            RuntimeError: a setting is a fraction of the run, whose length is unknown.
        """
        if self.last_step() is None and not self.finished():
            raise RuntimeError(
                f"{self.describe()} is a fraction of the run, but the run's length is unknown. Remedy: pass "
                "callbacks=[loraplex.ScheduleCallback()] to the trainer, call loraplex.set_total_steps(model, steps) "
                "before training, or give steps as integers."
            )
        self.has_advanced = True
        names = {id(p): name for name, p in self.named_parameters()}
        with torch.no_grad():
            self.advance(lambda parameter: self.training_state.of(parameter, names[id(parameter)]))

    def _before_forward(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._updates.forward_begins()
            if self.group is _UNKNOWN and (group := ddp_group()) is not None:
                self.group = group

    def train(self, mode: bool = True) -> Scheduled:
        """Switch modes; when training begins, watch for backward passes through the first trained parameter."""
        if mode:
            self._updates.watch()
        super().train(mode)
        return self

    def decided_by_first(self, numbers: list[list[int]], like: Tensor) -> list[list[int]]:
        """The numbers of the first of the ranks that train the adapter together; all of them must call this.

        Args:
            numbers: this rank's numbers.
            like: a parameter of the adapter.
        """
        groups = ranks_of(like) if self.group is _UNKNOWN or is_sharded(like) else [self.group]
        groups = [group for group in groups if group is not None and dist.get_world_size(group) > 1]
        return first_decides(numbers, groups)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled adapter has optimizers and process groups of its own.
        gone = ("_updates", "group", "callback", "in_checkpoint")
        return {key: value for key, value in self.__dict__.items() if key not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_counting()
        subscribe(self)  # and watch from the next forward on: the layers' parameters may not be there yet
