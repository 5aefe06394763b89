"""A saved adapter's analysis, from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from loraplex.inspection.spectra import Analysis, add_gate_use, analyse, analyse_lora
from loraplex.recipes.adapters.exporting import batches_of
from loraplex.recipes.adapters.saved import SavedAdapter, adapter_json, gated_config, open_adapter
from loraplex.recipes.config.arguments import config_class
from loraplex.recipes.config.run_config import ConfigError
from loraplex.tuner.config import AdapterConfig

_EXAMPLES = 64


def is_known(adapter: Path, method: str) -> bool:
    """Whether `analyse_adapter` knows what the updates of a method's saved adapter are: ours, and plain LoRA's."""
    cls = config_class(method)
    return issubclass(cls, AdapterConfig) or (cls is LoraConfig and not adapter_json(adapter).get("use_dora"))


def analyse_folder(
    folder: Path,
    with_data: bool | None,
    overrides: Sequence[tuple[str, Any]] = (),
    allow_code: Sequence[str] = (),
) -> Analysis:
    """Analyse the adapter in a folder; a plain LoRA needs no base model.

    Args:
        folder: of one of ours, or of a plain LoRA.
        with_data: as in `analyse_adapter`.
        overrides: of its run.
        allow_code: `module:Class` that may be imported for it.

    Raises:
        ConfigError: `with_data` without gates that depend on the data, or without a run.yaml that says what data to
            use.
    """
    if adapter_json(folder)["peft_type"] == "LORA":
        _needs_data(folder, None, with_data)
        return analyse_lora(str(folder))
    adapter = open_adapter(folder, None, [], list(overrides), data_option=None, allow_code=allow_code)
    if _needs_data(folder, adapter.run.config.method, with_data):
        adapter = open_adapter(folder, None, [], list(overrides), "a run.yaml beside it", allow_code)
    return analyse_adapter(adapter, with_data)


def analyse_adapter(adapter: SavedAdapter, with_data: bool | None = None) -> Analysis:
    """Analyse a saved adapter's updates. Base weights are loaded only with data.

    Args:
        adapter: one of ours, or a plain LoRA.
        with_data: run up to 64 held-out examples of each of its run's tasks, to see what its gates choose; None:
            where it has gates that depend on the data.
    """
    run = adapter.run
    if adapter_json(adapter.folder)["peft_type"] == "LORA":
        return analyse_lora(str(adapter.folder))
    if not _needs_data(adapter.folder, run.config.method, with_data):
        return analyse(adapter.load_on_skeleton())
    tasks, model = run.tasks, adapter.load()
    analysis, batches = analyse(model), {}
    for task in tasks:
        rows = task.train if task.eval is None else task.eval
        rows = rows.select(range(min(_EXAMPLES, len(rows))))
        kept = [name for name in rows.column_names if name not in ("choices", "answer")]
        encoded = run.encode(rows.select_columns(kept))
        batches[task.name] = list(batches_of(encoded, run.tokenizer, model.device))
    add_gate_use(analysis, model, batches)
    return analysis


def _needs_data(folder: Path, method: str | None, asked: bool | None) -> bool:
    """Whether the analysis runs examples; a ConfigError if it was asked to and has nothing to learn from them."""
    gated = method is not None and gated_config(folder, method) is not None
    if asked and not gated:
        raise ConfigError(f"{folder} has no gates that depend on the data: leave --with-data out.")
    return gated if asked is None else asked
