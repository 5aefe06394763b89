"""What a study found, as plain values: per trial, per method, and differences to the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from safetensors.torch import load_file

from loraplex.recipes.evaluation import Scores
from loraplex.study.choice import LOWER_IS_BETTER, Choice, deciding_metric
from loraplex.study.config import BASE, METRICS
from loraplex.study.run import State
from loraplex.study.statistics import Difference, difference_of, spread, value
from loraplex.study.trials import SCORES_NAME, Trial
from loraplex.study.update_summary import UpdateSummary, summarize_updates

ALL = "mean"
"""Stands for the mean over a mixture's data sets."""


@dataclass(frozen=True)
class Line:
    """A method on one data set of a task, or on the mean of them."""

    method: str
    data: str
    metric: str
    seeds: list[int]
    values: list[float]
    """One per seed."""
    mean: float
    deviation: float | None
    """Standard deviation over seeds."""
    difference: Difference | None = None
    """To the reference, over the seeds that both have; None for the reference itself and the base model."""

    @property
    def verdict(self) -> str:
        """ "better" or "worse" than the reference, or ""."""
        return "" if self.difference is None else self.difference.verdict(self.metric in LOWER_IS_BETTER)


@dataclass(frozen=True)
class Cost:
    """What a method took: medians over its seeds."""

    parameters: int | None = None
    excess: int | None = None
    file_bytes: int | None = None
    peak_memory_bytes: int | None = None
    step_seconds: float | None = None
    perplexity: float | None = None
    """On general text; of the mean loss over seeds."""
    perplexity_spread: float | None = None
    """Half the distance between one standard deviation of that loss above and below."""


@dataclass
class TaskResult:
    """One task of a study."""

    task: str
    metric: str
    data: list[str]
    lines: list[Line] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[list[tuple[int, float]]]] = field(default_factory=dict)
    """Method → (step, training loss) of each seed."""
    updates: dict[str, list[UpdateSummary]] = field(default_factory=dict)
    """Method → what each seed's updates look like."""
    others: list[str] = field(default_factory=list)
    """Further metrics that `lines` has."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(trial, message)."""
    missing: list[str] = field(default_factory=list)
    """Trials that have not run yet."""

    def line(self, method: str, data: str) -> Line | None:
        """The line of a method on a data set, or on `ALL`, in the deciding metric."""
        return next((line for line in self.of(data) if line.method == method), None)

    def of(self, data: str, metric: str | None = None) -> list[Line]:
        """The lines of all methods on a data set, in the deciding metric or another."""
        return [line for line in self.lines if (line.data, line.metric) == (data, metric or self.metric)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self)
        for line, source in zip(plain["lines"], self.lines, strict=True):
            line["verdict"] = source.verdict
        for choice in plain["choices"].values():
            choice["tried"] = {f"{rate:g}": value for rate, value in choice["tried"].items()}
        # Results that are saved already have this key.
        return {"insides" if key == "updates" else key: value for key, value in plain.items()}


def collect(state: State) -> list[TaskResult]:
    """What the trials that have run say; unfinished and failed ones are named."""
    return [_collect(state, task) for task in state.study.tasks]


def _collect(state: State, task: str) -> TaskResult:
    study = state.study
    scores: dict[str, dict[int, dict[str, Scores]]] = {}
    evaluated: dict[str, dict[str, Any]] = {}
    result = TaskResult(task, "", [])
    for method in study.methods:
        if (task, method) not in state.choices:
            result.missing += [f"{task}: {method}, learning rate not chosen yet"]
        else:
            result.choices[method] = state.choices[task, method]
        result.settings[method] = state.sizes[task][method].adapter
    for trial in state.chosen:
        if trial.task != task:
            continue
        folder = state.folder(trial)
        if folder.test is None:
            if folder.failure is not None:
                result.failures.append((str(trial), folder.failure["message"]))
            else:
                result.missing.append(str(trial))
            continue
        evaluated = folder.test["tasks"]
        scores.setdefault(trial.method, {})[trial.seed] = _by_data(load_file(folder.path / SCORES_NAME))
        if not trial.is_base:
            result.curves.setdefault(trial.method, []).append(folder.losses())
            if folder.analysis is not None:
                result.updates.setdefault(trial.method, []).append(summarize_updates(folder.analysis))
    result.metric, result.data = deciding_metric(evaluated, study.metric), list(evaluated)
    known = [name for name in METRICS if evaluated and all(name in row for row in evaluated.values())]
    result.others = [name for name in known if name != result.metric]
    for method in (BASE, *study.methods):
        if method in scores:
            for metric in (result.metric, *result.others):
                theirs = scores.get(study.reference, {})
                result.lines += _lines(metric, result.data, method, scores[method], theirs, study.reference)
            result.costs[method] = _cost(state, task, method, list(scores[method]))
    return result


def _by_data(tensors: Scores) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        found.setdefault(name, {})[kind] = tensor
    return found


def _lines(
    metric: str,
    all_data: list[str],
    method: str,
    ours: dict[int, dict[str, Scores]],
    theirs: dict[int, dict[str, Scores]],
    reference: str,
) -> list[Line]:
    seeds, both = sorted(ours), sorted({*ours} & {*theirs})
    lower = metric in LOWER_IS_BETTER
    groups = {name: [name] for name in all_data} | ({ALL: all_data} if len(all_data) > 1 else {})
    lines = []
    for data, names in groups.items():
        values = [fmean(value(metric, ours[seed][name]) for name in names) for seed in seeds]
        difference = None
        if method not in (BASE, reference) and both:
            mine, other = ({name: [side[seed][name] for seed in both] for name in names} for side in (ours, theirs))
            difference = difference_of(metric, mine, other, lower)
        lines.append(Line(method, data, metric, seeds, values, *spread(values), difference))
    return lines


def _cost(state: State, task: str, method: str, seeds: Sequence[int]) -> Cost:
    if method == BASE:
        return Cost(**_perplexity([state.folder(Trial(task)).test]))
    sized, rate = state.sizes[task][method], state.choices[task, method].rate
    folders = [state.folder(Trial(task, method, rate, seed)) for seed in seeds]
    rows = [folder.outcome.trained for folder in folders if folder.outcome is not None]
    steps = [row["step_seconds"] for row in rows if row.get("step_seconds")]
    sizes = [file.stat().st_size for folder in folders if (file := folder.path / "adapter_model.safetensors").is_file()]
    return Cost(
        parameters=int(median(row["trainable_parameters"] for row in rows)),
        excess=sized.excess,
        file_bytes=int(median(sizes)) if sizes else None,
        peak_memory_bytes=int(median(row["peak_memory_bytes"] for row in rows)),
        step_seconds=median(steps) if steps else None,
        **_perplexity([folder.test for folder in folders]),
    )


def _perplexity(tests: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    losses = [test["general_text"] for test in tests if test is not None and "general_text" in test]
    if not losses:
        return {}
    mean, deviation = spread(losses)
    half = None if deviation is None else (math.exp(mean + deviation) - math.exp(mean - deviation)) / 2
    return {"perplexity": math.exp(mean), "perplexity_spread": half}
