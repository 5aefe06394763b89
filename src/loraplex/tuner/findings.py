"""What a method can tell of its adapters, as plain values: inspection prints, draws and averages them.

A method returns these from `Factors.findings`, `Factors.gate_findings` and `SharedFactors.stored_findings`. Whoever
shows them asks what kind of finding it has, never which method it comes from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, final


class Finding(ABC):
    """One thing that a method knows of an adapter."""

    key: str
    """Its name in JSON, and of the figure's file."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, under the finding's key or several of its own."""

    def measures(self) -> dict[str, float]:
        """Numbers about the whole adapter: label → value, a share where the label ends in "%". None by default."""
        return {}


@final
@dataclass(frozen=True)
class Fact(Finding):
    """A line of text."""

    key: str
    label: str
    text: str
    value: Any
    """The same as a plain value."""

    def to_dict(self) -> dict[str, Any]:
        return {self.key: self.value}


@dataclass(frozen=True)
class Handover:
    """At `step`, `layer` of `family` gave up its factor; it reads that of layer `reads` now."""

    step: int
    family: str
    layer: int
    reads: int


@final
@dataclass(frozen=True)
class Handovers(Finding):
    """Which layers came to read another layer's factor, and when."""

    key: str
    title: str
    factor: str
    rows: list[Handover]
    layers: dict[str, int]
    """Family → number of its layers."""

    def to_dict(self) -> dict[str, Any]:
        return {self.key: [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class Panel:
    """One number per module, drawn over the layers."""

    key: str
    """Its name in JSON. Panels of one finding with the same key become one list per module there."""
    label: str
    values: dict[str, float]
    """Module → value."""
    measure: str = ""
    """What tables call the mean over modules; empty where it says nothing."""


@final
@dataclass(frozen=True)
class OverLayers(Finding):
    """Panels that are drawn side by side on one scale."""

    key: str
    title: str
    panels: list[Panel]
    top: float | None = None
    """Upper end of the scale; None: the largest value."""

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for panel in self.panels:
            alike = [other.values for other in self.panels if other.key == panel.key]
            found[panel.key] = panel.values if len(alike) == 1 else _side_by_side(alike)
        return found

    def measures(self) -> dict[str, float]:
        return {panel.measure: fmean(panel.values.values()) for panel in self.panels if panel.measure and panel.values}


@final
@dataclass(frozen=True)
class Matrices(Finding):
    """Symmetric matrices of similarities between 0 and 1."""

    key: str
    title: str
    measure: str
    """What tables call the mean over all pairs."""
    matrices: dict[str, list[list[float]]]
    labels: dict[str, str] = field(default_factory=dict)
    """Key of a matrix → its title in a figure."""

    def to_dict(self) -> dict[str, Any]:
        return {self.key: self.matrices}

    def measures(self) -> dict[str, float]:
        pairs = [v for m in self.matrices.values() for i, row in enumerate(m) for j, v in enumerate(row) if i != j]
        return {self.measure: fmean(pairs)} if pairs else {}


@final
@dataclass(frozen=True)
class GateUse(Finding):
    """Which parts of an update the gates choose, task by task."""

    key: str
    title: str
    part: str
    """What a gate opens, for people: "expert"."""
    use: dict[str, dict[str, list[float]]]
    """Task → module → mean gate of each part."""

    def to_dict(self) -> dict[str, Any]:
        return {self.key: self.use}

    def measures(self) -> dict[str, float]:
        """How far apart the tasks' gates are (½ Σ |g − g'|, over modules and pairs of tasks), and each task's largest
        gate, which is 1/n where all parts are used alike.
        """
        apart = [
            sum(abs(g - h) for g, h in zip(gates, other[module], strict=True)) / 2
            for number, one in enumerate(self.use.values())
            for other in list(self.use.values())[number + 1 :]
            for module, gates in one.items()
        ]
        found = {"separation of data sets": fmean(apart)} if apart else {}
        return found | {f"largest gate, {task}": fmean(map(max, gates.values())) for task, gates in self.use.items()}


def _side_by_side(columns: list[dict[str, float]]) -> dict[str, list[float]]:
    modules = dict.fromkeys(module for column in columns for module in column)
    return {module: [column[module] for column in columns if module in column] for module in modules}


def find(findings: list[Finding], key: str) -> Any:
    """The finding with this key.

    Raises:
        KeyError: there is none; the message lists those that there are.
    """
    for finding in findings:
        if finding.key == key:
            return finding
    raise KeyError(f"{key!r}: this adapter tells of {', '.join(f.key for f in findings) or 'nothing'}")


def as_dict(findings: list[Finding], taken: Iterable[str] = ()) -> dict[str, Any]:
    """All findings in one mapping, for JSON.

    Args:
        findings: of one adapter.
        taken: keys that stand beside them.

    Raises:
        ValueError: two findings have one key, or a finding has one that is taken.
    """
    found: dict[str, Any] = {}
    for finding in findings:
        values = finding.to_dict()
        if twice := sorted(values.keys() & {*found, *taken}):
            raise ValueError(f"a finding is called {twice[0]!r}, as something else is: give it another key.")
        found |= values
    return found
