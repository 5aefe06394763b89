"""The tables of a study's report and the sentences beside them, as text that any format can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loraplex.recipes.console import size_text
from loraplex.study.choice import LOWER_IS_BETTER
from loraplex.study.config import BASE
from loraplex.study.results import ALL, Line, TaskResult
from loraplex.study.statistics import spread
from loraplex.study.update_summary import TOP

Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def _number(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric in LOWER_IS_BETTER else f"{100 * value:.1f}"


def _signed(metric: str, value: float) -> str:
    return f"{value:+.4f}" if metric in LOWER_IS_BETTER else f"{100 * value:+.1f}"


def _unit(metric: str) -> str:
    return f"{metric}, nats" if metric in LOWER_IS_BETTER else f"{metric}, %"


def score_table(result: TaskResult, data: str, reference: str, metric: str | None = None) -> Table:
    """Mean ± standard deviation, difference with its interval, wins and verdict on one data set."""
    head = ["method", _unit(metric or result.metric), f"− {reference}", "95 % interval", "wins", "verdict"]
    rows = []
    for line in result.of(data, metric):
        mean = _number(line.metric, line.mean)
        if line.deviation is not None:
            mean += f" ± {_number(line.metric, line.deviation)}"
        rows.append([_name(line.method), mean, *_difference(line, reference)])
    return head, rows


def _difference(line: Line, reference: str) -> list[str]:
    d = line.difference
    if d is None:
        return ["", "", "", "reference" if line.method == reference else ""]
    interval = (
        "one seed"
        if d.low is None or d.high is None
        else (f"{_signed(line.metric, d.low)} to {_signed(line.metric, d.high)}")
    )
    return [_signed(line.metric, d.mean), interval, f"{d.wins} of {d.seeds}", line.verdict or "undecided"]


def cost_table(result: TaskResult) -> Table:
    """What each method is and takes."""
    head = ["method", "settings", "learning rate", "trainable", "file", "peak memory", "s/step"]
    budgeted = any(cost.excess is not None for cost in result.costs.values())
    general = any(cost.perplexity is not None for cost in result.costs.values())
    head[4:4] = ["off budget"] if budgeted else []
    head += ["perplexity, general text"] if general else []
    rows = []
    for method, cost in result.costs.items():
        choice = result.choices.get(method)
        row = [
            _name(method),
            ", ".join(f"{k} {_value(v)}" for k, v in result.settings.get(method, {}).items()),
            f"{choice.rate:g}{f' ({choice.at_edge} tried)' if choice.at_edge else ''}" if choice else "",
            _given(cost.parameters, "{:,}".format),
            *([_given(cost.excess, "{:+,}".format)] if budgeted else []),
            _given(cost.file_bytes, size_text),
            _given(cost.peak_memory_bytes, size_text),
            _given(cost.step_seconds, "{:.3g}".format),
        ]
        if general:
            spread = "" if cost.perplexity_spread is None else f" ± {cost.perplexity_spread:.2f}"
            row.append("" if cost.perplexity is None else f"{cost.perplexity:.2f}{spread}")
        rows.append(row)
    return head, rows


def update_table(result: TaskResult) -> Table | None:
    """What the updates look like, mean ± standard deviation over seeds; None where nothing is known."""
    columns: dict[str, tuple[str, str]] = {
        "effective_rank": ("effective rank", "{:.1f}"),
        "first": ("share of σ₁, %", "%"),
        "top": (f"of the first {TOP}, %", "%"),
        "norm": ("‖ΔW‖", "{:.3g}"),
    }
    updates = result.updates
    known = [name for name in columns if any(getattr(i, name) is not None for seeds in updates.values() for i in seeds)]
    measures = list(dict.fromkeys(name for seeds in updates.values() for i in seeds for name in i.measures))
    if not known:
        return None
    head = ["method", *(columns[name][0] for name in known), *measures]
    rows = []
    for method, seeds in updates.items():
        cells = [_spread([getattr(i, name) for i in seeds], columns[name][1]) for name in known]
        cells += [_spread([i.measures.get(m) for i in seeds], "%" if m.endswith("%") else "{:.3f}") for m in measures]
        if any(cells):
            rows.append([method, *cells])
    return head, rows


def update_notes(result: TaskResult) -> list[str]:
    """What the table of `update_table` leaves out, by method."""
    notes = []
    for method, seeds in result.updates.items():
        notes += [f"{method}: {note}" for note in sorted({note for summary in seeds for note in summary.notes})]
    return notes


def first_line(message: str) -> str:
    """The beginning of a message that may have several lines, or none."""
    return message.split("\n", 1)[0]


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if form == "%":
        known, form = [100 * value for value in known], "{:.1f}"
    mean, deviation = spread(known)
    return form.format(mean) + ("" if deviation is None else f" ± {form.format(deviation)}")


def _given(value: Any, text: Callable[[Any], str]) -> str:
    return "" if value is None else text(value)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(method: str) -> str:
    return "base model" if method == BASE else method


def groups(result: TaskResult) -> list[str]:
    """The mean first where there are several data sets, then each of them."""
    return [ALL, *result.data] if len(result.data) > 1 else result.data


def verdicts(result: TaskResult, reference: str) -> list[str]:
    """What can be said, and what can't."""
    if not result.data:
        return []
    data = groups(result)[0]
    lines = [line for line in result.of(data) if line.difference is not None]
    said = []
    for verdict in ("better", "worse"):
        names = [line.method for line in lines if line.verdict == verdict]
        if names:
            said.append(f"{verdict.capitalize()} than {reference}: {', '.join(names)}.")
    undecided = [line.method for line in lines if not line.verdict]
    if undecided:
        said.append(f"Not told apart from {reference}: {', '.join(undecided)}.")
    if len(lines) > 1:
        shown = len(lines) * (len(groups(result)) + len(result.others))
        said.append(f"Each interval is for one comparison, and one in twenty misses by chance; here are {shown}.")
    edges = [f"{m} ({c.at_edge})" for m, c in result.choices.items() if c.at_edge]
    if edges:
        said.append(f"The best learning rate was at the edge of those tried: {', '.join(edges)}. Try further ones.")
    return said
