"""The trials of a study: one training run each, in a folder of its own, done when its folder says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.io.reading import read_json
from loraplex.recipes.config.run_config import RunConfig, build_run, read_yaml
from loraplex.recipes.training.checkpoints import RUN_NAME
from loraplex.recipes.training.metrics import METRICS_NAME, read_metrics
from loraplex.study.config import BASE, StudyConfig
from loraplex.study.sizes import Sized

JOB_NAME = "job.json"
TEST_NAME = "test.json"
SCORES_NAME = "test.safetensors"
ANALYSIS_NAME = "analysis.json"
FAILED_NAME = "failed.json"
LOG_NAME = "output.log"


@dataclass(frozen=True)
class Trial:
    """A method trained on a task at a learning rate with a seed; or the base model on a task, which is only tested."""

    task: str
    method: str = BASE
    rate: float = 0.0
    seed: int = 0

    @property
    def is_base(self) -> bool:
        """Whether nothing is trained."""
        return self.method == BASE

    @property
    def path(self) -> Path:
        """Its folder within the study's."""
        if self.is_base:
            return Path(BASE, self.task)
        return Path("cells", self.task, self.method, f"lr-{self.rate:g}", f"seed-{self.seed}")

    def __str__(self) -> str:
        if self.is_base:
            return f"{self.task}: base model"
        return f"{self.task}: {self.method}, learning rate {self.rate:g}, seed {self.seed}"


def searched(study: StudyConfig) -> Iterator[Trial]:
    """The trials among which learning rates are chosen; none where there is nothing to choose."""
    for task in study.tasks:
        for method in study.methods:
            rates = study.rates(method)
            if len(rates) > 1:
                for rate in rates:
                    for seed in study.searched:
                        yield Trial(task, method, rate, seed)


def run_config(study: StudyConfig, trial: Trial, sized: Sized | None) -> RunConfig:
    """What `loraplex train` would be given for a trial.

    Raises:
        ConfigError: the study's train section or data does not fit.
    """
    task = study.tasks[trial.task]
    data = [spec.model_dump(exclude_unset=True) for spec in task.data]
    train = {"eval_steps": None, "save_total_limit": 1, **study.train, **task.train}
    tree = {
        "model": study.model,
        **study.source,
        "dtype": study.dtype,
        "task": study.task,
        # The base model is only tested: method and rate are placeholders that nothing reads.
        "method": "lora" if trial.is_base else study.methods[trial.method].method,
        "adapter": {} if sized is None else sized.adapter,
        # All trials hold the same rows out, or their scores could not be compared example by example.
        "data": [{**spec, "split_seed": spec.get("split_seed", 0)} for spec in data],
        "train": {**train, "eval_on_start": False, "seed": trial.seed, "learning_rate": trial.rate or 1.0},
        "output_dir": str(Path(study.output_dir) / trial.path),
    }
    return build_run(tree, f"trial {trial.path}")


@dataclass(frozen=True)
class Outcome:
    """What is known of a trial that has run."""

    evaluation: dict[str, dict[str, Any]]
    """Data set → metrics on its eval part, at the end of training."""
    trained: dict[str, Any]
    """The row that ends metrics.jsonl: seconds, step_seconds, trainable_parameters, peak_memory_bytes."""


class Folder:
    """A trial's folder: what it holds decides what is left to do."""

    def __init__(self, study: StudyConfig, trial: Trial) -> None:
        self.path = Path(study.output_dir) / trial.path
        self.trial = trial

    @property
    def outcome(self) -> Outcome | None:
        """None until training has ended."""
        rows = read_metrics(self.path / METRICS_NAME)
        if not rows or rows[-1]["event"] != "end":
            return None
        step = rows[-1]["step"]
        at_end = {row["task"]: row for row in rows if row["event"] == "eval" and row["step"] == step}
        return Outcome(at_end, rows[-1])

    @property
    def test(self) -> dict[str, Any] | None:
        """Metrics on the test parts and on general text; None until they were measured."""
        return self._json(TEST_NAME)

    @property
    def analysis(self) -> dict[str, Any] | None:
        """What `loraplex.inspection.spectra` says of the adapter; None until it was looked into."""
        return self._json(ANALYSIS_NAME)

    @property
    def analysed(self) -> bool:
        """Whether `analysis` is there; cheaper than reading it."""
        return (self.path / ANALYSIS_NAME).is_file()

    @property
    def failure(self) -> dict[str, Any] | None:
        """Why it can't be had; None where nothing failed."""
        return self._json(FAILED_NAME)

    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss)."""
        rows = read_metrics(self.path / METRICS_NAME)
        return [(row["step"], row["loss"]) for row in rows if row["event"] == "train" and row["loss"] is not None]

    def started_as(self) -> dict[str, Any] | None:
        """The configuration that it was started with."""
        file = self.path / RUN_NAME
        return read_yaml(file) if file.is_file() else None

    def _json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        return read_json(file, dict, "delete the trial's folder; it is run again") if file.is_file() else None
