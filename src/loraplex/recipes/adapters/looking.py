"""A saved adapter's analysis, from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from loraplex.inspection.spectra import Analysis, add_gate_use, analyse, analyse_lora
from loraplex.recipes.adapters.exporting import batches_of
from loraplex.recipes.adapters.saved import (
    adapter_json,
    gated_config,
    labels_of,
    load_adapted,
    load_on_skeleton,
    run_of,
)
from loraplex.recipes.config.arguments import config_class
from loraplex.recipes.config.run_config import ConfigError
from loraplex.recipes.prepare import load_data
from loraplex.tuner.config import AdapterConfig

_EXAMPLES = 64


def is_known(adapter: Path, method: str) -> bool:
    """Whether `analyse_adapter` knows what the updates of a method's saved adapter are: ours, and plain LoRA's."""
    cls = config_class(method)
    return issubclass(cls, AdapterConfig) or (cls is LoraConfig and not adapter_json(adapter).get("use_dora"))


def analyse_adapter(
    adapter: Path,
    with_data: bool | None,
    overrides: Sequence[tuple[str, Any]] = (),
    allow_code: Sequence[str] = (),
) -> Analysis:
    """Look into a saved adapter. Base weights are loaded only with data.

    Args:
        adapter: folder of one of ours, or of a plain LoRA.
        with_data: run up to 64 held-out examples of each of its run's tasks, to see what its gates choose; None:
            where it has gates that depend on the data.
        overrides: of its run.
        allow_code: `module:Class` that may be imported for it.

    Raises:
        ConfigError: `with_data` without such gates, or without a run.yaml that says what data to use.
    """
    if adapter_json(adapter)["peft_type"] == "LORA":
        _check_gated(adapter, with_data, gated=False)
        return analyse_lora(str(adapter))
    run = run_of(adapter, None, [], list(overrides), data_option=None, allow_code=allow_code)
    gated = gated_config(adapter, run.method) is not None
    _check_gated(adapter, with_data, gated)
    if not (gated if with_data is None else with_data):
        return analyse(load_on_skeleton(adapter, run, labels_of(adapter, run)))
    run = run_of(adapter, None, [], list(overrides), "a run.yaml beside it", allow_code)
    tokenizer, tasks = load_data(run)
    model = load_adapted(adapter, run, labels_of(adapter, run))
    analysis, batches = analyse(model), {}
    for task in tasks:
        rows = task.train if task.eval is None else task.eval
        rows = rows.select(range(min(_EXAMPLES, len(rows))))
        kept = [name for name in rows.column_names if name not in ("choices", "answer")]
        batches[task.name] = list(batches_of(rows.select_columns(kept), run, tokenizer, model.device))
    add_gate_use(analysis, model, batches)
    return analysis


def _check_gated(adapter: Path, with_data: bool | None, gated: bool) -> None:
    if with_data and not gated:
        raise ConfigError(f"{adapter} has no gates that depend on the data: leave --with-data out.")
