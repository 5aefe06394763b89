"""A word about what "all-linear" does not reach: weights that are bare parameters, such as those of experts."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterator

from peft import LoraConfig
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.experts import AdapterParameters
from loraplex.tuner.updates import ROOT

_KNOWN = (nn.Linear, nn.Embedding, Conv1D)
"""And what is derived from them, such as quantised layers."""
logger = logging.getLogger(__name__)


def add_bare_weights(model: nn.Module, config: AdapterConfig) -> bool:
    """Where all linear layers are asked for, add the bare parameters to `target_parameters` that PEFT's LoRA adds.

    Returns:
        Whether they are. PEFT puts the layers' names in the place of "all-linear" when it adapts a model.
    """
    if config.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return False
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    lora = LoraConfig(target_modules=INCLUDE_LINEAR_LAYERS_SHORTHAND)
    convert_peft_config_for_transformers(lora, model, None)
    if lora.target_parameters:
        config.target_parameters = sorted({*lora.target_parameters, *(config.target_parameters or ())})
    return True


def warn_of_left_out(model: nn.Module, config: AdapterConfig) -> None:
    """Log which weights an adapter on all linear layers leaves as they are, because no linear layer holds them."""
    adapted = {id(m.get_base_layer()) for m in model.modules() if isinstance(m, AdapterParameters)}
    left_out = dict(bare_weights(model, adapted))
    if left_out:
        names = list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name.removeprefix(ROOT)) for name in left_out))
        logger.warning(
            'target_modules="all-linear" leaves out %d weights that are bare parameters and no linear layers: %s. They '
            "hold %.0f %% of the model's parameters. To adapt them too: target_parameters=%s.",
            len(left_out),
            ", ".join(names[:5]) + (", …" if len(names) > 5 else ""),
            100 * sum(left_out.values()) / sum(p.numel() for p in model.parameters()),
            [*(config.target_parameters or ()), *names[:5]],
        )


def bare_weights(model: nn.Module, adapted: Container[int] = ()) -> Iterator[tuple[str, int]]:
    """Name and number of elements of weights that experts and their routers multiply with, without a linear layer.

    That is, stacks of matrices `(experts, …, …)`, and matrices called "weight" in modules that torch does not have.

    Args:
        model: any model.
        adapted: ids of modules to leave out.
    """
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or isinstance(module, _KNOWN) or id(module) in adapted:
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            stack = parameter.ndim == 3 and min(parameter.shape) > 1
            if stack or (parameter.ndim == 2 and name.endswith(".weight") and min(parameter.shape) > 1):
                yield name, parameter.numel()
