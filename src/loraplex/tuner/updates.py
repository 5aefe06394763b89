"""The updates ΔW of an adapter, layer by layer, whether it is of one of our methods or PEFT's own LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loraplex.numerics.lowrank import norm_of_product, row_tiles
from loraplex.numerics.products import product
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors, wide
from loraplex.tuner.finite import check_factors
from loraplex.tuner.layer import AdapterLinear

ROOT = "base_model.model."
"""The prefix that PEFT puts before the names of the base model's modules."""


@dataclass(frozen=True)
class LoraUpdate:
    """The update of PEFT's own LoRA on one layer, with the interface of `Factors`."""

    module_name: str
    layer: LoraLayer
    adapter_name: str

    @property
    def lora_A(self) -> Tensor:
        """A `(r, in)`."""
        return self.layer.lora_A[self.adapter_name].weight  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """Columns of ΔW."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of ΔW."""
        return self.lora_form()[1].shape[0]

    def lora_form(self) -> tuple[Tensor, Tensor]:
        """A and B, scaling included."""
        B = self.layer.lora_B[self.adapter_name].weight
        return wide(self.lora_A), self.layer.scaling[self.adapter_name] * wide(B)  # type: ignore[arg-type]

    def delta_weight(self, rows: slice = slice(None)) -> Tensor:
        """ΔW, or some rows of it."""
        A, B = self.lora_form()
        return product(B[rows], A)

    def check_mergeable(self) -> None:
        """Raise a ValueError if the layer adds more than B A."""
        name = self.adapter_name
        if name in self.layer.lora_variant or name not in self.layer.lora_B or self.layer.lora_bias.get(name):
            raise ValueError(
                f"The adapter on {self.module_name} is no plain LoRA of a linear layer (DoRA, an embedding, …): "
                "merge it with PEFT's merge_and_unload."
            )

    def is_exact(self) -> bool:
        """Whether ΔW is all that the adapter changes on this layer: it is."""
        return True

    def notes(self) -> list[str]:
        """Sentences for a user who exports or merges this adapter: none."""
        return []


Update = Factors | LoraUpdate


def adapted(model: nn.Module, adapter_name: str, mergeable: bool = True) -> list[tuple[BaseTunerLayer, Update]]:
    """The layers that `adapter_name` adapts, with its update on each.

    Args:
        model: the model that has the adapter.
        adapter_name: an adapter of one of our methods, or of PEFT's LoRA.
        mergeable: refuse updates that are not a constant, finite matrix.

    Raises:
        ValueError: the model has no such adapter, or it is of another kind.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}, only {sorted(configs)}.")
    if not isinstance(configs[adapter_name], (AdapterConfig, LoraConfig)):
        kind = configs[adapter_name].peft_type.value
        raise ValueError(f"Adapter {adapter_name!r} is {kind}, neither a LoRA nor one of loraplex.")
    found: list[tuple[BaseTunerLayer, Update]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLinear) and (factors := layer.factors(adapter_name)) is not None:
            found.append((layer, factors))
        elif isinstance(layer, ParamWrapper) and adapter_name in layer.lora_A:
            raise ValueError(
                f"{name.removeprefix(ROOT)}: a LoRA of PEFT's on bare parameters (target_parameters) is neither looked "
                "into nor exported: merge it with PEFT's merge_and_unload."
            )
        elif isinstance(layer, LoraLayer) and adapter_name in {*layer.lora_A, *layer.lora_embedding_A}:
            found.append((layer, LoraUpdate(name.removeprefix(ROOT), layer, adapter_name)))
    if mergeable:
        for _, update in found:
            update.check_mergeable()
            check_factors(update)
    return found


@torch.no_grad()
def difference(factors: Update, A: Tensor, B: Tensor) -> tuple[float, float]:
    """‖ΔW‖_F and ‖ΔW − B A‖_F / ‖ΔW‖_F, computed from ΔW's own factors if it has any, else tile by tile."""
    form = factors.lora_form()
    if form is not None:
        norm = norm_of_product(*form)
        A, B = A.to(form[0].device, torch.float64), B.to(form[0].device, torch.float64)
        error = norm_of_product(torch.cat([form[0].double(), A]), torch.cat([form[1].double(), -B], 1))
    else:
        squares = torch.zeros(2, dtype=torch.float64)
        for rows in row_tiles(factors.out_features, factors.in_features):
            delta = factors.delta_weight(rows)
            rest = delta - product(B[rows].to(delta), A.to(delta))
            squares += torch.stack([delta.double().square().sum(), rest.double().square().sum()]).cpu()
        norm, error = squares.sqrt().tolist()
    return norm, error / norm if norm else error
