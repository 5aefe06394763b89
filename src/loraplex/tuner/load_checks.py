"""Checks of a saved adapter's tensors before a model takes any of them.

PEFT and transformers load the tensors that happen to fit, leave the others at random, and let a file write into any
tensor of the model that it names. Here, no tensor may be missing, each must belong to the adapter, and each must have
the shape and kind that the model has for it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loraplex.tuner.attempt import running
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.finite import is_finite
from loraplex.tuner.saved_tensors import (
    FLOATS,
    marks_of,
    own_keys,
    placed_tensors,
    saved_embeddings,
    shared_with_prefix,
    trained_biases,
)
from loraplex.tuner.updates import ROOT

logger = logging.getLogger(__name__)

_LISTED, _LONGEST = 5, 200
"""How many names a message lists, and how many characters of each."""


def check_config(model: nn.Module, config: AdapterConfig) -> None:
    """Raise a ValueError if the weights are missing, or a listed target, which PEFT ignores if others exist."""
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
    """The file or the tensors that are about to be loaded into an adapter with this config; None if not known."""
    known = [attempt.weights for attempt in running() if attempt.weights is not None]
    weights = known[-1] if known else getattr(config, "_weights", None)
    if isinstance(weights, str) and not os.path.isfile(weights):
        return None
    return weights


def check_tensors(model: nn.Module, adapter_name: str, config: AdapterConfig, state: dict[str, Tensor]) -> None:
    """Check the tensors that are about to be loaded, and add those that were left out of the file on purpose.

    Args:
        model: the model, which has the adapter already.
        adapter_name: which adapter.
        config: its settings.
        state: key in the model → tensor. Factors may be meta tensors.

    Raises:
        ValueError: a tensor is missing, has another shape or kind than in the model, or does not belong to the
            adapter; or its schedule can't be in the state that was saved.
    """
    model_state = model.state_dict()
    own = own_keys(model, adapter_name, model_state)
    problem = _misshapen(placed_tensors(state, model_state), model_state)
    if not problem:
        for prefix, shared in shared_with_prefix(model, adapter_name):
            shared.check_state({name: state[prefix + name] for name in shared.buffer_names() if prefix + name in state})
            shared.fill_stale(prefix, state)
        placed = placed_tensors(state, model_state)
        needed = own | trained_biases(model, config, model_state)
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


def _misshapen(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> str | None:
    for key, tensor in state.items():
        place = model_state.get(key)
        if place is not None and place.shape != tensor.shape:
            return f"{key} is {tuple(tensor.shape)} in the adapter's weights and {tuple(place.shape)} in this model."
        if place is not None and tensor.is_floating_point() and tensor.dtype not in FLOATS:
            return f"{key} is {tensor.dtype} in the adapter's weights, which are read in {', '.join(FLOATS.values())}."
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
    biases = trained_biases(model, config, model_state)
    others = {key: tensor for key, tensor in others.items() if key not in biases}
    embeddings = saved_embeddings(model, adapter_name) if others else ()
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


def back_up_values(model: nn.Module, keys: Iterable[str]) -> None:
    """Copy the values that a load is about to overwrite, so that they can be restored if it fails."""
    if running():
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        found = [tensors[key] for key in keys if key in tensors]
        for attempt in running():
            attempt.back_up(found)


def warn_of_nonfinite(state: dict[str, Tensor], method: str) -> None:
    """Warn in one line which modules of an adapter hold NaN or Inf."""
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if bad:
        marks = marks_of(method)
        names = []
        for key in bad:
            module, found, factor = key.removeprefix(ROOT).partition(marks[0])
            names.append(module if found else factor or key.removeprefix(ROOT).rpartition(".")[2])
        logger.warning(
            "The adapter's weights hold NaN or Inf (%s): its outputs will too. Load an earlier checkpoint.",
            _listed(sorted(set(names))),
        )
