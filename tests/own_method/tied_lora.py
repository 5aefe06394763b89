"""Tied LoRA (arXiv 2311.09578).  h_l = W_l x + (α/r) · B (d_l ⊙ A x)

All layers of a family share A and B; each layer has a diagonal d_l `(r,)` of its own, which starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors, kaiming_, wide
from loraplex.tuner.families import Member
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.registry import register
from loraplex.tuner.sharing import SharedFactors, read


class TiedLoraShared(SharedFactors):
    """A `(r, in)` and B `(out, r)` of each family."""

    def add_shared(self, config: TiedLoraConfig, families: dict[str, list[Member]]) -> None:  # type: ignore[override]
        for name, (first, *_) in families.items():
            r, inputs, outputs = first.factors.r, first.factors.in_features, first.factors.out_features
            self.register_parameter(f"{name}__lora_A", nn.Parameter(kaiming_(torch.empty(r, inputs), fan_in=inputs)))
            self.register_parameter(f"{name}__lora_B", nn.Parameter(kaiming_(torch.empty(outputs, r), fan_in=r)))

    def read_by(self, factors: TiedLoraFactors) -> list[nn.Parameter]:  # type: ignore[override]
        return [self.get_parameter(f"{factors.family}__lora_{name}") for name in "AB"]


class TiedLoraFactors(Factors):
    """d_l. A and B belong to the family."""

    shared: TiedLoraShared
    family: str

    def add_parameters(self, config: AdapterConfig) -> None:
        self.lora_d = nn.Parameter(torch.zeros(self.r) if config.init_weights else torch.randn(self.r))

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """The family's A `(r, in)`."""
        return read(self.shared, f"{self.family}__lora_A", self.lora_d)

    @property
    def lora_B(self) -> Tensor:
        """The family's B `(out, r)`."""
        return read(self.shared, f"{self.family}__lora_B", self.lora_d)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(self.dropout(x), self.lora_A) * (self.scaling * self.lora_d), self.lora_B)

    def saved_bytes(self, tokens: int, itemsize: int, copied: int) -> int:
        # A x, the same times d, and α/r · d
        copies = copied * self.r * (self.in_features + self.out_features)
        return (2 * tokens * self.r + self.r) * itemsize + copies

    def lora_form(self) -> tuple[Tensor, Tensor]:
        return wide(self.lora_A), self.scaling * wide(self.lora_B) * wide(self.lora_d)


@dataclass
class TiedLoraConfig(AdapterConfig):
    """Settings of Tied LoRA. Trainable per family of L layers: r·(in + out + L)."""

    method: ClassVar[str] = "TIEDLORA"
    title: ClassVar[str] = "Tied LoRA"
    source: ClassVar[str] = "arXiv 2311.09578"
    factors_cls: ClassVar[type] = TiedLoraFactors
    shared_cls: ClassVar[type] = TiedLoraShared

    @property
    def shares_across_layers(self) -> bool:
        return True


class TiedLoraModel(AdapterModel):
    """PEFT's handle on Tied LoRA."""

    prefix = "tiedlora_"


register(TiedLoraConfig, TiedLoraModel)
