"""PEFT's status of a model's layers, without the bank: it adapts no module, though PEFT takes it for a tuner layer."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any, Literal

from peft import peft_model
from peft.peft_model import TunerLayerStatus
from torch import nn

from loraplex.tuner.bank import BANK

Trained = dict[str, bool | Literal["irregular"]]


def patch_layer_status() -> None:
    """Let `get_layer_status`, and `get_model_status` which calls it, name and count adapted layers only.

    What the bank has to tell, whether shared factors are trained and where they lie, is told by the layers that read
    them.
    """
    theirs = peft_model.get_layer_status

    @wraps(theirs)
    def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
        rows = theirs(model)
        banks = [row for row in rows if row.name.rpartition(".")[2] == BANK]
        layers = [row for row in rows if row not in banks]
        for bank in banks:
            for row in layers:
                _add(row, bank)
        return layers

    # PEFT passes the name on from module to module; who imported it before loraplex keeps PEFT's.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and vars(module).get("get_layer_status") is theirs:
            module.get_layer_status = get_layer_status  # type: ignore[attr-defined]


def _add(row: TunerLayerStatus, bank: TunerLayerStatus) -> None:
    """Tell of a layer's adapters what the bank tells of the factors that they share."""
    for adapter, trained in bank.requires_grad.items():
        if adapter in row.available_adapters:
            own: Any = row.requires_grad.get(adapter, trained)
            row.requires_grad[adapter] = own if own == trained else "irregular"
            row.devices[adapter] = sorted({*row.devices.get(adapter, []), *bank.devices.get(adapter, [])})
