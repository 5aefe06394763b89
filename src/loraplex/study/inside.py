"""What the updates of a study's adapters look like: numbers per method, from the analysis of each cell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

TOP = 8
"""Dominance is reported for the first singular value and for so many."""
POINTS = 64
"""The mean spectrum is kept up to so many singular values."""


@dataclass(frozen=True)
class Inside:
    """One adapter: means over its modules. What its method has not is None or empty."""

    effective_rank: float | None = None
    first: float | None = None
    """Share of σ₁ in Σ σ."""
    top: float | None = None
    """Share of the first `TOP`."""
    norm: float | None = None
    """‖ΔW‖_F."""
    cumulative: list[float] = field(default_factory=list)
    """Share of the first k singular values, k = 1 …, up to `POINTS` or the highest rank."""
    closed: float | None = None
    """Dual LoRA: share of closed gates."""
    negative: float | None = None
    """Dual LoRA: negative share of the open gates."""
    similarity: float | None = None
    """MASA: CKA between different experts of a group."""
    separation: float | None = None
    """MASA's router: half of Σ |g − g'| between the mean gates of two data sets, over modules and pairs of data sets; 0
    where all data sets use the experts alike, 1 where none shares an expert with another."""
    concentration: dict[str, float] = field(default_factory=dict)
    """MASA's router: data set → mean over modules of the largest mean gate; 1/n where all are used alike."""
    scaling: list[float] = field(default_factory=list)
    """MultiLoRA: mean |cᵢ| of each parallel module, the largest first in every layer."""
    merges: list[dict[str, Any]] = field(default_factory=list)
    """ASLoRA: step, family, layer, reads."""
    notes: list[str] = field(default_factory=list)
    """What the spectra leave out, and why there are none."""


def look_inside(analysis: dict[str, Any]) -> Inside:
    """The means of one cell's analysis.json; modules whose ΔW is zero count in the norm alone."""
    spectra = [spectrum for spectrum in analysis["spectra"] if spectrum["norm"]]
    similar = [
        value
        for matrix in analysis["similarity"].values()
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if i != j
    ]
    return Inside(
        effective_rank=_mean(spectrum["effective_rank"] for spectrum in spectra),
        first=_mean(_share(spectrum["values"], 1) for spectrum in spectra),
        top=_mean(_share(spectrum["values"], TOP) for spectrum in spectra),
        norm=_mean(spectrum["norm"] for spectrum in analysis["spectra"]),
        cumulative=_cumulative([spectrum["values"] for spectrum in spectra]),
        closed=_mean(analysis["closed"].values()),
        negative=_mean(analysis["negative"].values()),
        similarity=_mean(similar),
        separation=_mean(_distances(analysis["use"].values())),
        concentration={data: fmean(map(max, gates.values())) for data, gates in analysis["use"].items()},
        scaling=_means(sorted(c, reverse=True) for c in analysis["scaling"].values()),
        merges=analysis["merges"],
        notes=sorted({*(spectrum["note"] for spectrum in spectra), analysis.get("error", "")} - {""}),
    )


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _means(rows: Iterable[Sequence[float]]) -> list[float]:
    return [fmean(column) for column in zip(*rows, strict=True)]


def _distances(use: Iterable[dict[str, list[float]]]) -> Iterator[float]:
    for one, other in combinations(use, 2):
        for module, gates in one.items():
            yield sum(abs(g - h) for g, h in zip(gates, other[module], strict=True)) / 2


def _share(values: Sequence[float], k: int) -> float:
    return sum(values[:k]) / sum(values)


def _cumulative(spectra: Sequence[Sequence[float]]) -> list[float]:
    length = min(POINTS, max(map(len, spectra), default=0))
    return _means([_share(values, k) for k in range(1, length + 1)] for values in spectra)
