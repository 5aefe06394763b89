"""When ASLoRA merges, and which B's: the schedule of a family's merges."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from loraplex.methods.aslora.averages import STATE_KEYS, RunningAverages
from loraplex.methods.aslora.maps import MergeMaps
from loraplex.methods.aslora.merges import closest_pair, merge_due
from loraplex.runtime.parallel import full_tensor, to_local
from loraplex.tuner.schedule import StateOf

logger = logging.getLogger(__name__)


class AsLoraShared(MergeMaps):
    """What the layers of one adapter share, and its merges: at steps t > T_s with (t − T_s) mod m = 0."""

    state_keys: ClassVar[dict[str, bool]] = STATE_KEYS
    # The paper's values for MRPC, whose runs have 6900 steps.
    unknown_length: ClassVar[dict[str, int]] = {"merge_start_step": 320, "merge_interval": 240}

    def trained(self) -> Iterator[nn.Parameter]:
        for family in self.families:
            yield from (self.B(family, layer) for layer in self.owners(family))

    def last_step(self) -> int | None:
        start, interval = self._start_and_interval()
        return None if start is None or interval is None else start + interval * self._most_merges()

    def _start_and_interval(self) -> tuple[int | None, int | None]:
        return self.resolve(self.setting("merge_start_step")), self.resolve(self.setting("merge_interval"))

    def _most_merges(self) -> int:
        return max(self.num_merges(family) for family in self.families)

    def default_steps(self, total_steps: int) -> dict[str, int]:
        # The paper's shares of its run: T_s at 320 of 6900 steps, the last merge at 2000.
        interval = int(0.25 * total_steps / max(1, self._most_merges()))
        return {"merge_start_step": max(1, round(0.05 * total_steps)), "merge_interval": max(1, interval)}

    def finished(self) -> bool:
        return all(self._merges_left(family) <= 0 for family in self.families)

    def describe(self) -> str:
        start, interval = self.setting("merge_start_step"), self.setting("merge_interval")
        return f"merge_start_step={start}, merge_interval={interval}"

    def _merges_left(self, family: str) -> int:
        return self.num_merges(family) - (len(self.maps[family]) - len(self.owners(family)))

    def advance(self, state_of: StateOf) -> None:
        start, interval = self._start_and_interval()
        due: dict[str, dict[int, Tensor]] = {}
        for family in self.families:
            if self._merges_left(family) > 0:
                own = {layer: self.B(family, layer) for layer in self.owners(family)}
                merged = len(own) < len(self.maps[family])
                self._set_steps(family, self.averages.update(family, own, self.steps[family], merged, state_of))
                if merge_due(self.steps[family], start, interval):  # type: ignore[arg-type]
                    due[family] = self.averages.by_family[family]
        if due:
            choices = [self._choose(family, averages) for family, averages in due.items()]
            for family, (lower, upper) in zip(due, self._agree(list(due), choices), strict=True):
                self._merge(family, lower, upper, state_of)

    def _choose(self, family: str, averages: dict[int, Tensor]) -> tuple[int, int]:
        """The pair that this rank would merge; (-1, -1) if a distance is NaN."""
        # Distances need full tensors. Merges are few, so shards are gathered only now.
        averages = {layer: full_tensor(average, self.B(family, layer)) for layer, average in averages.items()}
        A = getattr(self, f"{family}__lora_A")
        A = full_tensor(to_local(A), A) if self.config.merge_distance == "update" else None
        # A device map may give parameters of the bank to several devices.
        device = next(iter(averages.values())).device
        averages = {layer: average.to(device) for layer, average in averages.items()}
        A = None if A is None else A.to(device)
        try:
            return closest_pair(averages, self.config.merge_candidates, A)
        except FloatingPointError as error:
            logger.error("%s: %s.", family, error)
            return -1, -1

    def _agree(self, families: list[str], mine: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The pairs that the first rank chose: ranks whose averages differ in the last bits may choose others."""
        rows = [[self.steps[family], *pair] for family, pair in zip(families, mine, strict=True)]
        agreed = self.decided_by_first(rows, self.B(families[0], self.owners(families[0])[0]))
        for family, (t, lower, upper), row in zip(families, agreed, rows, strict=True):
            if t != row[0]:
                raise RuntimeError(
                    f"The ranks disagree about the step at which {family} merges: {t} on the first, {row[0]} here. "
                    "Every rank has to make every update, and to load the same checkpoint."
                )
            if lower < 0:
                raise RuntimeError(
                    f"ASLoRA can't merge {family} at step {t}: the averages hold NaN or Inf, so training has diverged "
                    "before. Remedy: go on from an earlier checkpoint, with a smaller learning rate."
                )
            if [lower, upper] != row[1:]:
                logger.warning(
                    "ASLoRA step %d: %s merges layers %d and %d as the first rank says; this rank's averages say %d "
                    "and %d. Parameters that are not sharded should be equal on all ranks.",
                    *(t, family, lower, upper, *row[1:]),
                )
        return [(lower, upper) for _, lower, upper in agreed]

    def _merge(self, family: str, lower: int, upper: int, state_of: StateOf) -> None:
        t = self.steps[family]
        mapped = [upper if m == lower else m for m in self.maps[family]]
        merges = getattr(self, f"{family}__merges")
        merges[0] = torch.tensor(mapped)
        merges[1, lower] = t
        self.maps[family] = mapped
        self._map_is_read(family)
        gone = state_of(self.B(family, lower))
        for key in self.state_keys:
            gone.pop(key, None)
        self.averages.by_family[family].pop(lower)
        if self._merges_left(family) <= 0:
            self.averages = self.averages.without(family)
            self._set_steps(family, 0)
        logger.info("ASLoRA step %d: %s layer %d now reads layer %d's B", t, family, lower, upper)

    def restart_averages(self) -> None:
        """Begin averages and their count of steps anew; merges that were done stay."""
        self.averages = RunningAverages()
        self.training_state.clear(dict(self.named_parameters()))
        for family in self.families:
            self._set_steps(family, 0)

    def training_bytes(self) -> int:
        """B̄: float32, one per B of a family with merges to come."""
        merging = [family for family in self.families if self.num_merges(family) > 0]
        return sum(4 * self.B(family, layer).numel() for family in merging for layer in self.owners(family))

    def end_schedule(self) -> bool:
        # The lowest layers read one B. Which layers merge decides training, and the size is the same.
        for family, mapped in self.maps.items():
            self.maps[family] = [max(layer, self.num_merges(family)) for layer in mapped]
        return True

    def before_save(self, adapter_name: str) -> None:
        # A run that is shorter than its schedule ends with this save, and nothing else would say so.
        if self.is_trained() and self.has_advanced and not self.finished() and not self.in_checkpoint:
            left = max(self._merges_left(family) for family in self.families)
            logger.warning(
                "Adapter %r is saved with up to %d of its merges per family still to come (%s, the last at step %s). "
                "It works as it is, but holds more parameters than after all merges. Train longer, or with smaller "
                "steps; in a loop of your own, loraplex.set_total_steps(model, steps) before training makes the "
                "defaults follow the run's length.",
                adapter_name,
                left,
                self.describe(),
                self.last_step(),
            )
