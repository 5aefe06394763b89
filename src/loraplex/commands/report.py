"""Tables for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from loraplex.export.lora import LoraExport
from loraplex.export.merged import MergedExport
from loraplex.export.servers import ENGINES
from loraplex.inspection.describe import Description
from loraplex.recipes.console import make_console, size_text
from loraplex.recipes.models.budgeting import STEP_PARTS, BudgetReport, step_parts
from loraplex.recipes.training.result import Result
from loraplex.tuner.findings import Fact, Handovers

if TYPE_CHECKING:
    from loraplex.inspection.spectra import Analysis, Spectrum
    from loraplex.tuner.calibration import Calibration

# Choices of equal length have equal accuracies: one row is enough then.
_SAME_AS = {"accuracy_norm": "accuracy"}
# Columns of words, which stand at the left.
_WORDS = {
    "task",
    "modules",
    "metric",
    "module",
    "factors",
    "family",
    "factor",
    "shape",
    "read by layers",
    "method",
    "settings",
}
_METRICS = ("loss", "perplexity", "accuracy", "accuracy_norm", "exact_match", "f1")


def print_summary(result: Result) -> None:
    """What a finished run achieved, and where everything is."""
    console = make_console()
    if result.after:
        print_metrics(_columns(result.after, before=result.before, after=result.after), "Held-out data")
    facts = [
        ("adapter", str(result.output_dir)),
        ("trainable parameters", f"{result.trainable:,}"),
        ("time", _duration(result.seconds)),
        ("peak memory", f"{result.peak_memory / 2**30:.2f} GiB"),
        ("steps", f"{result.step:,}"),
    ]
    console.print(_facts(facts))


def _facts(facts: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def _columns(tasks: Iterable[str], **columns: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """task → {column: metrics}."""
    return {task: {name: values[task] for name, values in columns.items() if task in values} for task in tasks}


def print_metrics(tasks: dict[str, dict[str, Any]], title: str) -> None:
    """One row per task and metric, one column per model."""
    names = list(dict.fromkeys(name for columns in tasks.values() for name in columns))
    table = _table(title, "task", "metric", *names)
    for task, columns in tasks.items():
        label = f"{task} ({next(iter(columns.values()))['examples']:,} examples)"
        others = {key: None for values in columns.values() for key in values if key not in (*_METRICS, "examples")}
        for metric in (*_METRICS, *others):
            if any(values.get(metric) not in (None, values.get(_SAME_AS.get(metric))) for values in columns.values()):
                cells = [_number(columns.get(name, {}).get(metric)) for name in names]
                table.add_row(label, metric, *cells)
                label = ""
        table.add_section()
    make_console().print(table)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def print_description(description: Description, adapter: Path) -> None:
    """Parameters per module, what is shared between which layers, what was merged when."""
    console = make_console()
    size = "" if description.file_bytes is None else f", {description.file_bytes:,} bytes"
    facts = [
        ("adapter", str(adapter)),
        ("base model", str(description.base_model)),
        ("method", f"{description.method}, r {description.r}, lora_alpha {description.lora_alpha:g}"),
        ("trainable parameters", f"{description.parameters:,}{size}"),
    ]
    facts += [(finding.label, finding.text) for finding in description.findings if isinstance(finding, Fact)]
    console.print(_facts(facts))
    if description.modules or description.fully_trained:
        _print_modules(description, console)
    if description.shared:
        table = _table("Shared", "family", "factor", "shape", "parameters", "read by layers")
        for row in description.shared:
            shape = " × ".join(map(str, row.shape))
            table.add_row(_dotted(row.family), _short(row.factor), shape, f"{row.parameters:,}", _ranges(row.layers))
        console.print(table)
    for finding in description.findings:
        if isinstance(finding, Handovers) and finding.rows:
            table = _table(finding.key.capitalize(), "step", "family", "layer", f"now reads {finding.factor} of")
            for gone in finding.rows:
                table.add_row(str(gone.step), _dotted(gone.family), str(gone.layer), str(gone.reads))
            console.print(table)


def _print_modules(description: Description, console: Console) -> None:
    plain = any(row.rank is not None for row in description.modules)
    more = ["rank", "‖ΔW‖"] if plain else []
    table = _table("Modules", "module", "factors", "parameters", *more, *(["error"] if description.against else []))
    for row in description.modules:
        factors = ", ".join(f"{_short(name)} {'×'.join(map(str, shape))}" for name, shape in row.factors.items())
        # Embeddings and convolutions have neither.
        numbers = [_or_dash(row.rank, "d"), _or_dash(row.norm, ".4g")] if plain else []
        error = [_or_dash(description.against.get(row.module), ".2e")] if description.against else []
        table.add_row(row.module, factors, f"{row.parameters:,}", *numbers, *error)
    for name, parameters in description.fully_trained.items():
        table.add_row(name, "trained in full", f"{parameters:,}")
    console.print(table)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def print_export(export: LoraExport | MergedExport, calibration: Calibration | None) -> None:
    """What was written, how exact it is, and how to serve it."""
    console = make_console()
    lora = isinstance(export, LoraExport)
    facts = [("plain LoRA" if lora else "merged model", export.folder)]
    if isinstance(export, LoraExport):
        facts.append(("rank", f"{export.rank}, lora_alpha {export.rank}, scaling inside B"))
        error = f"exact (measured {export.error:.1e})" if export.exact else f"{export.error:.4g}"
        facts.append(("relative error of ΔW", error))
        shares = {module.module: module.error for module in export.modules}
    else:
        facts.append(("share of ΔW lost to rounding", f"{export.lost:.3g}"))
        shares = {module.module: module.lost for module in export.modules}
    worst = max(shares, key=shares.__getitem__)
    facts.append(("worst module", f"{shares[worst]:.3g} ({worst})"))
    if calibration is not None:
        errors = calibration.errors.values()
        facts.append(("mean gates miss", f"{sum(errors) / len(errors):.3g} of the updates, {max(errors):.3g} at worst"))
        facts.append(("", f"{calibration.output_error:.3g} of the adapter's effect on the outputs (held-out text)"))
    facts += [("note", text) for text in export.notes]
    lost = sum(share > 0.5 for share in shares.values())
    if lost and not lora:
        text = f"rounding takes most of the update of {lost} of {len(shares)} modules: merge with --dtype float32"
        facts.append(("warning", text))
    if isinstance(export, LoraExport) and (command := ENGINES[export.engine].command):
        # People paste it into a shell, and the base model's name comes from the adapter.
        names = {"folder": export.folder, "base": str(export.base_model)}
        quoted = names if export.engine == "peft" else {key: shlex.quote(name) for key, name in names.items()}
        facts.append(("serve", command.format(rank=export.rank, **quoted)))
    console.print(_facts(facts))


def print_analysis(analysis: Analysis, written: list[Path]) -> None:
    """Per role: how many directions the updates use; and where the figures are."""
    console = make_console()
    table = _table("Updates", "modules", "layers", "effective rank", "σ₁ / Σ σ", "‖ΔW‖")
    roles: dict[str, list[Spectrum]] = {}
    for spectrum in analysis.spectra:
        roles.setdefault(spectrum.role, []).append(spectrum)
    for role, group in roles.items():
        cells = [
            _span([getter(s) for s in group])
            for getter in (lambda s: s.effective_rank, lambda s: s.share(1), lambda s: s.norm)
        ]
        table.add_row(_dotted(role), str(len(group)), *cells)
    console.print(table)
    for note in dict.fromkeys(s.note for s in analysis.spectra if s.note):
        console.print(f"spectra: {note}")
    console.print("plots: " + ", ".join(str(path) for path in written))


def _span(values: list[float]) -> str:
    """Mean, lowest and highest."""
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def print_budgets(report: BudgetReport) -> None:
    """What each method's adapter is, and what a step with it takes: a table each, with a row per method."""
    console, budgets = make_console(), report.budgets
    weights = next(iter(budgets.values())).weight_bytes
    facts = [("base model", report.model)]
    facts.append(("", f"{report.base_parameters:,} parameters, {size_text(weights)} as {report.dtype}"))
    common = _common([budget.settings for budget in budgets.values()])
    if common:
        facts.append(("each adapter", _settings(common)))
    if report.target is not None:
        facts.append(("to match", f"{report.target:,} trainable parameters ({report.reference})"))
    console.print(_facts(facts))
    merges = any(budget.merged_file_bytes != budget.file_bytes for budget in budgets.values())
    more = ["off by"] if report.target is not None else []
    merged = ["after all merges"] if merges else []
    table = _table("Adapter", "method", "settings", "trainable", "of base", *more, "file", *merged)
    for method, budget in budgets.items():
        own = {name: value for name, value in budget.settings.items() if name not in common}
        cells = [f"{budget.parameters:,}", f"{budget.share:.3%}"]
        cells += [f"{budget.excess:+,}"] if budget.excess is not None else []
        cells += [size_text(size) for size in (budget.file_bytes, *([budget.merged_file_bytes] if merges else []))]
        table.add_row(method, _settings(own), *cells)
    console.print(table)
    autocast = " under autocast" if report.autocast else ""
    table = _table(f"Memory of a step of {report.tokens:,} tokens{autocast}", "method", *STEP_PARTS, "together")
    for method, budget in budgets.items():
        table.add_row(method, *map(size_text, step_parts(budget).values()), size_text(budget.step_bytes))
    console.print(table)
    console.print("On top: what the frozen model keeps for backward, and buffers of single operations.")


def _common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What all adapters share; a single one shares nothing."""
    first, *others = settings
    return {k: v for k, v in first.items() if others and all(k in o and o[k] == v for o in others)}


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items())


def _table(title: str, *columns: str) -> Table:
    """A table whose names are folded, never cut, and whose numbers stand at the right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        words = column in _WORDS
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _dotted(family: str) -> str:
    """Families are keys of a module table, where a name can't hold dots."""
    return family.replace("__", ".")


def _short(factor: str) -> str:
    return factor.removeprefix("lora_")


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0–2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
