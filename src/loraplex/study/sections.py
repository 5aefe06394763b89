"""What a study's report consists of: one list of sections, which HTML, Markdown and the terminal show alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loraplex.study import plots
from loraplex.study.config import StudyConfig
from loraplex.study.results import ALL, TaskResult
from loraplex.study.tables import Table, cost_table, groups, score_table, update_notes, update_table, verdicts


@dataclass(frozen=True)
class Section:
    """A heading with a table, sentences and figures under it, each of which may be missing."""

    task: str
    title: str = ""
    """"" for what stands under the task's own heading."""
    table: Table | None = None
    lines: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    """(caption, SVG element)."""


def setup(study: StudyConfig) -> str:
    """What was compared, in one line."""
    tried = len(study.learning_rates)
    rates = f"{tried} learning rates each, chosen on the eval parts" if tried > 1 else "one learning rate"
    budget = f"budget {study.budget}" if study.budget else "settings as given"
    return (
        f"{study.model}; {budget}; {rates}; {len(study.seeds)} seeds; scores on test parts that nothing was chosen by."
    )


def sections(study: StudyConfig, results: Sequence[TaskResult], figures: bool = False) -> list[Section]:
    """The sections of all tasks in their order.

    Args:
        study: what was compared.
        results: of each task.
        figures: whether to draw the figures; only a page of HTML shows them.
    """
    return [section for result in results for section in _of_task(study.reference, result, figures)]


def _of_task(reference: str, result: TaskResult, figures: bool) -> Iterator[Section]:
    task, several = result.task, len(result.data) > 1
    yield Section(task, lines=verdicts(result, reference))
    for data in groups(result):
        title = "Mean of the data sets" if data == ALL else data
        yield Section(task, title, score_table(result, data, reference))
    for metric in result.others:
        title = f"Beside it: {metric}{', mean of the data sets' if several else ''}"
        yield Section(task, title, score_table(result, groups(result)[0], reference, metric))
    if result.costs:
        yield Section(task, "Cost", cost_table(result))
    if (table := update_table(result)) is not None:
        yield Section(task, "What the updates look like", table, update_notes(result))
    if figures and (drawn := _figures(result, reference)):
        yield Section(task, "Figures", figures=drawn)
    if result.failures or result.missing:
        lines = [f"failed: {trial}: {message}" for trial, message in result.failures]
        yield Section(task, "What is missing", lines=lines + [f"not run yet: {trial}" for trial in result.missing])


def _figures(result: TaskResult, reference: str) -> list[tuple[str, str]]:
    drawn = {
        f"Difference to {reference}: the interval is filled where it leaves zero out.": plots.differences(
            result, reference
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
    return [(caption, svg) for caption, svg in drawn.items() if svg is not None]
