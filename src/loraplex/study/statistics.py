"""How sure a difference between two methods is: seeds and test examples both vary.

d̄ is the mean over seeds, and over data sets, of the differences; both methods are paired by seed and by example. Its
standard error has two parts: between seeds, s²/S, and within the test set, the variance of d̄ when examples are drawn
again with replacement (a paired bootstrap). The interval is d̄ ± t · √(s²/S + v), with Satterthwaite's degrees of
freedom: S − 1 where seeds decide, many where examples do. Percentiles over seeds alone would be far too narrow for
three or five of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

import torch
from scipy import stats
from torch import Tensor

from loraplex.recipes.evaluation import Scores

LEVEL = 0.95
_SHARES = {"accuracy": "correct", "accuracy_norm": "correct_norm", "exact_match": "exact"}
_DRAWS = 2000
_CHUNK = 2**24  # elements of drawn counts at a time


def sums_of(metric: str, scores: Scores, classes: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A metric as a function of sums over examples, so that it can be had for any multiset of them.

    Returns:
        (X, g): X `(examples, k)`, and g that maps sums `(draws, k)` to the metric `(draws,)`.
    """
    if metric in _SHARES:
        correct = scores[_SHARES[metric]].double()
        return torch.stack([correct, torch.ones_like(correct)], 1), _quotient
    if metric == "loss":
        nll = scores["nll"].double()
        return torch.stack([nll, scores.get("tokens", torch.ones_like(nll)).double()], 1), _quotient
    names = torch.arange(classes)
    predicted, label = (scores[key][:, None] == names for key in ("predicted", "label"))
    return torch.cat([(predicted & label).double(), predicted.double() + label.double()], 1), partial(_f1, classes)


def _quotient(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 1].clamp(min=1e-300)


def _f1(classes: int, sums: Tensor) -> Tensor:
    hits, size = sums[:, :classes], sums[:, classes:]
    return (2 * hits / size.clamp(min=1)).sum(1) / (size > 0).sum(1).clamp(min=1)


def value(metric: str, scores: Scores) -> float:
    """The metric on all examples."""
    X, g = sums_of(metric, scores, _classes([scores]))
    return g(X.sum(0, keepdim=True)).item()


def _classes(all_scores: Sequence[Scores]) -> int:
    return max((int(max(s["label"].max(), s["predicted"].max())) + 1 for s in all_scores if "label" in s), default=0)


@dataclass(frozen=True)
class Difference:
    """Method minus reference."""

    mean: float
    low: float | None
    """Of the confidence interval; None with a single seed, which says nothing about others."""
    high: float | None
    wins: int
    """Seeds in which the method did better."""
    seeds: int

    def verdict(self, lower_is_better: bool) -> str:
        """ "better", "worse", or "" where the interval covers zero or there is none."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return ""
        return "better" if (self.mean < 0) == lower_is_better else "worse"


def difference_of(
    metric: str,
    method: Mapping[str, Sequence[Scores]],
    reference: Mapping[str, Sequence[Scores]],
    lower_is_better: bool = False,
    seed: int = 0,
) -> Difference:
    """The difference of the mean over data sets, method minus reference.

    Args:
        metric: "accuracy", "accuracy_norm", "exact_match", "f1" or "loss".
        method, reference: data set → scores of each seed, seeds in the same order.
    """
    per_seed = torch.tensor(
        [
            [
                value(metric, ours) - value(metric, theirs)
                for ours, theirs in zip(method[name], reference[name], strict=True)
            ]
            for name in method
        ],
        dtype=torch.float64,
    ).mean(0)
    S, mean = len(per_seed), per_seed.mean().item()
    wins = int(((per_seed < 0) if lower_is_better else (per_seed > 0)).sum())
    if S < 2:
        return Difference(mean, None, None, wins, S)
    between = per_seed.var().item() / S
    # Data sets are drawn from independently, so the variances of their means add up.
    parts = [_variance(metric, method[name], reference[name], seed + i) for i, name in enumerate(method)]
    within = sum(parts) / len(parts) ** 2
    total = between + within
    if total == 0:
        return Difference(mean, mean, mean, wins, S)
    examples = sum(len(scores[0]["nll"]) for scores in method.values())
    degrees = total**2 / (between**2 / (S - 1) + within**2 / max(1, examples - 1))
    reach = stats.t.ppf(0.5 + LEVEL / 2, degrees).item() * math.sqrt(total)
    return Difference(mean, mean - reach, mean + reach, wins, S)


def _variance(metric: str, method: Sequence[Scores], reference: Sequence[Scores], seed: int) -> float:
    """Of the mean difference over seeds, when examples are drawn again."""
    classes, examples = _classes([*method, *reference]), len(method[0]["nll"])
    pairs = [
        (sums_of(metric, ours, classes), sums_of(metric, theirs, classes))
        for ours, theirs in zip(method, reference, strict=True)
    ]
    generator, found = torch.Generator().manual_seed(seed), []
    step = max(1, _CHUNK // examples)
    for start in range(0, _DRAWS, step):
        draws = min(step, _DRAWS - start)
        chosen = torch.randint(examples, (draws, examples), generator=generator)
        counts = torch.zeros(draws, examples, dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones_like(counts))
        differences = [g(counts @ X) - h(counts @ Z) for (X, g), (Z, h) in pairs]
        found.append(torch.stack(differences).mean(0))
    return torch.cat(found).var().item()


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation where there are two values or more."""
    return fmean(values), stdev(values) if len(values) > 1 else None
