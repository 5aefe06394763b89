"""Adapters as plain LoRA: exactly where ΔW = B A, as the best approximation of a given rank or error elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from loraplex.export.engine_checks import check_engine, check_experts
from loraplex.export.lora_format import partners, plain_config
from loraplex.export.servers import ENGINES, PORTABLE, Engine, engine_named
from loraplex.io.files import check_target, replaced_folder, write_tensors
from loraplex.io.reading import yaml_text
from loraplex.numerics.lowrank import randomized_svd, svd_of_product
from loraplex.tuner.checks import check_count
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.finite import check_finite, is_finite
from loraplex.tuner.updates import ROOT, Update, adapted, difference


@dataclass(frozen=True)
class Rank:
    """How large an exported rank may be; without any setting the exact form is written as it is."""

    exact: bool = False
    """Find the true rank of each update, which can be lower than that of its factors."""
    rank: int | None = None
    """The best approximation of this rank."""
    max_error: float | None = None
    """The smallest rank with which every module's relative error stays at or below this."""

    def __post_init__(self) -> None:
        if sum([self.exact, self.rank is not None, self.max_error is not None]) > 1:
            raise ValueError("compress, rank and max_error exclude each other: give one of them.")
        if self.rank is not None:
            check_count("rank", self.rank)
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise ValueError(f"max_error={self.max_error} must lie between 0 and 1: it is a share of ‖ΔW‖.")


@dataclass(frozen=True)
class ExportedModule:
    """One module of an export."""

    module: str
    rank: int
    """Rank that is used; the file pads all modules to one rank."""
    norm: float
    """‖ΔW‖_F of the adapter."""
    error: float
    """‖ΔW − B A‖_F / ‖ΔW‖_F of what the file holds."""


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote."""

    folder: str
    base_model: str | None
    method: str
    engine: str
    rank: int
    """The one rank of all modules in the file."""
    exact: bool
    """Whether nothing but rounding to the file's dtype parts it from the adapter."""
    modules: list[ExportedModule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Relative error of all updates together, √(Σ‖ΔW − B A‖² / Σ‖ΔW‖²)."""
        whole = sum(module.norm**2 for module in self.modules)
        return (sum((module.error * module.norm) ** 2 for module in self.modules) / whole) ** 0.5 if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "error": self.error}


def export_lora(
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    engine: str = PORTABLE,
    rank: Rank | int | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> LoraExport:
    """Write an adapter as a plain LoRA that stock PEFT and servers load without loraplex.

    The file holds one rank for all modules (zero-padded), `lora_alpha = r`, and the scaling inside B.

    Args:
        model: a PeftModel, or a transformers model with an adapter; base weights may be on the meta device.
        output_dir: the new folder; it appears whole or not at all.
        adapter_name: which adapter.
        engine: "portable", "peft", "vllm", "sglang" or "llama.cpp": what may go along, and which ranks it takes.
        rank: None for the exact form as it is, a number for the best approximation of that rank, or a `Rank`. Dual
            LoRA has no exact form: it needs a number or `Rank(max_error=…)`.
        dtype: of the file; None keeps the adapter's, but float32 at least, since scaling is multiplied in.
        force: replace a folder that is not empty.

    Raises:
        ValueError: ΔW has no such form (MASA's router without calibration, Dual LoRA without a rank), the engine
            can't take what the adapter holds, or it holds NaN or Inf.
    """
    target = Path(output_dir)
    rank = rank if isinstance(rank, Rank) else Rank(rank=rank)
    check_target(target, force)
    config, state, modules = convert(model, adapter_name, engine_named(engine), rank, dtype)
    source: AdapterConfig | LoraConfig = model.peft_config[adapter_name]  # type: ignore
    updates = [update for _, update in adapted(model, adapter_name)]
    export = LoraExport(
        folder=str(target),
        base_model=config.base_model_name_or_path,
        method=source.peft_type.value,  # type: ignore[union-attr]
        engine=engine,
        rank=config.r,
        exact=(rank == Rank() or rank.exact) and all(update.is_exact() for update in updates),
        modules=modules,
        notes=sorted({note for update in updates for note in update.notes()}),
    )
    with replaced_folder(target) as folder:
        error = f"{export.error:.3e}"
        write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, state, exported_from=export.method, relative_error=error)
        config.save_pretrained(str(folder))
        (folder / "README.md").write_text(_card(export, source), encoding="utf-8")
    return export


def convert(
    model: nn.Module, adapter_name: str, engine: Engine, rank: Rank, dtype: torch.dtype | None = None
) -> tuple[LoraConfig, dict[str, Tensor], list[ExportedModule]]:
    """A LoRA's config and tensors, in memory; arguments and errors as `export_lora`."""
    layers = adapted(model, adapter_name)
    named = {update.module_name: update for _, update in layers}
    source: AdapterConfig | LoraConfig = model.peft_config[adapter_name]  # type: ignore
    extras = _trained_in_full(model, source, adapter_name)
    check_experts(layers)
    check_engine(engine, model, layers, extras)
    weights = {name: lora_factors(update, rank) for name, update in named.items()}
    width = engine.rank(max([*(len(A) for A, _ in weights.values()), rank.rank or 1]))
    state, modules = {}, []
    for name, (A, B) in weights.items():
        wanted = dtype or torch.promote_types(named[name].lora_A.dtype, torch.float32)
        A, B = A.to(wanted), B.to(wanted)
        if not all(map(is_finite, (A, B))) and all(map(is_finite, weights[name])):
            raise ValueError(f"The update of {name} does not fit into {wanted}: choose dtype float32 or bfloat16.")
        modules.append(ExportedModule(name, len(A), *difference(named[name], A, B)))
        state[f"{ROOT}{name}.lora_A.weight"] = pad(A, width, 0)
        state[f"{ROOT}{name}.lora_B.weight"] = pad(B, width, 1)
    beside = partners(model, list(named), engine)
    for name, (out_features, in_features) in beside.items():
        state[f"{ROOT}{name}.lora_A.weight"] = torch.zeros(width, in_features, dtype=A.dtype)
        state[f"{ROOT}{name}.lora_B.weight"] = torch.zeros(out_features, width, dtype=A.dtype)
    state.update({ROOT + key.removeprefix(ROOT): tensor for key, tensor in extras.items()})
    return plain_config(model, source, [*named, *beside], width, extras), state, modules


def convert_for_peft(
    model: nn.Module, rank: float, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """What `peft.convert_to_lora` returns for an adapter of ours: exact where its rank allows, without an SVD of ΔW.

    Args:
        rank: an integer, or the share of Σσ² of each ΔW to keep; 1.0 keeps all.

    Raises:
        ValueError: as `export_lora`, or `rank` is out of range.
    """
    if isinstance(rank, int):
        wanted = Rank(rank=rank)
    elif not 0 < rank <= 1:
        raise ValueError(f"rank={rank} as a share of Σσ² must lie between 0 and 1.")
    else:
        wanted = Rank() if rank == 1 else Rank(max_error=(1 - rank) ** 0.5)
    config, state, _ = convert(model, adapter_name, ENGINES["peft"], wanted)
    config.target_modules = set(config.target_modules)  # type: ignore[arg-type,assignment]
    return config, state


@torch.no_grad()
def lora_factors(factors: Update, rank: Rank) -> tuple[Tensor, Tensor]:
    """A and B of one module, scaling included, not padded.

    Raises:
        ValueError: there is no exact form and no rank is asked for, or ΔW is not finite.
    """
    form = factors.lora_form()
    if form is None:
        if rank.rank is None and rank.max_error is None:
            raise ValueError(
                f"ΔW of {factors.module_name} is no product of two factors, so this method has no exact LoRA form. "
                "Its merged weights are exact (--format merged); or approximate it with --rank R or --max-error E "
                "(rank=Rank(rank=R)), whose error is reported."
            )
        return _approximate(factors, rank)
    if rank == Rank() or (rank.rank is not None and rank.rank >= len(form[0])):
        return form
    _check_can_approximate(factors, form)
    svd = svd_of_product(*form)
    return svd.factors(svd.rank() if rank.exact else rank.rank or _smallest(svd, rank.max_error))


def _approximate(factors: Update, rank: Rank) -> tuple[Tensor, Tensor]:
    out_features, in_features = factors.out_features, factors.in_features
    full = min(out_features, in_features)
    _check_can_approximate(factors, factors.parameters())  # type: ignore[union-attr]
    width = min(rank.rank or 16, full)
    while True:
        try:
            svd = randomized_svd(factors.delta_weight, out_features, in_features, width)
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"ΔW of {factors.module_name} holds NaN or Inf ({error}): load an earlier one.") from error
        if rank.rank is not None:
            return svd.factors(width)
        if svd.error(width) <= rank.max_error or width == full:  # type: ignore[operator]
            return svd.factors(_smallest(svd, rank.max_error))
        width = min(2 * width, full)


def _smallest(svd: Any, max_error: float | None) -> int:
    assert max_error is not None
    return next(k for k in range(1, svd.S.numel() + 1) if svd.error(k) <= max_error or k == svd.S.numel())


def _check_can_approximate(update: Update, tensors: Iterable[Tensor]) -> None:
    if not all(map(is_finite, tensors)):
        raise ValueError(
            f"The adapter holds NaN or Inf on {update.module_name}: nothing of a given rank or error is near to it. "
            "Load an earlier checkpoint."
        )


def pad(factor: Tensor, width: int, dim: int) -> Tensor:
    """`factor` with zeros up to `width` along `dim`."""
    shape = list(factor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _trained_in_full(model: nn.Module, config: AdapterConfig | LoraConfig, adapter_name: str) -> dict[str, Tensor]:
    if not config.modules_to_save and not config.trainable_token_indices and config.bias == "none":
        return {}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    marks = ("_factors.", "_shared.", ".lora_")
    found = {key: tensor for key, tensor in state.items() if not any(mark in key for mark in marks)}
    for key, tensor in found.items():
        check_finite(key.removeprefix(ROOT), [tensor])
    return found


def _card(export: LoraExport, config: AdapterConfig | LoraConfig) -> str:
    how = "exactly" if export.exact else f"with a relative error of {export.error:.3g}"
    notes = "".join(f"- {note}\n" for note in export.notes)
    return (
        f"---\nlibrary_name: peft\nbase_model: {yaml_text(config.base_model_name_or_path)}\ntags:\n- lora\n---\n\n"
        f"# {config.full_title() if isinstance(config, AdapterConfig) else 'LoRA'}, as plain LoRA\n\n"
        f"Exported {how} by loraplex: rank {export.rank}, scaling inside B. It needs no loraplex to load.\n\n{notes}"
    )
