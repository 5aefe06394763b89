"""The bank, which owns the factors that layers share.

PEFT and torch reassign parameters layer by layer (dtype casts, device moves, meta-device loading, FSDP). A parameter
that is registered in several layers is then split without a word. So each shared factor is registered once, in a bank
at the root of the adapted model. Layers hold an unregistered reference to its `SharedFactors`, and look the factor up
in forward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loraplex.runtime.placement import device_of
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.families import Member, group_families, layer_depth
from loraplex.tuner.layer import AdapterLayer, AdapterLinear
from loraplex.tuner.sharing import SharedFactors

BANK = "loraplex_bank"


class FactorBank(nn.Module, AdapterLayer):
    """Owner of shared factors, registered once at the root of the adapted model.

    PEFT takes it for a tuner layer, so that saving, loading, dtype casts, switching and deleting reach it; but it
    adapts no module.
    """

    # PEFT, torchao and accelerate ask every tuner layer for its base layer's bias, weight and sizes.
    bias = None  # type: ignore[assignment]
    weight = None  # type: ignore[assignment]
    in_features = None
    out_features = None

    def __init__(self) -> None:
        super().__init__()
        self.adapter_layer_names: tuple[str, ...] = ()
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self._active_adapter: list[str] = []

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapters that the layers have merged: PEFT compares them between tuner layers."""
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
        # The identity: if the model is an nn.Sequential, it calls every child.
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing of its own to merge."""

    def unmerge(self) -> None:
        """Nothing of its own to unmerge."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget `adapter_name`. The layers decide which adapter is active next."""
        for container in self.adapter_layer_names:
            modules = self._modules[container]
            if adapter_name in modules:  # type: ignore[operator]
                del modules[adapter_name]  # type: ignore[operator,union-attr]
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: whether a conversion is possible depends on the layers."""
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
        The bank. It is registered on `model` if the model had none.

    Raises:
        ValueError: modules of one family differ in shape or rank.
    """
    members = [
        Member(module.module_name, layer_depth(module.module_name, config.layers_pattern), module, factors)
        for module in model.modules()
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
