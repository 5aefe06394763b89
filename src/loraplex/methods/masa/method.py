"""MASA (arXiv 2510.06005).  h_l = W_l x + (α/r) · B_l · mixᵢ(A_{g(l),i} x)

Several down-projections A ("experts"), shared by a group g(l) of adjacent layers, and one up-projection B per layer.
The paper's abstract does not fix how the experts' outputs are combined; `expert_mixing` is our reading of it:

    "router"  Σᵢ softmax(R_l x)ᵢ · Aᵢ x     a gate per token and layer; ΔW depends on the input
    "sum"     Σᵢ Aᵢ x                       exactly mergeable, rank r
    "concat"  [A₁ x; …; Aₙ x]               exactly mergeable, rank n·r: B_l is (out, n·r)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.runtime.parallel import part
from loraplex.tuner.config import MOST_PARTS, AdapterConfig, check_choice, check_count, unscaled
from loraplex.tuner.factors import Factors, kaiming_, wide
from loraplex.tuner.families import Member
from loraplex.tuner.findings import Finding, GateUse, Matrices
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.sharing import SharedFactors, read, select


class MasaShared(SharedFactors):
    """The experts of each group of adjacent layers, stacked: A (n·r, in)."""

    def add_shared(self, config: MasaConfig, families: dict[str, list[Member]]) -> None:  # type: ignore[override]
        self.num_groups: dict[str, int] = {}
        for name, family in families.items():
            self.num_groups[name] = math.ceil(len(family) / config.group_size)
            for start in range(0, len(family), config.group_size):
                first = family[start].factors
                A = torch.empty(config.num_experts * first.r, first.in_features)
                group = start // config.group_size
                self.register_parameter(f"{name}__lora_A_{group}", nn.Parameter(kaiming_(A, fan_in=A.shape[1])))

    def all_A(self, family: str) -> list[nn.Parameter]:
        """The experts of each group of a family."""
        return [getattr(self, f"{family}__lora_A_{group}") for group in range(self.num_groups[family])]

    @classmethod
    def stored_readers(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: str, factor: str, layers: int
    ) -> list[int] | None:
        group = factor.rpartition("_")[2]
        if not re.fullmatch(r"\d{1,6}", group, re.ASCII):
            return None
        size = config["share_layers"] or config["num_experts"]
        return list(range(layers))[int(group) * size :][:size]

    def read_by(self, factors: MasaFactors) -> list[nn.Parameter]:  # type: ignore[override]
        return [self.get_parameter(factors.experts_name)]


class MasaFactors(Factors):
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
        self._mean_gate: Tensor | None = None
        self._calibrated = ""

    @property
    def mean_gate(self) -> Tensor | None:
        """The router's mean gate `(n,)` on calibration text, or None. It belongs to the weights that are set with it:
        merging and exporting refuse it once they have changed.
        """
        return self._mean_gate

    @mean_gate.setter
    def mean_gate(self, gate: Tensor | None) -> None:
        if gate is not None and len(gate) != self.num_experts:
            raise ValueError(f"{self.module_name} has {self.num_experts} experts, but {len(gate)} mean gates.")
        self._mean_gate = gate
        self._calibrated = "" if gate is None else self._digest()

    def _digest(self) -> str:
        """SHA-256 of what the gates depend on here, for any device and any dtype that holds the same values."""
        digest = hashlib.sha256(repr(self.scaling).encode())
        for factor in (getattr(self.shared, self.experts_name), self.lora_B, self.lora_router):
            digest.update(part(factor).double().cpu().numpy().tobytes())
        return digest.hexdigest()

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

    def lora_form(self) -> tuple[Tensor, Tensor]:
        self.check_mergeable()
        return self.mean_form()

    def mean_form(self) -> tuple[Tensor, Tensor]:
        """`lora_form` with the mean gates as they are, whatever weights they were measured on; else equal gates."""
        B, A = self.scaling * wide(self.lora_B), wide(self.lora_A)
        if self.mixing == "concat":
            return A, B
        gate = torch.ones(self.num_experts)
        if self.mixing == "router":
            gate = gate / self.num_experts if self._mean_gate is None else self._mean_gate
        # A sum, not an einsum: that would be a product, which some settings round to TF32.
        return (gate.to(A).view(-1, 1, 1) * A.view(self.num_experts, self.r, -1)).sum(0), B

    @torch.no_grad()
    def hold(self, A: Tensor, B: Tensor) -> None:
        # Each layer of the group writes the same experts: the stored ones, of which lora_A may be a copy.
        self.shared.get_parameter(self.experts_name).copy_(A)
        self.lora_B.copy_(B)

    def check_mergeable(self) -> None:
        if self.mixing == "router" and self.mean_gate is None:
            raise ValueError(
                'MASA with expert_mixing="router" has no constant ΔW: its gates depend on the input, so it can\'t be '
                "merged exactly. Run loraplex.calibrate(model, batches) on text of your task first to merge with the "
                'mean gates (an approximation, whose error it reports), or train with "sum" or "concat".'
            )
        if self.mixing == "router" and self._calibrated != self._digest():
            raise ValueError(
                f"The mean gates of {self.module_name} were measured on other weights: the adapter was trained, loaded "
                "or cast since loraplex.calibrate. Run loraplex.calibrate(model, batches) again before merging or "
                "exporting."
            )

    @classmethod
    def findings(cls, layers: Sequence[MasaFactors]) -> list[Finding]:
        groups = {layer.experts_name: layer for layer in layers}
        similar = {name: cka(layer.experts()).tolist() for name, layer in groups.items()}
        labels = {name: f"{layer.family}, group {name.rpartition('_')[2]}" for name, layer in groups.items()}
        title = "MASA: linear CKA between experts"
        return [Matrices("expert_similarity", title, "similarity of experts", similar, labels)]

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

    def is_exact(self) -> bool:
        return self.mixing != "router"

    def notes(self) -> list[str]:
        if self.is_exact():
            return []
        return ["The router's gates were replaced by their means over calibration text: an approximation."]


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


def cka(experts: Tensor) -> Tensor:
    """Linear CKA between the experts Aᵢ `(n, r, in)`, without centring: ‖Aᵢ Aⱼᵀ‖² / (‖Aᵢ Aᵢᵀ‖ ‖Aⱼ Aⱼᵀ‖).

    1 where two experts read the same directions with the same weights, 0 where theirs are orthogonal (Kornblith et
    al. 2019).
    """
    A = experts.double()
    cross = torch.einsum("iak,jbk->ijab", A, A).square().sum((-1, -2))
    own = cross.diagonal().sqrt()
    return cross / (own[:, None] * own[None, :]).clamp(min=1e-300)
