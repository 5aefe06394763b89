"""Dual LoRA's factors and its equation.  ΔW = α/√(r₁r₂) · ReLU(B A) ⊙ Sign(D C)"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.methods.dual_lora import tiles
from loraplex.methods.dual_lora.closed_gates import closed_and_negative, gates_and_signs
from loraplex.methods.dual_lora.gated_linear import compute_dtype, gated_linear
from loraplex.methods.dual_lora.sign import Sign
from loraplex.methods.dual_lora.tiles import delta_weight, has_kernels, rows_of
from loraplex.methods.dual_lora.warmup import DualLoraShared
from loraplex.numerics.products import product
from loraplex.runtime import loss_scaling
from loraplex.tuner.cache import TensorCache
from loraplex.tuner.factors import Factors, wide
from loraplex.tuner.findings import Finding

logger = logging.getLogger(__name__)


class DualLoraFactors(Factors):
    """A, B (magnitude) and C, D (direction)."""

    shared: DualLoraShared

    def add_parameters(self, config: Any) -> None:
        r1, r2 = config.ranks(self.module_name)
        self.compute, self.cache_delta = config.compute, config.cache_delta
        self._cache = TensorCache()
        loss_scaling.watch()
        shapes = {
            "lora_A": (r1, self.in_features),
            "lora_B": (self.out_features, r1),
            "lora_C": (r2, self.in_features),
            "lora_D": (self.out_features, r2),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).mul_(config.init_std)))
        self.lora_B: nn.Parameter
        self.lora_C: nn.Parameter
        self.lora_D: nn.Parameter

    @property
    def matrices(self) -> tiles.Factors:
        """A, B, C and D."""
        return self.lora_A, self.lora_B, self.lora_C, self.lora_D

    def clear_cache(self) -> None:
        self._cache.clear()

    def train(self, mode: bool = True) -> DualLoraFactors:
        """Switch modes, and empty the cache of ΔW."""
        self.clear_cache()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> DualLoraFactors:
        # A model that moves leaves no cached ΔW on the device.
        self.clear_cache()
        super()._apply(*args, **kwargs)
        return self

    def delta_weight(self, rows: slice = slice(None)) -> Tensor:
        return self._delta_weight(rows, half=False)

    def _delta_weight(self, rows: slice, half: bool) -> Tensor:
        # Outside autocast and in float32 at least: Sign(DC) flips when bfloat16 rounds, but forward, merge and export
        # have to see the same signs.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            A, B, C, D = map(wide, self.matrices)
            M, N = product(B[rows], A), product(D[rows], C)
            return self.scaling * self.shared.fraction(A) * torch.relu(M) * Sign.apply(N, half)

    def by_rows(self) -> Callable[[slice], Tensor]:
        return rows_of(self.matrices, self.scaling * self.shared.fraction(wide(self.lora_B)))

    def notes(self) -> list[str]:
        if self.shared.finished():
            return []
        done, steps = self.shared.warmup.tolist()
        return [f"The warm-up is at step {done} of {steps or '?'}: ΔW is what it is now."]

    @property
    def input_dtype(self) -> torch.dtype | None:
        # The base layer's input dtype also tells whether gradients are in float16.
        return None

    @classmethod
    def findings(cls, layers: Sequence[DualLoraFactors]) -> list[Finding]:
        return [gates_and_signs({layer.module_name: closed_and_negative(layer.matrices) for layer in layers})]

    def saved_bytes(self, tokens: int, itemsize: int, copied: int) -> int:
        if self.compute != "reference":
            return 4 + 8 * (itemsize == 2)  # the scale, and the seed of its rounding
        # In float32, under autocast too: ReLU(BA), the same scaled, Sign(DC); and ΔW as it is computed with.
        return self.out_features * self.in_features * (3 * 4 + itemsize)

    @property
    def takes_input_as_it_is(self) -> bool:
        return self.compute != "reference"

    def takes_weight(self, x: Tensor) -> bool:
        return self._stays_apart(x) is None

    def _stays_apart(self, x: Tensor) -> str | None:
        """Why W + ΔW should not be one matrix; None if it should."""
        if self.compute in ("apart", "reference"):
            return f"compute={self.compute!r}"
        if self.cache_delta and not self.training:
            return "ΔW is cached in evaluation (cache_delta)"
        if self.training and not isinstance(self.dropout, nn.Identity):
            return "with dropout, W and ΔW read different inputs"
        if self.compute == "auto" and not self.training and compute_dtype(x).itemsize < 4:
            return "exact in evaluation, where W + ΔW would be rounded to half precision"
        return None

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """ΔW x, or (W + ΔW) x + b if W is given."""
        if not torch.compiler.is_compiling():
            if self.training or torch.is_grad_enabled():
                # Fused optimizers change parameters without a trace, but not without a forward.
                self.clear_cache()
            self._announce_form(x, weight)
        if self.compute == "reference":
            return self._reference(x)
        x = self.dropout(x)
        scale = self.scaling * self.shared.fraction(wide(self.lora_B))
        x = x.to(compute_dtype(x))
        if self.cache_delta and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            sources, key = (*self.matrices, self.shared.warmup), (x.dtype, float(self.scaling))
            return linear(x, self._cache.get(lambda: delta_weight(self.matrices, scale, x.dtype), sources, key))
        return gated_linear(x, self.matrices, scale, weight, bias)

    def _reference(self, x: Tensor) -> Tensor:
        """ΔW x with plain autograd."""
        if not torch.compiler.is_compiling():
            loss_scaling.forward_begins()
        half = torch.float16 in (x.dtype, compute_dtype(x))
        x = self.dropout(x.to(self.lora_A.dtype))
        return linear(x, self._delta_weight(slice(None), half).to(x.dtype))

    def _announce_form(self, x: Tensor, weight: Tensor | None) -> None:
        means = "torch tiles"
        if self.compute == "reference":
            means = "plain autograd"
        elif has_kernels(x.device.type, max(len(self.lora_A), len(self.lora_C))):
            means = "Triton tiles"
        apart = self._stays_apart(x) or "the base weight is quantised, sharded, trained, or has hooks"
        _announce(x.device.type, means, None if weight is not None else apart)


@cache
def _announce(device: str, means: str, apart: str | None) -> None:
    """Log once in which form and by which means ΔW is computed, and why."""
    form = "x (W + ΔW)ᵀ" if apart is None else "x Wᵀ + x ΔWᵀ"
    logger.info("Dual LoRA computes %s by %s on %s: %s.", form, means, device, apart or "one product for each layer")
