"""Saved adapters back on their base models: to evaluate them, and to merge them into a plain model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed

from loraplex.config import check_adapter_files
from loraplex.evaluate import Evaluator, Metrics
from loraplex.training.arguments import METHOD_OF_TYPE
from loraplex.training.checkpoints import LABELS_NAME, RUN_NAME
from loraplex.training.config import ConfigError, RunConfig, build_run, parse_yaml, read_yaml, set_key
from loraplex.training.data import Task, load_task
from loraplex.training.encode import encode_texts, encode_training
from loraplex.training.models import load_model, load_tokenizer
from loraplex.training.run import load_data, make_evaluators, note

_CALIBRATION_EXAMPLES = 64


def run_of(
    adapter: Path, run_file: Path | None, data: list[str], overrides: list[tuple[str, Any]], needs_data: bool = True
) -> RunConfig:
    """The run behind an adapter: `run_file`, or the `run.yaml` beside the adapter, or what its config says.

    Raises:
        ConfigError: no adapter there, no way to tell what data to use, or a wrong key.
    """
    if not adapter.is_dir():
        raise ConfigError(f"adapter {adapter} is not a folder: give the folder that holds adapter_config.json.")
    check_adapter_files(str(adapter))
    beside = _beside(adapter, RUN_NAME)
    path = run_file or beside
    known = run_file is not None or path.is_file()
    tree = read_yaml(path) if known else _tree_from_adapter(adapter)
    if data:
        tree["data"] = [_data_entry(text) for text in data]
    for key, value in overrides:
        set_key(tree, key, value)
    if not tree.get("data"):
        if needs_data:
            raise ConfigError(f"{beside} does not exist, so it is not known what data to use: give --data or --run.")
        tree["data"] = [{"path": "-"}]
    return build_run(tree, str(path) if known else "adapter_config.json", {key for key, _ in overrides})


def _beside(adapter: Path, name: str) -> Path:
    """A file that a run wrote beside its adapter; for a checkpoint it lies one folder up."""
    folder = adapter.resolve()
    return (folder.parent if folder.name.startswith("checkpoint-") else folder) / name


def _tree_from_adapter(adapter: Path) -> dict[str, Any]:
    config = _adapter_json(adapter)
    method = METHOD_OF_TYPE.get(config["peft_type"])
    if method is None:
        raise ConfigError(f"{adapter} is a {config['peft_type']} adapter: use {', '.join(METHOD_OF_TYPE.values())}.")
    task = "classification" if config.get("task_type") == "SEQ_CLS" else "sft"
    return {"model": config["base_model_name_or_path"], "method": method, "task": task, "output_dir": str(adapter)}


def _adapter_json(adapter: Path) -> dict[str, Any]:
    return dict(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))


def _data_entry(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"path": text}
    entry = parse_yaml(text, "the value of --data")
    if not isinstance(entry, dict):
        raise ConfigError(f"--data {text!r} is no mapping: write a path, or '{{path: …, prompt: …}}'.")
    return entry


def load_adapted(adapter: Path, run: RunConfig, label_names: list[str] | None) -> PeftModel:
    """The run's base model with the saved adapter on it.

    Raises:
        ConfigError: the adapter does not fit the base model.
    """
    note(f"loading {run.model} and {adapter}")
    set_seed(run.train.seed)  # a classifier's fresh head is the one that training began with
    base = load_model(run.model, run.task, label_names=label_names, dtype=run.dtype, **run.source)
    if torch.cuda.is_available():
        base.to("cuda")  # type: ignore[arg-type]
    try:
        return PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{adapter} does not fit {run.model}: {error}. Give its own base model with --model."
        ) from error


def labels_of(adapter: Path, run: RunConfig) -> list[str] | None:
    """The classes that a classifier's adapter was trained on, in order."""
    if run.task != "classification":
        return None
    path = _beside(adapter, LABELS_NAME)
    if not path.is_file():
        raise ConfigError(f"{path} is missing: write the classes into it, in order, as a JSON list.")
    return list(json.loads(path.read_text(encoding="utf-8")))


def evaluate_adapter(adapter: Path, run: RunConfig, with_base: bool) -> dict[str, dict[str, Metrics]]:
    """task → {"base": metrics, "adapted": metrics}.

    Raises:
        ConfigError: no task holds examples out, or the data's classes are not those of the adapter.
    """
    tokenizer, tasks = load_data(run)
    label_names = list(tasks[0].label_names) or None
    if label_names and _beside(adapter, LABELS_NAME).is_file() and labels_of(adapter, run) != label_names:
        raise ConfigError(f"the data has the classes {label_names}, the adapter {labels_of(adapter, run)}.")
    evaluators = make_evaluators(run, tasks, tokenizer)
    if not evaluators:
        raise ConfigError("data: nothing is held out: set eval_fraction, eval_size, eval_split or eval_path.")
    model = load_adapted(adapter, run, label_names)
    report = {}
    for name, evaluator in evaluators.items():
        report[name] = _base_and_adapted(model, evaluator, with_base)
    return report


def _base_and_adapted(model: PeftModel, evaluator: Evaluator, with_base: bool) -> dict[str, Metrics]:
    metrics = {}
    if with_base:
        with model.disable_adapter():
            metrics["base"] = evaluator(model, "base")
    metrics["adapted"] = evaluator(model, "adapted")
    return metrics


def merge_adapter(
    adapter: Path, run: RunConfig, target: Path, *, safe: bool, calibration: list[str] | None, force: bool
) -> dict[str, float] | None:
    """Merge an adapter into its base model and write a plain model with its tokenizer to `target`.

    Returns:
        With calibration, module → relative error of its update; None for an exact merge.

    Raises:
        ConfigError: `target` is not empty, or the calibration data can't be used.
        ValueError: the method can't be merged as asked, or `safe` found values that are not finite.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not force:
        raise ConfigError(f"{target} is not empty: choose another -o, or replace it with --force.")
    _check_calibration(adapter, calibration is not None)
    tokenizer = load_tokenizer(run.model, **run.source)
    model = load_adapted(adapter, run, labels_of(adapter, run)).eval()
    errors = None if calibration is None else _calibrate(model, run, tokenizer, calibration)
    merged = model.merge_and_unload(safe_merge=safe, progressbar=True)
    with replaced_folder(target) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return errors


def _check_calibration(adapter: Path, given: bool) -> None:
    routed = _adapter_json(adapter).get("expert_mixing") == "router"
    if routed and not given:
        raise ConfigError(
            f"{adapter} is MASA with a router: its gates depend on the input, so it has no constant update and can't "
            "be merged exactly. Give --calibration DATA (text of your task; without DATA: the run's own) to merge "
            'with the mean gates, an approximation whose error is reported; or train with expert_mixing "sum" or '
            '"concat".'
        )
    if given and not routed:
        raise ConfigError(f"{adapter} has no router and merges exactly: leave --calibration out.")


def _calibrate(
    model: PeftModel, run: RunConfig, tokenizer: PreTrainedTokenizerBase, data: list[str]
) -> dict[str, float]:
    from loraplex import calibrate

    if data:
        run = run.model_copy(update={"data": build_run(
            {**run.model_dump(), "data": [_data_entry(text) for text in data]}, "--calibration"
        ).data})  # fmt: skip
    chat = tokenizer.chat_template is not None
    tasks = [load_task(spec, run.train.seed, run.task, chat) for spec in run.data]
    batches = [batch for task in tasks for batch in _batches(task, run, tokenizer, model.device, len(tasks))]
    note(f"calibrating on {len(batches)} batches")
    return calibrate(model, batches)


def _batches(
    task: Task, run: RunConfig, tokenizer: PreTrainedTokenizerBase, device: Any, num_tasks: int
) -> Iterator[dict[str, Any]]:
    count = min(len(task.train), max(1, _CALIBRATION_EXAMPLES // num_tasks))
    rows = task.train.select(range(count))
    encode = encode_training if run.task == "sft" else encode_texts
    rows = encode(tokenizer, rows, run.train.max_length).remove_columns("labels")
    for start in range(0, len(rows), 8):
        batch = [rows[index] for index in range(start, min(start + 8, len(rows)))]
        padded = tokenizer.pad(batch, return_tensors="pt", padding_side="right")
        yield {key: value.to(device) for key, value in padded.items()}


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes when not."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            os.rename(target, old)
        os.rename(folder, target)
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
