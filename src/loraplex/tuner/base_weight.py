"""The weight of a base layer, quantised or not: how it is read, written, backed up and restored bit for bit.

PEFT's backends dequantise a quantised weight to read it, and quantise it again to write it. Its backup is the object
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
from loraplex.tuner.expert_weight import ExpertLinear


class Layer(Protocol):
    """What this module needs of an adapted layer."""

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


def backup(layer: Layer) -> tuple[Any, ...]:
    """What `restore` needs. It is a tuple, since torch would register a parameter or module that is an attribute."""
    inner: Any = layer.get_base_layer()
    match layer.quantization_backend:
        case None:
            # On the CPU: many devices have no room for a copy of every adapted weight beside the weights themselves.
            # Outside inference mode: autograd could not save an inference tensor once it is restored.
            with torch.inference_mode(False):
                return (inner.weight.detach().to("cpu", copy=True),)
        case HqqBackend():
            return (layer.base_layer,)
        case Bnb8bitBackend():
            return inner.weight, inner.weight.SCB if inner.state.SCB is None else inner.state.SCB
        case _:
            return (inner.weight,)


def restore(layer: Layer, saved: tuple[Any, ...]) -> None:
    """Put back the weight that `backup` saved, bit for bit, on the device and in the dtype that the layer has now."""
    inner: Any = layer.get_base_layer()
    match layer.quantization_backend:
        case None:
            with torch.inference_mode(False):
                if isinstance(inner, ExpertLinear):
                    inner.weight.data.copy_(saved[0])  # a view: what is assigned to it would not reach the stack
                else:
                    inner.weight.data = saved[0].to(inner.weight.device, inner.weight.dtype)
        case HqqBackend():
            layer.base_layer = saved[0].to(inner.W_q.device)
        case Bnb8bitBackend():
            weight, scales = saved
            device = inner.weight.device
            inner.weight = weight = weight.to(device)
            inner.state.reset_grads()
            weight.CB, weight.SCB = weight.data, scales.to(device)
        case Bnb4bitBackend():
            weight = saved[0]
            # PEFT clears it on the weight that it replaces: a move to a device would quantise it again.
            weight.bnb_quantized = True
            inner.weight = weight = weight.to(inner.weight.device)
            inner.quant_state = weight.quant_state
        case _:
            weight = saved[0]
            stayed = weight.device == inner.weight.device
            inner.weight = weight if stayed else nn.Parameter(weight.to(inner.weight.device), requires_grad=False)


def fingerprint(layer: Layer) -> tuple[torch.dtype, int] | None:
    """The dtype of an unquantised weight and a number from its bits, which show that it was written to; else None."""
    weight: Any = layer.get_base_layer().weight if layer.quantization_backend is None else None
    if weight is None or is_sharded(weight) or weight.is_meta:
        return None
    rows = weight.detach().view(_INTEGERS[weight.itemsize]).sum(-1)
    # Each row counts by its index, so that two rows that change places change the number.
    return weight.dtype, int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def read(layer: Layer) -> Tensor:
    """The weight, dequantised if it is quantised. It may be a copy or the weight itself."""
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
    """Store `weight`, quantised if the layer is, and return what the layer then holds.

    Raises:
        Unreadable: the quantisation's backend can't do it.
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


def frozen_linear(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """W (out, in) and b, if calling the base layer does no more than W x + b and trains neither; else None.

    A module with hooks has to be called: accelerate's move weights, and users record activations.
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
        return None  # the base layer's own error says what is wrong
    return (weight.T if layer.fan_in_fan_out else weight), bias


def passes_gradient(layer: Layer, x: Tensor, result: Tensor) -> bool:
    """Whether a quantised layer lets gradients through to its input; some are made for inference only."""
    asked = layer.quantization_backend is not None and torch.is_grad_enabled() and x.requires_grad
    return not asked or result.requires_grad
