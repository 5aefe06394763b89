"""Which tensors a saved adapter consists of, and by which keys a model has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.tuner.bank import FactorBank
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.sharing import SharedFactors
from loraplex.tuner.tokens import token_wrappers
from loraplex.tuner.updates import ROOT

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Dtypes of factors → their names in safetensors. Dtypes of 8 or 4 bits lack most of torch's operations."""


def marks_of(method: str) -> tuple[str, str]:
    """What the keys of a method's factors contain: of factors that a layer owns, and of shared ones."""
    return f".{method.lower()}_factors.", f".{method.lower()}_shared."


def shared_with_prefix(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SharedFactors]]:
    """The shared factors of `adapter_name`, with the prefix of their keys in the model's state dict."""
    for bank_name, bank in model.named_modules():
        if isinstance(bank, FactorBank):
            for container in bank.adapter_layer_names:
                modules = bank.get_submodule(container)
                if adapter_name in modules:  # type: ignore[operator]
                    prefix = f"{bank_name}.{container}.{adapter_name}."
                    yield prefix, modules[adapter_name]  # type: ignore[index]


def read_tensors(path: str, method: str) -> dict[str, Tensor]:
    """Key → tensor of a safetensors file. The adapter's factors are meta tensors, with their shapes only."""
    state = {}
    marks = marks_of(method)
    with safe_open(path, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            stored = tensors.get_slice(key)
            if stored.get_dtype() in FLOATS.values() and any(mark in key for mark in marks):
                state[key] = torch.empty(stored.get_shape(), device="meta")
            else:
                state[key] = tensors.get_tensor(key)
    return state


def to_model_keys(
    model: nn.Module, adapter_name: str, config: AdapterConfig, raw: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A saved adapter's tensors by the keys that PEFT and transformers will find for them in `model`."""
    state, in_full = dict(raw), {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, own in module.adapter_state_dict_load_map(adapter_name).items():
                found = [key for prefix in ("", ROOT) if (key := f"{prefix}{name}.{saved}") in state]
                if len(found) > 1:
                    raise ValueError(f"The adapter's weights hold {name}.{saved} twice, under other names.")
                for key in found:
                    in_full[f"{name}.{own}"] = state.pop(key)
                    # If biases are trained, PEFT saves those of such modules a second time, under this name.
                    again = state.pop(f"{ROOT}{name}.{own}", None)
                    if again is not None and not _same(again, in_full[f"{name}.{own}"]):
                        raise ValueError(f"The adapter's weights hold {name}.{saved} twice, with different values.")
    state |= in_full
    placed = BaseTuner._remap_adapter_state_dict_for_load(model, config, adapter_name, state)
    check_none_lost(state, placed)
    return placed


def check_none_lost(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Raise a ValueError if renaming the keys sent two tensors to one place."""
    if len(after) < len(before):
        raise ValueError(f"The adapter's weights hold {len(before) - len(after)} tensors twice, under other names.")


def placed_tensors(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's own keys, which have PEFT's prefix only if the model is a PeftModel."""
    rooted = any(key.startswith(ROOT) for key in model_state)
    placed = {key if rooted else key.removeprefix(ROOT): tensor for key, tensor in state.items()}
    check_none_lost(state, placed)
    return placed


def own_keys(model: nn.Module, adapter_name: str, model_state: dict[str, Tensor]) -> set[str]:
    """Keys of the adapter's factors, of its schedule's state, and of its copies of modules that are trained in full."""
    factors = _filter_state_dict_by_key_prefixes(
        model_state, _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    )
    copies = (key for key in model_state if f".modules_to_save.{adapter_name}." in key)
    # Of tied modules the tokens are in the model's state twice, and in a file once.
    wrappers = (item for item in token_wrappers(model, adapter_name) if item[1].token_adapter.tied_adapter is None)
    tokens = (f"{name}.token_adapter.trainable_tokens_delta.{adapter_name}" for name, _ in wrappers)
    return {*factors, *copies, *tokens}


def tensors_of(model: nn.Module, adapter_name: str, config: AdapterConfig) -> dict[str, Tensor]:
    """All tensors that a file of this adapter holds, with their present values in `model`."""
    model_state = model.state_dict()
    keys = own_keys(model, adapter_name, model_state) | trained_biases(model, config, model_state)
    return {key: model_state[key] for key in keys}


def trained_biases(model: nn.Module, config: AdapterConfig, model_state: dict[str, Tensor]) -> set[str]:
    """Keys of the base model's biases that are trained, and saved, with an adapter of this config."""
    if config.bias == "none":
        return set()
    if config.bias == "all":
        return {key for key in model_state if key.endswith(".bias") and ".modules_to_save." not in key}
    layers = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {key for name in layers if (key := f"{name}.base_layer.bias") in model_state}


def saved_embeddings(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """Prefixes of the embeddings and heads whose base weights PEFT saves with an adapter.

    PEFT does so if one is adapted, and if the vocabulary was resized. The model at hand tells whether it was, not a
    file.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return ()
    resized = _is_resized(base)
    found = []
    for get in (base.get_input_embeddings, base.get_output_embeddings):
        try:
            layer = get()
        except NotImplementedError:
            continue
        targeted = isinstance(layer, AdapterLinear) and layer.factors(adapter_name) is not None
        if layer is not None and (resized or targeted):
            names = (name for name, module in model.named_modules() if module is layer)
            found += [f"{name}." for name in names]
    return tuple(found)


def _is_resized(base: PreTrainedModel) -> bool:
    """Whether the model's vocabulary has another size than the checkpoint that it comes from."""
    size = getattr(base.config, "vocab_size", None)
    if not size or not base.name_or_path:
        return False
    try:
        saved = type(base.config).from_pretrained(base.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return bool(saved.vocab_size != size)


def to_their_dtypes(model: nn.Module, method: str, state: dict[str, Tensor]) -> None:
    """Cast tensors as loading does, since `low_cpu_mem_usage` has PEFT put them in place as they are.

    Modules that were trained in full get the model's dtypes. Factors of several dtypes, which can't be multiplied, get
    the widest.
    """
    places, marks = model.state_dict(), marks_of(method)
    factors = [
        key for key, tensor in state.items() if tensor.is_floating_point() and any(mark in key for mark in marks)
    ]
    for key, tensor in state.items():
        if key in places and not any(mark in key for mark in marks):
            state[key] = tensor.to(places[key].dtype)
    if factors:
        widest = reduce(torch.promote_types, (state[key].dtype for key in factors))
        state.update({key: state[key].to(widest) for key in factors})


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and (one.is_meta or other.is_meta or torch.equal(one, other))
