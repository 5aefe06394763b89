"""Which learning rate a method gets: the one that does best on the eval parts, never the test parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from loraplex.study.trials import Folder

LOWER_IS_BETTER = {"loss"}


@dataclass(frozen=True)
class Choice:
    """A learning rate, and what each that was tried came to."""

    rate: float
    tried: dict[float, float | None] = field(default_factory=dict)
    """Rate → mean of the deciding metric over data sets and seeds; None where a run failed."""
    metric: str = "loss"

    @property
    def at_edge(self) -> str:
        """ "lowest" or "highest" where the best rate is the end of what was tried; else ""."""
        rates = sorted(self.tried)
        if len(rates) < 2 or self.rate not in (rates[0], rates[-1]):
            return ""
        return "lowest" if self.rate == rates[0] else "highest"


def deciding_metric(evaluation: Mapping[str, Mapping[str, Any]], wanted: str | None) -> str:
    """The study's metric, or accuracy where every data set has one, or loss."""
    if wanted is not None:
        return wanted
    return "accuracy" if evaluation and all("accuracy" in row for row in evaluation.values()) else "loss"


def choose(tries: Mapping[float, Sequence[Folder]], wanted: str | None) -> Choice | None:
    """The best of the rates that were tried; ties are broken by the lower loss, then the lower rate.

    None while a try is still to be run, or where all of them failed.
    """
    rates = sorted(tries)
    if len(rates) == 1:
        return Choice(rates[0])
    values: dict[float, tuple[float, float]] = {}
    metric = "loss"
    for rate in rates:
        outcomes = [folder.outcome for folder in tries[rate]]
        if any(o is None and f.failure is None for o, f in zip(outcomes, tries[rate], strict=True)):
            return None
        done = [outcome for outcome in outcomes if outcome is not None]
        if len(done) < len(outcomes):
            continue
        metric = deciding_metric(done[0].evaluation, wanted)
        means = {
            name: fmean(_number(row.get(name)) for outcome in done for row in outcome.evaluation.values())
            for name in (metric, "loss")
        }
        values[rate] = (means[metric] if metric in LOWER_IS_BETTER else -means[metric], means["loss"])
    if not values:
        return None
    best = min(values, key=lambda rate: (*values[rate], rate))
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return Choice(best, {rate: sign * values[rate][0] if rate in values else None for rate in rates}, metric)


def _number(value: float | None) -> float:
    return math.inf if value is None else value  # metrics.jsonl writes what is not finite as null
