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
from loraplex.inspection.describe import describe
from loraplex.numerics.lowrank import randomized_svd, svd_of_product
from loraplex.tuner.calibration import gate_use
from loraplex.tuner.factors import Factors
from loraplex.tuner.families import layer_depth, role
from loraplex.tuner.findings import Finding, as_dict, find
from loraplex.tuner.gates import GatedFactors
from loraplex.tuner.updates import LoraUpdate, Update, adapted

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
    """What an adapter has learned."""

    method: str
    spectra: list[Spectrum] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """What is particular to the method."""

    def finding(self, key: str) -> Any:
        """What the method tells under this key, such as "merges"; a KeyError lists the keys that there are."""
        return find(self.findings, key)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; each finding under its own key, and the numbers for tables under "measures"."""
        plain: dict[str, Any] = {"method": self.method, "spectra": [asdict(spectrum) for spectrum in self.spectra]}
        for row, spectrum in zip(plain["spectra"], self.spectra, strict=True):
            row |= {"effective_rank": spectrum.effective_rank, "share_of_first": spectrum.share(1)}
        measures = {name: value for finding in self.findings for name, value in finding.measures().items()}
        return plain | as_dict(self.findings, taken=[*plain, "measures"]) | {"measures": measures}


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
    found = Analysis(description.method, findings=list(description.findings))
    updates = [update for _, update in adapted(model, adapter_name, mergeable=False)]
    for update in updates:
        if isinstance(update, LoraUpdate):
            update.check_mergeable()
        found.spectra.append(_spectrum(update))
    layers = [update for update in updates if isinstance(update, Factors)]
    if layers:
        found.findings += type(layers[0]).findings(layers)
    return found


def add_gate_use(
    analysis: Analysis,
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    adapter_name: str = "default",
) -> None:
    """Run the model on each task's batches and note what its gates, which depend on the input, choose.

    Args:
        analysis: of `analyse`.
        model: with its base weights.
        batches: task → inputs for `model(**batch)`.
        adapter_name: of the adapter that is analysed; it is the active one.
    """
    use = {task: gate_use(model, inputs) for task, inputs in batches.items()}
    layers = (update for _, update in adapted(model, adapter_name, mergeable=False))
    gated = next(update for update in layers if isinstance(update, GatedFactors))
    analysis.findings += gated.gate_findings(use)


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
    if isinstance(update, GatedFactors) and update.depends_on_input and update.mean_gate is None:
        return _of_factors(place, *update.mean_form(), "all gates equal")
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
