"""What changes as training advances: ASLoRA's merges and Dual LoRA's warm-up.

A schedule advances once per optimizer step, by itself: torch tells about every optimizer's step, and a step belongs
to an adapter when the optimizer holds its parameters. Under gradient accumulation that is once per update; a step
that a gradient scaler skips does not count. Engines that flatten parameters hide them: there `ScheduleCallback` or
`loraplex.step(model)` advances the schedule, and a run that goes on without it is stopped with an error.

What belongs to the adapter (merge map, warm-up step) is in its state dict, so that weights and map can't part. What
belongs to training (ASLoRA's running averages) is in `optimizer.state[parameter]`, which every trainer saves; where
parameters are sharded or the optimizer is hidden, each rank keeps its part, and checkpoints hold a file of their own.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loraplex.files import write_tensors
from loraplex.parallel import cut, is_sharded, part, whole
from loraplex.sharing import FactorBank, SharedFactors

logger = logging.getLogger(__name__)

StateOf = Callable[[nn.Parameter], "dict[str, Any] | None"]
Stepped = Callable[[nn.Parameter], bool]

SCHEDULE_NAME = "schedule.safetensors"
_MISSED_STEPS = 3
"""Foreign optimizer steps, each after a backward pass through an adapter, that prove its own optimizer is hidden."""
_BACKWARDS_WITHOUT_STEP = 4096
"""Backward passes without any optimizer step in sight; more than any gradient accumulation."""

_scheduled: weakref.WeakSet[Scheduled] = weakref.WeakSet()


class Scheduled(SharedFactors):
    """Shared factors with a schedule. A method says which parameters it trains and what a step changes."""

    def __init__(self, *args: Any) -> None:
        self.total_steps: int | None = None
        self._backwards = self._missed = 0
        self._private_state: dict[str, dict[str, Any]] = {}
        self._follow_nothing()
        super().__init__(*args)
        _scheduled.add(self)

    def _follow_nothing(self) -> None:
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._watched: Callable[[], nn.Parameter | None] = lambda: None

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """Parameters by which the adapter's optimizer is recognised; the first is watched for backward passes."""

    def is_trained(self) -> bool:
        """Whether the adapter is being trained; a frozen one stands still, even if an optimizer holds it."""
        return any(p.requires_grad for p in self.trained())

    @abstractmethod
    def advance(self, state_of: StateOf, stepped: Stepped) -> None:
        """One optimizer step was taken.

        Args:
            state_of: the optimizer's state of a parameter, None if no optimizer is known to hold it.
            stepped: whether the optimizer that took the step holds a parameter; a run may have several.
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

    def resolve(self, value: int | float) -> int | None:
        """A number of steps as it is; a fraction of the run gives at least 1; None while its length is unknown."""
        if isinstance(value, int):
            return value
        return max(1, round(value * self.total_steps)) if self.total_steps else None

    def step(self, optimizer: Optimizer | None = None) -> None:
        """Advance by one optimizer step; without an optimizer the training state is kept in memory only."""
        if self.last_step() is None and not self.finished():
            raise RuntimeError(
                f"{self.describe()} is a fraction of the run, but the run's length is unknown. Remedy: pass "
                "callbacks=[loraplex.ScheduleCallback()] to the trainer, call loraplex.set_total_steps(model, steps) "
                "before training, or give steps as integers."
            )
        self._backwards = self._missed = 0
        with torch.no_grad():
            if optimizer is None:
                self.advance(self._own_state, lambda _: True)
            else:
                # The latest first: a new optimizer takes over from one that happens to live on.
                others = [known for known in self._optimizers if known() not in (None, optimizer)]
                self._optimizers = [weakref.ref(optimizer), *others]
                held = _held(optimizer)
                self.advance(self._optimizer_state, lambda parameter: id(parameter) in held)

    def _optimizer_state(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        known = (optimizer() for optimizer in self._optimizers)
        # Its state is asked first: to look through all groups for each of hundreds of parameters takes milliseconds.
        found = next(
            (
                o.state[parameter]
                for o in known
                if o is not None and (parameter in o.state or id(parameter) in _held(o))
            ),
            None,
        )
        if found is None or is_sharded(parameter):
            # Not in a sharded optimizer's state: distributed checkpoints drop the keys that torch does not know.
            return None if found is None else self._own_state(parameter)
        if found and self._private_state:
            # From a checkpoint of an engine that hides its optimizer, or shards it.
            found.update(self._private_state.pop(self._name_of(parameter), {}))
        return found

    def _own_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        # Not empty, as an optimizer's state is not once the parameter has been trained.
        return self._private_state.setdefault(self._name_of(parameter), {"explicit": True})

    def _name_of(self, parameter: nn.Parameter) -> str:
        return next(name for name, p in self.named_parameters() if p is parameter)

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
        self._private_state = {}
        for path, value in state.items():
            name, key = path.split("/")
            like = parameters[name]
            entry = cut(value.to(part(like).device), like) if value.ndim else value.item()
            self._private_state.setdefault(name, {})[key] = entry

    # Watching for an optimizer that can't be seen

    def train(self, mode: bool = True) -> Scheduled:
        """Switch modes; when training begins, watch for backward passes through the first trained parameter."""
        witness = self.trained()[0]
        # Here and not at creation: casts, loading and sharding put new parameters in place before training begins.
        if mode and witness.requires_grad and self._watched() is not witness:
            me = weakref.ref(self)
            witness.register_post_accumulate_grad_hook(lambda _: _count_backward(me()))
            self._watched = weakref.ref(witness)
        super().train(mode)
        return self

    def _backward_seen(self) -> None:
        self._backwards += 1
        if self._backwards > _BACKWARDS_WITHOUT_STEP:
            self._raise_hidden(f"{_BACKWARDS_WITHOUT_STEP} backward passes went by")

    def missed(self) -> None:
        """Some optimizer stepped that holds none of our parameters."""
        if self._backwards and not self.finished():
            self._backwards = 0
            self._missed += 1
            if self._missed >= _MISSED_STEPS:
                self._raise_hidden(f"{_MISSED_STEPS} optimizer steps went by after backward passes through the adapter")

    def _raise_hidden(self, evidence: str) -> None:
        self._backwards = self._missed = 0
        # Only now, since it looks at every object there is: an optimizer that has yet to step is no hidden one.
        waiting = any(issubclass(type(o), Optimizer) and _holds(o, self) for o in gc.get_objects())
        if not waiting and not self.finished():
            raise RuntimeError(
                f"The schedule ({self.describe()}) never advances: {evidence}, but no optimizer that holds the "
                "adapter's parameters was seen to step. Remedy: pass callbacks=[loraplex.ScheduleCallback()] to the "
                "trainer, or call loraplex.step(model) after every optimizer step."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled adapter follows optimizers of its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_optimizers", "_watched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_nothing()
        _scheduled.add(self)


def _count_backward(shared: Scheduled | None) -> None:
    if shared is not None:
        shared._backward_seen()


def _after_optimizer_step(optimizer: Optimizer, *_: Any) -> None:
    if not _scheduled:
        return
    found_inf = optimizer.__dict__.get("found_inf")
    if found_inf is not None and found_inf.item():
        # A fused optimizer skips the step itself when the gradient scaler has found an overflow.
        return
    if all(group["lr"] == 0 for group in optimizer.param_groups) and _is_initialising():
        return
    for shared in list(_scheduled):
        if _holds(optimizer, shared):
            shared.step(optimizer)
        else:
            shared.missed()


def _is_initialising() -> bool:
    """Whether torch takes a step without effect, to have an optimizer's state to load a distributed checkpoint into."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


register_optimizer_step_post_hook(_after_optimizer_step)


def schedules(model: nn.Module) -> Iterator[tuple[str, Scheduled]]:
    """The scheduled adapters of `model` as (adapter name, schedule)."""
    for bank in model.modules():
        if isinstance(bank, FactorBank):
            yield from ((name, shared) for name, shared in bank.named_shared() if isinstance(shared, Scheduled))


def step(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Advance all schedules of `model` by one optimizer step, where the optimizer's own step can't be seen.

    Args:
        model: a PeftModel, or a model with adapters.
        optimizer: a torch optimizer that holds the adapter's parameters, if there is one; it then keeps the state
            that a resume needs. A step of such an optimizer was counted already, and is not counted again.
    """
    for _, shared in schedules(model):
        if shared.is_trained() and (optimizer is None or not _holds(optimizer, shared)):
            shared.step()


def set_total_steps(model: nn.Module, total_steps: int) -> None:
    """Tell the schedules of `model` how many optimizer steps the run has, so that fractions of it have a meaning.

    Raises:
        ValueError: a schedule does not end within the run; ASLoRA would silently merge less than asked for.
    """
    for name, shared in schedules(model):
        shared.total_steps = total_steps
        last = shared.last_step()
        if not shared.finished() and last is not None and last > total_steps:
            raise ValueError(
                f"Adapter {name!r}: its schedule ({shared.describe()}) ends at step {last}, but the run has only "
                f"{total_steps} optimizer steps. Train longer, or give smaller steps; fractions such as 0.1 follow "
                "the run's length."
            )


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _holds(optimizer: Any, shared: Scheduled) -> bool:
    held = _held(optimizer)
    return any(p.requires_grad and id(p) in held for p in shared.trained())


def save_schedules(model: nn.Module, folder: Path) -> None:
    """Write `schedule.safetensors` into a checkpoint, if there is anything to write. All ranks must call it."""
    found = {f"{name}/{key}": t for name, shared in schedules(model) for key, t in shared.training_state().items()}
    if found and (not dist.is_initialized() or dist.get_rank() == 0):
        write_tensors(folder / SCHEDULE_NAME, found)


def load_schedules(model: nn.Module, folder: Path) -> None:
    """Read what `save_schedules` wrote into a checkpoint; nothing if it wrote nothing."""
    if not (folder / SCHEDULE_NAME).is_file():
        return
    found = load_file(folder / SCHEDULE_NAME)
    for name, shared in schedules(model):
        prefix = f"{name}/"
        shared.load_training_state({k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix)})


class ScheduleCallback(TrainerCallback):
    """For `transformers.Trainer` and TRL: gives schedules the run's length, checks that they end within it, advances
    them under engines that hide the optimizer's parameters, and keeps their state in checkpoints where engines would
    lose it. Elsewhere schedules need no callback.

    Args:
        saves: whether it writes that state; False where something else calls `save_schedules`.
    """

    def __init__(self, saves: bool = True) -> None:
        self.saves = saves

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_total_steps(kwargs["model"], state.max_steps)
        if state.global_step:
            load_schedules(kwargs["model"], _checkpoint(args, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped:
            return
        for _, shared in schedules(kwargs["model"]):
            if shared.is_trained() and not _holds(optimizer, shared):
                shared.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.saves:
            save_schedules(kwargs["model"], _checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
