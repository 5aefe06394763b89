"""A word about what "all-linear" does not reach: weights that are bare parameters, such as those of experts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.updates import ROOT

_KNOWN = (nn.Linear, nn.Embedding, Conv1D)
"""And what is derived from them, such as quantised layers."""
logger = logging.getLogger(__name__)


def asks_for_all(config: AdapterConfig) -> bool:
    """Whether the config asks for all linear layers. PEFT puts their names in its place when it adapts a model."""
    return config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND


def warn_of_left_out(model: nn.Module, config: AdapterConfig) -> None:
    """Log which weights an adapter on all linear layers leaves as they are, because no linear layer holds them."""
    left_out = dict(bare_weights(model))
    if left_out:
        names = list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name.removeprefix(ROOT)) for name in left_out))
        logger.warning(
            'target_modules="all-linear" leaves out %d weights that are bare parameters and no linear layers: %s. They '
            "hold %.0f %% of the model's parameters, and %s can't adapt them. PEFT's LoRA does, as target_parameters.",
            len(left_out),
            ", ".join(names[:5]) + (", …" if len(names) > 5 else ""),
            100 * sum(left_out.values()) / sum(p.numel() for p in model.parameters()),
            config.title,
        )


def bare_weights(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and number of elements of weights that experts and their routers multiply with, without a linear layer.

    That is, stacks of matrices `(experts, …, …)`, and matrices called "weight" in modules that torch does not have.
    """
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or isinstance(module, _KNOWN):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            stack = parameter.ndim == 3 and min(parameter.shape) > 1
            if stack or (parameter.ndim == 2 and name.endswith(".weight") and min(parameter.shape) > 1):
                yield name, parameter.numel()
