"""Batches whose examples have different adapters: `adapter_names` on its way from the model to its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from loraplex.tuner.experts import AdapterParameters
from loraplex.tuner.layer import AdapterLinear


@contextmanager
def passed_down(model: Any, adapter_names: list[str], beams: int) -> Iterator[None]:
    """Pass `adapter_names`, one per example, to every adapted layer of `model` that is called in this block.

    Args:
        model: the adapted model.
        adapter_names: which adapter each example of the batch has.
        beams: how many beams `generate` follows for each example.
    """
    if any(isinstance(module, AdapterParameters) for module in model.modules()):
        raise ValueError(
            "adapter_names can't be used where bare parameters are adapted (target_parameters): experts get the tokens "
            "of all examples together. Use set_adapter, one adapter at a time."
        )
    # generate repeats each example once per beam, except in the encoder.
    repeated = [name for name in adapter_names for _ in range(beams)]
    encoder = {*model.get_encoder().modules()} if _is_encoder_decoder(model) else set()
    handles = [
        module.register_forward_pre_hook(
            partial(_add_adapter_names, names=adapter_names if module in encoder else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (AdapterLinear, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
