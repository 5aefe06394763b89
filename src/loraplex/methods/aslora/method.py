"""ASLoRA (arXiv 2412.10135).  h_l = W_l x + (α/r) · B_{m(l)} A x

One A for a whole family of layers; one B per layer at first. While training runs, the most similar B's are merged:
the lower layer goes over to the upper layer's B, m(l) ← m(upper).

Running average over all steps (eq. 3):  B̄_lᵗ = (1/t) Σ_{k≤t} B_lᵏ
Score of a pair (eq. 4), smallest is merged:  ‖B̄_i − B̄_j‖_F
Merges at steps t > T_s with (t − T_s) mod m = 0, one per family, until N are done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraplex.methods.aslora.shared import AsLoraShared
from loraplex.tuner.checks import check_choice, check_count, check_steps
from loraplex.tuner.config import AdapterConfig, unscaled
from loraplex.tuner.factors import Factors, wide
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.sharing import read, select


class _ReadInstead(torch.autograd.Function):
    """`used`, with a zero gradient for `unused`: DDP fails over a parameter that stops getting gradients mid-run."""

    # torch.func's transforms want setup_context apart from forward, and rules for vmap and jvp.
    generate_vmap_rule = True

    @staticmethod
    def forward(used: Tensor, unused: Tensor) -> Tensor:
        return used.view_as(used)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, unused = inputs
        ctx.unused = (unused.shape, unused.dtype, unused.device)

    @staticmethod
    def jvp(ctx: Any, used: Tensor, unused: Tensor) -> Tensor:
        return used.view_as(used)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.unused
        return grad, torch.zeros(shape, dtype=dtype, device=device)


class AsLoraFactors(Factors):
    """What a layer computes with A and B, which belong to the family; it owns no parameters."""

    shared: AsLoraShared
    family: str
    index: int
    place: Tensor

    def add_parameters(self, config: AdapterConfig) -> None:
        pass

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """The family's A `(r, in)`."""
        return getattr(self.shared, f"{self.family}__lora_A")

    @property
    def lora_B(self) -> Tensor:
        """B_{m(l)} `(out, r)`."""
        if torch.compiler.is_compiling():
            owner = getattr(self.shared, f"{self.family}__merges")[0].index_select(0, self.place)
            return select(self.shared.all_B(self.family), owner)
        own, owner = self.index, self.shared.owner(self.family, self.index)
        B = self.shared.B(self.family, owner)
        if owner == own or not torch.is_grad_enabled():
            return B
        return _ReadInstead.apply(B, self.shared.B(self.family, own))

    def forward(self, x: Tensor) -> Tensor:
        shared, A = self.shared, f"{self.family}__lora_A"
        # The scaling on A x: (tokens, r) is smaller than (tokens, out).
        return linear(linear(self.dropout(x), read(shared, A, x)) * self.scaling, self.lora_B.to(x.device))

    @torch.no_grad()
    def hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.copy_(A)
        self.shared.B(self.family, self.index).copy_(B)

    def lora_form(self) -> tuple[Tensor, Tensor]:
        return wide(self.lora_A), self.scaling * wide(self.lora_B)


@dataclass
class AsLoraConfig(AdapterConfig):
    """Settings of ASLoRA (arXiv 2412.10135).

    Trainable per family of L layers: r·in + L·r·out. After N merges an adapter file holds r·in + (L−N)·r·out.
    """

    method: ClassVar[str] = "ASLORA"
    title: ClassVar[str] = "ASLoRA"
    source: ClassVar[str] = "arXiv 2412.10135"
    factors_cls: ClassVar[type] = AsLoraFactors
    shared_cls: ClassVar[type] = AsLoraShared
    training_fields: ClassVar[tuple[str, ...]] = (
        "init_weights", "merge_start_step", "merge_interval", "num_merges", "merge_candidates", "merge_distance",
    )  # fmt: skip

    merge_start_step: int | float | None = None
    """T_s, after which merging begins: optimizer steps, or a fraction of the run. None: a twentieth of the run, or 320
    steps where its length is unknown; the paper's value for MRPC in either form."""
    merge_interval: int | float | None = None
    """m, the distance of merges: optimizer steps, or a fraction of the run. None: N merges in a quarter of the run, or
    240 steps where its length is unknown; the paper's value for MRPC in either form."""
    num_merges: int | None = None
    """N, merges per family; None: 7 of 12 layers, the paper's share."""
    merge_candidates: str = "adjacent"
    """Pairs that are compared: "adjacent" groups of layers (the paper's text) or "all" (its algorithm)."""
    merge_distance: str = "factor"
    """"factor" ‖B̄_i − B̄_j‖ (the paper), or "update" ‖(B̄_i − B̄_j) A‖, which does not depend on the basis (ours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_start_step is not None:
            check_steps("merge_start_step", self.merge_start_step)
        if self.merge_interval is not None:
            check_steps("merge_interval", self.merge_interval)
        if self.num_merges is not None:
            check_count("num_merges", self.num_merges, minimum=0)
        check_choice("merge_candidates", self.merge_candidates, ("adjacent", "all"))
        check_choice("merge_distance", self.merge_distance, ("factor", "update"))

    def holding(self, rank: int, configs: list[AdapterConfig]) -> AsLoraConfig:
        return unscaled(self, rank, num_merges=0)

    @property
    def shares_across_layers(self) -> bool:
        return True


class AsLoraModel(AdapterModel):
    """PEFT's handle on ASLoRA."""

    prefix = "aslora_"
