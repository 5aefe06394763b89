"""One training run, from its configuration to the adapter and what is written beside it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from peft import get_peft_model
from transformers import DataCollatorWithPadding, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from loraplex import ScheduleCallback
from loraplex.io.field_types import expected, fits, shown
from loraplex.io.files import replaced_file, write_text
from loraplex.io.reading import read_json
from loraplex.recipes.config.arguments import checkpoint_without_reentry
from loraplex.recipes.config.run_config import ConfigError, to_yaml
from loraplex.recipes.data.encode import check_vocabulary
from loraplex.recipes.data.tasks import build_mixture
from loraplex.recipes.evaluation import Evaluator
from loraplex.recipes.prepare import PreparedRun
from loraplex.recipes.progress import is_main, note
from loraplex.recipes.training.callbacks import MetricsCallback, ProgressLine, ResumedLearningRate, StopOnSignal
from loraplex.recipes.training.card import model_card
from loraplex.recipes.training.checkpoints import (
    LABELS_NAME,
    RUN_NAME,
    UNMOVED,
    check_fresh,
    check_same_run,
    checkpoints,
    last_complete,
    remove_leftovers,
    step_of,
)
from loraplex.recipes.training.lock import locked
from loraplex.recipes.training.memory import located
from loraplex.recipes.training.metrics import METRICS_NAME, PLOT_NAME, MetricsLog, plot_losses
from loraplex.recipes.training.nonfinite import NonFiniteGuard
from loraplex.recipes.training.result import VERSIONS_NAME, Result, peak_memory, versions
from loraplex.recipes.training.trainers import AnswerTrainer, ClassifierTrainer

# What a saved adapter consists of; the libraries also write a pickle of their arguments beside it.
_ADAPTER_FILES = (
    "adapter_",
    "README",
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "added_tokens",
    "chat_template",
)


_STATE = {
    **dict.fromkeys(("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen"), int),
    **dict.fromkeys(("epoch", "total_flos"), float),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), int | float | None),
    **dict.fromkeys(("train_batch_size", "best_global_step"), int | None),
    "best_metric": float | None,
    "best_model_checkpoint": str | None,
    "log_history": list[dict],
}
"""Of the trainer's state, what it computes with, without a look at the types."""


def train(run: PreparedRun) -> Result:
    """Train an adapter, or continue an interrupted run from its last whole checkpoint.

    Raises:
        ConfigError: the configuration or the state of `output_dir` doesn't allow it.
    """
    output_dir = run.output_dir
    run.check()
    if run.resume and not output_dir.is_dir():
        raise ConfigError(f"output_dir {output_dir} does not exist, so there is nothing to resume: leave --resume out.")
    output_dir.mkdir(parents=True, exist_ok=True)
    with locked(output_dir) if is_main() else nullcontext():
        if is_main():
            remove_leftovers(output_dir)
        if run.resume:
            checkpoint, faults = last_complete(output_dir)
            for warning in [*faults, *check_same_run(run.config, output_dir)]:
                note(f"warning: {warning}")
            note(f"continuing from {checkpoint}")
        else:
            check_fresh(output_dir)
            checkpoint = None
        return _train(run, checkpoint)


def _train(run: PreparedRun, checkpoint: Path | None) -> Result:
    config, output_dir = run.config, run.output_dir
    evaluators = run.evaluators()
    trainer = _build_trainer(run)
    log = MetricsLog(output_dir / METRICS_NAME)
    stop = _attach(trainer, config.train.on_nonfinite, evaluators, log, checkpoint)
    if trainer.is_world_process_zero():
        log.start(None if checkpoint is None else step_of(checkpoint))
        write_text(output_dir / RUN_NAME, to_yaml(config))
        write_text(output_dir / VERSIONS_NAME, json.dumps(versions(), indent=2) + "\n")
        if run.class_names is not None:
            write_text(output_dir / LABELS_NAME, json.dumps(run.class_names) + "\n")
    with located(trainer):
        result = _run(trainer, stop, log, checkpoint, output_dir)
    if trainer.is_world_process_zero():
        plot_losses(log.rows, output_dir / PLOT_NAME, f"{config.method} on {Path(config.model).name}")
        if result.signal is None:
            write_text(output_dir / "README.md", model_card(config, result))
    return result


def _build_trainer(run: PreparedRun) -> Any:
    model = run.load_base()
    data = run.encode(build_mixture(run.tasks, run.config.train.seed))
    check_vocabulary(data["input_ids"], model)
    if len(data) == 0:
        raise ConfigError("data: no training example is left: every answer is empty.")
    # evaluate() is ours, but the Trainer refuses to plan evaluations without a data set of its own.
    evaluates = run.arguments.eval_strategy != "no" or run.arguments.eval_on_start
    placeholder = data.select(range(1)) if evaluates else None
    common: dict[str, Any] = {"args": run.arguments, "train_dataset": data, "eval_dataset": placeholder}
    common["processing_class"] = run.tokenizer
    if run.config.task == "sft":
        return AnswerTrainer(model=model, peft_config=run.peft_config, **common)
    set_seed(run.config.train.seed)
    model = get_peft_model(model, run.peft_config)
    return ClassifierTrainer(model=model, data_collator=DataCollatorWithPadding(run.tokenizer), **common)


def _attach(
    trainer: Any,
    on_nonfinite: Literal["stop", "skip"],
    evaluators: dict[str, Evaluator],
    log: MetricsLog,
    checkpoint: Path | None,
) -> StopOnSignal:
    stop = StopOnSignal()
    trainer.guard = NonFiniteGuard(trainer, on_nonfinite)
    trainer.evaluators, trainer.metrics_log = evaluators, log
    if trainer.is_deepspeed_enabled:
        checkpoint_without_reentry(trainer.args)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.metrics = MetricsCallback(log)
    schedule = ScheduleCallback(saves=False, resume_from=checkpoint)
    ours = (schedule, ResumedLearningRate(), trainer.metrics, ProgressLine())
    for callback in (*ours, trainer.guard, stop):
        trainer.add_callback(callback)
    return stop


def _run(trainer: Any, stop: StopOnSignal, log: MetricsLog, checkpoint: Path | None, output_dir: Path) -> Result:
    started = time.monotonic()
    finished = None if checkpoint is None else _finished_state(checkpoint)
    if finished is not None:
        trainer.state = finished
    else:
        with stop.installed():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    result = Result(output_dir, trainer.state.global_step)
    if finished is not None:
        _move_files(output_dir / f"checkpoint-{_saved_step(trainer, result.step)}", output_dir, copy=True)
    elif stop.signal is not None and result.step < trainer.state.max_steps:
        result.signal = stop.signal
        result.checkpoint = next(iter(checkpoints(output_dir)), None)
    else:
        if trainer.evaluators and trainer.evaluated_at != result.step:
            trainer.evaluate()
        _save(trainer, output_dir)
    result.seconds, result.step_seconds = time.monotonic() - started, trainer.metrics.seconds_per_step
    result.trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    result.peak_memory = peak_memory()
    result.before, result.after = log.evaluations(0), log.evaluations(_saved_step(trainer, result.step))
    if trainer.is_world_process_zero() and result.signal is None:
        _write_end(log, result)
    return result


def _finished_state(checkpoint: Path) -> TrainerState | None:
    # The Trainer would take a step too many if it were asked to continue from its last one.
    file = checkpoint / TRAINER_STATE_NAME
    settings = read_json(file, dict)
    try:
        for name, kind in _STATE.items():
            if not fits(settings.get(name), kind):
                raise TypeError(f"{name} is {shown(settings.get(name))}, not {expected(kind)}")
        state = TrainerState.load_from_json(str(file))
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} is no state of a training run ({error}): delete the checkpoint.") from None
    return state if state.global_step >= state.max_steps else None


def _saved_step(trainer: Any, step: int) -> int:
    best = trainer.state.best_global_step
    return best if trainer.args.load_best_model_at_end and best is not None else step


def _save(trainer: Any, output_dir: Path) -> None:
    """Save the adapter under a temporary name, then move its files to their place."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=UNMOVED) as folder:
        trainer.save_model(folder)
        if trainer.is_world_process_zero():
            _move_files(Path(folder), output_dir)


def _move_files(folder: Path, output_dir: Path, copy: bool = False) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.startswith(_ADAPTER_FILES):
            if copy:
                with replaced_file(output_dir / file.name) as temporary:
                    shutil.copyfile(file, temporary)
            else:
                os.replace(file, output_dir / file.name)


def _write_end(log: MetricsLog, result: Result) -> None:
    log.add(
        "end",
        result.step,
        {
            "seconds": round(result.seconds, 1),
            "step_seconds": None if result.step_seconds is None else round(result.step_seconds, 4),
            "trainable_parameters": result.trainable,
            "peak_memory_bytes": result.peak_memory,
        },
    )
