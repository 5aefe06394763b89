"""MASA (arXiv 2510.06005).  h_l = W_l x + (α/r) · B_l · mixᵢ(A_{g(l),i} x)

Several down-projections A ("experts"), shared by a group g(l) of adjacent layers, and one up-projection B per layer.
The paper's abstract does not fix how the experts' outputs are combined; `expert_mixing` is our reading of it:

    "router"  Σᵢ softmax(R_l x)ᵢ · Aᵢ x     a gate per token and layer; ΔW depends on the input
    "sum"     Σᵢ Aᵢ x                       exactly mergeable, rank r
    "concat"  [A₁ x; …; Aₙ x]               exactly mergeable, rank n·r: B_l is (out, n·r)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.methods.masa.experts import MasaShared, similarity_of_experts
from loraplex.tuner.checks import check_choice, check_count
from loraplex.tuner.config import MOST_PARTS, AdapterConfig, unscaled
from loraplex.tuner.factors import wide
from loraplex.tuner.findings import Finding, GateUse
from loraplex.tuner.gates import GatedFactors
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.sharing import read, select


class MasaFactors(GatedFactors):
    """B_l, and with "router" R_l (n, in). A belongs to the group of layers."""

    shared: MasaShared
    family: str
    index: int
    place: Tensor

    def add_parameters(self, config: MasaConfig) -> None:  # type: ignore[override]
        self.num_experts, self.mixing = config.num_experts, config.expert_mixing
        self.group_size = config.group_size
        rank = self.r * (self.num_experts if self.mixing == "concat" else 1)
        B = torch.zeros(self.out_features, rank)
        self.lora_B = nn.Parameter(B if config.init_weights else nn.init.normal_(B))
        if self.mixing == "router":
            R = torch.zeros(self.num_experts, self.in_features)
            self.lora_router = nn.Parameter(R if config.init_weights else nn.init.normal_(R))

    @property
    def experts_name(self) -> str:
        """Under which the group's experts are shared."""
        return f"{self.family}__lora_A_{self.index // self.group_size}"

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """The group's experts `(n·r, in)`."""
        if torch.compiler.is_compiling() and self.shared.num_groups[self.family] > 1:
            return select(self.shared.all_A(self.family), self.place // self.group_size).to(self.lora_B.device)
        return read(self.shared, self.experts_name, self.lora_B)

    @property
    def input_dtype(self) -> torch.dtype | None:
        # lora_A has the same, but may have to be copied from another device.
        return self.lora_B.dtype

    def experts(self) -> Tensor:
        """The group's experts as `(n, r, in)`."""
        return self.lora_A.view(self.num_experts, self.r, self.in_features)

    @property
    def num_gates(self) -> int:
        return self.num_experts

    def gates(self, x: Tensor) -> Tensor:
        """softmax(R_l x): `(..., in)` → `(..., n)`."""
        return linear(x, self.lora_router).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self._mixed(x), self.lora_B)

    def _mixed(self, x: Tensor) -> Tensor:
        """(α/r) · mixᵢ(Aᵢ x): `(..., in)` → `(..., r)`, or `(..., n·r)` with "concat"."""
        n, r = self.num_experts, self.r
        if self.mixing == "router":
            A_R = self._with_router(self.lora_A, self.lora_router)
            h, logits = linear(self.dropout(x), A_R).split((n * r, n), dim=-1)
            return (logits.softmax(dim=-1).unsqueeze(-1) * h.unflatten(-1, (n, r))).sum(-2)
        # The scaling here, not after B: (tokens, r) is smaller than (tokens, out).
        if self.mixing == "concat":
            return linear(self.dropout(x), self.lora_A) * self.scaling
        if self.training and isinstance(self.dropout, nn.Dropout):
            # A mask per expert: without it all experts get the same gradient and never part.
            return torch.stack([linear(self.dropout(x), A) for A in self.experts()]).sum(0) * self.scaling
        return linear(x, self.experts().sum(0)) * self.scaling

    def _with_router(self, A: Tensor, R: Tensor) -> Tensor:
        """[α/r · A; R] `(n·r + n, in)`: one GEMM for the experts and their gates."""
        return torch.cat([self.scaling * A, R])

    def mean_form(self) -> tuple[Tensor, Tensor]:
        B, A = self.scaling * wide(self.lora_B), wide(self.lora_A)
        if self.mixing == "concat":
            return A, B
        gate = torch.ones(self.num_experts)
        if self.mixing == "router":
            gate = gate / self.num_experts if self.mean_gate is None else self.mean_gate
        # A sum, not an einsum: that would be a product, which some settings round to TF32.
        return (gate.to(A).view(-1, 1, 1) * A.view(self.num_experts, self.r, -1)).sum(0), B

    def calibrated_tensors(self) -> list[Tensor]:
        return [self.shared.get_parameter(self.experts_name), self.lora_B, self.lora_router]

    @torch.no_grad()
    def hold(self, A: Tensor, B: Tensor) -> None:
        # Each layer of the group writes the same experts: the stored ones, of which lora_A may be a copy.
        self.shared.get_parameter(self.experts_name).copy_(A)
        self.lora_B.copy_(B)

    @classmethod
    def findings(cls, layers: Sequence[MasaFactors]) -> list[Finding]:
        return similarity_of_experts({f.experts_name: (f.family, f.experts()) for f in layers})

    @classmethod
    def gate_findings(cls, use: dict[str, dict[str, list[float]]]) -> list[Finding]:
        return [GateUse("expert_use", "MASA: which experts each task uses", "expert", use)]

    def saved_bytes(self, tokens: int, itemsize: int, copied: int) -> int:
        n, r, i, o = self.num_experts, self.r, self.in_features, self.out_features
        if self.mixing == "concat":
            return tokens * n * r * itemsize + copied * n * r * (i + o)  # [A₁ x; …; Aₙ x]
        if self.mixing == "sum":
            return tokens * r * itemsize + r * i * itemsize + copied * r * o  # Σᵢ Aᵢ x and Σᵢ Aᵢ
        # Aᵢ x and their logits, the gates, and their mixture; [α/r · A; R]
        return tokens * (n * r + 2 * n + r) * itemsize + n * (r + 1) * i * itemsize + copied * r * o

    @property
    def dropout_draws(self) -> int:
        return self.num_experts if self.mixing == "sum" else 1


@dataclass
class MasaConfig(AdapterConfig):
    """Settings of MASA (arXiv 2510.06005).

    Trainable per family of L layers: ⌈L/share_layers⌉ · n·r·in + L·r·out, plus L·n·in with "router"; B is n times
    as wide with "concat". With `share_layers` = n and "sum" that is a rank-r LoRA.
    """

    method: ClassVar[str] = "MASA"
    title: ClassVar[str] = "MASA"
    source: ClassVar[str] = "arXiv 2510.06005"
    factors_cls: ClassVar[type] = MasaFactors
    shared_cls: ClassVar[type] = MasaShared

    num_experts: int = 4
    """n, the number of down-projections A in a group."""
    share_layers: int | None = None
    """How many adjacent layers share the experts; None: as many layers as experts."""
    expert_mixing: str = "router"
    """How the experts' outputs are combined: "router", "sum" or "concat". Our reading, see the module's text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_experts", self.num_experts, maximum=MOST_PARTS)
        if self.share_layers is not None:
            check_count("share_layers", self.share_layers)
        check_choice("expert_mixing", self.expert_mixing, ("router", "sum", "concat"))

    def holding(self, rank: int, configs: list[AdapterConfig]) -> MasaConfig:
        sizes = {config.group_size for config in configs}  # type: ignore[attr-defined]
        if len(sizes) > 1:
            raise ValueError(f"The adapters share experts between {sorted(sizes)} layers: only equal groups add up.")
        r = self.r if rank % self.r == 0 else rank
        return unscaled(self, r, num_experts=rank // r, share_layers=self.group_size, expert_mixing="concat")

    @property
    def parts(self) -> int:
        return self.num_experts

    @property
    def group_size(self) -> int:
        """Layers per group."""
        return self.share_layers or self.num_experts

    @property
    def shares_across_layers(self) -> bool:
        return True

    @property
    def depends_on_input(self) -> bool:
        return self.expert_mixing == "router"

    @property
    def constant_instead(self) -> str:
        return 'expert_mixing "sum" or "concat"'


class MasaModel(AdapterModel):
    """PEFT's handle on MASA."""

    prefix = "masa_"
