"""PEFT's `convert_to_lora`, for models with our adapters."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import conversion
from torch import Tensor, nn

from loraplex.export.lora import convert_for_peft
from loraplex.tuner.layer import AdapterLinear


def patch_peft_conversion() -> None:
    """Let PEFT's `convert_to_lora` and `save_as_lora` write our adapters from their factors.

    PEFT's version would form every ΔW, decompose it, and stop at the bank of shared factors, which has none.
    """
    theirs = conversion.convert_to_lora

    @wraps(theirs)
    def convert_to_lora(
        model: nn.Module,
        rank: float,
        adapter_name: str = "default",
        progressbar: bool = False,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        if any(isinstance(module, AdapterLinear) for module in model.modules()):
            return convert_for_peft(model, rank, adapter_name)
        return theirs(model, rank, adapter_name, progressbar, compile_kwargs)

    # PEFT passes the name on from module to module; who imported it before loraplex keeps PEFT's.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and vars(module).get("convert_to_lora") is theirs:
            module.convert_to_lora = convert_to_lora  # type: ignore[attr-defined]
