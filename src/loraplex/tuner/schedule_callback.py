"""Schedules under `transformers.Trainer` and TRL, whose trainers add the callback by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loraplex.runtime.optimizer_steps import holds
from loraplex.tuner.schedules import load_schedules, save_schedules, schedules, set_total_steps


class ScheduleCallback(TrainerCallback):
    """For `transformers.Trainer` and TRL: gives schedules the run's length, checks that they end within it, advances
    them under engines that hide the optimizer's parameters, and saves their training state in checkpoints where engines
    would lose it. In a loop of one's own, schedules need no callback.

    Args:
        saves: whether the callback writes the training state; False if something else calls `save_schedules`.
        resume_from: the checkpoint from which a run under FSDP2 or ZeRO resumes, if it is not in `output_dir`: trainers
            do not pass it to callbacks.
    """

    def __init__(self, saves: bool = True, resume_from: str | Path | None = None) -> None:
        self.saves = saves
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for _, shared in schedules(kwargs["model"]):
            shared.callback = self  # the last callback, which is the user's if there is one
        set_total_steps(kwargs["model"], state.max_steps)
        if state.global_step:
            load_schedules(kwargs["model"], self._resumed_from(args, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped:
            return
        for _, shared in schedules(kwargs["model"]):
            if shared.callback in (None, self) and shared.is_trained() and not shared.is_held(holds(optimizer)):
                shared.step()
        self._note_checkpoint(control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note_checkpoint(control, kwargs["model"])

    def _note_checkpoint(self, control: TrainerControl, model: nn.Module) -> None:
        """Note that the next save is a checkpoint from which the run goes on, not an adapter that is unfinished."""
        for _, shared in schedules(model):
            shared.in_checkpoint = control.should_save and not control.should_training_stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for _, shared in schedules(kwargs["model"]):
            shared.in_checkpoint = False
        ours = all(shared.callback in (None, self) for _, shared in schedules(kwargs["model"]))
        if self.saves and ours:
            save_schedules(kwargs["model"], _checkpoint(args, state))

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.resume_from is not None:
            return Path(self.resume_from)
        given = Path(args.resume_from_checkpoint or "")
        return given if given.name == _checkpoint(args, state).name else _checkpoint(args, state)


class _ByDefault(ScheduleCallback):
    """The callback of trainers to which the user gave none. It does nothing beside a `ScheduleCallback` of theirs."""


def join_trainers() -> None:
    """Have every `transformers.Trainer` that is created from now on add the callback by itself.

    It is called for the first adapter that has a schedule.
    """
    from transformers import trainer  # half a second, which other adapters need not pay

    if _ByDefault not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(_ByDefault)  # type: ignore[arg-type]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
