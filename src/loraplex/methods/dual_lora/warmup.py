"""Dual LoRA's warm-up, by which training starts at the base model's function."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loraplex.tuner.families import Member
from loraplex.tuner.findings import Fact, Finding
from loraplex.tuner.schedule import Scheduled, StateOf
from loraplex.tuner.sharing import check_stored, foreign, read

logger = logging.getLogger(__name__)


def check_warmup(warmup: Tensor) -> None:
    """Check a saved warm-up (2,): steps done, and steps in all, which are 0 until they are known.

    Raises:
        ValueError: training can't have led to these numbers.
    """
    done, steps = warmup.tolist()
    if not 0 <= done <= steps:
        raise ValueError(
            f"warmup says that {done} of {steps} steps are done, which training never leads to: the file is broken; "
            "copy or download the adapter again."
        )


class DualLoraShared(Scheduled):
    """The warm-up: ΔW is multiplied by a factor that rises from 0 to 1 over `warmup_steps` optimizer steps.

    All four factors start Gaussian, since a zero factor would close the ReLU for good: B = 0 makes ReLU'(BA) = 0, and
    with it every gradient. So the warm-up has to start training at the base model's function.
    """

    unknown_length: ClassVar[dict[str, int]] = {"warmup_steps": 100}
    state_names: ClassVar[tuple[str, ...]] = ("warmup",)

    def add_shared(self, config: Any, families: dict[str, list[Member]]) -> None:
        # Steps done, and steps in all (0: not known yet). Integers: a cast of the model to bfloat16 leaves them alone.
        self.register_buffer("warmup", torch.tensor([0, self.last_step() or 0]))
        if not config.init_weights:
            self.warmup.copy_(torch.tensor([1, 1]))
        self.warmup: Tensor

    def trained(self) -> Iterator[nn.Parameter]:
        # All four factors: a run that trains only the signs needs the warm-up too.
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
            # A run that goes on with fewer warm-up steps may be past its end.
            self.warmup[1] = max(self.last_step() or 0, int(self.warmup[0]))

    @classmethod
    def check_buffer(cls, name: str, value: Tensor) -> None:
        check_warmup(value)

    @classmethod
    def stored_readers(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: str, factor: str, layers: int
    ) -> list[int]:
        raise foreign(f"{family}__{factor}")  # the layers share no factor

    @classmethod
    def stored_findings(cls, tensors: Mapping[str, Tensor]) -> list[Finding]:
        if (warmup := tensors.get("warmup")) is None:
            return []
        check_stored("warmup", warmup, warmup.shape == (2,))
        check_warmup(warmup)
        done, steps = warmup.tolist()
        return [Fact("warmup", "warm-up", f"{done} of {steps or 'an unknown number of'} steps", [done, steps])]

    def before_save(self, adapter_name: str) -> None:
        # A run that is shorter than its warm-up ends with this save, and nothing else would say so.
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
