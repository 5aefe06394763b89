"""Merging adapters into the weight of one layer, and taking them out again."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from loraplex.numerics.products import add_product_, tiles
from loraplex.runtime.placement import is_offloaded, loaded
from loraplex.tuner import base_weight
from loraplex.tuner.factors import Factors
from loraplex.tuner.finite import check_factors

logger = logging.getLogger(__name__)


class MergingLayer(nn.Module, BaseTunerLayer):
    """A layer that can merge its adapters. Abstract: the subclass holds the adapters and computes with them."""

    base_layer: nn.Module
    module_name: str
    quantization_backend: Any
    fan_in_fan_out: bool

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self.merge_error = 0.0
        """‖W′ − W − ΔW‖_F / ‖ΔW‖_F of the last merge, where W′ is what the base layer stores."""
        self._backup: tuple[Any, ...] | None = None
        self._fingerprint: tuple[torch.dtype, int] | None = None
        self._tied_weight: nn.Parameter | None = None

    @abstractmethod
    def factors(self, adapter_name: str) -> Factors | None:
        """The factors of `adapter_name` on this layer, or None if it does not adapt this layer."""

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise a ValueError if the base can't take a merged weight, or an adapter's ΔW is not constant and finite."""
        present = [factors for name in adapter_names if (factors := self.factors(name)) is not None]
        if present and self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(self._cannot_merge())
        for factors in present:
            factors.check_mergeable()
            check_factors(factors)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can convert the adapter: its ΔW must be a constant matrix."""
        factors = self.factors(adapter_name)
        try:
            if factors is not None:
                factors.check_mergeable()
        except ValueError:
            return False
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the ΔW of adapters to the base weight.

        So that `unmerge` can restore it, the weight before the merge is backed up, on the CPU if it is not quantised.
        A quantised weight is dequantised, added to and quantised again. `merge_error` tells what that, or rounding to
        the weight's dtype, has cost.

        Args:
            safe_merge: refuse a merge whose result would hold NaN or Inf, whether from the base weight or by overflow.
            adapter_names: which adapters to merge; None merges the active ones.

        Raises:
            ValueError: see `check_mergeable`, or `safe_merge` found NaN or Inf. Then no adapter stays merged.
        """
        self._merge(safe_merge, adapter_names, backup=True)

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, merged if `merge` says so. PEFT puts it in the place of this layer."""
        if merge:
            # Nobody can unmerge afterwards. Without a backup, merging is bound by the memory's bandwidth.
            self._merge(safe_merge, adapter_names, backup=safe_merge or self.quantization_backend is not None)
        return self.get_base_layer()

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, backup: bool) -> None:
        names = [n for n in check_adapters_to_merge(self, adapter_names) if self.factors(n) is not None]
        if names:
            self.check_mergeable(names)
            with loaded(self):
                self._merge_loaded(names, safe_merge, backup)

    def _merge_loaded(self, names: list[str], safe_merge: bool, backup: bool) -> None:
        inner = self.get_base_layer()
        if is_offloaded(inner) and self.quantization_backend is None:
            # What was loaded may be the memory of an embedding that it is tied to, or of the user's own state dict.
            inner.weight.data = inner.weight.data.clone()  # type: ignore[operator]
        if self._backup is None and not backup:
            self.merge_error = self._add(names, safe_merge)
            self.merged_adapters = names
            return
        if self._backup is not None:
            # Start from the weight before any merge: adding to a merged one would round, or quantise, the update twice.
            names = [*self.merged_adapters, *names]
            self._unmerge_loaded()
        before = base_weight.backup(self)
        try:
            self.merge_error = self._add(names, safe_merge)
        except base_weight.Unreadable as error:
            base_weight.restore(self, before)
            raise ValueError(f"{self._cannot_merge()} ({error})") from error
        except Exception:
            base_weight.restore(self, before)
            raise
        self._backup, self.merged_adapters = before, names
        self._fingerprint = base_weight.fingerprint(self)

    def _add(self, names: list[str], safe_merge: bool) -> float:
        """Write W + Σ ΔW, and return the share of Σ ΔW that was lost."""
        weight = base_weight.read(self)
        # A quantised weight can't be written in parts.
        target = weight if self.quantization_backend is None else weight.clone()
        view = target.T if self.fan_in_fan_out else target
        lost, total = self._add_to(view, [self.factors(name) for name in names])  # type: ignore[misc]
        if safe_merge and not view.isfinite().all():
            raise ValueError(
                f"Merging {names} would write NaN or Inf into the weight of {self.module_name}: the adapter is "
                "broken; load an earlier checkpoint."
            )
        if self.quantization_backend is not None:
            lost = ((base_weight.write(self, target) - target).norm() ** 2).item()
        return math.sqrt(lost / total) if total else 0.0

    def _add_to(self, view: Tensor, adapters: list[Factors]) -> tuple[float, float]:
        """W ← W + Σ ΔW; returns ‖what rounding took‖² and ‖Σ ΔW‖²."""
        forms = [factors.lora_form() for factors in adapters]
        exact = view.dtype.itemsize >= 4 and self.quantization_backend is None
        if exact and all(form is not None for form in forms):
            for A, B in filter(None, forms):
                add_product_(view, B.to(view), A.to(view))
            return 0.0, 0.0
        lost = total = torch.zeros((), dtype=torch.float64, device=view.device)
        updates = [factors.by_rows() for factors in adapters]
        for rows in tiles(view):
            # Sum in float32 at least and round once: rounding after each adapter would lose small updates.
            delta: Tensor = sum(update(rows).to(view.device) for update in updates)  # type: ignore[assignment]
            if exact:
                view[rows] += delta
                continue
            merged = delta + view[rows]
            view[rows] = merged
            lost, total = lost + (view[rows] - merged).norm() ** 2, total + delta.norm() ** 2
        return lost.item(), total.item()

    def _cannot_merge(self) -> str:
        backend: Any = self.quantization_backend
        return (
            f"Can't merge into {self.module_name}: its weight is quantised with {backend.backend_name} "
            f"({type(self.get_base_layer()).__name__}), which can't be written. Merge into the base model in bfloat16 "
            "or float32, or serve the adapter unmerged."
        )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the exact weight that `merge` found.

        If the merged weight was written to (trained, edited, loaded), ΔW is subtracted from it instead, as PEFT's LoRA
        does, and a warning says so.
        """
        if self._backup is not None:
            with loaded(self):
                self._unmerge_loaded()
        if self._tied_weight is not None:
            if not is_offloaded(self.get_base_layer()):
                self.get_base_layer().weight = self._tied_weight
            self._tied_weight = None

    def _unmerge_loaded(self) -> None:
        assert self._backup is not None
        now = base_weight.fingerprint(self)
        # After a cast of the model the bits differ without a change; the backup is cast alike.
        if now is None or self._fingerprint is None or now[0] != self._fingerprint[0] or now == self._fingerprint:
            base_weight.restore(self, self._backup)
        else:
            logger.warning(
                "The weight of %s was changed while %s were merged into it: their update is subtracted from it, since "
                "putting back the weight from before the merge would undo the change. Unmerge before you train or "
                "edit the base model, to get the exact weights back.",
                self.module_name,
                self.merged_adapters,
            )
            weight = base_weight.read(self)
            view = weight.T if self.fan_in_fan_out else weight
            updates = [f.by_rows() for name in self.merged_adapters if (f := self.factors(name)) is not None]
            for rows in tiles(view):
                delta = sum(update(rows).to(view.device) for update in updates)
                view[rows] = view[rows] - delta
        self._backup, self._fingerprint, self.merged_adapters = None, None, []

    def untie(self) -> None:
        """Give the base layer a weight of its own until `unmerge`: merging must not change a tied embedding."""
        tied: Any = self.get_base_layer().weight
        self.get_base_layer().weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
        self._tied_weight = tied

    @property
    def untied(self) -> bool:
        """Whether the base layer has a weight of its own for now, instead of one that is tied to another module's."""
        return self._tied_weight is not None
