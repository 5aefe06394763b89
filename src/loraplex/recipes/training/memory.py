"""When memory runs out: where in the run it happened, what was planned for it, and what to change."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loraplex.inspection.budget import Budget
from loraplex.recipes.config.arguments import plannable
from loraplex.recipes.config.run_config import TrainSection
from loraplex.recipes.console import size_text
from loraplex.recipes.models.budgeting import BudgetJob, plan_methods, step_parts
from loraplex.recipes.prepare import PreparedRun
from loraplex.recipes.training.callbacks import ProgressLine
from loraplex.recipes.training.checkpoints import RUN_NAME, checkpoints
from loraplex.runtime.out_of_memory import OutOfMemory, is_out_of_memory


@contextmanager
def located(trainer: Any) -> Iterator[None]:
    """Turn running out of memory into an `OutOfMemory` that knows the trainer's step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames hold the step's activations, and the message needs some memory too.
        traceback.clear_frames(error.__traceback__)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressLine):  # the message would stand in its line
                callback.on_train_end(trainer.args, trainer.state, trainer.control)
        step, evaluate = trainer.state.global_step, type(trainer).evaluate.__code__
        if any(frame.f_code is evaluate for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise OutOfMemory("evaluation", step) from error
        raise OutOfMemory("step", step + 1) from error


def explain(run: PreparedRun, error: BaseException) -> str:
    """What happened, what memory was planned, what would need less, and how to go on; several lines."""
    config, arguments = run.config, run.arguments
    train, dtype = config.train, str(config.dtype)
    phase, what = "start", "out of memory before the first step"
    if isinstance(error, OutOfMemory):
        phase, what = error.phase, str(error)
    lines = [what]
    if plannable(config.method):  # the budget knows no other methods
        tokens, autocast = train.per_device_train_batch_size * train.max_length, arguments.bf16 or arguments.fp16
        job = BudgetJob(
            config.model, [config.method], tokens=tokens, dtype=config.dtype, task=config.task, autocast=autocast
        )
        settings = [(f"adapter.{key}", value) for key, value in config.adapter.items()]
        report = plan_methods(job, [*settings, *config.source.items()])
        dtype = report.dtype
        lines += _planned(report.budgets[config.method], train, phase)
    found = checkpoints(run.output_dir)
    remedies = _remedies(train, phase, dtype, started=bool(found))
    lines += ["what needs less memory:", *(f"  {options}  ({effect})" for options, effect in remedies.items())]
    return "\n".join([*lines, *_going_on(run.output_dir / RUN_NAME, found, phase, next(iter(remedies)))])


def _planned(budget: Budget, train: TrainSection, phase: str) -> list[str]:
    parts, planned = step_parts(budget), "planned"
    if phase == "start":
        parts = {"weights": parts["weights"]}
    elif phase == "evaluation":
        parts = {name: parts[name] for name in ("weights", "adapter", "AdamW")}
    else:
        batch = f"{train.per_device_train_batch_size} × {train.max_length}"
        planned = f"planned for {batch} tokens, without gradient checkpointing"
    sizes = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    lines = [f"{planned}: {sizes}; together {size_text(sum(parts.values()))}"]
    if phase == "step":
        lines.append("on top: what the frozen model keeps for backward, and buffers of single operations")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        lines.append(f"{torch.cuda.get_device_name()}: {size_text(total)}, of which {size_text(free)} are free now")
    return lines


def _remedies(train: TrainSection, phase: str, dtype: str, started: bool) -> dict[str, str]:
    """Options that need less memory → what else they change; none that is set already."""
    remedies: dict[str, str] = {}
    batch, evaluated, length = train.per_device_train_batch_size, train.per_device_eval_batch_size, train.max_length
    if phase == "evaluation" and evaluated > 1:
        remedies[f"--train.per_device_eval_batch_size {evaluated // 2}"] = "the same results"
    if phase == "step" and batch > 1:
        smaller = max(size for size in range(1, batch) if batch % size == 0)
        steps = train.gradient_accumulation_steps * (batch // smaller)
        options = f"--train.per_device_train_batch_size {smaller} --train.gradient_accumulation_steps {steps}"
        remedies[options] = "as many examples per step"
    if phase == "step" and not train.gradient_checkpointing:
        remedies["--train.gradient_checkpointing true"] = "more time"
    if phase != "start" and length >= 16:
        remedies[f"--train.max_length {length // 2}"] = "longer prompts lose their middle"
    if dtype == "float32":
        elsewhere = "; in a new run with another --output_dir" if started else ""
        remedies["--dtype bfloat16"] = f"weights of half the size{elsewhere}"
    return remedies or {"--model M": "a smaller one"}


def _going_on(run_file: Path, found: Sequence[Path], phase: str, options: str) -> list[str]:
    command = f"loraplex train {run_file}"
    if found:
        # Only training settings may differ from those of the checkpoint.
        further = f"; continue with: {command} --resume {options}" if options.startswith("--train.") else ""
        return [f"{found[0].name} stays{further}"]
    return [] if phase == "start" else [f"there is no checkpoint yet; start again with: {command} {options}"]
