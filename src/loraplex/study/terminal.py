"""A study's plan and results as tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from rich.table import Table

from loraplex.recipes.console import PlainConsole, make_console
from loraplex.study.config import StudyConfig
from loraplex.study.results import TaskResult
from loraplex.study.run import State
from loraplex.study.sections import sections
from loraplex.study.tables import Table as Content
from loraplex.study.trials import searched

_MOST_LINES = 20


def print_plan(state: State) -> None:
    """Methods with their settings, and how many trials there are; to stderr, as all that is not a result."""
    study, console = state.study, PlainConsole(stderr=True, width=None if sys.stderr.isatty() else 160)
    for task, sizes in state.sizes.items():
        head, rows = ["method", "settings", "trainable", "off budget"], []
        for method, sized in sizes.items():
            settings = ", ".join(f"{k} {v}" for k, v in sized.adapter.items())
            rows.append(
                [method, settings, f"{sized.parameters:,}", "" if sized.excess is None else f"{sized.excess:+,}"]
            )
        console.print(_table(f"{study.title}: {task}", (head, rows)))
    search = list(searched(study))
    final = len(study.tasks) * len(study.methods) * len(study.seeds)
    again = sum(trial.seed in study.seeds for trial in search)
    reused = again // len(study.learning_rates) if search else 0
    console.print(
        f"{len(search)} runs to choose learning rates, {final - reused} more to compare, in {study.output_dir}; "
        f"{sum(state.folder(trial).outcome is not None for trial in state.possible)} are done."
    )


def print_results(study: StudyConfig, results: Sequence[TaskResult]) -> None:
    """The report's sections; of a long list only its beginning."""
    console = make_console()
    for section in sections(study, results):
        if not section.title:
            console.print(section.task)
        if section.table is not None:
            console.print(_table(f"{section.task}: {section.title}", section.table))
        for line in section.lines[:_MOST_LINES]:
            console.print(line.split("\n", 1)[0])
        if len(section.lines) > _MOST_LINES:
            console.print(f"and {len(section.lines) - _MOST_LINES} more, which the report names")


def _table(title: str, content: Content) -> Table:
    head, rows = content
    table = Table(title=title, title_justify="left")
    for name in head:
        justify: Literal["left", "right"] = "left" if name in ("method", "settings", "verdict") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
