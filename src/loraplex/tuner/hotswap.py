"""Swapping an adapter for another of its kind in place, without a new graph of a compiled model.

PEFT's `peft.utils.hotswap` swaps LoRA only: it writes tensors one by one, and knows neither shared factors nor a
schedule's state. Here the adapter's own loading does it, all or nothing; PEFT's functions pass our adapters on to it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap as peft_hotswap
from torch import Tensor, nn

from loraplex.io.field_types import shown
from loraplex.tuner.adapter_files import check_adapter_files
from loraplex.tuner.attempt import all_or_nothing
from loraplex.tuner.bank import shared_by
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.schedule import Scheduled

_MAY_DIFFER = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loraplex_version", "peft_type", "peft_version",
    "revision", "task_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform",
)  # fmt: skip
"""Fields that say nothing about what is computed, or of which the tensors' names and shapes tell whether they agree."""
_INSTEAD = "Load it beside this one (loraplex.load_adapter) and switch with set_adapter."


def hotswap(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any) -> None:
    """Put a saved adapter in the place of `adapter_name`, which is of the same method, ranks and modules.

    The parameters stay the same objects, so that a model that `torch.compile` has compiled is not compiled anew; if
    `lora_alpha` differs, call `peft.utils.hotswap.prepare_model_for_compiled_hotswap(model)` before compiling.

    Args:
        model: a PeftModel or a transformers model with the adapter, compiled or not.
        path: folder of the new adapter, or its name on the hub.
        adapter_name: which adapter it replaces; it keeps the name.
        kwargs: what `PeftConfig.from_pretrained` takes (subfolder, revision, token, …).

    Raises:
        ValueError: the adapters are not alike, the old one is merged, or the files are broken. The model is unchanged.
    """
    folder = os.path.join(os.fspath(path), kwargs.get("subfolder") or "")
    kind = check_adapter_files(folder)["peft_type"] if os.path.isdir(folder) else None
    kind = PeftConfig._get_peft_type(os.fspath(path), **kwargs) if kind is None else kind
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, PeftConfig)
    if not issubclass(config_cls, AdapterConfig):
        raise ValueError(f"{path} is a {shown(kind)} adapter, none of loraplex: use peft.utils.hotswap.")
    config = config_cls.from_pretrained(os.fspath(path), **kwargs)
    swap(model, config, load_peft_weights(os.fspath(path), device="cpu", **kwargs), adapter_name)


def swap(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], adapter_name: str) -> None:
    """`hotswap` of an adapter that was read already.

    Args:
        tensors: as its file holds them, without an adapter's name in the keys.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    _check(model, config, adapter_name)

    def change() -> None:
        configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]
        config.inference_mode = configs[adapter_name].inference_mode
        set_peft_model_state_dict(model, tensors, adapter_name)
        configs[adapter_name] = config
        for factors in _factors(model, adapter_name):
            factors.lora_alpha = config.alpha(factors.module_name)
            _set_scaling(factors, config.scaling(factors.module_name))
            factors.clear_cache()
        if isinstance(shared := shared_by(model, adapter_name), Scheduled):
            shared.change_config(config)

    all_or_nothing(model, change)


def _factors(model: nn.Module, adapter_name: str | None = None) -> list[Factors]:
    """The factors of an adapter, or of all, on all layers."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    names = [adapter_name] if adapter_name is not None else list(getattr(model, "peft_config", {}))
    return [factors for layer in layers for name in names if (factors := layer.factors(name)) is not None]


def _check(model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r} to swap, only {sorted(configs)}: load it instead.")
    old = configs[adapter_name]
    if type(old) is not type(config):
        kinds = f"{old.peft_type.value} and {config.peft_type.value}"  # type: ignore[union-attr]
        raise ValueError(f"Incompatible PEFT types found: {kinds}. {_INSTEAD}")
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the base weights: call unmerge_adapter() first.")
    for factors in _factors(model, adapter_name):
        if (r := config.rank(factors.module_name)) != factors.r:
            raise ValueError(
                f"The adapters have r={factors.r} and r={r} on {factors.module_name}, and only equal ranks can be "
                f"swapped. {_INSTEAD}"
            )
    free = {*_MAY_DIFFER, *config.training_fields}
    for field in fields(config):
        values = [getattr(each, field.name) for each in (old, config)]
        if field.name not in free and values[0] != values[1]:
            raise ValueError(
                f"Configs are incompatible: {field.name} is {shown(values[0])} in the adapter that is there, and "
                f"{shown(values[1])} in the new one. {_INSTEAD}"
            )


def _set_scaling(factors: Factors, scaling: float) -> None:
    """Scale by `scaling`, in the same tensor if compiled graphs read one."""
    if isinstance(factors.scaling, Tensor):
        factors.scaling = factors.scaling.new_tensor(scaling)
    elif factors.scaling != scaling:
        factors.scaling = scaling


def prepare(model: nn.Module, target_rank: int | None = None, check_compiled: str = "error") -> None:
    """Let graphs that are compiled later read each scaling as data, so that adapters with other alphas can be swapped.

    Raises:
        ValueError: the model is compiled already, or `target_rank` asks for ranks that it does not have.
    """
    if check_compiled == "error" and (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)):
        raise ValueError("Call prepare_model_for_compiled_hotswap before compiling the model.")
    for factors in _factors(model):
        if target_rank is not None and factors.r != target_rank:
            raise ValueError(
                f"target_rank={target_rank}, but r={factors.r} on {factors.module_name}: these methods' ranks can't be "
                "padded. Leave target_rank out and swap adapters of equal rank, or export them as LoRA with one --rank."
            )
    for factors in _factors(model):
        factors.scaling = torch.tensor(float(factors.scaling), device=factors.lora_A.device)  # type: ignore[assignment]


def patch_peft_hotswap() -> None:
    """Let the functions in `peft.utils.hotswap` take our adapters; others are passed on to PEFT's."""
    _replace("hotswap_adapter", _hotswap_adapter)
    _replace("hotswap_adapter_from_state_dict", _from_state_dict)
    _replace("prepare_model_for_compiled_hotswap", _prepare)


def _replace(name: str, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    theirs = getattr(peft_hotswap, name)
    ours = wrap(theirs)
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "peft" and vars(module).get(name) is theirs:
            setattr(module, name, ours)


def _has_ours(model: nn.Module, adapter_name: str) -> bool:
    configs = getattr(getattr(model, "_orig_mod", model), "peft_config", {})
    return isinstance(configs.get(adapter_name), AdapterConfig)


def _hotswap_adapter(theirs: Callable[..., None]) -> Callable[..., None]:
    @wraps(theirs)
    def hotswap_adapter(
        model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
    ) -> None:
        if _has_ours(model, adapter_name):
            hotswap(model, model_name_or_path, adapter_name, **kwargs)
        else:
            theirs(model, model_name_or_path, adapter_name, torch_device, **kwargs)

    return hotswap_adapter


def _from_state_dict(theirs: Callable[..., None]) -> Callable[..., None]:
    @wraps(theirs)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
    ) -> None:
        if isinstance(config, AdapterConfig) or _has_ours(model, adapter_name):
            raise ValueError(
                "hotswap_adapter_from_state_dict swaps LoRA only: use loraplex.hotswap(model, folder, adapter_name)."
            )
        theirs(model, state_dict, adapter_name, config, parameter_prefix)

    return hotswap_adapter_from_state_dict


def _prepare(theirs: Callable[..., None]) -> Callable[..., None]:
    @wraps(theirs)
    def prepare_model_for_compiled_hotswap(
        model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
    ) -> None:
        if any(isinstance(module, AdapterLinear) for module in model.modules()):
            prepare(model, target_rank, check_compiled)
        else:
            theirs(model, target_rank=target_rank, config=config, check_compiled=check_compiled)

    return prepare_model_for_compiled_hotswap
