"""MASA's experts: which group of layers shares which, and how alike they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.tuner.factors import kaiming_
from loraplex.tuner.families import Member
from loraplex.tuner.findings import Finding, Matrices
from loraplex.tuner.sharing import SharedFactors, foreign


class MasaShared(SharedFactors):
    """The experts of each group of adjacent layers, stacked: A (n·r, in)."""

    def add_shared(self, config: Any, families: dict[str, list[Member]]) -> None:
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
    ) -> list[int]:
        group = factor.rpartition("_")[2]
        if not re.fullmatch(r"\d{1,6}", group, re.ASCII):
            raise foreign(f"{family}__{factor}")
        size = config["share_layers"] or config["num_experts"]
        return list(range(layers))[int(group) * size :][:size]

    def read_by(self, factors: Any) -> list[nn.Parameter]:
        return [self.get_parameter(factors.experts_name)]


def similarity_of_experts(groups: dict[str, tuple[str, Tensor]]) -> list[Finding]:
    """The experts of each group compared: the group's name → its family and its experts `(n, r, in)`."""
    similar = {name: cka(experts).tolist() for name, (_, experts) in groups.items()}
    labels = {name: f"{family}, group {name.rpartition('_')[2]}" for name, (family, _) in groups.items()}
    return [Matrices("expert_similarity", "MASA: linear CKA between experts", "similarity of experts", similar, labels)]


def cka(experts: Tensor) -> Tensor:
    """Linear CKA between the experts Aᵢ `(n, r, in)`, without centring: ‖Aᵢ Aⱼᵀ‖² / (‖Aᵢ Aᵢᵀ‖ ‖Aⱼ Aⱼᵀ‖).

    1 where two experts read the same directions with the same weights, 0 where theirs are orthogonal (Kornblith et
    al. 2019).
    """
    A = experts.double()
    cross = torch.einsum("iak,jbk->ijab", A, A).square().sum((-1, -2))
    own = cross.diagonal().sqrt()
    return cross / (own[:, None] * own[None, :]).clamp(min=1e-300)
