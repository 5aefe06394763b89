"""The weight of a base layer, plain or quantised: read, written, and put back exactly as it was.

Quantised ones go through PEFT's backends: dequantise to read, quantise again to write. What was kept is the object
itself, since quantising the same weight again gives other bits.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend, HqqBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.runtime.packing import is_packed, unpacked
from loraplex.runtime.parallel import is_sharded


class Layer(Protocol):
    """An adapted layer, as far as its base weight is concerned."""

    base_layer: nn.Module
    quantization_backend: Any
    fan_in_fan_out: bool

    def get_base_layer(self) -> nn.Module:
        """The innermost layer, which holds the weight."""

    def get_base_weight(self) -> Tensor:
        """The weight that PEFT reads."""

    def set_base_weight(self, weight: Tensor) -> None:
        """Let PEFT write the weight."""


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Unreadable(Exception):
    """The quantisation's backend can't read or write this weight."""


def keep(layer: Layer) -> tuple[Any, ...]:
    """What `put_back` needs. In a tuple: torch would register a parameter or module that is an attribute."""
    inner: Any = layer.get_base_layer()
    match layer.quantization_backend:
        case None:
            # On the CPU: a copy of every adapted weight beside the weights themselves would not fit on many devices.
            # No inference tensor, which could not be trained beside once it is put back.
            with torch.inference_mode(False):
                return (inner.weight.detach().to("cpu", copy=True),)
        case HqqBackend():
            return (layer.base_layer,)
        case Bnb8bitBackend():
            return inner.weight, inner.weight.SCB if inner.state.SCB is None else inner.state.SCB
        case _:
            return (inner.weight,)


def put_back(layer: Layer, kept: tuple[Any, ...]) -> None:
    """Restore what `keep` found, bit for bit, on the device and in the dtype in which the layer is now."""
    inner: Any = layer.get_base_layer()
    match layer.quantization_backend:
        case None:
            with torch.inference_mode(False):
                inner.weight.data = kept[0].to(inner.weight.device, inner.weight.dtype)
        case HqqBackend():
            layer.base_layer = kept[0].to(inner.W_q.device)
        case Bnb8bitBackend():
            weight, scales = kept
            device = inner.weight.device
            inner.weight = weight = weight.to(device)
            inner.state.reset_grads()
            weight.CB, weight.SCB = weight.data, scales.to(device)
        case Bnb4bitBackend():
            weight = kept[0]
            # PEFT clears it on the weight that it replaces: a move to a device would quantise it again.
            weight.bnb_quantized = True
            inner.weight = weight = weight.to(inner.weight.device)
            inner.quant_state = weight.quant_state
        case _:
            weight = kept[0]
            stayed = weight.device == inner.weight.device
            inner.weight = weight if stayed else nn.Parameter(weight.to(inner.weight.device), requires_grad=False)


def fingerprint(layer: Layer) -> tuple[torch.dtype, int] | None:
    """The dtype of a plain weight and a number from its bits, which tell of writes to it; None of other weights."""
    weight: Any = layer.get_base_layer().weight if layer.quantization_backend is None else None
    if weight is None or is_sharded(weight) or weight.is_meta:
        return None
    rows = weight.detach().view(_INTEGERS[weight.itemsize]).sum(-1)
    # By its place: two rows that change places change the number.
    return weight.dtype, int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def read(layer: Layer) -> Tensor:
    """The weight, dequantised if need be: a copy or the weight itself."""
    inner: Any = layer.get_base_layer()
    if isinstance(layer.quantization_backend, Bnb4bitBackend) and is_packed(inner.weight):
        # bitsandbytes does not notice that it can't dequantise this layout.
        weight = copy.copy(inner.weight)
        weight.data, weight.quant_state = unpacked(inner.weight)
        inner = SimpleNamespace(weight=weight)
    try:
        if layer.quantization_backend is None:
            return layer.get_base_weight()
        return layer.quantization_backend.get_base_weight(inner)
    except Exception as error:
        raise Unreadable(str(error)) from error


def write(layer: Layer, weight: Tensor) -> Tensor:
    """Store `weight`, quantised if need be, and return it as it is stored.

    Raises:
        Unreadable: the backend can't do it.
    """
    inner: Any = layer.get_base_layer()
    try:
        layer.set_base_weight(weight)
    except Exception as error:
        raise Unreadable(str(error)) from error
    new: Any = layer.get_base_layer()
    if new is not inner:
        # PEFT's HQQ backend makes a new layer, without the bias.
        new.bias = inner.bias
    return read(layer)


def plain(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(W (out, in), b or None), where calling the base layer does no more than W x + b and trains neither; else None.

    Whoever hooks a module (accelerate moves weights, users record activations) expects it to be called.
    """
    inner: Any = layer.base_layer
    if type(inner) not in (nn.Linear, Conv1D) or "forward" in inner.__dict__:
        return None
    weight, bias = inner.weight, inner.bias
    if inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks or inner._backward_pre_hooks:
        return None
    # A parameter of another type is quantised or distributed.
    if type(weight) is not nn.Parameter or is_sharded(weight):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None  # for the base layer to say what is wrong
    return (weight.T if layer.fan_in_fan_out else weight), bias


def passes_gradient(layer: Layer, x: Tensor, result: Tensor) -> bool:
    """Whether a quantised layer lets gradients through to its input; some are made for inference only."""
    asked = layer.quantization_backend is not None and torch.is_grad_enabled() and x.requires_grad
    return not asked or result.requires_grad
