"""What watches a training run: its progress bar, its metrics, and the signals that stop it."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraplex.recipes.progress import progress
from loraplex.recipes.training.metrics import MetricsLog

# TRL counts tokens from zero again after a resume; the Trainer's own count is saved with the checkpoint.
_TRAIN_KEYS = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "mean_token_accuracy": "token_accuracy",
    "num_input_tokens_seen": "tokens",
    "epoch": "epoch",
}


class MetricsCallback(TrainerCallback):
    """Writes a row of `metrics.jsonl` per logged step."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log
        self._started = 0.0
        self._seconds: list[float] = []

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the steps of this process, the first left out: it warms up."""
        return statistics.median(self._seconds[1:]) if len(self._seconds) > 1 else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._started)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            row = {ours: logs[theirs] for theirs, ours in _TRAIN_KEYS.items() if theirs in logs}
            self.log.add("train", state.global_step, row)


class ResumedLearningRate(TrainerCallback):
    """Lets a changed learning rate count in a resumed run; its checkpoint brings the old one back."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler, groups = kwargs["lr_scheduler"], kwargs["optimizer"].param_groups
        if not isinstance(scheduler, LambdaLR) or set(scheduler.base_lrs) == {args.learning_rate}:
            return
        for group in groups:
            group["lr"] *= args.learning_rate / group["initial_lr"]
            group["initial_lr"] = args.learning_rate
        rates = {"base_lrs": [args.learning_rate] * len(groups), "_last_lr": [group["lr"] for group in groups]}
        scheduler.load_state_dict({**scheduler.state_dict(), **rates})


class ProgressLine(TrainerCallback):
    """One progress bar with the current loss, instead of a printed dictionary per logged step."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            start = {"initial": state.global_step, "leave": True, "delay": 0.0}
            self.bar = progress("train", state.max_steps, "step", **start)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(
                refresh=sys.stderr.isatty(), loss=f"{logs['loss']:.4f}", lr=f"{logs.get('learning_rate', 0):.2e}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end training after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block; what handled them before does so again afterwards."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"\n{name}: finishing the current step, then saving a checkpoint (once more: stop at once)\n"
        os.write(2, text.encode())  # print() may be what the signal interrupted

    def _stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        stop = self.signal is not None
        if args.world_size > 1:
            # The ranks hear the signal at different moments, and must leave at the same step.
            flag = torch.tensor([float(stop)], device=args.device)
            torch.distributed.all_reduce(flag)
            stop = bool(flag.item())
        if stop:
            self.signal = self.signal or signal.SIGTERM
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A signal during an evaluation: the Trainer saves after it, so the step need not be followed by another.
        self._stop(args, control)
