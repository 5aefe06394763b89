"""Dual LoRA (arXiv 2512.03402).  ΔW = α/√(r₁r₂) · ReLU(B A) ⊙ Sign(D C)

A (r₁, in), B (out, r₁) give each weight's update its magnitude, C (r₂, in), D (out, r₂) its direction. Sign is +1 for
positive inputs and −1 otherwise; its gradient is passed straight through, clipped to [−1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loraplex.io.field_types import shown
from loraplex.methods.dual_lora.factors import DualLoraFactors
from loraplex.methods.dual_lora.warmup import DualLoraShared
from loraplex.tuner.checks import check_choice, check_count, check_number, check_steps
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.model import AdapterModel


@dataclass
class DualLoraConfig(AdapterConfig):
    """Settings of Dual LoRA (arXiv 2512.03402). Trainable per module: (r_magnitude + r_direction)·(in + out)."""

    method: ClassVar[str] = "DUALLORA"
    title: ClassVar[str] = "Dual LoRA"
    source: ClassVar[str] = "arXiv 2512.03402"
    factors_cls: ClassVar[type] = DualLoraFactors
    shared_cls: ClassVar[type] = DualLoraShared
    rank_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "r_magnitude", "r_direction")
    training_fields: ClassVar[tuple[str, ...]] = ("init_weights", "init_std", "warmup_steps")

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
        # PEFT's type, a part of the keys in adapter files, has no underscore. A subclass has a type of its own.
        return "dual_lora" if cls.method == "DUALLORA" else super().run_name()

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
