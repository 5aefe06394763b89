"""The report of a study: results.json, results.csv, report.md, and report.html, which needs no other file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from loraplex.io.files import write_text
from loraplex.io.reading import printable
from loraplex.recipes.training.result import versions
from loraplex.study.config import StudyConfig
from loraplex.study.page import page
from loraplex.study.results import TaskResult, collect
from loraplex.study.run import State
from loraplex.study.sections import Section, sections, setup
from loraplex.study.tables import Table, first_line

JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME = "results.json", "results.csv", "report.md", "report.html"
_COLUMNS = (
    *("task", "data", "method", "metric", "mean", "deviation", "seeds", "difference", "low", "high", "wins", "verdict"),
    *("learning_rate", "parameters", "file_bytes", "peak_memory_bytes", "step_seconds", "general_perplexity"),
)


def write_report(state: State) -> list[TaskResult]:
    """Write all four files into the study's folder, from the trials that have run."""
    results, folder, made = collect(state), Path(state.study.output_dir), versions()
    found = sections(state.study, results, figures=True)
    plain = {"study": state.study.model_dump(mode="json"), "versions": made, "tasks": [r.to_dict() for r in results]}
    write_text(folder / JSON_NAME, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / CSV_NAME, _csv(results))
    write_text(folder / MARKDOWN_NAME, markdown(state.study, found))
    write_text(folder / HTML_NAME, page(state.study, found, made))
    return results


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


def markdown(study: StudyConfig, found: Sequence[Section]) -> str:
    """The tables and what is said beside them; figures are left out, and of a message its first line is kept."""
    parts = [f"# {_plain(study.title)}", _plain(setup(study))]
    for section in found:
        if section.title and section.table is None and not section.lines:
            continue
        parts.append(f"### {_plain(section.title)}" if section.title else f"## {_plain(section.task)}")
        if section.table is not None:
            parts.append(_markdown(section.table))
        if section.lines:
            parts.append("\n".join(f"- {_plain(first_line(line))}" for line in section.lines))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    head, rows = table
    lines = [_markdown_row(head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *map(_markdown_row, rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """A name or a message in Markdown: one line, and no tags."""
    return " ".join(printable(text).split("\n")).replace("<", "&lt;")
