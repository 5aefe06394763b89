"""Factors that many layers read and the model owns once.

PEFT and torch reassign parameters layer by layer (dtype casts, device moves, meta-device loading, FSDP): a parameter
registered in several layers is split without a word. So each shared factor is registered once, in a bank at the root
of the adapted model, and layers hold an unregistered reference to its holder and look the factor up in forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loraplex.io.field_types import shown
from loraplex.runtime.parallel import announce_reads, is_sharded, part, replicated
from loraplex.runtime.placement import Resident, device_of
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors
from loraplex.tuner.findings import Finding
from loraplex.tuner.layer import AdapterLinear

BANK = "loraplex_bank"


@dataclass(frozen=True)
class Member:
    """One adapted module of a family."""

    name: str
    depth: int
    layer: AdapterLinear
    factors: Factors


class SharedFactors(Resident):
    """What the layers of one adapter share: parameters, and the state of its schedule. A method subclasses this once.

    Parameters and buffers are flat, `<family>__<factor>`: PEFT finds the adapter's name in a key just before the
    last dot.
    """

    def __init__(self, config: AdapterConfig, families: dict[str, list[Member]]) -> None:
        super().__init__()
        self._announced = False
        self.families = list(families)
        # Unregistered: the layers own these modules.
        self._factors = {name: [member.factors for member in family] for name, family in families.items()}
        self.add_shared(config, families)
        for name, family in families.items():
            for index, member in enumerate(family):
                # On the CPU even where torch's default device is another, such as "meta" while a model is loaded.
                place = torch.tensor([index], device="cpu")
                # Through __dict__: a registered reference would make every layer own the shared factors.
                member.factors.__dict__.update(shared=self, family=name, index=index, place=place)

    def add_shared(self, config: AdapterConfig, families: dict[str, list[Member]]) -> None:
        """Create and initialise what the families share."""

    def read_by(self, factors: Factors) -> list[nn.Parameter]:
        """Which of the shared parameters one layer's forward and backward read. None by default."""
        return []

    def train(self, mode: bool = True) -> SharedFactors:
        """Switch modes; when training begins, tell ZeRO-3 which layers read parameters of ours."""
        super().train(mode)
        self._move_places()
        first = next(self.parameters(), None)
        if mode and first is not None and is_sharded(first) and not self._announced:
            self._announced = True
            for factors in self.member_factors():
                announce_reads(factors, self.read_by(factors))
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> SharedFactors:
        super()._apply(*args, **kwargs)
        self._move_places()
        return self

    def _move_places(self) -> None:
        # Compiled layers select by `place` (see `select`): on their device, so that no forward waits for a copy.
        like = next(chain(self.parameters(), self.buffers()), None)
        for factors in self.member_factors():
            if like is not None and not like.is_meta:
                factors.__dict__["place"] = factors.__dict__["place"].to(like.device)

    def stale_parameters(self) -> list[str]:
        """Names of parameters that no layer reads any more; they are not saved."""
        return []

    def training_bytes(self) -> int:
        """What training keeps beside gradients and the optimizer's own state, in bytes."""
        return 0

    def end_schedule(self) -> bool:
        """Take on the size of the adapter after its schedule, on the meta device; False if it has none that counts."""
        return False

    # A saved adapter, whose base model is not at hand

    @classmethod
    def stored_readers(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: str, factor: str, layers: int
    ) -> list[int] | None:
        """Which layers of a family read a stored factor, or None if nothing in the file says; all of them by default.

        Args:
            config: the adapter's settings.
            tensors: the shared tensors of its file, by name.
            family: the layers' role.
            factor: the factor's name without the family.
            layers: how many layers the family has, as far as their own factors tell.
        """
        return list(range(layers))

    @classmethod
    def stored_findings(cls, tensors: Mapping[str, Tensor]) -> list[Finding]:
        """What the buffers in an adapter's file tell, after a check of each.

        Raises:
            ValueError: a buffer holds what training can't have led to.
        """
        return []

    def layout(self) -> dict[str, tuple[str, int]]:
        """Module → its family and its place in it."""
        return {f.module_name: (name, i) for name, family in self._factors.items() for i, f in enumerate(family)}

    def follow(self, others: list[SharedFactors]) -> None:
        """Share as `others` do, whose sum this adapter holds."""

    def before_save(self, adapter_name: str) -> None:
        """Called when the adapter is about to be written."""

    def buffer_names(self) -> list[str]:
        """Names of the buffers, which hold the state of the method's schedule."""
        return [name for name, _ in self.named_buffers(recurse=False)]

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Check values that are about to be loaded into the buffers: by name, some or all of them.

        Raises:
            ValueError: they are no state that the adapter can be in.
        """
        for name, value in state.items():
            like = self.get_buffer(name)
            if value.dtype != like.dtype or value.shape != like.shape:
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape)} in the adapter's weights, but {like.dtype} "
                    f"{tuple(like.shape)} here: the file is broken, or for another model."
                )
            if not value.is_meta:
                self.check_buffer(name, part(value))

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """`check_state` of what a state dict holds, which may have been cast as a whole to another dtype."""
        state = {name: state_dict[prefix + name] for name in self.buffer_names() if prefix + name in state_dict}
        for name, value in state.items():
            cast = value.to(self.get_buffer(name).dtype)
            if value.is_meta or torch.equal(part(cast).to(value.dtype), part(value)):
                state[name] = cast
        self.check_state(state)

    @classmethod
    def check_buffer(cls, name: str, value: Tensor) -> None:
        """Raise a ValueError unless `value`, which has the right shape, is a state of the buffer `name`."""

    def fill_stale(self, prefix: str, state: dict[str, Tensor]) -> None:
        """Add to `state`, read from a file, what `stale_parameters` left out. Keys are `prefix` + parameter name."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # accelerate's loading on rank 0 only knows entries of a mesh, and FSDP2 leaves buffers out of it.
        like = next(chain(self.parameters(), *(f.parameters() for f in self.member_factors())))
        for name, buffer in self.named_buffers(recurse=False):
            destination[prefix + name] = replicated(buffer, like)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, _ in self.named_buffers(recurse=False):
            if isinstance(value := state_dict.get(prefix + name), DTensor):
                state_dict[prefix + name] = value.to_local()
        self.check_loaded(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def member_factors(self) -> Iterator[Factors]:
        """The factors of all layers of this adapter."""
        for family in self._factors.values():
            yield from family


def check_stored(name: str, buffer: Tensor, fits: bool) -> None:
    """Raise a ValueError unless a buffer in an adapter's file holds integers and `fits` in shape."""
    if buffer.dtype != torch.int64 or not fits:
        raise ValueError(
            f"{shown(name)} is {buffer.dtype} {tuple(buffer.shape)} in the adapter's weights, which no such record can "
            "be: the file is broken; copy or download the adapter again."
        )


class FactorBank(nn.Module, BaseTunerLayer):
    """Owner of shared factors, registered once at the root of the adapted model.

    It is a tuner layer to PEFT, so that saving, loading, dtype casts, switching and deleting reach it, but it adapts
    no module.
    """

    # PEFT, torchao and accelerate ask every tuner layer for its base layer's.
    bias = None  # type: ignore[assignment]
    weight = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.adapter_layer_names: tuple[str, ...] = ()
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self._active_adapter: list[str] = []

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """What the layers have merged; PEFT compares it between tuner layers."""
        merged = {name for _, shared in self.named_shared() for name in first_layer(shared).merged_adapters}
        return sorted(merged)

    def add_adapter(self, adapter_name: str, config: AdapterConfig, shared: SharedFactors) -> None:
        """Own `shared` under `adapter_name`, on the device and in the dtype of its first layer."""
        container = f"{config.method.lower()}_shared"
        if container not in self._modules:
            self.add_module(container, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, container)
        self.get_submodule(container)[adapter_name] = shared  # type: ignore[operator]
        layer = first_layer(shared)
        shared.to(dtype=layer.adapter_dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def shared(self, adapter_name: str) -> SharedFactors | None:
        """What the layers of `adapter_name` share, or None."""
        for container in self.adapter_layer_names:
            modules = self._modules[container]
            if adapter_name in modules:  # type: ignore[operator]
                return modules[adapter_name]  # type: ignore[index]
        return None

    def named_shared(self) -> Iterator[tuple[str, SharedFactors]]:
        """All adapters' shared factors as (adapter name, shared)."""
        for container in self.adapter_layer_names:
            yield from self._modules[container].items()  # type: ignore[union-attr,operator]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        shared = self.shared(adapter_name)
        if shared is None or any(t.is_meta for t in (*shared.parameters(), *shared.buffers())):
            return
        device = device or device_of(first_layer(shared).get_base_layer())
        if device is not None and device.type != "meta":
            shared.to(device=device)

    def forward(self, x: Tensor) -> Tensor:
        # The identity: an nn.Sequential root calls every child it has.
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing of its own to merge."""

    def unmerge(self) -> None:
        """Nothing of its own to unmerge."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget `adapter_name`. Which adapter is active next is for the layers to say."""
        for container in self.adapter_layer_names:
            modules = self._modules[container]
            if adapter_name in modules:  # type: ignore[operator]
                del modules[adapter_name]  # type: ignore[operator,union-attr]
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the bank itself never stands in the way."""
        return True


def find_bank(model: nn.Module) -> FactorBank | None:
    """The bank of shared factors of `model` (a PeftModel, a tuner or the adapted model), or None."""
    return next((m for m in model.modules() if isinstance(m, FactorBank)), None)


def shared_by(model: nn.Module, adapter_name: str) -> SharedFactors | None:
    """What the layers of `adapter_name` share, or None."""
    bank = find_bank(model)
    return None if bank is None else bank.shared(adapter_name)


def first_layer(shared: SharedFactors) -> AdapterLinear:
    """The first layer that reads `shared`."""
    return shared.__dict__["_first_layer"][0]


def link(model: nn.Module, adapter_name: str, config: AdapterConfig) -> FactorBank:
    """Create what the layers of `adapter_name` share and tie the layers to it.

    Returns:
        The bank, which is registered on `model` if it was not before.

    Raises:
        ValueError: modules of one family differ in shape or rank.
    """
    members = [
        Member(name, layer_depth(name, config.layers_pattern), module, factors)
        for name, module in model.named_modules()
        if isinstance(module, AdapterLinear) and (factors := module.factors(adapter_name)) is not None
    ]
    families = group_families(members, config)
    shared = config.shared_cls(config, families)  # type: ignore[misc]
    shared.__dict__["_first_layer"] = (members[0].layer,)
    bank = model._modules.get(BANK)
    if bank is None:
        bank = FactorBank()
        model.add_module(BANK, bank)
    bank.add_adapter(adapter_name, config, shared)  # type: ignore[operator]
    return bank  # type: ignore[return-value]


def group_families(members: Iterable[Member], config: AdapterConfig) -> dict[str, list[Member]]:
    """Group modules of the same role and shape, ordered by depth.

    The role is the module's name without the layer's index, so encoder and decoder stacks are different families.
    Keys are legal attribute names: "layers.3.self_attn.q_proj" belongs to "layers__N__self_attn__q_proj".

    Raises:
        ValueError: modules of one role differ in shape or rank.
    """
    families: dict[str, list[Member]] = {}
    for member in sorted(members, key=lambda m: m.depth):
        families.setdefault(role(member.name, config.layers_pattern), []).append(member)
    if config.shares_across_layers:
        for family in families.values():
            _check_alike(family, config)
    return families


def _check_alike(family: list[Member], config: AdapterConfig) -> None:
    first = family[0]
    for member in family[1:]:
        shapes = [(m.layer.out_features, m.layer.in_features) for m in (first, member)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{config.title} shares factors between {first.name} and {member.name}, but their weights are "
                f"{shapes[0]} and {shapes[1]}: adapt one of the shapes (exclude_modules, layers_to_transform), or "
                "name the list of layers with layers_pattern if the names hold more than one number."
            )
        if first.factors.r != member.factors.r:
            raise ValueError(
                f"{config.title} shares factors between {first.name} and {member.name}, but rank_pattern gives them "
                f"r={first.factors.r} and r={member.factors.r}: use one rank for both."
            )


def _index_span(name: str, layers_pattern: list[str] | str | None) -> tuple[int, int] | None:
    """Where in `name` the layer's index stands: the first number, or the one after `layers_pattern`."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
    for pattern in patterns:
        if match := re.search(rf"(?:^|\.){pattern}\.(\d+)(?=\.|$)", name):
            return match.span(1)
    # The first number, not the last: in T5's block.3.layer.0.SelfAttention.q it is the depth.
    match = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return match.span(1) if match else None


def layer_depth(name: str, layers_pattern: list[str] | str | None = None) -> int:
    """Index of the layer that the module `name` belongs to; 0 for a module outside the stack."""
    span = _index_span(name, layers_pattern)
    return int(name[slice(*span)]) if span else 0


def role(name: str, layers_pattern: list[str] | str | None = None) -> str:
    """`name` without the layer's index, as an attribute name."""
    span = _index_span(name, layers_pattern)
    if span:
        name = f"{name[: span[0]]}N{name[span[1] :]}"
    return name.replace(".", "__")


def select(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """`tensors[index]` for an index `(1,)` that is data: a compiled graph serves every layer, and every ASLoRA merge.

    torch.compile specialises a graph on the integers and names that it reads, and compiles anew for others, at most
    eight times. The gradient of those that are not selected is zero.
    """
    return (
        torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
        .index_select(0, index.to(tensors[0].device))
        .squeeze(0)
    )


def read(shared: SharedFactors, name: str, like: Tensor | Any) -> Tensor:
    """The shared tensor `name` on the device of `like`: layers of a dispatched model live on several devices."""
    tensor: Tensor = getattr(shared, name)
    return tensor if tensor.device == like.device else tensor.to(like.device)
