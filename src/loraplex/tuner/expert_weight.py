"""One matrix of a stacked weight, seen as the linear layer that it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear


class ExpertLinear(nn.Linear):
    """Expert number `index` of a parameter `(experts, out, in)` or `(experts, in, out)`; it owns no parameter.

    An adapted layer reads, merges into and restores its weight as that of any linear layer: what is written to it is
    written to the stack. A bare matrix `(out, in)` has no index.
    """

    def __init__(self, owner: nn.Module, name: str, index: int | None, transposed: bool) -> None:
        nn.Module.__init__(self)
        # Not registered: the parameter belongs to the module of the experts.
        self.__dict__["owner"] = owner
        self.name, self.index, self.transposed = name, index, transposed
        self.register_parameter("bias", None)
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W `(out, in)`, a view of the stack."""
        owner: Any = self.owner
        stack: Tensor = owner._parameters[self.name]
        matrix = stack if self.index is None else stack[self.index]
        return matrix.T if self.transposed else matrix

    @property
    def num_experts(self) -> int:
        """How many matrices the stack holds; 1 of a bare matrix."""
        owner: Any = self.owner
        return 1 if self.index is None else len(owner._parameters[self.name])

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
