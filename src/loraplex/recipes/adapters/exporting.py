"""From a saved adapter to what a server loads: a plain LoRA, or a merged model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from loraplex.export.lora import LoraExport, Rank, export_lora
from loraplex.export.merged import MergedExport, OtherLayout, merge_checkpoint, merged_weight
from loraplex.export.servers import PORTABLE
from loraplex.export.wish import WEIGHTS_NAME, Wish, sha256_of
from loraplex.io.files import check_target, place_of, replaced_folder
from loraplex.io.reading import expanded
from loraplex.recipes.adapters.saved import SavedAdapter, data_entry, gated_config
from loraplex.recipes.config.run_config import ConfigError, build_run
from loraplex.recipes.models.loading import DTYPES, base_folder
from loraplex.recipes.progress import note
from loraplex.tuner.calibration import Calibration, calibrate, set_mean_gates
from loraplex.tuner.expert_weight import ExpertLinear
from loraplex.tuner.model_merging import tied_layers
from loraplex.tuner.updates import adapted

_CALIBRATION_EXAMPLES = 64
_BATCH = 4


@dataclass(frozen=True)
class ExportJob:
    """What to write, and where."""

    format: str
    """"lora" or "merged"."""
    target: Path
    engine: str = PORTABLE
    rank: Rank = field(default_factory=Rank)
    dtype: str | None = None
    """None keeps the dtype of the adapter (float32 at least) or of the base's weights."""
    calibration: list[str] | None = None
    """Data for the mean gates, where gates depend on the input; empty: the run's own."""
    safe: bool = False
    """Refuse to write merged weights that are not finite."""
    force: bool = False


def export_adapter(adapter: SavedAdapter, job: ExportJob) -> tuple[LoraExport | MergedExport, Calibration | None]:
    """Export a saved adapter. For a LoRA, only gates that depend on the input need the base model's weights.

    Raises:
        ConfigError: the calibration data is missing, superfluous or can't be used.
        ValueError: the target is not empty, or the adapter can't be exported as asked.
    """
    config = adapter.run.config
    check_target(job.target, job.force)
    _check_sources(job.target, [adapter.folder, expanded(config.model)])
    _check_calibration(adapter.folder, config.method, job.calibration is not None)
    found = None if job.calibration is None else _calibrate(adapter, job.calibration)
    model = adapter.load_on_skeleton()
    if found is not None:
        set_mean_gates(model, found.gates)
    dtype = _dtype(job)
    if job.format == "lora":
        return export_lora(model, job.target, engine=job.engine, rank=job.rank, dtype=dtype, force=job.force), found
    base = base_folder(config.model, **config.source)
    try:
        return merge_checkpoint(model, base, job.target, dtype=dtype, safe=job.safe, force=job.force), found
    except OtherLayout as layout:
        note(f"{layout}: merging in memory")
    return _merge_in_memory(adapter, job, found), found


def remember(adapter: Path, job: ExportJob, calibration: Calibration | None) -> None:
    """Write the job's rank and the mean gates beside the adapter, for `loraplex.to_plain`."""
    weights = None if calibration is None else sha256_of(adapter / WEIGHTS_NAME)
    gates = None if calibration is None else calibration.gates
    Wish(job.rank.rank, job.rank.max_error, job.rank.exact, gates, weights).write(adapter)


def _merge_in_memory(adapter: SavedAdapter, job: ExportJob, calibration: Calibration | None) -> MergedExport:
    """For checkpoints that only transformers can read: one model in memory, merged in place."""
    model = adapter.load(dtype="auto").eval()
    if calibration is not None:
        set_mean_gates(model, calibration.gates)
    layers = adapted(model, "default")
    dtype = _dtype(job)
    untied = bool(tied_layers(model))
    modules = []
    for layer, update in layers:
        inner: Any = layer.get_base_layer()
        weight, module = merged_weight(inner.weight, (layer, update), f"{update.module_name}.weight", dtype, job.safe)
        if isinstance(inner, ExpertLinear):
            inner.weight.data.copy_(weight)
        else:
            # A new parameter: a tied embedding keeps the old one.
            inner.weight = nn.Parameter(weight.to(inner.weight.device), requires_grad=False)
        modules += [module] if module else []
    notes = sorted({line for _, update in layers for line in update.notes()})
    plain = model.unload()
    if untied:
        plain.config.tie_word_embeddings = False
    with replaced_folder(job.target) as folder:
        (plain if dtype is None else plain.to(dtype)).save_pretrained(folder)
        adapter.run.tokenizer.save_pretrained(folder)
    return MergedExport(str(job.target), modules, notes)


def _dtype(job: ExportJob) -> torch.dtype | None:
    dtype = None if job.dtype is None else DTYPES[job.dtype]
    assert not isinstance(dtype, str)
    return dtype


def _check_sources(target: Path, sources: list[Path]) -> None:
    """Refuse to replace a folder that holds what the export is made from."""
    place = place_of(target)
    for source in sources:
        if source.exists() and place in (*place_of(source).parents, place_of(source)):
            raise ConfigError(f"{target} holds {source}, which the export is made from: choose another folder.")


def _check_calibration(adapter: Path, method: str, given: bool) -> None:
    gated = gated_config(adapter, method)
    if gated is not None and not given:
        instead = f"; or train with {gated.constant_instead}" if gated.constant_instead else ""
        raise ConfigError(
            f"{adapter} is {gated.title}: its gates depend on the input, so it has no constant update and can't "
            "be exported exactly. Give --calibration DATA (text of your task; without DATA: the run's own) to export "
            f"it with the mean gates, an approximation whose error is reported{instead}."
        )
    if given and gated is None:
        raise ConfigError(f"{adapter} has no gates that depend on the input: leave --calibration out.")


def _calibrate(adapter: SavedAdapter, data: list[str]) -> Calibration:
    run = adapter.run
    if data:
        given = {**run.config.model_dump(), "data": [data_entry(text) for text in data]}
        tasks = [run.read(spec) for spec in build_run(given, "--calibration").data]
    else:
        tasks = run.tasks
    model = adapter.load().eval()
    count = max(2, _CALIBRATION_EXAMPLES // len(tasks))
    seen: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for task in tasks:
        rows = task.train.select(range(min(count, len(task.train))))
        # A quarter is held out; where the task holds examples out itself, those are used.
        cut = len(rows) if task.eval is not None else len(rows) - max(1, len(rows) // 4)
        rest = rows.select(range(cut, len(rows))) if task.eval is None else task.eval
        rest = rest.select(range(min(max(1, count // 4), len(rest))))
        seen += batches_of(run.encode(rows.select(range(max(1, cut)))), run.tokenizer, model.device)
        held_out += batches_of(run.encode(rest), run.tokenizer, model.device)
    note(f"calibrating on {len(seen)} batches, measuring on {len(held_out)} held-out ones")
    return calibrate(model, seen, held_out)


def batches_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, device: Any) -> Iterator[dict[str, Any]]:
    """Inputs for `model(**batch)` from encoded rows, padded on the right."""
    rows = rows.remove_columns("labels")
    for start in range(0, len(rows), _BATCH):
        batch = [rows[index] for index in range(start, min(start + _BATCH, len(rows)))]
        padded = tokenizer.pad(batch, return_tensors="pt", padding_side="right")
        yield {key: value.to(device) for key, value in padded.items()}
