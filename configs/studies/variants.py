"""Methods that only studies need: Dual LoRA with one of its gates taken out, and full fine-tuning of the same modules.

A study names them `configs.studies.variants:WithoutReluConfig` and is run from the repository's root.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.methods.dual_lora.method import DualLoraConfig
from loraplex.methods.dual_lora.sign import Sign
from loraplex.methods.dual_lora.warmup import DualLoraShared
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors, wide
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.registry import register


class AblatedFactors(Factors):
    """Dual LoRA's factors, start and warm-up with another product of B A and D C. Abstract."""

    shared: DualLoraShared

    def add_parameters(self, config: DualLoraConfig) -> None:  # type: ignore[override]
        r1, r2 = config.ranks(self.module_name)
        self.lora_A = nn.Parameter(torch.randn(r1, self.in_features) * config.init_std)
        self.lora_B = nn.Parameter(torch.randn(self.out_features, r1) * config.init_std)
        self.lora_C = nn.Parameter(torch.randn(r2, self.in_features) * config.init_std)
        self.lora_D = nn.Parameter(torch.randn(self.out_features, r2) * config.init_std)

    @abstractmethod
    def product(self, magnitude: Tensor, direction: Tensor) -> Tensor:
        """ΔW / s from B A and D C, `(out, in)` each."""

    def delta_weight(self, rows: slice = slice(None)) -> Tensor:
        with torch.autocast(self.lora_A.device.type, enabled=False):
            A, B, C, D = (wide(factor) for factor in (self.lora_A, self.lora_B, self.lora_C, self.lora_D))
            return self.scaling * self.shared.fraction(A) * self.product(B[rows] @ A, D[rows] @ C)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.dropout(x), self.delta_weight().to(x.dtype))


class WithoutReluFactors(AblatedFactors):
    """ΔW = s · B A ⊙ Sign(D C)."""

    def product(self, magnitude: Tensor, direction: Tensor) -> Tensor:
        return magnitude * Sign.apply(direction)


class WithoutSignFactors(AblatedFactors):
    """ΔW = s · ReLU(B A) ⊙ D C."""

    def product(self, magnitude: Tensor, direction: Tensor) -> Tensor:
        return torch.relu(magnitude) * direction


class FullFactors(Factors):
    """ΔW itself, from zero: full fine-tuning of the adapted weights, if these have no weight decay."""

    def add_parameters(self, config: AdapterConfig) -> None:
        self.lora_delta = nn.Parameter(torch.zeros(self.out_features, self.in_features))

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """What tells the dtype."""
        return self.lora_delta

    def delta_weight(self, rows: slice = slice(None)) -> Tensor:
        return wide(self.lora_delta)[rows]

    def takes_weight(self, x: Tensor) -> bool:
        return isinstance(self.dropout, nn.Identity)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        delta = self.lora_delta if weight is None else weight + self.lora_delta
        return linear(self.dropout(x), delta, bias)


@dataclass
class WithoutReluConfig(DualLoraConfig):
    """Dual LoRA without ReLU."""

    method: ClassVar[str] = "WITHOUTRELU"
    title: ClassVar[str] = "Dual LoRA without ReLU"
    factors_cls: ClassVar[type] = WithoutReluFactors


@dataclass
class WithoutSignConfig(DualLoraConfig):
    """Dual LoRA without Sign."""

    method: ClassVar[str] = "WITHOUTSIGN"
    title: ClassVar[str] = "Dual LoRA without Sign"
    factors_cls: ClassVar[type] = WithoutSignFactors


@dataclass
class FullConfig(AdapterConfig):
    """Full fine-tuning of the target modules; r and lora_alpha mean nothing."""

    method: ClassVar[str] = "FULL"
    title: ClassVar[str] = "full fine-tuning"
    source: ClassVar[str] = "every weight of a layer is trained"
    factors_cls: ClassVar[type] = FullFactors
    shared_cls: ClassVar[None] = None


class WithoutReluModel(AdapterModel):
    """PEFT's handle."""

    prefix = "withoutrelu_"


class WithoutSignModel(AdapterModel):
    """PEFT's handle."""

    prefix = "withoutsign_"


class FullModel(AdapterModel):
    """PEFT's handle."""

    prefix = "full_"


register(WithoutReluConfig, WithoutReluModel)
register(WithoutSignConfig, WithoutSignModel)
register(FullConfig, FullModel)
