"""The report of a study: results.json, results.csv, report.md, and report.html, which needs no other file."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraplex.io.files import write_text
from loraplex.io.reading import printable
from loraplex.recipes.console import size_text
from loraplex.recipes.training.result import versions
from loraplex.study import plots
from loraplex.study.choice import LOWER_IS_BETTER
from loraplex.study.config import BASE, StudyConfig, to_yaml
from loraplex.study.results import ALL, Line, TaskResult, collect
from loraplex.study.run import State
from loraplex.study.statistics import spread
from loraplex.study.update_summary import TOP

JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME = "results.json", "results.csv", "report.md", "report.html"

Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def write_report(state: State) -> list[TaskResult]:
    """Write all four files into the study's folder, from the trials that have run."""
    results, folder, made = collect(state), Path(state.study.output_dir), versions()
    plain = {"study": state.study.model_dump(mode="json"), "versions": made, "tasks": [r.to_dict() for r in results]}
    write_text(folder / JSON_NAME, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / CSV_NAME, _csv(results))
    write_text(folder / MARKDOWN_NAME, markdown(state.study, results))
    write_text(folder / HTML_NAME, page(state.study, results, made))
    return results


# Tables


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
    notes = {
        method: sorted({note for inside in seeds for note in inside.notes}) for method, seeds in result.updates.items()
    }
    return [f"{method}: {note}" for method, found in notes.items() for note in found]


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
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _name(method: str) -> str:
    return "base model" if method == BASE else method


def first_line(message: str) -> str:
    """The beginning of a message that may have several lines, or none."""
    return message.split("\n", 1)[0]


def groups(result: TaskResult) -> list[str]:
    """The mean first where there are several data sets, then each of them."""
    return [ALL, *result.data] if len(result.data) > 1 else result.data


def _heading(result: TaskResult, data: str) -> str:
    return "Mean of the data sets" if data == ALL else data


def _beside(result: TaskResult, metric: str) -> str:
    return f"Beside it: {metric}{', mean of the data sets' if len(result.data) > 1 else ''}"


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


# Files

_COLUMNS = (
    *("task", "data", "method", "metric", "mean", "deviation", "seeds", "difference", "low", "high", "wins", "verdict"),
    *("learning_rate", "parameters", "file_bytes", "peak_memory_bytes", "step_seconds", "general_perplexity"),
)


def markdown(study: StudyConfig, results: Sequence[TaskResult]) -> str:
    """The tables alone."""
    parts = [f"# {_plain(study.title)}", _plain(_setup(study))]
    for result in results:
        parts.append(f"## {_plain(result.task)}")
        parts += [f"- {_plain(said)}" for said in verdicts(result, study.reference)]
        for data in groups(result):
            parts += [f"### {_plain(_heading(result, data))}", _markdown(score_table(result, data, study.reference))]
        for metric in result.others:
            data = groups(result)[0]
            parts += [f"### {_beside(result, metric)}", _markdown(score_table(result, data, study.reference, metric))]
        parts += ["### Cost", _markdown(cost_table(result))]
        if (inside := update_table(result)) is not None:
            parts += ["### What the updates look like", _markdown(inside)]
            parts += [f"- {_plain(note)}" for note in update_notes(result)]
        parts += [f"- failed: {trial}: {_plain(first_line(message))}" for trial, message in result.failures]
        parts += [f"- not run yet: {trial}" for trial in result.missing]
    text = "\n\n".join(part for part in parts if part)
    return text.replace("\n\n- ", "\n- ") + "\n"


def _setup(study: StudyConfig) -> str:
    tried = len(study.learning_rates)
    rates = f"{tried} learning rates each, chosen on the eval parts" if tried > 1 else "one learning rate"
    budget = f"budget {study.budget}" if study.budget else "settings as given"
    return (
        f"{study.model}; {budget}; {rates}; {len(study.seeds)} seeds; scores on test parts that nothing was chosen by."
    )


def _markdown(table: Table) -> str:
    head, rows = table
    lines = [_markdown_row(head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *map(_markdown_row, rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """A name or a message in Markdown: one line, and no tags."""
    return " ".join(printable(text).split("\n")).replace("<", "&lt;")


def _csv(results: Sequence[TaskResult]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in results:
        for line in result.lines:
            d, cost, choice = line.difference, result.costs[line.method], result.choices.get(line.method)
            writer.writerow(
                [result.task, line.data, line.method, line.metric, line.mean, line.deviation, len(line.seeds)]
                + ([d.mean, d.low, d.high, d.wins] if d else [""] * 4)
                + [line.verdict, choice.rate if choice else "", cost.parameters, cost.file_bytes]
                + [cost.peak_memory_bytes, cost.step_seconds, cost.perplexity]
            )
    return buffer.getvalue()


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; font-size: .92rem; }
.wide { overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #111; vertical-align: bottom; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { max-width: 22rem; font-size: .85rem; }
tr.better td:last-child, tr.worse td:last-child { font-weight: bold; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85rem; }
"""


def page(study: StudyConfig, results: Sequence[TaskResult], made: dict[str, Any]) -> str:
    """One page with everything in it: no script, no other file, nothing from the network."""
    escape = html.escape
    parts = [f"<h1>{escape(study.title)}</h1>", f"<p>{escape(_setup(study))}</p>"]
    for result in results:
        parts.append(f"<h2>{escape(result.task)}</h2>")
        parts.append(
            "<ul>" + "".join(f"<li>{escape(said)}</li>" for said in verdicts(result, study.reference)) + "</ul>"
        )
        for data in groups(result):
            parts += [f"<h3>{escape(_heading(result, data))}</h3>", _table(score_table(result, data, study.reference))]
        for metric in result.others:
            table = score_table(result, groups(result)[0], study.reference, metric)
            parts += [f"<h3>{escape(_beside(result, metric))}</h3>", _table(table)]
        parts += ["<h3>Cost</h3>", _table(cost_table(result))]
        if (inside := update_table(result)) is not None:
            notes = "".join(f"<li>{escape(note)}</li>" for note in update_notes(result))
            parts += ["<h3>What the updates look like</h3>", _table(inside), f"<ul>{notes}</ul>" if notes else ""]
        figures = {
            f"Difference to {study.reference}: the interval is filled where it leaves zero out.": plots.differences(
                result, study.reference
            ),
            "Quality against trainable parameters; bars are one standard deviation over seeds.": (
                plots.quality_against_size(result)
            ),
            "Training loss at the chosen learning rate, mean over seeds, smoothed.": plots.loss_curves(result),
            "Share of the first k singular values in the sum of all, mean over modules and seeds.": (
                plots.cumulative_spectra(result)
            ),
            "Learning rates that were tried, on the eval parts.": plots.rates(result),
        }
        for caption, svg in figures.items():
            if svg is not None:
                parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
        if result.failures or result.missing:
            named = [f"failed: {trial}: {message}" for trial, message in result.failures]
            named += [f"not run yet: {trial}" for trial in result.missing]
            parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in named) + "</ul>")
    parts += ["<h2>How to read it</h2>", *(f"<p>{escape(text)}</p>" for text in _EXPLAINED)]
    parts += ["<h2>The study</h2>", f"<pre>{escape(to_yaml(study))}</pre>"]
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    made_with = ", ".join(f"{name} {version}" for name, version in made.items())
    parts.append(f"<p>Made by loraplex compare on {date}, with {escape(made_with)}.</p>")
    head = f'<meta charset="utf-8"><title>{escape(study.title)}</title><style>{_STYLE}</style>'
    viewport = '<meta name="viewport" content="width=device-width">'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}{viewport}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


_EXPLAINED = (
    "Every method had the same number of learning rates to try. The rate was chosen on the eval parts with the seeds "
    "of the search; the test parts were read once, by the runs at the chosen rate.",
    "± is the standard deviation over seeds. The interval of a difference is d ± t · √(s²/S + v): s² is the variance "
    "of the difference between the S seeds, v the variance of a paired bootstrap over test examples, t a Student "
    "quantile with Satterthwaite's degrees of freedom. “Wins” counts seeds. A verdict is given only where the "
    "interval leaves zero out.",
    "What the updates look like: means over the adapted modules. Effective rank is exp(−Σ p log p) with p = σ / Σ σ. "
    "A gate is closed where B A ≤ 0; negative signs are a share of the open gates. Similarity of experts is linear CKA "
    "without centring; the largest gate is that of the expert a module uses most, on average over tokens; separation "
    "of data sets is half of Σ |g − g'| between their mean gates.",
    "Peak memory is that of the process on a CPU and of the accelerator elsewhere; s/step is the median of a training "
    "step without evaluation and saving.",
)


def _table(table: Table) -> str:
    head, rows = table
    body = []
    for row in rows:
        mark = f' class="{row[-1]}"' if row[-1] in ("better", "worse") else ""
        cells = "".join(
            f"<td{' class=text' if name == 'settings' else ''}>{html.escape(cell)}</td>"
            for name, cell in zip(head, row, strict=True)
        )
        body.append(f"<tr{mark}>{cells}</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
