"""What changes as training advances: ASLoRA's merges and Dual LoRA's warm-up.

A schedule advances once per update, by itself: torch tells of every optimizer's step (`optimizer_steps`), and an update
is complete when all optimizers that hold the adapter's parameters have stepped. Under gradient accumulation that is
once per update; a step that a gradient scaler skips does not count. Engines that flatten parameters hide them: there
`ScheduleCallback` or `loraplex.step(model)` advances the schedule, and a run that goes on without is stopped with an
error (`hidden_optimizer`).

What belongs to the adapter (merge map, warm-up step) is in its state dict, so that weights and map can't part. What
belongs to training (ASLoRA's running averages) is in `optimizer.state[parameter]`, which every trainer saves; where
parameters are sharded, the optimizer is hidden or its state is split over ranks, each rank keeps what it needs, and
checkpoints hold a file of their own.
"""

from __future__ import annotations

import logging
import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from loraplex.io.files import write_tensors
from loraplex.runtime.hidden_optimizer import Watch
from loraplex.runtime.optimizer_steps import follow, holds
from loraplex.runtime.parallel import cut, ddp_group, first_decides, is_sharded, part, ranks_of, whole
from loraplex.tuner.bank import FactorBank
from loraplex.tuner.sharing import SharedFactors
from loraplex.tuner.training_state import check_training_state, read_training_state

logger = logging.getLogger(__name__)

StateOf = Callable[[nn.Parameter], dict[str, Any]]

SCHEDULE_NAME = "schedule.safetensors"

_UNKNOWN = object()


class Scheduled(SharedFactors):
    """Shared factors with a schedule. A method says which parameters it trains and what an update changes."""

    kept: ClassVar[dict[str, bool]] = {}
    """What a method keeps for each parameter while it trains: name → whether it counts steps."""
    config: Any
    unknown_length: ClassVar[dict[str, int]]
    """Field of the config → steps, where neither the user nor the run's length says how many."""
    told_by: Any = None
    """The callback that tells this schedule of the run, if several of one trainer could."""
    in_checkpoint = False
    """Whether a trainer saves a checkpoint in the middle of its run, after which the schedule goes on."""

    def __init__(self, *args: Any) -> None:
        self.total_steps: int | None = None
        self._left_open: list[str] | None = None
        self._configs: dict[str, Any] = {}
        self._name = ""
        self._private_state: dict[str, dict[str, Any]] = {}
        self._follow_nothing()
        super().__init__(*args)
        first = next(self.member_factors())
        # Casts, loading and sharding put new parameters in place, and a loop need not call train().
        first.register_forward_pre_hook(self._before_forward)
        follow(self)
        self._arm()

    def _follow_nothing(self) -> None:
        self._watch = Watch(self)
        self._homes: dict[int, weakref.ref[Optimizer] | None] = {}
        self._stepped: set[int] = set()
        self._absent: set[int] = set()
        self._last_told = self._last_seen = self._in_backward = False
        self._seen_since_told: set[int] = set()
        self.has_advanced = False
        self.group: Any = _UNKNOWN
        """The process group whose ranks train the adapter together; None: this rank alone."""

    @abstractmethod
    def trained(self) -> Iterator[nn.Parameter]:
        """Parameters by which the adapter's optimizer is recognised; the first is watched for backward passes."""

    def is_trained(self) -> bool:
        """Whether the adapter is being trained; a frozen one stands still, even if an optimizer holds it."""
        return any(p.requires_grad for p in self.trained())

    @abstractmethod
    def advance(self, state_of: StateOf) -> None:
        """One update was made.

        Args:
            state_of: where the training state of a parameter is kept: the optimizer's, or the schedule's own.
        """

    @abstractmethod
    def last_step(self) -> int | None:
        """The optimizer step at which the schedule has done its last; None if a fraction of an unknown length."""

    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing is left to change."""

    @abstractmethod
    def describe(self) -> str:
        """The schedule's settings, for errors: "warmup_steps=100"."""

    @abstractmethod
    def default_steps(self, total_steps: int) -> dict[str, int]:
        """What a run of so many steps makes of the fields of `unknown_length` that the user left open."""

    # Its settings

    def belongs_to(self, configs: dict[str, Any], name: str) -> None:
        """Note where the model keeps the config that is saved with the adapter `name`."""
        self._configs, self._name = configs, name

    def setting(self, name: str) -> int | float:
        """A field of the config, or what it means while it is left open."""
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

    # Which steps make an update

    def is_held(self, held: set[int]) -> bool:
        """Whether a parameter that is trained is among these ids."""
        return any(p.requires_grad and id(p) in held for p in self.trained())

    def known_optimizers(self) -> Iterator[Optimizer]:
        """The optimizers that were seen to step the adapter's parameters, as far as they live."""
        refs = {ref for ref in self._homes.values() if ref is not None}
        yield from (optimizer for ref in refs if (optimizer := ref()) is not None)

    def saw_step(self, optimizer: Optimizer, inner: list[Optimizer], idle: bool) -> None:
        """An optimizer that holds trained parameters has stepped; the update may consist of several such steps."""
        in_backward = self._complete_after_backward()
        if idle and not (self._watch.fresh or self._stepped or in_backward):
            return
        self._note_homes(optimizer, inner)
        if self._last_told and not self._watch.fresh and id(optimizer) not in self._seen_since_told:
            # loraplex.step(model) was called before the step that it told of.
            self._seen_since_told.add(id(optimizer))
            self._last_seen = True
            return
        held = holds(optimizer)
        stepped = {id(p) for p in self.trained() if p.requires_grad and id(p) in held}
        if self._stepped and (stepped & self._stepped or (self._watch.fresh and not in_backward)):
            self._complete()  # the update before, in which others did not step
        self._stepped |= stepped
        self._last_seen, self._in_backward = True, in_backward
        self._watch.counted()
        if not in_backward and not self._is_waiting():
            self._complete()

    def _complete_after_backward(self) -> bool:
        """Whether a backward pass is going on, in whose course one optimizer steps for each layer; then at its end."""
        try:
            Variable._execution_engine.queue_callback(partial(_complete, weakref.ref(self)))
        except RuntimeError:
            return False
        return True

    def _is_waiting(self) -> bool:
        """Whether another optimizer has yet to step: a parameter that used to be stepped still has its gradient."""
        return any(
            p.requires_grad and p.grad is not None and id(p) not in self._stepped and id(p) not in self._absent
            for p in self.trained()
        )

    def complete_update(self) -> None:
        """All optimizers have stepped that belong to the update."""
        if self._stepped:
            self._complete()

    def _complete(self) -> None:
        self._absent = {id(p) for p in self.trained()} - self._stepped
        self._stepped = set()
        self._last_told = False
        self._watch.counted()
        self._advance()

    def step(self) -> None:
        """Advance by one update, as told; if its step was seen, it was counted already."""
        if self._last_seen and not self._watch.fresh:
            self.complete_update()
            self._last_seen = False
            return
        self.complete_update()
        self._last_told, self._last_seen = True, False
        self._seen_since_told = set()
        self._watch.counted()
        self._advance()

    def _advance(self) -> None:
        if self.last_step() is None and not self.finished():
            raise RuntimeError(
                f"{self.describe()} is a fraction of the run, but the run's length is unknown. Remedy: pass "
                "callbacks=[loraplex.ScheduleCallback()] to the trainer, call loraplex.set_total_steps(model, steps) "
                "before training, or give steps as integers."
            )
        self.has_advanced = True
        names = {id(p): name for name, p in self.named_parameters()}
        with torch.no_grad():
            self.advance(lambda parameter: self._state_of(parameter, names[id(parameter)]))

    # Where its state is kept

    def _note_homes(self, optimizer: Optimizer, inner: list[Optimizer]) -> None:
        """Find the optimizer in whose state each parameter's is saved: of nested ones the inner."""
        outer = holds(optimizer)
        mine = {id(p) for p in self.trained() if id(p) in outer}
        home: dict[int, weakref.ref[Optimizer] | None] = {}
        for candidate in inner:
            home.update({i: weakref.ref(candidate) for i in holds(candidate) & mine if i not in home})
        if not home:
            home = dict.fromkeys(mine, weakref.ref(optimizer))
        elif len(home) < len(mine):
            # The inner one holds a part, as ZeroRedundancyOptimizer's on each rank. All ranks need all averages.
            home = dict.fromkeys(mine, None)
        for name, parameter in self.named_parameters():
            if id(parameter) in home:
                self._move(name, parameter, self._homes.get(id(parameter)), home[id(parameter)])
        self._homes.update(home)

    def _move(
        self,
        name: str,
        parameter: nn.Parameter,
        old: weakref.ref[Optimizer] | None,
        new: weakref.ref[Optimizer] | None,
    ) -> None:
        """Take the method's own state along to the optimizer that has taken over, unless that has loaded its own."""
        before = None if old is None else old()
        after = None if new is None else new()
        if before is None or before is after or parameter not in before.state:
            return
        if after is not None and any(key in after.state.get(parameter, {}) for key in self.kept):
            return
        # Left behind, it would go on from there when optimizers take turns.
        left = before.state[parameter]
        self._private_state[name] = {key: left.pop(key) for key in self.kept if key in left}

    def _state_of(self, parameter: nn.Parameter, name: str) -> dict[str, Any]:
        ref = self._homes.get(id(parameter))
        home = None if ref is None else ref()
        # Not in a sharded optimizer's state: distributed checkpoints drop the keys that torch does not know.
        if home is not None and not is_sharded(parameter):
            state = home.state[parameter]
            # Optimizers initialise a parameter's state at its first gradient, and only if it is empty.
            if state or parameter.grad is not None:
                # From a checkpoint of an engine that hides its optimizer, or shards it.
                state.update(self._private_state.pop(name, {}))
                return state
        return self._private_state.setdefault(name, {})

    def kept_state(self) -> Iterator[dict[str, Any]]:
        """The training state of each parameter that has any, as far as it is known where."""
        yield from self._private_state.values()
        for optimizer in self.known_optimizers():
            yield from (optimizer.state[p] for p in self.parameters() if p in optimizer.state)

    def training_state(self) -> dict[str, Tensor]:
        """What a resume needs and neither adapter nor optimizer holds, as whole tensors. All ranks must call it."""
        parameters, state = dict(self.named_parameters()), {}
        for name, entries in self._private_state.items():
            for key, entry in entries.items():
                value = entry["step"] if isinstance(entry, dict) else entry  # kept from being cast, as in an optimizer
                tensor = isinstance(value, Tensor)
                state[f"{name}/{key}"] = whole(value, parameters[name]).cpu() if tensor else torch.tensor(value)
        return state

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `training_state`, on any number of ranks and under any engine."""
        parameters = dict(self.named_parameters())
        found = check_training_state(state, parameters, self.kept)
        self._private_state = {}
        for name, entries in found.items():
            like = parameters[name]
            self._private_state[name] = {
                key: cut(value.to(part(like).device), like) if value.ndim else value.item()
                for key, value in entries.items()
            }

    def restart_averages(self) -> None:
        """Forget what was gathered in training, to begin another run. Nothing by default."""

    # Ranks

    def decided_by_first(self, numbers: list[list[int]], like: Tensor) -> list[list[int]]:
        """What the first of the ranks says that train the adapter together; all of them must call this.

        Args:
            numbers: what this rank says.
            like: a parameter of the adapter.
        """
        groups = ranks_of(like) if self.group is _UNKNOWN or is_sharded(like) else [self.group]
        groups = [group for group in groups if group is not None and dist.get_world_size(group) > 1]
        return first_decides(numbers, groups)

    # Watching for an optimizer that can't be seen

    def _before_forward(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            if not self._in_backward:
                self.complete_update()  # of an update, the optimizers step before the next forward
            self._arm()
            if self.group is _UNKNOWN and (group := ddp_group()) is not None:
                self.group = group

    def train(self, mode: bool = True) -> Scheduled:
        """Switch modes; when training begins, watch for backward passes through the first trained parameter."""
        if mode:
            self._arm()
        super().train(mode)
        return self

    def _arm(self) -> None:
        witness = next((p for p in self.trained() if p.requires_grad), None)
        if witness is not None:
            self._watch.follow(witness)

    def missed(self) -> None:
        """Some optimizer stepped that holds none of our parameters."""
        self._arm()  # of a compiled forward no hook is called
        self._watch.missed()

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled adapter follows optimizers of its own.
        gone = ("_watch", "_homes", "_stepped", "_absent", "_seen_since_told", "group", "told_by", "in_checkpoint")
        return {key: value for key, value in self.__dict__.items() if key not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_nothing()
        follow(self)  # and watch from the next forward on: the layers' parameters may not be there yet


def _complete(shared: weakref.ref[Scheduled]) -> None:
    if (found := shared()) is not None:
        found.complete_update()


def schedules(model: nn.Module) -> Iterator[tuple[str, Scheduled]]:
    """The scheduled adapters of `model` as (adapter name, schedule)."""
    for bank in model.modules():
        if isinstance(bank, FactorBank):
            yield from ((name, shared) for name, shared in bank.named_shared() if isinstance(shared, Scheduled))


def step(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Advance all schedules of `model` by one update, where the optimizer's own step can't be seen.

    An update whose step was seen is not counted again, whether this is called before it or after it.

    Args:
        model: a PeftModel, or a model with adapters.
        optimizer: the optimizer that was stepped, if it is one of torch; where it holds the adapter's parameters its
            steps are seen, and nothing is to be done.
    """
    for _, shared in schedules(model):
        if shared.is_trained() and (optimizer is None or not shared.is_held(holds(optimizer))):
            shared.step()


def set_total_steps(model: nn.Module, total_steps: int) -> None:
    """Tell the schedules of `model` how many optimizer steps the run has, so that fractions of it have a meaning.

    Steps that the config leaves open (None) become shares of the run.

    Raises:
        ValueError: a schedule that the user set does not end within the run; ASLoRA would silently merge less than
            asked for.
    """
    for name, shared in schedules(model):
        shared.set_total_steps(total_steps)
        last = shared.last_step()
        if not shared.is_trained() or shared.finished() or last is None or last <= total_steps:
            continue
        problem = (
            f"Adapter {name!r}: its schedule ({shared.describe()}) ends at step {last}, but the run has only "
            f"{total_steps} optimizer steps."
        )
        if not shared.is_left_open():
            raise ValueError(
                f"{problem} Train longer, or give smaller steps; fractions such as 0.1 follow the run's length, and so "
                "do the defaults."
            )
        logger.warning("%s What comes after is left out; a longer run does all of it.", problem)


def restart_averages(model: nn.Module) -> None:
    """Begin another run from an adapter that was saved in the middle of its schedule.

    ASLoRA's running averages and the steps that its merges are due at begin anew; merges that were done stay. Dual
    LoRA's warm-up goes on where it is.
    """
    for _, shared in schedules(model):
        shared.restart_averages()


def set_process_group(model: nn.Module, group: Any) -> None:
    """Say which ranks train the adapters of `model` together, where neither DDP nor sharding tells.

    The first of them decides which layers ASLoRA merges. Untold, these are the ranks of DDP's group or of the
    parameters' mesh, else all ranks of the default group, which then wait for each other at each merge.

    Args:
        group: a process group; None if every rank trains a model of its own.
    """
    for _, shared in schedules(model):
        shared.group = group


def save_schedules(model: nn.Module, folder: Path) -> None:
    """Write `schedule.safetensors` into a checkpoint, if there is anything to write. All ranks must call it."""
    found = {f"{name}/{key}": t for name, shared in schedules(model) for key, t in shared.training_state().items()}
    if found and (not dist.is_initialized() or dist.get_rank() == 0):
        write_tensors(folder / SCHEDULE_NAME, found)


def load_schedules(model: nn.Module, folder: Path) -> None:
    """Read what `save_schedules` wrote into a checkpoint; nothing if it wrote nothing.

    Raises:
        ValueError: the file is broken, or of another adapter; then no schedule has changed.
    """
    path = folder / SCHEDULE_NAME
    if not os.path.lexists(path):
        return
    found, states = read_training_state(path), []
    for name, shared in schedules(model):
        prefix = f"{name}/"
        states.append((shared, {k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix)}))
    for shared, state in states:
        check_training_state(state, dict(shared.named_parameters()), shared.kept)
    for shared, state in states:
        shared.load_training_state(state)
