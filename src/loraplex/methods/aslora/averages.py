"""Running averages of ASLoRA's B's over all steps (eq. 3):  B̄_lᵗ = (1/t) Σ_{k≤t} B_lᵏ

They belong to training, so they are stored in each B's training state, from which a resume goes on.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.runtime.parallel import to_local
from loraplex.tuner.schedule import StateOf

logger = logging.getLogger(__name__)

STATE_KEYS = {"aslora_steps": True, "aslora_average": False}
"""What is stored for each B: key → whether it counts steps."""


def update_average(average: Tensor, B: Tensor, t: int) -> Tensor:
    """B̄ᵗ = B̄ᵗ⁻¹ + (Bᵗ − B̄ᵗ⁻¹)/t in float32 (eq. 3, incrementally), in place."""
    return average.lerp_(B.float(), 1 / t)


class RunningAverages:
    """The averages of every family whose merges are not done. Of sharded B's, they are of this rank's part."""

    def __init__(self) -> None:
        self.by_family: dict[str, dict[int, Tensor]] = {}
        """Family → layer → B̄, as this process has averaged them."""

    def update(self, family: str, own: dict[int, nn.Parameter], steps: int, merged: bool, state_of: StateOf) -> int:
        """Add the B's of one more step to the averages of `family`.

        Args:
            family: the family.
            own: layer → B, of the layers that own a B.
            steps: how many steps the adapter says were averaged so far.
            merged: whether layers of the family were merged already.
            state_of: where the training state of a B is kept.

        Returns:
            How many steps are averaged now.

        Raises:
            RuntimeError: the adapter was averaged before, but the averages are missing.
        """
        states = {layer: state_of(B) for layer, B in own.items()}
        self._check(family, states, steps, merged)
        averages = {}
        for layer, state in states.items():
            B = to_local(own[layer])
            t = state["aslora_steps"] = state.get("aslora_steps", 0) + 1
            averages[layer] = update_average(_stored_average(state, B), B, t)
            # Loading a state dict casts every entry to its parameter's dtype, except one under the key "step".
            state["aslora_average"] = averages[layer] if B.dtype.itemsize >= 4 else {"step": averages[layer]}
        self.by_family[family] = averages
        return max(state["aslora_steps"] for state in states.values())

    def without(self, family: str) -> RunningAverages:
        """The averages of all other families. These stay as they are, since a load that fails takes them back."""
        rest = RunningAverages()
        rest.by_family = {name: averages for name, averages in self.by_family.items() if name != family}
        return rest

    def _check(self, family: str, states: dict[int, dict[str, Any]], steps: int, merged: bool) -> None:
        """Put averages in place that the training state lacks, though the adapter was averaged before."""
        counts = {state.get("aslora_steps", 0) for state in states.values()}
        found = max(counts)
        if found and len(counts) > 1:
            raise RuntimeError(
                f"ASLoRA can't go on: of the running averages of {family}, some are of step {found} and some of step "
                f"{min(counts)}, since the optimizer's state leaves out what never got a gradient. Remedy: write "
                "loraplex.save_schedules(model, checkpoint) beside the optimizer's state, and call "
                "loraplex.load_schedules(model, checkpoint) after loading it; ScheduleCallback does both in a trainer."
            )
        if found == 0 and steps and family in self.by_family:
            # Another optimizer has taken over in this process.
            for layer, state in states.items():
                state.update(aslora_steps=steps, aslora_average=self.by_family[family][layer])
        elif found == 0 and steps:
            raise RuntimeError(
                f"ASLoRA can't go on from step {steps}, at which this adapter was saved: the running averages of "
                f"{family} are missing, and its next merge would rest on other numbers. Remedy: load the optimizer's "
                "state too (optimizer.load_state_dict); under FSDP2, ZeRO or ZeroRedundancyOptimizer call "
                "loraplex.load_schedules(model, checkpoint), or pass loraplex.ScheduleCallback(resume_from=checkpoint) "
                "to the trainer. To begin another run from this adapter, call loraplex.restart_averages(model)."
            )
        elif found == 0 and merged:
            logger.warning(
                "%s was merged in an earlier run, but its averages start anew: to continue that run exactly, load "
                "the optimizer's state too.",
                family,
            )
        elif steps and found != steps:
            logger.warning(
                "The adapter is of step %d, but the averages of %s in the training state are of step %d: they come "
                "from different checkpoints. Merges follow the averages.",
                steps,
                family,
                found,
            )


def _stored_average(state: dict[str, Any], B: Tensor) -> Tensor:
    stored = state.get("aslora_average")
    if stored is None:
        return torch.zeros_like(B, dtype=torch.float32)
    return (stored["step"] if isinstance(stored, dict) else stored).to(B.device, torch.float32)
