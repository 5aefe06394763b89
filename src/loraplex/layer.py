"""The adapted linear layer: forward, merge, unmerge and mixed batches, written once for all methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.config import AdapterConfig

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Factors(nn.Module, ABC):
    """What one adapter owns on one layer, and its equation. A method subclasses this once.

    `lora_A` (a parameter, or a property that reads a shared one) tells in which dtype the method computes.
    """

    lora_A: Tensor

    def __init__(self, config: AdapterConfig, module_name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.module_name = module_name
        self.in_features, self.out_features = in_features, out_features
        self.r = config.rank(module_name)
        self.lora_alpha = config.alpha(module_name)
        self.scaling = config.scaling(module_name)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.add_parameters(config)

    @abstractmethod
    def add_parameters(self, config: AdapterConfig) -> None:
        """Create and initialise the parameters that this layer owns."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """ΔW `(out, in)`, scaling included, in the factors' dtype or a wider one."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """ΔW x, scaling included: `(..., in)` → `(..., out)`. `x` has the dtype of `lora_A`."""

    def check_mergeable(self) -> None:
        """Raise a ValueError where ΔW is not a constant matrix."""

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, r={self.r}, scaling={self.scaling:g}"


class AdapterLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters of any of the methods: `base(x) + Σ ΔW x` over the active adapters.

    Wraps `nn.Linear`, GPT-2's `Conv1D` and PEFT's quantised linear layers. The class name must contain "Linear":
    PEFT looks for it when a second adapter asks for `target_modules="all-linear"`.
    """

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged_weight: Tensor | None = None
        inner = self.get_base_layer()
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = _get_in_out_features(inner)  # type: ignore[assignment]
        self.fan_in_fan_out = isinstance(inner, Conv1D)
        self.quantization_backend = resolve_quantization_backend(inner, **quantization_kwargs)

    def add_adapter(self, adapter_name: str, config: AdapterConfig, factors: Factors) -> None:
        """Register `factors` under `adapter_name`, on the base layer's device."""
        # PEFT finds a method's keys by "<module>.<type in lower case>_…": one container for each method.
        container = f"{config.method.lower()}_factors"
        if container not in self._modules:
            self.add_module(container, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, container)
        factors.to(dtype=self.adapter_dtype)
        self.get_submodule(container)[adapter_name] = factors  # type: ignore[operator]
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def factors(self, adapter_name: str) -> Factors | None:
        """The factors of `adapter_name` on this layer, or None where it does not adapt this layer."""
        for container in self.adapter_layer_names:
            modules = self._modules[container]
            if adapter_name in modules:  # type: ignore[operator]
                return modules[adapter_name]  # type: ignore[index]
        return None

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The base weight's dtype where adapters can compute in it, float32 over quantised weights."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype if dtype in _FLOATS else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype: after loading with low_cpu_mem_usage that would round
        # a float32 adapter to bfloat16 and back.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        factors = self.factors(adapter_name)
        if factors is None or device is None or any(p.is_meta for p in factors.parameters()):
            return
        factors.to(device=device)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            return result
        dtype = result.dtype
        for adapter_name in self.active_adapters:
            factors = self.factors(adapter_name)
            if factors is not None:
                result = result + factors(self._cast_input_dtype(x, factors.lora_A.dtype))
        return result.to(dtype)

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}: give one name per example, "
                '"__base__" for none. Models that pass other things than the batch through an adapted layer, such as '
                "DeBERTa its relative positions, can't mix adapters."
            )
        if self.merged_adapters:
            raise ValueError(f"adapter_names can't be used while {self.merged_adapters} are merged: unmerge first.")
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in dict.fromkeys(adapter_names):
            factors = self.factors(adapter_name)
            if factors is not None:
                rows = [i for i, name in enumerate(adapter_names) if name == adapter_name]
                delta = factors(self._cast_input_dtype(x[rows], factors.lora_A.dtype))
                result[rows] = (result[rows] + delta).to(result.dtype)
        return result

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters to the base weight; the weight before is kept on the CPU for `unmerge`.

        Args:
            safe_merge: refuse to merge where the result would hold NaN or Inf.
            adapter_names: which adapters; None merges the active ones.

        Raises:
            ValueError: ΔW is not a constant matrix (MASA's router), or `safe_merge` found NaN or Inf. The
                weight is unchanged then.
        """
        named = {name: self.factors(name) for name in check_adapters_to_merge(self, adapter_names)}
        present = {name: factors for name, factors in named.items() if factors is not None}
        if not present:
            return
        if self.quantization_backend is not None:
            raise ValueError(
                f"Can't merge {list(present)} into a base quantised with {self.quantization_backend.backend_name}: "
                "load the base model in bfloat16 or float32 and merge there."
            )
        weight = self.get_base_weight()
        # Sum in float32 at least and round once: rounding after each adapter would lose small updates.
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for factors in present.values():
            factors.check_mergeable()
            delta = factors.delta_weight().to(total.device, total.dtype)
            total += delta.T if self.fan_in_fan_out else delta
        if safe_merge and not total.isfinite().all():
            raise ValueError(
                f"Merging {list(present)} would write NaN or Inf into the weight of {factors.module_name}: the "
                "adapter is broken; load an earlier checkpoint."
            )
        if self._unmerged_weight is None:
            # W + ΔW − ΔW ≠ W in floating point, and loops that merge at every step would drift.
            self._unmerged_weight = self.weight.detach().to("cpu", copy=True)
        self.set_base_weight(total.to(weight.dtype))
        self.merged_adapters.extend(present)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the exact weight that `merge` found."""
        if self._unmerged_weight is None:
            return
        weight = self.weight
        weight.data = self._unmerged_weight.to(weight.device)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "loraplex." + super().__repr__()


def kaiming_(factor: Tensor, fan_in: int) -> Tensor:
    """Fill with U(−1/√fan_in, 1/√fan_in), as `nn.Linear` and LoRA's A start (Kaiming-uniform with a = √5)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.init.uniform_(factor, -bound, bound)
