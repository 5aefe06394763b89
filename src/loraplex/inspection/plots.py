"""Plots of an analysis, one PNG each; methods, layers and families are told apart by marker, dash and lightness."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loraplex.inspection.spectra import Analysis, Spectrum
from loraplex.io.reading import printable

_MARKERS = "osD^vP*X<>"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MOST_PANELS = 12


@rc_context({"text.parse_math": False})  # a name may hold a $
def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Write the figures that the adapter's method has something for; returns their paths."""
    figures: dict[str, Callable[[Analysis], Figure | None]] = {
        "spectra": _spectra,
        "rank_by_depth": _rank_by_depth,
        "merges": _merges,
        "gates": _gates,
        "scaling": _scaling,
        "expert_similarity": _similarity,
        "expert_use": _use,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in figures.items():
        if (figure := make(analysis)) is not None:
            path = folder / f"{name}.png"
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            FigureCanvasAgg(figure)
            figure.savefig(temporary, format="png")
            os.replace(temporary, path)
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


def _merges(analysis: Analysis) -> Figure | None:
    """Per family: each layer is a line until its B is merged into another's; the arrow says whose."""
    if not analysis.merges:
        return None
    families = list(dict.fromkeys(merge.family for merge in analysis.merges))[:_MOST_PANELS]
    last = max(merge.step for merge in analysis.merges)
    end = last * 1.08 + 1
    figure, axes = _panels(len(families), height=3.4, columns=3)
    for family, panel in zip(families, axes, strict=True):
        merges = {merge.layer: merge for merge in analysis.merges if merge.family == family}
        layers = analysis.layers.get(family, max(merges) + 1)
        for layer in range(layers):
            merge = merges.get(layer)
            stop = end if merge is None else merge.step
            panel.plot([0, stop], [layer, layer], color="black", linewidth=1.4 if merge is None else 0.8)
            if merge is not None:
                panel.plot([stop, end], [layer, layer], color="0.75", linewidth=0.8, linestyle=":")
                arrow = {"arrowstyle": "->", "color": "black", "linewidth": 0.8}
                panel.annotate("", (merge.step, merge.reads), (merge.step, layer), arrowprops=arrow)
        panel.set(xlabel="step", ylabel="layer", xlim=(0, end), ylim=(-0.7, layers - 0.3))
        panel.set_title(short(family), fontsize="medium")
    figure.suptitle("ASLoRA: merges of B, → whose is read")
    return figure


def _over_layers(figure: Figure, panels: list[Axes], parts: dict[str, dict[str, float]], analysis: Analysis) -> None:
    where = {s.module: s for s in analysis.spectra}
    for panel, (label, values) in zip(panels, parts.items(), strict=True):
        roles: dict[str, list[tuple[int, float]]] = {}
        for module, value in values.items():
            roles.setdefault(where[module].role, []).append((where[module].depth, value))
        for number, (role, points) in enumerate(roles.items()):
            _lines(panel, number, short(role), sorted(points))
        panel.set(xlabel="layer", ylabel=label, ylim=(0, None))
    _grids(panels)
    panels[0].legend(frameon=False, fontsize="small")


def _gates(analysis: Analysis) -> Figure | None:
    """Dual LoRA: closed gates and negative signs over the layers."""
    if not analysis.closed:
        return None
    figure, axes = _panels(2, width=4.2, height=3.2)
    parts = {"share of closed gates (BA ≤ 0)": analysis.closed, "negative share of open gates": analysis.negative}
    _over_layers(figure, axes, parts, analysis)
    for panel in axes:
        panel.set_ylim(0, 1)
    figure.suptitle("Dual LoRA: gates and signs")
    return figure


def _scaling(analysis: Analysis) -> Figure | None:
    """MultiLoRA: the size of each module's scaling factors over the layers."""
    if not analysis.scaling:
        return None
    count = len(next(iter(analysis.scaling.values())))
    figure, axes = _panels(count)
    parts = {f"mean |c| of module {i + 1}": {m: c[i] for m, c in analysis.scaling.items()} for i in range(count)}
    _over_layers(figure, axes, parts, analysis)
    top = max(panel.get_ylim()[1] for panel in axes)
    for panel in axes:
        panel.set_ylim(0, top)
    figure.suptitle("MultiLoRA: scaling factors")
    return figure


def _similarity(analysis: Analysis) -> Figure | None:
    """MASA: similarity of the experts of each group."""
    if not analysis.similarity:
        return None
    groups = dict(list(analysis.similarity.items())[:_MOST_PANELS])
    figure, axes = _panels(len(groups), width=2.6, height=2.5)
    for (name, matrix), panel in zip(groups.items(), axes, strict=True):
        panel.imshow(matrix, cmap="Greys", vmin=0, vmax=1)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
        family, _, factor = name.rpartition("__lora_A_")
        panel.set_title(f"{short(family)}, group {factor}", fontsize="small")
        panel.set_xticks(range(len(matrix)), [str(i + 1) for i in range(len(matrix))])
        panel.set_yticks(range(len(matrix)), [str(i + 1) for i in range(len(matrix))])
    hidden = len(analysis.similarity) - len(groups)
    figure.suptitle(f"MASA: linear CKA between experts{f' ({hidden} more groups not drawn)' if hidden else ''}")
    return figure


def _use(analysis: Analysis) -> Figure | None:
    """MASA's router: mean gate of each expert on each task, over the layers."""
    if not analysis.use:
        return None
    experts = len(next(iter(next(iter(analysis.use.values())).values())))
    figure, axes = _panels(experts)
    where = {s.module: s.depth for s in analysis.spectra}
    for expert, panel in enumerate(axes):
        for number, (task, gates) in enumerate(analysis.use.items()):
            depths: dict[int, list[float]] = {}
            for module, gate in gates.items():
                depths.setdefault(where[module], []).append(gate[expert])
            _lines(panel, number, task, [(depth, sum(v) / len(v)) for depth, v in sorted(depths.items())])
        panel.set(xlabel="layer", ylabel=f"mean gate of expert {expert + 1}", ylim=(0, 1))
    _grids(axes)
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle("MASA: which experts each task uses")
    return figure


def _grids(axes: Iterable[Axes]) -> None:
    for panel in axes:
        panel.grid(color="0.92", linewidth=0.6)
        panel.set_axisbelow(True)
