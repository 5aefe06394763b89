"""What users call to drive the schedules of a model, and to save and load their training state."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from loraplex.io.files import write_tensors
from loraplex.runtime.optimizer_steps import holds
from loraplex.tuner.bank import FactorBank
from loraplex.tuner.schedule import Scheduled
from loraplex.tuner.training_state import read_training_state

logger = logging.getLogger(__name__)

SCHEDULE_NAME = "schedule.safetensors"


def schedules(model: nn.Module) -> Iterator[tuple[str, Scheduled]]:
    """The adapters of `model` that have a schedule, as (adapter name, schedule)."""
    for bank in model.modules():
        if isinstance(bank, FactorBank):
            yield from ((name, shared) for name, shared in bank.named_shared() if isinstance(shared, Scheduled))


def step(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Advance all schedules of `model` by one update, if the optimizer's own step can't be observed.

    An update whose step was observed is not counted again, whether this is called before the step or after it.

    Args:
        model: a PeftModel, or a model with adapters.
        optimizer: the optimizer that was stepped, if it is one of torch. If it holds the adapter's parameters, its
            steps are observed, and this does nothing.
    """
    for _, shared in schedules(model):
        if shared.is_trained() and (optimizer is None or not shared.is_held(holds(optimizer))):
            shared.step()


def set_total_steps(model: nn.Module, total_steps: int) -> None:
    """Tell the schedules of `model` how many optimizer steps the run has, so that fractions of it have a meaning.

    Steps that the config leaves open (None) become shares of the run.

    Raises:
        ValueError: a schedule that the user set does not end within the run. ASLoRA would silently merge less than
            the config asks for.
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

    ASLoRA's running averages, and the count of steps by which merges are due, begin anew; merges that were done stay.
    Dual LoRA's warm-up goes on where it is.
    """
    for _, shared in schedules(model):
        shared.restart_averages()


def set_process_group(model: nn.Module, group: Any) -> None:
    """Say which ranks train the adapters of `model` together, if neither DDP nor sharding says it.

    The first of these ranks decides which layers ASLoRA merges. Without this call, they are the ranks of DDP's group
    or of the parameters' mesh, else all ranks of the default group, which then wait for each other at each merge.

    Args:
        group: a process group; None if every rank trains a model of its own.
    """
    for _, shared in schedules(model):
        shared.group = group


def save_schedules(model: nn.Module, folder: Path) -> None:
    """Write `schedule.safetensors` into a checkpoint, unless it would be empty. All ranks must call it."""
    found: dict[str, Tensor] = {}
    for name, shared in schedules(model):
        state = shared.training_state.save(dict(shared.named_parameters()))
        found |= {f"{name}/{key}": tensor for key, tensor in state.items()}
    if found and (not dist.is_initialized() or dist.get_rank() == 0):
        write_tensors(folder / SCHEDULE_NAME, found)


def load_schedules(model: nn.Module, folder: Path) -> None:
    """Read the file that `save_schedules` wrote into a checkpoint, if it wrote one.

    Raises:
        ValueError: the file is broken, or belongs to another adapter. No schedule has changed then.
    """
    path = folder / SCHEDULE_NAME
    if not os.path.lexists(path):
        return
    found, states = read_training_state(path), []
    for name, shared in schedules(model):
        prefix = f"{name}/"
        states.append((shared, {k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix)}))
    for shared, state in states:
        shared.training_state.check(state, dict(shared.named_parameters()))
    for shared, state in states:
        shared.training_state.load(state, dict(shared.named_parameters()))
