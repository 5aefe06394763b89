"""Figures of a report as SVG text, told apart by marker and dash, so that they can be read without colour."""

from __future__ import annotations

import html
import io
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from loraplex.recipes.training.metrics import smooth
from loraplex.study.choice import LOWER_IS_BETTER
from loraplex.study.config import BASE
from loraplex.study.results import ALL, TaskResult

# Okabe and Ito's colours, which stay apart for colour-blind people; the darkest first.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_MARKERS = "osD^vP*X<>"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))

_names_as_they_are = rc_context({"text.parse_math": False})
"""A name may hold a $."""


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the method that stands at `number`."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


@_names_as_they_are
def differences(result: TaskResult, reference: str) -> str | None:
    """Each method's difference to the reference with its interval, one panel per data set."""
    groups = [ALL, *result.data] if len(result.data) > 1 else result.data
    lines = {data: [line for line in result.of(data) if line.difference is not None] for data in groups}
    groups = [data for data in groups if lines[data]]
    if not groups:
        return None
    rows = len(lines[groups[0]])
    columns = min(3, len(groups))
    height = -(-len(groups) // columns)
    figure = Figure(figsize=(3.0 * columns + 1.2, (0.32 * rows + 1.0) * height), layout="constrained")
    all_axes = figure.subplots(height, columns, squeeze=False, sharey=True).flat
    for axes, data in zip(all_axes, groups, strict=False):
        for place, line in enumerate(reversed(lines[data])):
            d = line.difference
            assert d is not None
            if d.low is not None:
                axes.plot([d.low, d.high], [place, place], color="black", linewidth=1.4, solid_capstyle="butt")
            axes.plot(d.mean, place, marker="o", color="black", markerfacecolor="black" if line.verdict else "white")
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_yticks(range(rows), [line.method for line in reversed(lines[groups[0]])])
        axes.set_ylim(-0.6, rows - 0.4)
        axes.set_title("mean of data sets" if data == ALL else data, fontsize="medium")
        axes.set_xlabel(f"{result.metric} − {reference}'s")
    for axes in list(all_axes)[len(groups) :]:
        axes.set_visible(False)
    return _svg(figure, f"Difference to {reference} with 95 % intervals")


@_names_as_they_are
def quality_against_size(result: TaskResult) -> str | None:
    """The deciding metric against trainable parameters."""
    data = ALL if len(result.data) > 1 else next(iter(result.data), "")
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(result.settings):
        line, cost = result.line(method, data), result.costs.get(method)
        if line is not None and cost is not None and cost.parameters is not None:
            axes.errorbar(
                cost.parameters, line.mean, yerr=line.deviation or 0, capsize=3, markersize=7, markerfacecolor="white",
                label=method, **style(number) | {"linestyle": "none"},
            )  # fmt: skip
    if not axes.get_legend_handles_labels()[0]:
        return None
    if (base := result.line(BASE, data)) is not None:
        axes.axhline(base.mean, color="0.6", linewidth=0.8, linestyle=":", label="base model")
    axes.set(xlabel="trainable parameters", ylabel=_label(result))
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
    _finish(axes)
    return _svg(figure, f"{result.metric} against trainable parameters")


@_names_as_they_are
def loss_curves(result: TaskResult) -> str | None:
    """Training loss, mean over seeds and smoothed."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(result.settings):
        curves = [dict(curve) for curve in result.curves.get(method, []) if curve]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = smooth([fmean(curve[step] for curve in curves) for step in steps], max(1.0, len(steps) / 15))
        marks: dict[str, Any] = {"markevery": max(1, len(steps) // 8), "markersize": 5, "markerfacecolor": "white"}
        axes.plot(steps, means, label=method, linewidth=1.3, **marks, **style(number))
    if not axes.get_legend_handles_labels()[0]:
        return None
    axes.set(xlabel="step", ylabel="training loss (nats)")
    _finish(axes)
    return _svg(figure, "Training loss by step")


@_names_as_they_are
def cumulative_spectra(result: TaskResult) -> str | None:
    """How few directions the updates live in: the earlier a curve rises, the fewer."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(result.settings):
        curves = [inside.cumulative for inside in result.updates.get(method, []) if inside.cumulative]
        if curves:
            length = min(map(len, curves))
            means = [fmean(curve[k] for curve in curves) for k in range(length)]
            marks: dict[str, Any] = {
                "markerfacecolor": "white",
                "markevery": [2**i - 1 for i in range(length.bit_length())],
            }
            axes.plot(range(1, length + 1), means, label=method, **marks, **style(number))
    if not axes.get_legend_handles_labels()[0]:
        return None
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="first k singular values", ylabel="share of Σ σ", ylim=(0, 1.02))
    _finish(axes)
    return _svg(figure, "Cumulative share of singular values")


@_names_as_they_are
def rates(result: TaskResult) -> str | None:
    """What each learning rate came to on the eval parts."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(result.settings):
        choice = result.choices.get(method)
        tried = {} if choice is None else {rate: value for rate, value in choice.tried.items() if value is not None}
        if tried:
            axes.plot(list(tried), list(tried.values()), label=method, markerfacecolor="white", **style(number))
    if not axes.get_legend_handles_labels()[0]:
        return None
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel=f"{next(iter(result.choices.values())).metric} on the eval parts")
    _finish(axes)
    return _svg(figure, "Learning rates tried")


def _label(result: TaskResult) -> str:
    better = "lower is better" if result.metric in LOWER_IS_BETTER else "higher is better"
    return f"{result.metric} ({better})"


def _finish(axes: Any) -> None:
    axes.grid(color="0.92", linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")


def _svg(figure: Figure, description: str) -> str:
    """The figure as an <svg> element for a page."""
    buffer = io.StringIO()
    # A fixed salt and no date: the same results give the same file. Text stays text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)
