"""lm-evaluation-harness on an adapted model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from loraplex.recipes.adapters.saved import SavedAdapter
from loraplex.recipes.config.run_config import ConfigError
from loraplex.recipes.evaluation import Metrics


@dataclass(frozen=True)
class Harness:
    """What to run."""

    tasks: Sequence[str]
    path: Path | None = None
    """Folder of further task files."""
    limit: int | None = None
    fewshot: int | None = None
    """None: as each task says."""
    chat: bool = False
    """Whether prompts go through the tokenizer's chat template."""


def evaluate_by_harness(adapter: SavedAdapter, harness: Harness, with_base: bool) -> dict[str, dict[str, Metrics]]:
    """task → {"base": metrics, "adapted": metrics}, with the harness's names of tasks and metrics.

    Raises:
        ConfigError: the adapter is a classifier's, the folder does not exist, or the harness knows no such task.
    """
    config, folder = adapter.run.config, adapter.folder
    if config.task != "sft":
        raise ConfigError(f"{folder} is a classifier: the harness measures language models; leave --harness out.")
    if harness.path is not None and not harness.path.is_dir():
        raise ConfigError(f"--harness-path {harness.path} is not a folder: give the folder of your task files.")
    manager = TaskManager(include_path=None if harness.path is None else str(harness.path))
    if unknown := [task for task in harness.tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"lm-evaluation-harness knows no task {', '.join(unknown)}: see lm_eval ls tasks.")
    tokenizer, batch_size = adapter.run.tokenizer, config.train.per_device_eval_batch_size
    model = adapter.load()
    report: dict[str, dict[str, Metrics]] = {}
    for name in ["base", "adapted"] if with_base else ["adapted"]:
        if name == "base":
            with model.disable_adapter():
                found = _results(model, tokenizer, batch_size, harness, manager)
        else:
            found = _results(model, tokenizer, batch_size, harness, manager)
        for task, metrics in found.items():
            report.setdefault(task, {})[name] = metrics
    return report


def _results(model: Any, tokenizer: Any, batch_size: int, harness: Harness, manager: TaskManager) -> dict[str, Metrics]:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results: Any = simple_evaluate(
        lm,
        tasks=list(harness.tasks),
        num_fewshot=harness.fewshot,
        limit=harness.limit,
        apply_chat_template=harness.chat,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    found = {}
    for task, row in results["results"].items():
        # "acc,none" is the metric acc without a filter.
        metrics = {
            key.removesuffix(",none"): v for key, v in row.items() if isinstance(v, float) and "stderr" not in key
        }
        found[task] = {**metrics, "examples": results["n-samples"][task]["effective"]}
    return found
