"""What a plain LoRA, or an engine that serves it, can't take of an adapter."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loraplex.export.servers import Engine
from loraplex.tuner.expert_weight import ExpertLinear
from loraplex.tuner.model_merging import tied_layers
from loraplex.tuner.updates import ROOT, Update


def check_experts(layers: list[tuple[BaseTunerLayer, Update]]) -> None:
    """Raise a ValueError if the adapter changes bare parameters."""
    if parts := [update.module_name for layer, update in layers if isinstance(layer.get_base_layer(), ExpertLinear)]:
        names = dict.fromkeys(re.sub(r"^.*?\.\d+\.|\.\d+$", "", name) for name in parts)
        raise ValueError(
            f"The adapter changes {len(parts)} matrices of bare parameters ({', '.join(names)}), which a plain LoRA of "
            "linear layers can't carry: merge it (--format merged)."
        )


def check_engine(
    engine: Engine, model: nn.Module, layers: list[tuple[BaseTunerLayer, Update]], extras: dict[str, Tensor]
) -> None:
    """Raise a ValueError if the engine can't take what the adapter changes; `extras` is what was trained in full."""
    if extras and not engine.full_modules:
        names = sorted(key.removeprefix(ROOT) for key in extras)
        raise ValueError(
            f"The adapter trained these in full, or rows of them, and a LoRA for {engine.name} can't carry them: "
            f"{', '.join(names)}. Export for stock PEFT (--engine peft), or merge everything (--format merged)."
        )
    if engine.name == "llama.cpp" and any(layer.fan_in_fan_out for layer, _ in layers):  # type: ignore[attr-defined]
        raise ValueError(
            "llama.cpp's converter swaps the factors of Conv1D layers (GPT-2): merge instead (--format merged)."
        )
    tied_ones = set(tied_layers(model))
    tied = [factors.module_name for layer, factors in layers if layer in tied_ones]
    if tied and not engine.head:
        raise ValueError(
            f"The adapter changes {', '.join(tied)}, whose weight is also the input embedding; servers ignore or "
            f"refuse a LoRA there (engine {engine.name}). Export for stock PEFT (--engine peft), or merge "
            "(--format merged), which gives the head a weight of its own."
        )
