"""ASLoRA (arXiv 2412.10135).  h_l = W_l x + (α/r) · B_{m(l)} A x

One A for a whole family of layers; one B per layer at first. While training runs, the most similar B's are merged:
the lower layer goes over to the upper layer's B, m(l) ← m(upper).

Running average over all steps (eq. 3):  B̄_lᵗ = (1/t) Σ_{k≤t} B_lᵏ
Score of a pair (eq. 4), smallest is merged:  ‖B̄_i − B̄_j‖_F
Merges at steps t > T_s with (t − T_s) mod m = 0, one per family, until N are done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraplex.runtime.parallel import part, whole
from loraplex.tuner.config import AdapterConfig, check_choice, check_count, check_steps, unscaled
from loraplex.tuner.factors import Factors, kaiming_, wide
from loraplex.tuner.findings import Finding, Handover, Handovers
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.schedule import Scheduled, StateOf
from loraplex.tuner.sharing import Member, check_stored, read, select

logger = logging.getLogger(__name__)


def update_average(average: Tensor, B: Tensor, t: int) -> Tensor:
    """B̄ᵗ = B̄ᵗ⁻¹ + (Bᵗ − B̄ᵗ⁻¹)/t in float32 (eq. 3, incrementally), in place."""
    return average.lerp_(B.float(), 1 / t)


def _stored_average(state: dict[str, Any], B: Tensor) -> Tensor:
    stored = state.get("aslora_average")
    if stored is None:
        return torch.zeros_like(B, dtype=torch.float32)
    return (stored["step"] if isinstance(stored, dict) else stored).to(B.device, torch.float32)


def distance(B_i: Tensor, B_j: Tensor, A: Tensor | None = None) -> float:
    """‖B̄_i − B̄_j‖_F (eq. 4), or ‖(B̄_i − B̄_j) A‖_F if A is given.

    The second does not change with the basis of the rank space. With Aᵀ = Q R it is ‖(B̄_i − B̄_j) Rᵀ‖_F: no
    (out, in) matrix is formed.
    """
    difference = B_i.double() - B_j.double()
    if A is not None:
        R = torch.linalg.qr(A.double().T, mode="r").R
        difference = difference @ R.T
    return difference.norm().item()


def closest_pair(averages: dict[int, Tensor], candidates: str, A: Tensor | None = None) -> tuple[int, int]:
    """The pair (lower, upper) of layers whose B's are to be merged; ties go to the lowest layers.

    Args:
        averages: B̄ of the layers that own a B.
        candidates: "adjacent" compares neighbours among these layers, "all" every pair.
        A: given for the "update" distance.

    Raises:
        FloatingPointError: a distance is NaN, which is neither small nor large.
    """
    layers = sorted(averages)
    pairs = pairwise(layers) if candidates == "adjacent" else combinations(layers, 2)
    distances = {pair: distance(averages[pair[0]], averages[pair[1]], A) for pair in pairs}
    for (lower, upper), value in distances.items():
        if math.isnan(value):
            raise FloatingPointError(f"The distance between the averages of layers {lower} and {upper} is NaN")
    return min(distances, key=distances.__getitem__)


def merge_due(t: int, start: int, interval: int) -> bool:
    """Whether step t > T_s is a multiple of m after T_s: with T_s=320, m=240 the first is step 560."""
    return t > start and (t - start) % interval == 0


def check_merges(name: str, merges: Tensor) -> None:
    """Check a saved record of merges `(2, layers)`: m(l), and the step at which layer l gave up its own B.

    The top layer never gives up its B; in its place stands the number of steps that were averaged.

    Raises:
        ValueError: merging can't have led there.
    """
    mapped, steps = merges.tolist()
    for layer, (owner, step) in enumerate(zip(mapped, steps, strict=True)):
        # A lower layer goes over to an upper one, and all its readers with it.
        possible = layer <= owner < len(mapped) and mapped[owner] == owner
        is_top = layer == len(mapped) - 1
        if not possible or step < 0 or (not is_top and (step > 0) != (owner != layer)):
            raise ValueError(
                f"{name} says that layer {layer} reads the B of layer {owner} since step {step}, which no merge of "
                f"{len(mapped)} layers leads to: the file is broken; copy or download the adapter again."
            )


class AsLoraShared(Scheduled):
    """A and all B's of each family, and which layer reads which B."""

    kept: ClassVar[dict[str, bool]] = {"aslora_steps": True, "aslora_average": False}
    # The paper's values for MRPC, whose runs have 6900 steps.
    unknown_length: ClassVar[dict[str, int]] = {"merge_start_step": 320, "merge_interval": 240}

    def add_shared(self, config: AsLoraConfig, families: dict[str, list[Member]]) -> None:  # type: ignore[override]
        self.config = config
        self.maps: dict[str, list[int]] = {}
        self.steps: dict[str, int] = {}
        """Family → steps averaged so far; 0 once all its merges are done."""
        self._averages: dict[str, dict[int, Tensor]] = {}
        self._maps_read: dict[str, tuple[Tensor, int] | None] = {}
        if config.num_merges and all(len(family) == 1 for family in families.values()):
            raise ValueError(
                f"num_merges={config.num_merges} is larger than possible: the targets are one layer deep, so there is "
                "nothing to merge. Adapt more layers, or set num_merges=0."
            )
        for name, family in families.items():
            self._add_family(name, family[0].factors, len(family), config)

    def _add_family(self, name: str, factors: Factors, layers: int, config: AsLoraConfig) -> None:
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
        # Rows: m(l), and the step at which layer l gave up its own B (0: it has not). The last entry, of the top layer,
        # is `steps`.
        self.register_buffer(f"{name}__merges", torch.stack([torch.arange(layers), torch.zeros(layers).long()]))
        self.maps[name], self.steps[name] = list(range(layers)), 0

    def B(self, family: str, layer: int) -> nn.Parameter:
        """The B that belongs to `layer`."""
        return getattr(self, f"{family}__lora_B_{layer}")

    def all_B(self, family: str) -> list[nn.Parameter]:
        """Every layer's own B, in use or not."""
        return [self.B(family, layer) for layer in range(len(self.maps[family]))]

    def read_by(self, factors: AsLoraFactors) -> list[nn.Parameter]:  # type: ignore[override]
        # All B's of the family: ZeRO-3 records once which parameters a layer needs, and merges change that.
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

    # Schedule

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
                averages = self._update_averages(family, state_of)
                if merge_due(self.steps[family], start, interval):  # type: ignore[arg-type]
                    due[family] = averages
        if due:
            choices = [self._choose(family, averages) for family, averages in due.items()]
            for family, (lower, upper) in zip(due, self._agree(list(due), choices), strict=True):
                self._merge(family, lower, upper, state_of)

    def _choose(self, family: str, averages: dict[int, Tensor]) -> tuple[int, int]:
        """The pair that this rank would merge; (-1, -1) if a distance is NaN."""
        # Distances need whole matrices, merges are few: only now are shards gathered.
        averages = {layer: whole(average, self.B(family, layer)) for layer, average in averages.items()}
        A = getattr(self, f"{family}__lora_A")
        A = whole(part(A), A) if self.config.merge_distance == "update" else None
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
        """The pairs that the first rank chose: ranks whose averages differ in their last bits may choose others."""
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

    def _update_averages(self, family: str, state_of: StateOf) -> dict[int, Tensor]:
        """layer → B̄, of sharded B's this rank's part."""
        states = {layer: state_of(self.B(family, layer)) for layer in self.owners(family)}
        self._check_averages(family, states)
        averages = {}
        for layer, state in states.items():
            B = part(self.B(family, layer))
            t = state["aslora_steps"] = state.get("aslora_steps", 0) + 1
            averages[layer] = update_average(_stored_average(state, B), B, t)
            # Loading a state dict casts every entry to its parameter's dtype, but for the key "step".
            state["aslora_average"] = averages[layer] if B.dtype.itemsize >= 4 else {"step": averages[layer]}
        self._set_steps(family, max(state["aslora_steps"] for state in states.values()))
        self._averages[family] = averages
        return averages

    def _check_averages(self, family: str, states: dict[int, dict[str, Any]]) -> None:
        """Put averages in place that the training state lacks, though the adapter was averaged before."""
        steps, found = self.steps[family], max(state.get("aslora_steps", 0) for state in states.values())
        if found == 0 and steps and family in self._averages:
            # Another optimizer has taken over in this process.
            for layer, state in states.items():
                state.update(aslora_steps=steps, aslora_average=self._averages[family][layer])
        elif found == 0 and steps:
            raise RuntimeError(
                f"ASLoRA can't go on from step {steps}, at which this adapter was saved: the running averages of "
                f"{family} are missing, and its next merge would rest on other numbers. Remedy: load the optimizer's "
                "state too (optimizer.load_state_dict); under FSDP2, ZeRO or ZeroRedundancyOptimizer call "
                "loraplex.load_schedules(model, checkpoint), or pass loraplex.ScheduleCallback(resume_from=checkpoint) "
                "to the trainer. To begin another run from this adapter, call loraplex.restart_averages(model)."
            )
        elif found == 0 and len(self.owners(family)) < len(self.maps[family]):
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

    def restart_averages(self) -> None:
        """Begin averages and their count of steps anew; merges that were done stay."""
        self._averages = {}
        for state in self.kept_state():
            for key in self.kept:
                state.pop(key, None)
        for family in self.families:
            self._set_steps(family, 0)

    def _set_steps(self, family: str, steps: int) -> None:
        """Keep the number of steps that are averaged with the adapter, so that missing averages are noticed."""
        self.steps[family] = steps
        # In the row of merge steps, where the top layer has no use for its place: it never gives up its B.
        getattr(self, f"{family}__merges")[1, -1] = steps
        self._map_is_read(family)

    def _merge(self, family: str, lower: int, upper: int, state_of: StateOf) -> None:
        t = self.steps[family]
        mapped = [upper if m == lower else m for m in self.maps[family]]
        merges = getattr(self, f"{family}__merges")
        merges[0] = torch.tensor(mapped)
        merges[1, lower] = t
        self.maps[family] = mapped
        self._map_is_read(family)
        gone = state_of(self.B(family, lower))
        for key in self.kept:
            gone.pop(key, None)
        self._averages[family].pop(lower)
        if self._merges_left(family) <= 0:
            self._averages.pop(family)
            self._set_steps(family, 0)
        logger.info("ASLoRA step %d: %s layer %d now reads layer %d's B", t, family, lower, upper)

    def follow(self, others: list[Any]) -> None:
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

    def before_save(self, adapter_name: str) -> None:
        # A run that is shorter than its schedule ends here, and nobody else would say so.
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
                for layer, owner in enumerate(part(merges)[0].tolist()):
                    B = state.get(f"{prefix}{family}__lora_B_{owner}")
                    if B is not None:
                        # Nothing reads it; the parameters of a run must not change in number.
                        state.setdefault(f"{prefix}{family}__lora_B_{layer}", B)

    @classmethod
    def check_buffer(cls, name: str, value: Tensor) -> None:
        check_merges(name, value)

    @classmethod
    def stored_readers(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: str, factor: str, layers: int
    ) -> list[int] | None:
        if (merges := tensors.get(f"{family}__merges")) is None:
            return None
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

    def training_bytes(self) -> int:
        """B̄: float32, one per B of a family with merges to come."""
        merging = [family for family in self.families if self.num_merges(family) > 0]
        return sum(4 * self.B(family, layer).numel() for family in merging for layer in self.owners(family))

    def end_schedule(self) -> bool:
        # The lowest layers read one B. Which layers merge decides training, and the size is the same.
        for family, mapped in self.maps.items():
            self.maps[family] = [max(layer, self.num_merges(family)) for layer in mapped]
        return True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # What was averaged before is not of the factors that are loaded.
        self._averages = {f: a for f, a in self._averages.items() if f"{prefix}{f}__merges" not in state_dict}
        self._read_maps()

    def train(self, mode: bool = True) -> AsLoraShared:
        """Switch modes, which every loader does in the end: transformers' own sets buffers past load_state_dict."""
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
            if any(owner not in range(len(mapped)) for owner in mapped):
                return  # memory that to_empty has made, and that is filled later
            self.maps[family] = mapped
            if steps != self.steps[family]:
                self.steps[family] = steps
                self._averages.pop(family, None)
            self._map_is_read(family)

    def _map_is_read(self, family: str) -> None:
        """Note that `maps` and `steps` say what the tensor of the merges says now."""
        merges: Tensor = getattr(self, f"{family}__merges")
        self._maps_read[family] = None if merges.is_inference() else (merges, merges._version)

    def owner(self, family: str, layer: int) -> int:
        """m(l), also after a copied state dict or an average of weights was written into the tensor of the merges."""
        merges: Tensor = getattr(self, f"{family}__merges")
        read = self._maps_read.get(family)
        # On other devices it is not read in every forward, which would wait for them.
        if merges.is_cpu or read is None or read[0] is not merges or read[1] != merges._version:
            self._read_map(family)
        return self.maps[family][layer]


class _ReadInstead(torch.autograd.Function):
    """`used`, with a zero gradient for `unused`: DDP fails over a parameter that stops getting gradients mid-run."""

    # In two parts and with rules for vmap and jvp, without which torch.func's transforms refuse it.
    generate_vmap_rule = True

    @staticmethod
    def forward(used: Tensor, unused: Tensor) -> Tensor:
        return used.view_as(used)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, unused = inputs
        ctx.unused = (unused.shape, unused.dtype, unused.device)

    @staticmethod
    def jvp(ctx: Any, used: Tensor, unused: Tensor) -> Tensor:
        return used.view_as(used)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.unused
        return grad, torch.zeros(shape, dtype=dtype, device=device)


class AsLoraFactors(Factors):
    """Nothing of its own: A and B belong to the family."""

    shared: AsLoraShared
    family: str
    index: int
    place: Tensor

    def add_parameters(self, config: AdapterConfig) -> None:
        pass

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """The family's A `(r, in)`."""
        return getattr(self.shared, f"{self.family}__lora_A")

    @property
    def lora_B(self) -> Tensor:
        """B_{m(l)} `(out, r)`."""
        if torch.compiler.is_compiling():
            owner = getattr(self.shared, f"{self.family}__merges")[0].index_select(0, self.place)
            return select(self.shared.all_B(self.family), owner)
        own, owner = self.index, self.shared.owner(self.family, self.index)
        B = self.shared.B(self.family, owner)
        if owner == own or not torch.is_grad_enabled():
            return B
        return _ReadInstead.apply(B, self.shared.B(self.family, own))

    def forward(self, x: Tensor) -> Tensor:
        shared, A = self.shared, f"{self.family}__lora_A"
        # The scaling on A x: (tokens, r) is smaller than (tokens, out).
        return linear(linear(self.dropout(x), read(shared, A, x)) * self.scaling, self.lora_B.to(x.device))

    @torch.no_grad()
    def hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.copy_(A)
        self.shared.B(self.family, self.index).copy_(B)

    def lora_form(self) -> tuple[Tensor, Tensor]:
        return wide(self.lora_A), self.scaling * wide(self.lora_B)


@dataclass
class AsLoraConfig(AdapterConfig):
    """Settings of ASLoRA (arXiv 2412.10135).

    Trainable per family of L layers: r·in + L·r·out. After N merges an adapter file holds r·in + (L−N)·r·out.
    """

    method: ClassVar[str] = "ASLORA"
    title: ClassVar[str] = "ASLoRA"
    source: ClassVar[str] = "arXiv 2412.10135"
    factors_cls: ClassVar[type] = AsLoraFactors
    shared_cls: ClassVar[type] = AsLoraShared

    merge_start_step: int | float | None = None
    """T_s, after which merging begins: optimizer steps, or a fraction of the run. None: a twentieth of the run, or 320
    steps where its length is unknown; the paper's value for MRPC in either form."""
    merge_interval: int | float | None = None
    """m, the distance of merges: optimizer steps, or a fraction of the run. None: N merges in a quarter of the run, or
    240 steps where its length is unknown; the paper's value for MRPC in either form."""
    num_merges: int | None = None
    """N, merges per family; None: 7 of 12 layers, the paper's share."""
    merge_candidates: str = "adjacent"
    """Pairs that are compared: "adjacent" groups of layers (the paper's text) or "all" (its algorithm)."""
    merge_distance: str = "factor"
    """"factor" ‖B̄_i − B̄_j‖ (the paper), or "update" ‖(B̄_i − B̄_j) A‖, which does not depend on the basis (ours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_start_step is not None:
            check_steps("merge_start_step", self.merge_start_step)
        if self.merge_interval is not None:
            check_steps("merge_interval", self.merge_interval)
        if self.num_merges is not None:
            check_count("num_merges", self.num_merges, minimum=0)
        check_choice("merge_candidates", self.merge_candidates, ("adjacent", "all"))
        check_choice("merge_distance", self.merge_distance, ("factor", "update"))

    def holding(self, rank: int, configs: list[AdapterConfig]) -> AsLoraConfig:
        return unscaled(self, rank, num_merges=0)

    @property
    def shares_across_layers(self) -> bool:
        return True


class AsLoraModel(AdapterModel):
    """PEFT's handle on ASLoRA."""

    prefix = "aslora_"
