"""MultiLoRA (arXiv 2311.11501).  h = W x + (α/r) · Σᵢ cᵢ ⊙ (Bᵢ Aᵢ x)

n parallel LoRA modules on one weight, the paper's "horizontal" scaling. Bᵢ is not zero at the start; the learnable
scaling cᵢ is, so that training starts at the base model while no module depends on one dominant direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.tuner.checks import check_choice, check_count
from loraplex.tuner.config import MOST_PARTS, AdapterConfig, unscaled
from loraplex.tuner.factors import Factors, kaiming_, wide
from loraplex.tuner.findings import Finding, OverLayers, Panel
from loraplex.tuner.model import AdapterModel


class MultiLoraFactors(Factors):
    """A (n·r, in) and B (out, n·r) hold the n modules side by side: one pair of GEMMs instead of n."""

    no_decay: ClassVar[tuple[str, ...]] = ("lora_scaling",)
    """It starts at zero and is a gate: weight decay would pull the whole update back to nothing."""

    def add_parameters(self, config: MultiLoraConfig) -> None:  # type: ignore[override]
        n, r = config.num_modules, self.r
        self.num_modules = n
        self.lora_A = nn.Parameter(kaiming_(torch.empty(n * r, self.in_features), fan_in=self.in_features))
        # Each Bᵢ maps from rank r, so r is its fan-in, not n·r.
        self.lora_B = nn.Parameter(kaiming_(torch.empty(self.out_features, n * r), fan_in=r))
        channels = self.out_features if config.scaling_granularity == "channel" else 1
        c = torch.zeros(n, channels) if config.init_weights else torch.randn(n, channels)
        self.lora_scaling = nn.Parameter(c)

    def lora_form(self) -> tuple[Tensor, Tensor]:
        return wide(self.lora_A), self._scaled(wide(self.lora_B), wide(self.lora_scaling))

    @torch.no_grad()
    def hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.lora_scaling.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        B = self._scaled(self.lora_B, self.lora_scaling)
        return linear(linear(self.dropout(x), self.lora_A), B)

    @classmethod
    def findings(cls, layers: Sequence[MultiLoraFactors]) -> list[Finding]:
        means = {layer.module_name: layer.lora_scaling.float().abs().mean(1).tolist() for layer in layers}
        count = max(map(len, means.values()))
        panels = [
            Panel("scaling", f"mean |c| of module {i + 1}", {m: c[i] for m, c in means.items() if i < len(c)})
            for i in range(count)
        ]
        return [OverLayers("scaling", "MultiLoRA: scaling factors", panels)]

    def saved_bytes(self, tokens: int, itemsize: int, copied: int) -> int:
        R = self.num_modules * self.r
        # A x, [c₁ ⊙ B₁, …, cₙ ⊙ Bₙ]·α/r, and c·α/r
        scaled = self.out_features * R * itemsize + self.lora_scaling.nbytes
        return tokens * R * itemsize + scaled + copied * R * self.in_features

    def _scaled(self, B: Tensor, c: Tensor) -> Tensor:
        """[c₁ ⊙ B₁, …, cₙ ⊙ Bₙ] · α/r, `(out, n·r)`."""
        B = B.view(self.out_features, self.num_modules, self.r)
        return (B * (self.scaling * c).T.unsqueeze(-1)).flatten(1)


@dataclass
class MultiLoraConfig(AdapterConfig):
    """Settings of MultiLoRA (arXiv 2311.11501). Trainable per module: n·r·(in + out) + n·out ("channel")."""

    method: ClassVar[str] = "MULTILORA"
    title: ClassVar[str] = "MultiLoRA"
    source: ClassVar[str] = "arXiv 2311.11501"
    factors_cls: ClassVar[type] = MultiLoraFactors
    shared_cls: ClassVar[None] = None

    num_modules: int = 3
    """n, the number of parallel LoRA modules."""
    scaling_granularity: str = "channel"
    """Shape of cᵢ: "channel" (one number per output channel) or "module" (one number). The paper leaves it open."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_modules", self.num_modules, maximum=MOST_PARTS)
        check_choice("scaling_granularity", self.scaling_granularity, ("channel", "module"))

    @property
    def parts(self) -> int:
        return self.num_modules

    def holding(self, rank: int, configs: list[AdapterConfig]) -> MultiLoraConfig:
        r = self.r if rank % self.r == 0 else rank
        return unscaled(self, r, num_modules=rank // r)


class MultiLoraModel(AdapterModel):
    """PEFT's handle on MultiLoRA."""

    prefix = "multilora_"
