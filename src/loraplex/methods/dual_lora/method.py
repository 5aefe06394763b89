"""Dual LoRA (arXiv 2512.03402).  ΔW = α/√(r₁r₂) · ReLU(B A) ⊙ Sign(D C)

A (r₁, in), B (out, r₁) give each weight's update its magnitude, C (r₂, in), D (out, r₂) its direction. Sign is +1 for
positive inputs and −1 otherwise; its gradient is passed straight through, clipped to [−1, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.io.field_types import shown
from loraplex.methods.dual_lora.gated_linear import (
    compute_dtype,
    delta_weight,
    gated_linear,
    has_kernels,
    rows_of,
    sign_,
)
from loraplex.numerics.lowrank import row_tiles
from loraplex.numerics.products import product
from loraplex.runtime import loss_scaling
from loraplex.tuner.cache import TensorCache
from loraplex.tuner.config import AdapterConfig, check_choice, check_count, check_number, check_steps
from loraplex.tuner.factors import Factors, wide
from loraplex.tuner.families import Member
from loraplex.tuner.findings import Fact, Finding, OverLayers, Panel
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.schedule import Scheduled, StateOf
from loraplex.tuner.sharing import check_stored, read

logger = logging.getLogger(__name__)


class Sign(torch.autograd.Function):
    """+1 where the input is positive, −1 elsewhere (Sign(0) = −1); backward clips the gradient to [−1, 1].

    Under a loss scale S that is [−S, S]. `half`: whether the gradient comes from float16, where S must be known.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: bool = False) -> Tensor:
        ctx.half = half
        return sign_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return loss_scaling.clip(grad, ctx.half), None


def check_warmup(warmup: Tensor) -> None:
    """Check a saved warm-up (2,): steps done, and steps in all, 0 while that is not known.

    Raises:
        ValueError: training can't have led there.
    """
    done, steps = warmup.tolist()
    if not 0 <= done <= steps:
        raise ValueError(
            f"warmup says that {done} of {steps} steps are done, which training never leads to: the file is broken; "
            "copy or download the adapter again."
        )


class DualLoraShared(Scheduled):
    """The warm-up: ΔW is multiplied by a factor that rises from 0 to 1 over `warmup_steps` optimizer steps.

    All four factors start Gaussian, since a zero factor would close the ReLU for good: B = 0 makes ReLU'(BA) = 0 and
    with it every gradient. So it is the warm-up that starts training at the base model's function.
    """

    unknown_length: ClassVar[dict[str, int]] = {"warmup_steps": 100}

    def add_shared(self, config: DualLoraConfig, families: dict[str, list[Member]]) -> None:  # type: ignore[override]
        self.config = config
        # Steps done, and steps in all (0: not known yet). Integers: a cast of the model to bfloat16 leaves them alone.
        self.register_buffer("warmup", torch.tensor([0, self.last_step() or 0]))
        if not config.init_weights:
            self.warmup.copy_(torch.tensor([1, 1]))
        self.warmup: Tensor

    def trained(self) -> Iterator[nn.Parameter]:
        # All four: whoever trains only the signs needs the warm-up too.
        for factors in self.member_factors():
            yield from factors.parameters()

    def last_step(self) -> int | None:
        return self.resolve(self.setting("warmup_steps"))

    def default_steps(self, total_steps: int) -> dict[str, int]:
        return {"warmup_steps": max(1, round(0.1 * total_steps))}

    def finished(self) -> bool:
        done, steps = self.warmup.tolist()
        return 0 < steps <= done

    def describe(self) -> str:
        return f"warmup_steps={self.setting('warmup_steps')}"

    def advance(self, state_of: StateOf) -> None:
        if not self.finished():
            self.warmup[0] += 1
            # A run that goes on with fewer steps in all may be past the end.
            self.warmup[1] = max(self.last_step() or 0, int(self.warmup[0]))

    @classmethod
    def check_buffer(cls, name: str, value: Tensor) -> None:
        check_warmup(value)

    @classmethod
    def stored_findings(cls, tensors: Mapping[str, Tensor]) -> list[Finding]:
        if (warmup := tensors.get("warmup")) is None:
            return []
        check_stored("warmup", warmup, warmup.shape == (2,))
        check_warmup(warmup)
        done, steps = warmup.tolist()
        return [Fact("warmup", "warm-up", f"{done} of {steps or 'an unknown number of'} steps", [done, steps])]

    def before_save(self, adapter_name: str) -> None:
        # A run that is shorter than its warm-up ends here, and nobody else would say so.
        if self.is_trained() and self.has_advanced and not self.finished() and not self.in_checkpoint:
            done, steps = self.warmup.tolist()
            logger.warning(
                "Adapter %r is saved at step %d of %d of its warm-up (%s): its update is at %.0f %% of its strength, "
                "wherever it is loaded. Train longer, or with fewer warmup_steps; in a loop of your own, "
                "loraplex.set_total_steps(model, steps) before training makes the default a tenth of the run.",
                adapter_name,
                done,
                steps,
                self.describe(),
                100 * done / max(1, steps),
            )

    def fraction(self, like: Tensor) -> Tensor:
        """The warm-up factor, a number between 0 and 1, on the device and in the dtype of `like`."""
        done, steps = read(self, "warmup", like)
        return (done / steps.clamp(min=1).to(like.dtype)).clamp(max=1)


class DualLoraFactors(Factors):
    """A, B (magnitude) and C, D (direction)."""

    shared: DualLoraShared

    def add_parameters(self, config: DualLoraConfig) -> None:  # type: ignore[override]
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

    def clear_cache(self) -> None:
        self._cache.clear()

    def train(self, mode: bool = True) -> DualLoraFactors:
        """Switch modes, and empty the cache of ΔW."""
        self.clear_cache()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> DualLoraFactors:
        # A model that moves leaves nothing behind on the device.
        self.clear_cache()
        super()._apply(*args, **kwargs)
        return self

    def delta_weight(self, rows: slice = slice(None)) -> Tensor:
        return self._delta_weight(rows, half=False)

    def _delta_weight(self, rows: slice, half: bool) -> Tensor:
        # Outside autocast and in float32 at least: Sign(DC) flips on bfloat16 rounding, and forward, merge and export
        # must see the same signs.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            A, B, C, D = (wide(factor) for factor in (self.lora_A, self.lora_B, self.lora_C, self.lora_D))
            M, N = product(B[rows], A), product(D[rows], C)
            return self.scaling * self.shared.fraction(A) * torch.relu(M) * Sign.apply(N, half)

    def by_rows(self) -> Callable[[slice], Tensor]:
        factors = self.lora_A, self.lora_B, self.lora_C, self.lora_D
        return rows_of(factors, self.scaling * self.shared.fraction(wide(self.lora_B)))

    def notes(self) -> list[str]:
        if self.shared.finished():
            return []
        done, steps = self.shared.warmup.tolist()
        return [f"The warm-up is at step {done} of {steps or '?'}: ΔW is what it is now."]

    @property
    def input_dtype(self) -> torch.dtype | None:
        # The base layer's, which also tells whether gradients are in float16.
        return None

    @classmethod
    def findings(cls, layers: Sequence[DualLoraFactors]) -> list[Finding]:
        shares = {layer.module_name: layer.closed_and_negative() for layer in layers}
        closed = {name: share[0] for name, share in shares.items()}
        negative = {name: share[1] for name, share in shares.items()}
        panels = [
            Panel("closed", "share of closed gates (BA ≤ 0)", closed, "closed gates, %"),
            Panel("negative", "negative share of open gates", negative, "negative signs, %"),
        ]
        return [OverLayers("gates", "Dual LoRA: gates and signs", panels, top=1)]

    def closed_and_negative(self) -> tuple[float, float]:
        """The share of ΔW where ReLU(BA) is zero, and the share of negative signs in the rest."""
        A, B, C, D = map(wide, (self.lora_A, self.lora_B, self.lora_C, self.lora_D))
        opened = negative = 0
        for rows in row_tiles(self.out_features, self.in_features):
            is_open = product(B[rows], A) > 0
            opened += int(is_open.sum())
            negative += int((is_open & ~(product(D[rows], C) > 0)).sum())
        return 1 - opened / (self.out_features * self.in_features), negative / opened if opened else 0.0

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
        """Why W + ΔW should not be one matrix, or None."""
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
            apart = self._stays_apart(x) or "the base weight is quantised, sharded, trained, or has hooks"
            means = "torch tiles"
            if self.compute == "reference":
                means = "plain autograd"
            elif has_kernels(x.device.type, max(len(self.lora_A), len(self.lora_C))):
                means = "Triton tiles"
            _announce(x.device.type, means, None if weight is not None else apart)
        if self.compute == "reference":
            if not torch.compiler.is_compiling():
                loss_scaling.forward_begins()
            half = torch.float16 in (x.dtype, compute_dtype(x))
            x = self.dropout(x.to(self.lora_A.dtype))
            return linear(x, self._delta_weight(slice(None), half).to(x.dtype))
        x = self.dropout(x)
        scale = self.scaling * self.shared.fraction(wide(self.lora_B))
        factors = self.lora_A, self.lora_B, self.lora_C, self.lora_D
        x = x.to(compute_dtype(x))
        if self.cache_delta and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            sources = *factors, self.shared.warmup
            key = x.dtype, self.scaling
            return linear(x, self._cache.get(lambda: delta_weight(factors, scale, x.dtype), sources, key))
        return gated_linear(x, factors, scale, weight, bias)


@cache
def _announce(device: str, means: str, apart: str | None) -> None:
    """Say once which way ΔW is computed, and why."""
    form = "x (W + ΔW)ᵀ" if apart is None else "x Wᵀ + x ΔWᵀ"
    logger.info("Dual LoRA computes %s by %s on %s: %s.", form, means, device, apart or "one product for each layer")


@dataclass
class DualLoraConfig(AdapterConfig):
    """Settings of Dual LoRA (arXiv 2512.03402). Trainable per module: (r_magnitude + r_direction)·(in + out)."""

    method: ClassVar[str] = "DUALLORA"
    title: ClassVar[str] = "Dual LoRA"
    source: ClassVar[str] = "arXiv 2512.03402"
    factors_cls: ClassVar[type] = DualLoraFactors
    shared_cls: ClassVar[type] = DualLoraShared
    rank_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "r_magnitude", "r_direction")

    r_magnitude: int | None = None
    """r₁, rank of the magnitude group; None: r − r_direction, or half of r, rounded up."""
    r_direction: int | None = None
    """r₂, rank of the direction group; None: r − r_magnitude, or half of r, rounded down."""
    warmup_steps: int | float | None = None
    """Over how many optimizer steps ΔW fades in: steps, or a fraction of the run. None: a tenth of the run, or 100
    steps where its length is unknown. The paper names no number."""
    init_std: float = 0.02
    """Standard deviation of the Gaussian from which all four factors start. The paper names no number."""
    compute: str = "auto"
    """How W x + ΔW x is computed: "added" (x (W + ΔW)ᵀ), "apart" (x Wᵀ + x ΔWᵀ), "reference" (the same with plain
    autograd, which keeps three matrices as large as W), or "auto": "added" where it is exact enough and W is plain."""
    cache_delta: bool = False
    """Whether each layer caches ΔW in evaluation, as large as W, to generate tokens one by one without merging. It does
    not see a write into `parameter.data`: call `loraplex.clear_cache(model)` after one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r_magnitude", "r_direction"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
                if self.rank_pattern:
                    raise ValueError(f"{name}={value} and rank_pattern exclude each other: leave one of them out.")
        if self.r_magnitude is not None and self.r_direction is not None:
            self.r = self.r_magnitude + self.r_direction
        patterns = [(f"rank_pattern[{shown(pattern)}]", r) for pattern, r in self.rank_pattern.items()]
        for name, r in [("r", self.r), *patterns]:
            if min(self._split(r)) < 1:
                raise ValueError(
                    f"{name}={r} leaves no rank for one of Dual LoRA's two groups (r_magnitude={self.r_magnitude}, "
                    f"r_direction={self.r_direction}): r must be at least 2 and larger than either."
                )
        if self.warmup_steps is not None:
            check_steps("warmup_steps", self.warmup_steps)
        check_number("init_std", self.init_std)
        check_choice("compute", self.compute, ("auto", "added", "apart", "reference"))

    @classmethod
    def run_name(cls) -> str:
        # PEFT's type has no underscore, since it is a part of the keys in adapter files.
        return "dual_lora"

    @property
    def lowest_rank(self) -> int:
        return 1 + (self.r_magnitude or self.r_direction or 1)

    def ranks(self, module_name: str) -> tuple[int, int]:
        """(r₁, r₂) on the module `module_name`."""
        return self._split(self.rank(module_name))

    def _split(self, r: int) -> tuple[int, int]:
        if self.r_magnitude is not None:
            return self.r_magnitude, r - self.r_magnitude
        r2 = r // 2 if self.r_direction is None else self.r_direction
        return r - r2, r2

    def scaling(self, module_name: str) -> float:
        """α/√(r₁r₂), or α/(r₁r₂)^¼ with `use_rslora`: the geometric mean of the ranks takes the place of r."""
        r1, r2 = self.ranks(module_name)
        return self.alpha(module_name) / (r1 * r2) ** (0.25 if self.use_rslora else 0.5)


class DualLoraModel(AdapterModel):
    """PEFT's handle on Dual LoRA."""

    prefix = "duallora_"
