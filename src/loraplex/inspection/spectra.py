"""What an adapter has learned: spectra of its updates, and what is particular to each method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from loraplex.export.lora_format import read_lora
from loraplex.inspection.describe import Merge, describe
from loraplex.methods.dual_lora.method import DualLoraFactors
from loraplex.methods.masa.calibrate import expert_use
from loraplex.methods.masa.method import MasaFactors
from loraplex.methods.multilora import MultiLoraFactors
from loraplex.numerics.lowrank import randomized_svd, row_tiles, svd_of_product
from loraplex.numerics.products import product
from loraplex.tuner.layer import wide
from loraplex.tuner.sharing import layer_depth, role
from loraplex.tuner.updates import PlainLora, Update, adapted

EXACT_SIZE = 2048
"""Updates without a low-rank form are decomposed in full up to this many rows or columns."""
LEADING = 256
"""Of larger ones, so many singular values are computed."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one module's ΔW."""

    module: str
    role: str
    """The module's name without its layer: what is drawn together."""
    depth: int
    """Of its layer."""
    values: list[float]
    """σ₁ ≥ σ₂ ≥ …; zeros of a low rank left out."""
    norm: float
    """‖ΔW‖_F."""
    note: str = ""
    """What these values leave out, if anything."""

    @cached_property
    def effective_rank(self) -> float:
        """exp(−Σ pᵢ log pᵢ) with pᵢ = σᵢ / Σ σ (Roy & Vetterli 2007): 1 for rank 1, r for r equal values."""
        p = torch.tensor(self.values, dtype=torch.float64)
        p = p / p.sum()
        return torch.special.entr(p).sum().exp().item() if self.norm else 0.0

    def share(self, k: int) -> float:
        """Of the first k singular values in the sum of all: how much few directions dominate."""
        total = sum(self.values)
        return sum(self.values[:k]) / total if total else 0.0


@dataclass
class Analysis:
    """An adapter's inner life; what its method has not is empty."""

    method: str
    spectra: list[Spectrum] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    """ASLoRA's."""
    layers: dict[str, int] = field(default_factory=dict)
    """ASLoRA: family → number of its layers."""
    closed: dict[str, float] = field(default_factory=dict)
    """Dual LoRA: module → share of ΔW that is zero, where B A ≤ 0."""
    negative: dict[str, float] = field(default_factory=dict)
    """Dual LoRA: module → share of the open gates whose sign is negative."""
    scaling: dict[str, list[float]] = field(default_factory=dict)
    """MultiLoRA: module → mean |cᵢ| of each of its n modules."""
    similarity: dict[str, list[list[float]]] = field(default_factory=dict)
    """MASA: group of layers → linear CKA between its experts' row spaces."""
    use: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """MASA's router: task → module → mean gate of each expert. Filled in by `add_expert_use`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self)
        for row, spectrum in zip(plain["spectra"], self.spectra, strict=True):
            row |= {"effective_rank": spectrum.effective_rank, "share_of_first": spectrum.share(1)}
        return plain


@torch.no_grad()
def analyse(model: nn.Module, adapter_name: str = "default") -> Analysis:
    """Look into an adapter: one of ours, or PEFT's plain LoRA. The base weights are not read.

    Args:
        model: with the adapter on it; the base may be on the meta device.
        adapter_name: which adapter.

    Raises:
        ValueError: the model has no such adapter, or it is of another kind.
    """
    description = describe(model, adapter_name)
    found = Analysis(description.method, merges=description.merges)
    for _, update in adapted(model, adapter_name, mergeable=False):
        name = update.module_name
        if isinstance(update, PlainLora):
            update.check_mergeable()
        found.spectra.append(_spectrum(update))
        if isinstance(update, DualLoraFactors):
            found.closed[name], found.negative[name] = _gates(update)
        elif isinstance(update, MultiLoraFactors):
            found.scaling[name] = update.lora_scaling.float().abs().mean(1).tolist()
        elif isinstance(update, MasaFactors) and update.experts_name not in found.similarity:
            found.similarity[update.experts_name] = cka(update.experts()).tolist()
    if found.merges:
        for row in description.shared:
            found.layers[row.family] = max(found.layers.get(row.family, 0), *(layer + 1 for layer in row.layers))
    return found


def add_expert_use(analysis: Analysis, model: nn.Module, batches: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Run a MASA router's model on each task's batches and note which experts the gates choose.

    Args:
        analysis: of `analyse`.
        model: with its base weights.
        batches: task → inputs for `model(**batch)`.
    """
    for task, inputs in batches.items():
        analysis.use[task] = expert_use(model, inputs)


def analyse_lora(folder: str) -> Analysis:
    """The spectra of a saved plain LoRA; neither the base model nor its config is needed."""
    start = PeftConfig.from_pretrained(folder).init_lora_weights
    # These take their first B A out of the base weight, which is not here.
    moved = isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    note = f"B A, with what {start} took out of the base weight" if moved else ""
    spectra = [_of_factors(_place(name), A, B, note) for name, (A, B) in read_lora(folder).items()]
    return Analysis("LORA", spectra)


def _place(name: str) -> dict[str, Any]:
    return {"module": name, "role": role(name), "depth": layer_depth(name)}


def _of_factors(place: dict[str, Any], A: Tensor, B: Tensor, note: str = "") -> Spectrum:
    svd = svd_of_product(A, B)
    return Spectrum(values=svd.S[: svd.rank()].tolist() if svd.norm else [], norm=svd.norm, note=note, **place)


def _spectrum(update: Update) -> Spectrum:
    place = _place(update.module_name)
    if isinstance(update, MasaFactors) and update.mixing == "router" and update.mean_gate is None:
        A = wide(update.experts()).mean(0)
        return _of_factors(place, A, update.scaling * wide(update.lora_B), "all gates equal")
    if (form := update.lora_form()) is not None:
        return _of_factors(place, *form)
    if min(update.out_features, update.in_features) <= EXACT_SIZE:
        delta = update.delta_weight().double()
        if not delta.isfinite().all():
            raise ValueError(f"{update.module_name}: ΔW holds NaN or Inf: the adapter is broken; load an earlier one.")
        S = torch.linalg.svdvals(delta)
        return Spectrum(values=S.tolist(), norm=S.norm().item(), **place)
    svd = randomized_svd(update.delta_weight, update.out_features, update.in_features, LEADING)
    note = f"the first {LEADING} of {min(update.out_features, update.in_features)}"
    return Spectrum(values=svd.S.tolist(), norm=svd.norm, note=note, **place)


def _gates(factors: DualLoraFactors) -> tuple[float, float]:
    """Share of ΔW where ReLU(BA) is zero; share of negative signs among the rest."""
    A, B, C, D = map(wide, (factors.lora_A, factors.lora_B, factors.lora_C, factors.lora_D))
    opened = negative = 0
    for rows in row_tiles(factors.out_features, factors.in_features):
        is_open = product(B[rows], A) > 0
        opened += int(is_open.sum())
        negative += int((is_open & ~(product(D[rows], C) > 0)).sum())
    return 1 - opened / (factors.out_features * factors.in_features), negative / opened if opened else 0.0


def cka(experts: Tensor) -> Tensor:
    """Linear CKA between the experts Aᵢ `(n, r, in)`, without centring: ‖Aᵢ Aⱼᵀ‖² / (‖Aᵢ Aᵢᵀ‖ ‖Aⱼ Aⱼᵀ‖).

    1 where two experts read the same directions with the same weights, 0 where theirs are orthogonal (Kornblith et
    al. 2019).
    """
    A = experts.double()
    cross = torch.einsum("iak,jbk->ijab", A, A).square().sum((-1, -2))
    own = cross.diagonal().sqrt()
    return cross / (own[:, None] * own[None, :]).clamp(min=1e-300)
