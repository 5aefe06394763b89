"""ASLoRA's factors, and m(l): which layer reads which layer's B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from loraplex.methods.aslora.averages import RunningAverages
from loraplex.methods.aslora.merges import check_merges
from loraplex.runtime.parallel import to_local
from loraplex.tuner.factors import Factors, kaiming_
from loraplex.tuner.families import Member
from loraplex.tuner.findings import Finding, Handover, Handovers
from loraplex.tuner.schedule import Scheduled
from loraplex.tuner.sharing import check_stored, foreign


class MergeMaps(Scheduled):
    """A and all B's of each family, and which layer reads which B. Abstract: the subclass says when B's are merged.

    The buffer `<family>__merges` (2, layers) is what is saved and loaded. Its rows are m(l), and the step at which
    layer l gave up its own B (0: it has not). The top layer never does: its entry is the number of averaged steps.
    `maps` and `steps` hold the same as Python numbers, so that no forward waits for the buffer's device.
    """

    state_names: ClassVar[tuple[str, ...]] = ("merges",)

    def add_shared(self, config: Any, families: dict[str, list[Member]]) -> None:
        self.maps: dict[str, list[int]] = {}
        self.steps: dict[str, int] = {}
        """Family → steps averaged so far; 0 once all its merges are done."""
        self.averages = RunningAverages()
        self._maps_read: dict[str, tuple[Tensor, int] | None] = {}
        if config.num_merges and all(len(family) == 1 for family in families.values()):
            raise ValueError(
                f"num_merges={config.num_merges} is larger than possible: the targets are one layer deep, so there is "
                "nothing to merge. Adapt more layers, or set num_merges=0."
            )
        for name, family in families.items():
            self._add_family(name, family[0].factors, len(family), config)

    def _add_family(self, name: str, factors: Factors, layers: int, config: Any) -> None:
        if layers > 1 and (config.num_merges or 0) > layers - 1:
            raise ValueError(
                f"num_merges={config.num_merges} is larger than possible: the {layers} layers of {name} allow "
                f"at most {layers - 1} merges."
            )
        A = torch.empty(factors.r, factors.in_features)
        self.register_parameter(f"{name}__lora_A", nn.Parameter(kaiming_(A, fan_in=A.shape[1])))
        for layer in range(layers):
            B = torch.zeros(factors.out_features, factors.r)
            B = B if config.init_weights else nn.init.normal_(B)
            self.register_parameter(f"{name}__lora_B_{layer}", nn.Parameter(B))
        self.register_buffer(f"{name}__merges", torch.stack([torch.arange(layers), torch.zeros(layers).long()]))
        self.maps[name], self.steps[name] = list(range(layers)), 0

    def B(self, family: str, layer: int) -> nn.Parameter:
        """The B that belongs to `layer`."""
        return getattr(self, f"{family}__lora_B_{layer}")

    def all_B(self, family: str) -> list[nn.Parameter]:
        """Every layer's own B, in use or not."""
        return [self.B(family, layer) for layer in range(len(self.maps[family]))]

    def read_by(self, factors: Any) -> list[nn.Parameter]:
        # All B's of the family: ZeRO-3 records once which parameters a layer reads, and merges change that.
        return [self.get_parameter(f"{factors.family}__lora_A"), *self.all_B(factors.family)]

    def owners(self, family: str) -> list[int]:
        """Layers whose own B is in use."""
        return sorted(set(self.maps[family]))

    def num_merges(self, family: str) -> int:
        """N: the setting, or the paper's 7 of 12 layers."""
        layers = len(self.maps[family])
        asked = self.config.num_merges
        return min(layers * 7 // 12 if asked is None else asked, layers - 1)

    def merge_history(self) -> Iterator[tuple[int, str, int, int]]:
        """Merges done, as (step, family, lower layer, layer whose B it reads now)."""
        for family, mapped in self.maps.items():
            steps = getattr(self, f"{family}__merges")[1, :-1].tolist()
            yield from ((step, family, layer, mapped[layer]) for layer, step in enumerate(steps) if step)

    def _set_steps(self, family: str, steps: int) -> None:
        """Store the number of averaged steps with the adapter, so that a resume notices missing averages."""
        self.steps[family] = steps
        getattr(self, f"{family}__merges")[1, -1] = steps
        self._map_is_read(family)

    def share_like(self, others: list[Any]) -> None:
        """Share a B between layers that share it in all of `others`."""
        for family in self.families:
            readers = list(zip(*(other.maps[family] for other in others), strict=True))
            last = {B: layer for layer, B in enumerate(readers)}
            mapped = [last[B] for B in readers]
            merges = getattr(self, f"{family}__merges")
            merges[0] = torch.tensor(mapped)
            steps = [getattr(other, f"{family}__merges")[1].to(merges.device) for other in others]
            merges[1] = torch.stack(steps).amax(0) * (merges[0] != torch.arange(len(mapped), device=merges.device))
            self.maps[family] = mapped

    # Saving and loading

    def stale_parameters(self) -> list[str]:
        return [
            f"{family}__lora_B_{layer}"
            for family, mapped in self.maps.items()
            for layer in range(len(mapped))
            if layer not in mapped
        ]

    def fill_stale(self, prefix: str, state: dict[str, Tensor]) -> None:
        for family in self.families:
            merges = state.get(f"{prefix}{family}__merges")
            if merges is not None:
                for layer, owner in enumerate(to_local(merges)[0].tolist()):
                    B = state.get(f"{prefix}{family}__lora_B_{owner}")
                    if B is not None:
                        # No layer reads it, but the number of a run's parameters must not change.
                        state.setdefault(f"{prefix}{family}__lora_B_{layer}", B)

    @classmethod
    def check_buffer(cls, name: str, value: Tensor) -> None:
        check_merges(name, value)

    @classmethod
    def stored_readers(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: str, factor: str, layers: int
    ) -> list[int]:
        if (merges := tensors.get(f"{family}__merges")) is None:
            raise foreign(f"{family}__{factor}")
        owner = factor.rpartition("_")[2]  # of a B: lora_B_3; all layers read A
        return [layer for layer, m in enumerate(merges[0].tolist()) if not owner.isdigit() or m == int(owner)]

    @classmethod
    def stored_findings(cls, tensors: Mapping[str, Tensor]) -> list[Finding]:
        rows, layers = [], {}
        for name, merges in tensors.items():
            family, _, factor = name.rpartition("__")
            if factor != "merges":
                continue
            check_stored(name, merges, merges.ndim == 2 and len(merges) == 2 and merges.numel() > 0)
            check_merges(name, merges)
            mapped, (*steps, _) = merges.tolist()  # the last is the number of averaged steps
            layers[family] = len(mapped)
            rows += [Handover(step, family, layer, mapped[layer]) for layer, step in enumerate(steps) if step]
        rows.sort(key=lambda row: (row.step, row.family))
        return [Handovers("merges", "ASLoRA: merges of B", "B", rows, layers)] if layers else []

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for family in self.families:
            if f"{prefix}{family}__merges" in state_dict:
                # The averages in memory are of other factors than those that were just loaded.
                self.averages = self.averages.without(family)
        self._read_maps()

    def train(self, mode: bool = True) -> Self:
        """Switch modes, and read the maps: transformers' loader sets buffers without load_state_dict, and ends here."""
        super().train(mode)
        self._read_maps()
        return self

    def _read_maps(self) -> None:
        for family in self.families:
            self._read_map(family)

    def _read_map(self, family: str) -> None:
        merges: Tensor = getattr(self, f"{family}__merges")
        if not merges.is_meta:
            mapped, (*_, steps) = merges.tolist()
            if any(owner not in range(layer, len(mapped)) for layer, owner in enumerate(mapped)):
                return  # to_empty has allocated it, with zeros perhaps, and it is filled later
            self.maps[family] = mapped
            if steps != self.steps[family]:
                self.steps[family] = steps
                self.averages = self.averages.without(family)
            self._map_is_read(family)

    def _map_is_read(self, family: str) -> None:
        """Note that `maps` and `steps` agree with the buffer as it is now."""
        merges: Tensor = getattr(self, f"{family}__merges")
        self._maps_read[family] = None if merges.is_inference() else (merges, merges._version)

    def owner(self, family: str, layer: int) -> int:
        """m(l), even if a copied state dict or an average of weights was written into the buffer."""
        merges: Tensor = getattr(self, f"{family}__merges")
        read = self._maps_read.get(family)
        # On other devices than the CPU it is not read in every forward, which would wait for the device.
        if merges.is_cpu or read is None or read[0] is not merges or read[1] != merges._version:
            self._read_map(family)
        return self.maps[family][layer]
