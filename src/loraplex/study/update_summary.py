"""What the updates of a study's adapters look like: numbers per method, from the analysis of each trial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

TOP = 8
"""Dominance is reported for the first singular value and for so many."""
POINTS = 64
"""The mean spectrum is kept up to so many singular values."""


@dataclass(frozen=True)
class UpdateSummary:
    """One adapter: means over its modules; None where there is nothing to average."""

    effective_rank: float | None = None
    first: float | None = None
    """Share of σ₁ in Σ σ."""
    top: float | None = None
    """Share of the first `TOP`."""
    norm: float | None = None
    """‖ΔW‖_F."""
    cumulative: list[float] = field(default_factory=list)
    """Share of the first k singular values, k = 1 …, up to `POINTS` or the highest rank."""
    measures: dict[str, float] = field(default_factory=dict)
    """What the method measures of its own: label → value; a share where the label ends in "%"."""
    notes: list[str] = field(default_factory=list)
    """What the spectra leave out, and why there are none."""


def summarize_updates(analysis: dict[str, Any]) -> UpdateSummary:
    """The means of one trial's analysis.json; modules whose ΔW is zero count in the norm alone."""
    spectra = [spectrum for spectrum in analysis["spectra"] if spectrum["norm"]]
    return UpdateSummary(
        effective_rank=_mean(spectrum["effective_rank"] for spectrum in spectra),
        first=_mean(_share(spectrum["values"], 1) for spectrum in spectra),
        top=_mean(_share(spectrum["values"], TOP) for spectrum in spectra),
        norm=_mean(spectrum["norm"] for spectrum in analysis["spectra"]),
        cumulative=_cumulative([spectrum["values"] for spectrum in spectra]),
        measures=analysis.get("measures", {}),
        notes=sorted({*(spectrum["note"] for spectrum in spectra), analysis.get("error", "")} - {""}),
    )


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _means(rows: Iterable[Sequence[float]]) -> list[float]:
    return [fmean(column) for column in zip(*rows, strict=True)]


def _share(values: Sequence[float], k: int) -> float:
    return sum(values[:k]) / sum(values)


def _cumulative(spectra: Sequence[Sequence[float]]) -> list[float]:
    length = min(POINTS, max(map(len, spectra), default=0))
    return _means([_share(values, k) for k in range(1, length + 1)] for values in spectra)
