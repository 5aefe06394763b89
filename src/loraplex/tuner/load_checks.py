"""What a saved adapter's tensors must be like before a model takes any of them.

PEFT and transformers load what happens to fit, leave the rest at random, and let a file write into any tensor of the
model that it names. Here every tensor must belong to the adapter, be there, and have the shape and kind of its place.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator
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

from loraplex.tuner.attempt import running
from loraplex.tuner.bank import FactorBank
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.finite import is_finite
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.sharing import SharedFactors
from loraplex.tuner.tokens import token_wrappers
from loraplex.tuner.updates import ROOT

logger = logging.getLogger(__name__)

_LISTED, _LONGEST = 5, 200
"""How many names a message lists, and how many characters of each."""
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Kinds of factors, and what safetensors calls them. Others, of 8 or 4 bits, lack most of torch's operations."""


def shared_with_prefix(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SharedFactors]]:
    """The shared factors of `adapter_name`, with the prefix of their keys in the model's state dict."""
    for bank_name, bank in model.named_modules():
        if isinstance(bank, FactorBank):
            for container in bank.adapter_layer_names:
                modules = bank.get_submodule(container)
                if adapter_name in modules:  # type: ignore[operator]
                    prefix = f"{bank_name}.{container}.{adapter_name}."
                    yield prefix, modules[adapter_name]  # type: ignore[index]


def check_config(model: nn.Module, config: AdapterConfig) -> None:
    """Raise a ValueError if the weights are missing, or a listed target is: PEFT ignores it beside others."""
    weights = getattr(config, "_weights", None)
    if config.inference_mode and weights and not os.path.isfile(weights):
        raise ValueError(f"{weights} is missing: the folder holds settings but no weights. Copy the adapter again.")
    targets = config.target_modules
    if isinstance(targets, str) or targets is None or getattr(config, "_unproven", False):
        return
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = {name.rpartition(".")[2] for name in names}
            nearest = difflib.get_close_matches(target, endings, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ": see model.named_modules() for the names."
            raise ValueError(f"target_modules names {target!r}, but the model has no such module{hint}")


def weights_of(config: AdapterConfig) -> str | dict[str, Tensor] | None:
    """What is about to be loaded into an adapter with this config, a file or tensors; None if nothing is known."""
    known = [attempt.weights for attempt in running() if attempt.weights is not None]
    weights = known[-1] if known else getattr(config, "_weights", None)
    if isinstance(weights, str) and not os.path.isfile(weights):
        return None
    return weights


def read_tensors(path: str, method: str) -> dict[str, Tensor]:
    """Key → tensor of a safetensors file; of an adapter's factors shape and dtype are enough (meta tensors)."""
    state = {}
    marks = (f".{method.lower()}_factors.", f".{method.lower()}_shared.")
    with safe_open(path, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            stored = tensors.get_slice(key)
            if stored.get_dtype() in _FLOATS.values() and any(mark in key for mark in marks):
                state[key] = torch.empty(stored.get_shape(), device="meta")
            else:
                state[key] = tensors.get_tensor(key)
    return state


def to_model_keys(
    model: nn.Module, adapter_name: str, config: AdapterConfig, raw: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A saved adapter's tensors under the names that they will have in `model`, as PEFT and transformers find them."""
    state, in_full = dict(raw), {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, own in module.adapter_state_dict_load_map(adapter_name).items():
                found = [key for prefix in ("", ROOT) if (key := f"{prefix}{name}.{saved}") in state]
                if len(found) > 1:
                    raise ValueError(f"The adapter's weights hold {name}.{saved} twice, under other names.")
                for key in found:
                    in_full[f"{name}.{own}"] = state.pop(key)
                    # With trained biases PEFT saves those of such modules a second time, under this name.
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


def check_tensors(model: nn.Module, adapter_name: str, config: AdapterConfig, state: dict[str, Tensor]) -> None:
    """Check what is about to be loaded, and add to `state` what was left out of the file on purpose.

    Args:
        model: the model that has the adapter already.
        adapter_name: which adapter.
        config: its settings.
        state: key in the model → tensor; of factors, meta tensors will do.

    Raises:
        ValueError: a tensor is missing, has another shape or kind than its place, or belongs to something else; or the
            state of a schedule is none that it can be in.
    """
    model_state = model.state_dict()
    own = _own_keys(model, adapter_name, model_state)
    problem = _misshapen(_placed(state, model_state), model_state)
    if not problem:
        for prefix, shared in shared_with_prefix(model, adapter_name):
            shared.check_state({name: state[prefix + name] for name in shared.buffer_names() if prefix + name in state})
            shared.fill_stale(prefix, state)
        placed = _placed(state, model_state)
        needed = own | _trained_biases(model, config, model_state)
        lost = next((key for key in model_state if key in needed and key not in placed), None)
        problem = (
            f"The adapter's weights lack {lost}: it is incomplete or for another model."
            if lost
            else _foreign(own, placed, model, model_state, adapter_name, config)
        )
    if problem:
        raise ValueError(
            f"{problem} The adapter was trained on {config.base_model_name_or_path or 'an unnamed model'}: load it "
            "onto that base model, with the adapter_config.json it was saved with."
        )


def _placed(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's own keys: only those of a PeftModel have PEFT's prefix."""
    rooted = any(key.startswith(ROOT) for key in model_state)
    placed = {key if rooted else key.removeprefix(ROOT): tensor for key, tensor in state.items()}
    check_none_lost(state, placed)
    return placed


def _own_keys(model: nn.Module, adapter_name: str, model_state: dict[str, Tensor]) -> set[str]:
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
    """All that a file of this adapter holds, as `model` has it now: factors, copies, trained biases."""
    model_state = model.state_dict()
    keys = _own_keys(model, adapter_name, model_state) | _trained_biases(model, config, model_state)
    return {key: model_state[key] for key in keys}


def _misshapen(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> str | None:
    for key, tensor in state.items():
        place = model_state.get(key)
        if place is not None and place.shape != tensor.shape:
            return f"{key} is {tuple(tensor.shape)} in the adapter's weights and {tuple(place.shape)} in this model."
        if place is not None and tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            return f"{key} is {tensor.dtype} in the adapter's weights, which are read in {', '.join(_FLOATS.values())}."
        if place is not None and place.is_floating_point() != tensor.is_floating_point():
            return f"{key} is {tensor.dtype} in the adapter's weights, where this model needs {place.dtype}."
    return None


def _foreign(
    own: set[str],
    state: dict[str, Tensor],
    model: nn.Module,
    model_state: dict[str, Tensor],
    adapter_name: str,
    config: AdapterConfig,
) -> str | None:
    others = {key: tensor for key, tensor in state.items() if key not in own}
    for key in [*others]:
        # With a resized vocabulary PEFT saves all that a wrapper of trained tokens holds, and does not load it.
        if ".token_adapter.trainable_tokens_" in key and f"{key}.{adapter_name}" in model_state:
            del others[key]
        # With biases, and with embeddings, PEFT saves fully trained modules a second time.
        head, found, rest = key.partition(".modules_to_save.")
        if found and f"{head}.modules_to_save.{adapter_name}.{rest}" in own:
            del others[key]
    homeless = sorted(key for key in others if key not in model_state)
    if homeless:
        return f"The adapter's weights hold {_listed(homeless)}, which this model has no place for."
    biases = _trained_biases(model, config, model_state)
    others = {key: tensor for key, tensor in others.items() if key not in biases}
    embeddings = _saved_embeddings(model, adapter_name) if others else ()
    wrong = sorted(
        key for key, tensor in others.items() if not key.startswith(embeddings) and not _equal(tensor, model_state[key])
    )
    if not wrong:
        return None
    module = wrong[0].removeprefix(ROOT).rpartition(".")[0].rpartition(".")[2]
    return (
        f"The adapter's weights hold {_listed(wrong)}, which belong to the base model or to another adapter: loading "
        "them would change it for everyone. If they were trained with this adapter, add the modules to modules_to_save "
        f"in its adapter_config.json ({module!r}), and they are loaded as copies of its own."
    )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(key if len(key) <= _LONGEST else f"{key[:_LONGEST]}…" for key in keys[:_LISTED]) + more


def _equal(tensor: Tensor, place: Tensor) -> bool:
    """Whether loading would change nothing."""
    return not (tensor.is_meta or place.is_meta) and torch.equal(tensor.to(place), place)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and (one.is_meta or other.is_meta or torch.equal(one, other))


def _trained_biases(model: nn.Module, config: AdapterConfig, model_state: dict[str, Tensor]) -> set[str]:
    """Keys of the base model's biases that are trained, and saved, with an adapter of this config."""
    if config.bias == "none":
        return set()
    if config.bias == "all":
        return {key for key in model_state if key.endswith(".bias") and ".modules_to_save." not in key}
    layers = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {key for name in layers if (key := f"{name}.base_layer.bias") in model_state}


def _saved_embeddings(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """Prefixes of the embeddings and heads whose base weights PEFT saves with an adapter.

    It does so where one is adapted, and where the vocabulary was resized. The second is judged by the model at hand,
    not by what a file says.
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
    """Cast what was trained in full as loading does, and factors of several dtypes, which can't be multiplied, to the
    widest: `low_cpu_mem_usage` has PEFT put tensors in place as they are.
    """
    places, marks = model.state_dict(), (f".{method.lower()}_factors.", f".{method.lower()}_shared.")
    factors = [
        key for key, tensor in state.items() if tensor.is_floating_point() and any(mark in key for mark in marks)
    ]
    for key, tensor in state.items():
        if key in places and not any(mark in key for mark in marks):
            state[key] = tensor.to(places[key].dtype)
    if factors:
        widest = reduce(torch.promote_types, (state[key].dtype for key in factors))
        state.update({key: state[key].to(widest) for key in factors})


def keep_values(model: nn.Module, keys: Iterable[str]) -> None:
    """Copy what is about to be overwritten, so that a load that does not come to its end can put it back."""
    if running():
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        found = [tensors[key] for key in keys if key in tensors]
        for attempt in running():
            attempt.keep(found)


def warn_of_nonfinite(state: dict[str, Tensor], method: str) -> None:
    """Say in one line which modules of an adapter hold NaN or Inf."""
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if bad:
        marks = (f".{method.lower()}_factors.", f".{method.lower()}_shared.")
        names = []
        for key in bad:
            module, found, factor = key.removeprefix(ROOT).partition(marks[0])
            names.append(module if found else factor or key.removeprefix(ROOT).rpartition(".")[2])
        logger.warning(
            "The adapter's weights hold NaN or Inf (%s): its outputs will too. Load an earlier checkpoint.",
            _listed(sorted(set(names))),
        )
