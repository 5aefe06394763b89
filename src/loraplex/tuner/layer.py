"""The adapted linear layer: the adapters it has, its forward, and mixed batches, written once for all methods."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.runtime.parallel import DDP_INSTEAD, refuse_fsdp1
from loraplex.runtime.placement import device_of
from loraplex.tuner import base_weight
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors
from loraplex.tuner.merging import MergingLayer

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AdapterLayer(BaseTunerLayer):
    """What our tuners switch, freeze and delete adapters of: the adapted layers and the bank. Abstract.

    Not every tuner layer of PEFT's: its wrappers for trained tokens and modules have tuner layers inside, which they
    switch themselves. PEFT's own introspection looks for the classes in this module.
    """


class AdapterLinear(MergingLayer, AdapterLayer):
    """A linear layer with adapters of any of the methods: `base(x) + Σ ΔW x` over the active adapters.

    Wraps `nn.Linear`, GPT-2's `Conv1D` and PEFT's quantised linear layers. The class name must contain "Linear":
    PEFT looks for it when a second adapter asks for `target_modules="all-linear"`.
    """

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.adapter_layer_names: tuple[str, ...] = ()
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # PEFT's disable_input_dtype_casting asks every tuner layer
        self._fsdp1_checked = False
        self._may_take_weight = False
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
        self._may_take_weight |= type(factors).takes_weight is not Factors.takes_weight
        factors.to(dtype=self.adapter_dtype)
        self.get_submodule(container)[adapter_name] = factors  # type: ignore[operator]
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def factors(self, adapter_name: str) -> Factors | None:
        """The factors of `adapter_name` on this layer, or None if it does not adapt this layer."""
        for container in self.adapter_layer_names:
            modules = self._modules[container]
            if adapter_name in modules:  # type: ignore[operator]
                return modules[adapter_name]  # type: ignore[index]
        return None

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The base weight's dtype if adapters can compute in it; float32 over quantised weights."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype if dtype in _FLOATS else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype, which would round a float32 adapter to bfloat16 and back after
        # loading with low_cpu_mem_usage.
        device = device or device_of(self.get_base_layer())
        factors = self.factors(adapter_name)
        if factors is None or device is None or any(p.is_meta for p in factors.parameters()):
            return
        # A base on the meta device serves for its names and shapes only: the adapter keeps its values.
        if device.type != "meta":
            factors.to(device=device)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if not torch.compiler.is_compiling() and self.training and not self._fsdp1_checked:
            refuse_fsdp1(self)
            self._fsdp1_checked = True
        if self._may_take_weight and (h := self._forward_with_weight(x)) is not None:
            return h
        result = self.base_layer(x, *args, **kwargs)
        if self.training and not base_weight.passes_gradient(self, x, result):
            raise ValueError(
                f"{self.module_name} passes no gradient to its input: its quantised "
                f"{type(self.get_base_layer()).__name__} is for inference only, and the layers before it would not be "
                "trained. Quantise weights only (torchao: "
                'Int8WeightOnlyConfig; GPTQ: backend="gptq_torch"), or use bitsandbytes.'
            )
        return result if self.merged_adapters else self.with_updates(x, result)

    def with_updates(self, x: Tensor, result: Tensor) -> Tensor:
        """`result`, which the base layer computed from x `(…, in)`, plus ΔW x of the active adapters."""
        dtype = result.dtype
        # If accelerate hooks the base layer alone, x may come from another device.
        x = x.to(result.device)
        for adapter_name in self.active_adapters:
            factors = self.factors(adapter_name)
            if factors is not None:
                result = result + factors(self._cast(x, factors))
        return result.to(dtype)

    def _forward_with_weight(self, x: Tensor) -> Tensor | None:
        """h, if one adapter alone is active and computes it with the base weight; else None."""
        only: Factors | None = None
        for adapter_name in self.active_adapters:
            factors = self.factors(adapter_name)
            if factors is not None and only is not None:
                return None
            only = factors or only
        if only is None or self.merged_adapters or not only.takes_weight(x):
            return None
        linear = base_weight.frozen_linear(self, x)
        return None if linear is None else only(x, *linear)

    def _cast(self, x: Tensor, factors: Factors) -> Tensor:
        return x if (dtype := factors.input_dtype) is None else self._cast_input_dtype(x, dtype)

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            f"Adapters can't be trained under nn.DataParallel: copies of a layer would not share factors. {DDP_INSTEAD}"
        )

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}: give one name per example, "
                '"__base__" for none. Models that pass other things than the batch through an adapted layer, such as '
                "DeBERTa its relative positions, can't mix adapters."
            )
        if self.merged_adapters:
            raise ValueError(f"adapter_names can't be used while {self.merged_adapters} are merged: unmerge first.")
        # Cloned: bitsandbytes returns views made inside autograd functions, which can't be written to.
        result = self.base_layer(x, *args, **kwargs).clone()
        x = x.to(result.device)
        for adapter_name in dict.fromkeys(adapter_names):
            factors = self.factors(adapter_name)
            if factors is not None:
                rows = [i for i, name in enumerate(adapter_names) if name == adapter_name]
                delta = factors(self._cast(x[rows], factors))
                result[rows] = (result[rows] + delta).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "loraplex." + super().__repr__()


def put_around(target: nn.Module, parent: nn.Module, name: str, quantization: dict[str, Any]) -> AdapterLinear:
    """An `AdapterLinear` around a module of the model.

    Args:
        target: the module, or another tuner's layer around it.
        parent: the module that holds it.
        name: its name.
        quantization: what PEFT knows of the model's quantisation.

    Raises:
        ValueError: the module can't be adapted.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name} belongs to nn.MultiheadAttention, which reads its weight without calling it: an adapter there "
            "would do nothing. Put it into exclude_modules."
        )
    try:
        backend = resolve_quantization_backend(base, **quantization)
    except ValueError as error:
        raise ValueError(
            f"{name} is quantised with torchao, but the model does not say how ({error}). Load it with "
            "quantization_config=TorchAoConfig(…), and adapt the whole model, not a part of it."
        ) from error
    if not isinstance(base, (nn.Linear, Conv1D)) and (backend is None or backend.layer_type != "linear"):
        raise ValueError(
            f"{name} is a {type(base).__name__}; only linear layers (nn.Linear, Conv1D) can be adapted. "
            "Leave it out of target_modules, or train it in full with modules_to_save."
        )
    return AdapterLinear(target, name, **quantization)
