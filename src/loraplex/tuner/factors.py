"""What one adapter owns on one layer, and its equation: the base class of every method's factors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loraplex.numerics.products import product
from loraplex.runtime.placement import NeverOffloaded
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.findings import Finding

_MOST_RANKS = 16
"""How many times in + out the ranks of all parts of an adapter may come to."""


class Factors(NeverOffloaded, ABC):
    """What one adapter owns on one layer, and its equation. A method subclasses this once.

    The dtype of `lora_A`, which is a parameter or a property that reads a shared one, is the dtype in which the method
    computes. A method whose ΔW is a product of two factors writes `lora_form`; any other method writes `delta_weight`.
    """

    lora_A: Tensor
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Parameters that weight decay would undo, such as gates that start at zero."""

    def __init__(self, config: AdapterConfig, module_name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.module_name = module_name
        self.in_features, self.out_features = in_features, out_features
        self.r = config.rank(module_name)
        self._check_size(config)
        self.lora_alpha = config.alpha(module_name)
        self.scaling = config.scaling(module_name)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.add_parameters(config)

    def _check_size(self, config: AdapterConfig) -> None:
        # A rank that can't be meant should not end in the allocator. One above the smaller dimension is only wasteful:
        # a single r for all layers may exceed the outputs of a router or a classifier.
        largest = self.in_features + self.out_features
        if self.r > largest or self.r * config.parts > _MOST_RANKS * largest:
            times = f" in each of {config.parts} parts" if config.parts > 1 else ""
            raise ValueError(
                f"r={self.r}{times} is too large for {self.module_name}, whose weight is "
                f"{(self.out_features, self.in_features)}: the factors would be larger than what they adapt. Choose a "
                "smaller r, for this module by rank_pattern."
            )

    @abstractmethod
    def add_parameters(self, config: AdapterConfig) -> None:
        """Create and initialise the parameters that this layer owns."""

    def lora_form(self) -> tuple[Tensor, Tensor] | None:
        """A `(R, in)` and B `(out, R)` with ΔW = B A, scaling included, in float32 at least; None if ΔW has none.

        Raises:
            ValueError: ΔW is not a constant matrix.
        """
        return None

    def delta_weight(self, rows: slice = slice(None)) -> Tensor:
        """ΔW `(out, in)`, or some rows of it, scaling included, in float32 at least.

        Raises:
            ValueError: ΔW is not a constant matrix.
        """
        form = self.lora_form()
        assert form is not None, "a method writes lora_form or delta_weight"
        A, B = form
        with torch.autocast(A.device.type, enabled=False):
            return product(B[rows], A)

    def by_rows(self) -> Callable[[slice], Tensor]:
        """`delta_weight` without a gradient, for many calls: what all rows need is computed once."""
        if (form := self.lora_form()) is None:
            return self.delta_weight
        A, B = (factor.detach() for factor in form)
        return lambda rows: product(B[rows], A)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype in which `forward` takes x; None for the dtype in which the base layer takes it."""
        return self.lora_A.dtype

    def takes_weight(self, x: Tensor) -> bool:
        """Whether `forward` takes the base layer's weight and bias beside x and returns all of h. No by default."""
        return False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """ΔW x, scaling included: `(..., in)` → `(..., out)`. The dtype of x is `input_dtype`."""

    def clear_cache(self) -> None:
        """Drop cached tensors that were computed from the factors. A method caches nothing by default."""

    def check_mergeable(self) -> None:
        """Raise a ValueError if ΔW is not a constant matrix. It is one by default."""

    def hold(self, A: Tensor, B: Tensor) -> None:
        """Set the factors so that ΔW = B A. The config comes from `AdapterConfig.holding`, which made room for it."""
        raise NotImplementedError

    def is_exact(self) -> bool:
        """Whether ΔW is all that the adapter changes on this layer."""
        return True

    def notes(self) -> list[str]:
        """Sentences for a user who exports or merges this adapter."""
        return []

    # What inspection and budgets ask

    @classmethod
    def findings(cls, layers: Sequence[Any]) -> list[Finding]:
        """What is particular to the method in an adapter, of which `layers` are the factors of all layers."""
        return []

    def saved_bytes(self, tokens: int, itemsize: int, copied: int) -> int:
        """What a layer saves from forward to backward beside its input, in bytes; parameters are counted elsewhere.

        As LoRA by default: A x, and the copies that autocast makes of A and B.

        Args:
            tokens: T, of a step.
            itemsize: bytes per element that is computed with.
            copied: bytes per element of a factor that autocast copies; 0 without autocast.
        """
        rank = self.r
        return tokens * rank * itemsize + copied * rank * (self.in_features + self.out_features)

    @property
    def takes_input_as_it_is(self) -> bool:
        """Whether x is saved in the dtype in which the base layer gets it, not as a copy in another one."""
        return self.input_dtype is None

    @property
    def dropout_draws(self) -> int:
        """How many masks the forward draws for one input."""
        return 1

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, r={self.r}, scaling={float(self.scaling):g}"


def wide(factor: Tensor) -> Tensor:
    """`factor` in float32 at least, so that products that are merged or exported are not rounded to bfloat16."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def kaiming_(factor: Tensor, fan_in: int) -> Tensor:
    """Fill with U(−1/√fan_in, 1/√fan_in), as `nn.Linear` and LoRA's A start (Kaiming-uniform with a = √5)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.init.uniform_(factor, -bound, bound)
