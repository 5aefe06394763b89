"""Plots of an analysis, one PNG each; methods, layers and families are told apart by marker, dash and lightness."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loraplex.inspection.spectra import Analysis, Spectrum
from loraplex.io.files import replaced_file
from loraplex.io.reading import printable
from loraplex.tuner.findings import Finding, GateUse, Handovers, Matrices, OverLayers

_MARKERS = "osD^vP*X<>"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MOST_PANELS = 12


@rc_context({"text.parse_math": False})  # a name may hold a $
def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Write a figure of the spectra, one over the layers, and one of each finding that can be drawn.

    Returns:
        The files' paths.
    """
    figures = {"spectra": _spectra(analysis), "rank_by_depth": _rank_by_depth(analysis)}
    figures |= {f.key: _DRAWN[type(f)](f, analysis) for f in analysis.findings if type(f) in _DRAWN}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            FigureCanvasAgg(figure)
            with replaced_file(path) as temporary:
                figure.savefig(temporary, format="png")
            written.append(path)
    return written


def short(role: str) -> str:
    """ "model__layers__N__self_attn__q_proj" → "self_attn.q_proj"."""
    return printable(role.rpartition("__N__")[2].replace("__", ".")).replace("\n", " ")


def _by_role(spectra: Iterable[Spectrum]) -> dict[str, list[Spectrum]]:
    found: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        if spectrum.values:
            found.setdefault(spectrum.role, []).append(spectrum)
    return {role: sorted(group, key=lambda s: s.depth) for role, group in found.items()}


def _panels(count: int, width: float = 3.4, height: float = 2.8, columns: int = 4) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def _spectra(analysis: Analysis) -> Figure | None:
    """Per role: singular values over the largest one, and their cumulative share; deep layers are darker."""
    roles = _by_role(analysis.spectra)
    if not roles:
        return None
    figure, axes = _panels(2 * len(roles), columns=2)
    for (role, group), values, cumulative in zip(roles.items(), axes[::2], axes[1::2], strict=True):
        deepest = max(s.depth for s in group) or 1
        for s in group:
            grey = str(0.8 * (1 - max(s.depth, 0) / deepest))
            numbers = range(1, len(s.values) + 1)
            marker: dict[str, Any] = {"marker": ".", "markersize": 4} if len(s.values) < 40 else {}
            values.plot(numbers, [v / (s.values[0] or 1) for v in s.values], color=grey, linewidth=0.9, **marker)
            cumulative.plot(numbers, [s.share(k) for k in numbers], color=grey, linewidth=0.9, **marker)
        if any(s.norm for s in group):
            values.set_yscale("log")
        notes = {s.note for s in group if s.note}
        values.set_title(f"{short(role)}{' (' + ', '.join(notes) + ')' if notes else ''}", fontsize="medium")
        values.set(xlabel="number of the singular value", ylabel="σᵢ / σ₁")
        cumulative.set(xlabel="first k", ylabel="share of Σ σ", ylim=(0, 1.02))
        cumulative.set_title(f"layers {group[0].depth} (light) to {deepest} (dark)", fontsize="medium")
    _grids(axes)
    figure.suptitle(f"{analysis.method}: singular values of ΔW")
    return figure


def _lines(axes: Axes, number: int, label: str, points: list[tuple[int, float]]) -> None:
    x, y = zip(*points, strict=True)
    dash, marker = _DASHES[number % len(_DASHES)], _MARKERS[number % len(_MARKERS)]
    axes.plot(
        x, y, color=str(0.15 * (number % 4)), linestyle=dash, marker=marker, markersize=4.5, markerfacecolor="white",
        linewidth=1.1, label=label,
    )  # fmt: skip


def _rank_by_depth(analysis: Analysis) -> Figure | None:
    """Effective rank, the largest singular value's share, and the update's size, over the layers."""
    roles = _by_role(analysis.spectra)
    if not roles:
        return None
    figure, axes = _panels(3, width=3.8, height=3.2)
    for number, (role, group) in enumerate(roles.items()):
        _lines(axes[0], number, short(role), [(s.depth, s.effective_rank) for s in group])
        _lines(axes[1], number, short(role), [(s.depth, s.share(1)) for s in group])
        _lines(axes[2], number, short(role), [(s.depth, s.norm) for s in group])
    for panel, label in zip(axes, ("effective rank", "σ₁ / Σ σ", "‖ΔW‖ (Frobenius)"), strict=True):
        panel.set(xlabel="layer", ylabel=label, ylim=(0, None))
    _grids(axes)
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{analysis.method}: how many directions each update uses")
    return figure


def _handovers(finding: Handovers, analysis: Analysis) -> Figure | None:
    """Per family: each layer is a line until it gives up its factor; the arrow says whose it reads then."""
    if not finding.rows:
        return None
    families = list(dict.fromkeys(row.family for row in finding.rows))[:_MOST_PANELS]
    end = max(row.step for row in finding.rows) * 1.08 + 1
    figure, axes = _panels(len(families), height=3.4, columns=3)
    for family, panel in zip(families, axes, strict=True):
        gone = {row.layer: row for row in finding.rows if row.family == family}
        layers = finding.layers[family]
        for layer in range(layers):
            row = gone.get(layer)
            stop = end if row is None else row.step
            panel.plot([0, stop], [layer, layer], color="black", linewidth=1.4 if row is None else 0.8)
            if row is not None:
                panel.plot([stop, end], [layer, layer], color="0.75", linewidth=0.8, linestyle=":")
                arrow = {"arrowstyle": "->", "color": "black", "linewidth": 0.8}
                panel.annotate("", (row.step, row.reads), (row.step, layer), arrowprops=arrow)
        panel.set(xlabel="step", ylabel="layer", xlim=(0, end), ylim=(-0.7, layers - 0.3))
        panel.set_title(short(family), fontsize="medium")
    figure.suptitle(f"{finding.title}, → whose is read")
    return figure


def _over_layers(finding: OverLayers, analysis: Analysis) -> Figure | None:
    """One panel per number: its value on each module, over the layers."""
    few = len(finding.panels) < 3
    figure, axes = _panels(len(finding.panels), *((4.2, 3.2) if few else ()))
    where = {s.module: s for s in analysis.spectra}
    for panel, axis in zip(finding.panels, axes, strict=True):
        roles: dict[str, list[tuple[int, float]]] = {}
        for module, value in panel.values.items():
            roles.setdefault(where[module].role, []).append((where[module].depth, value))
        for number, (role, points) in enumerate(roles.items()):
            _lines(axis, number, short(role), sorted(points))
        axis.set(xlabel="layer", ylabel=panel.label, ylim=(0, None))
    top = finding.top or max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    _grids(axes)
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(finding.title)
    return figure


def _matrices(finding: Matrices, analysis: Analysis) -> Figure | None:
    """The matrices as grey tables, a panel each."""
    if not finding.matrices:
        return None
    drawn = dict(list(finding.matrices.items())[:_MOST_PANELS])
    figure, axes = _panels(len(drawn), width=2.6, height=2.5)
    for (name, matrix), panel in zip(drawn.items(), axes, strict=True):
        panel.imshow(matrix, cmap="Greys", vmin=0, vmax=1)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
        panel.set_title(short(finding.labels.get(name, name)), fontsize="small")
        panel.set_xticks(range(len(matrix)), [str(i + 1) for i in range(len(matrix))])
        panel.set_yticks(range(len(matrix)), [str(i + 1) for i in range(len(matrix))])
    hidden = len(finding.matrices) - len(drawn)
    figure.suptitle(f"{finding.title}{f' ({hidden} more groups not drawn)' if hidden else ''}")
    return figure


def _gate_use(finding: GateUse, analysis: Analysis) -> Figure | None:
    """One panel per part: its mean gate on each task, over the layers."""
    if not finding.use:
        return None
    parts = len(next(iter(next(iter(finding.use.values())).values())))
    figure, axes = _panels(parts)
    where = {s.module: s.depth for s in analysis.spectra}
    for part, panel in enumerate(axes):
        for number, (task, gates) in enumerate(finding.use.items()):
            depths: dict[int, list[float]] = {}
            for module, gate in gates.items():
                depths.setdefault(where[module], []).append(gate[part])
            _lines(panel, number, task, [(depth, sum(v) / len(v)) for depth, v in sorted(depths.items())])
        panel.set(xlabel="layer", ylabel=f"mean gate of {finding.part} {part + 1}", ylim=(0, 1))
    _grids(axes)
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(finding.title)
    return figure


_DRAWN: dict[type[Finding], Callable[[Any, Analysis], Figure | None]] = {
    Handovers: _handovers,
    OverLayers: _over_layers,
    Matrices: _matrices,
    GateUse: _gate_use,
}


def _grids(axes: Iterable[Axes]) -> None:
    for panel in axes:
        panel.grid(color="0.92", linewidth=0.6)
        panel.set_axisbelow(True)
