"""A study's plan and results as tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.table import Table

from loraplex.recipes.console import PlainConsole, make_console
from loraplex.study.config import StudyConfig
from loraplex.study.report import Table as Cells
from loraplex.study.report import cost_table, first_line, groups, score_table, update_table, verdicts
from loraplex.study.results import ALL, TaskResult
from loraplex.study.run import State
from loraplex.study.trials import searched


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
    """Scores, costs, and what is missing."""
    console = make_console()
    for result in results:
        for data in groups(result):
            title = f"{result.task}: {'mean of the data sets' if data == ALL else data}"
            console.print(_table(title, score_table(result, data, study.reference)))
        for metric in result.others:
            title = f"{result.task}: beside it, {metric}"
            console.print(_table(title, score_table(result, groups(result)[0], study.reference, metric)))
        if result.costs:
            console.print(_table(f"{result.task}: cost", cost_table(result)))
        if (inside := update_table(result)) is not None:
            console.print(_table(f"{result.task}: what the updates look like", inside))
        for said in verdicts(result, study.reference):
            console.print(said)
        for trial, message in result.failures:
            console.print(f"failed: {trial}: {first_line(message)}")
        if result.missing:
            console.print(f"{len(result.missing)} trials have not run yet; the report names them.")


def _table(title: str, cells: Cells) -> Table:
    head, rows = cells
    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(
            name, justify="left" if name in ("method", "settings", "verdict") else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    return table
