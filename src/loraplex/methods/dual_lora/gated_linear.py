"""Dual LoRA's linear map, y = x (W + ΔW)ᵀ + b with ΔW = s · ReLU(B A) ⊙ Sign(D C), and its gradients.

The gates are element-wise, so ΔW has no low rank to compute with. Plain autograd saves three (out, in) matrices for
each layer from forward to backward; here no matrix of that size is saved. W + ΔW is built into a buffer that lives for
one product, and again in backward, tile by tile, where the tiles of G = dYᵀ X are turned into the factors' gradients
(`tiles.py`).

Without W, y is ΔW x alone. With W, a layer costs one product instead of two, but bfloat16 would round away an update
that is small beside the steps between W's values, in the same way for every token and every step. So the sum is rounded
at random, up or down with the probabilities that make its mean exact (`rounding.py`): in the same way in forward,
backward and activation checkpointing, and in another way after each step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from loraplex.methods.dual_lora.tiles import Factors, empty_as, fill, is_transposed, turn
from loraplex.runtime import loss_scaling
from loraplex.tuner.factors import wide


def gated_linear(x: Tensor, factors: Factors, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (W + ΔW)ᵀ + b, computed in the dtype of `x`. W and b get no gradient.

    Args:
        x: (..., in).
        factors: A (r₁, in), B (out, r₁), C (r₂, in), D (out, r₂); ΔW is computed in float32 at least.
        scale: s ≥ 0, a tensor without dimensions on the device of `x`.
        weight: W (out, in), any strides; None for ΔW x alone. In half precision W is rounded to the nearest value, as
            autocast does, and W + ΔW at random; where ΔW is 0, the sum is W.
        bias: (out,), or None.
    """
    return torch.ops.loraplex.gated_linear(x, *factors, scale, weight, bias)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes with `x`: that of autocast where it is on."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


@torch.library.custom_op("loraplex::gated_linear", mutates_args=())
def _forward(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    loss_scaling.watch()
    loss_scaling.forward_begins()
    with torch.autocast(x.device.type, enabled=False):
        total = empty_as(weight, x.new_empty, len(B), A.shape[1])
        fill(total, (wide(A), wide(B), wide(C), wide(D)), scale, weight)
        return linear(x, total, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("loraplex::gated_linear_backward", mutates_args=())
def _backward(
    dY: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dC, dD). Gradients that are not asked for are empty; the factors' are, unless `x` is given."""
    with torch.autocast(dY.device.type, enabled=False):
        dY2 = dY.reshape(-1, len(B))
        factors = wide(A), wide(B), wide(C), wide(D)
        # One buffer: as soon as a tile of G is used, it is overwritten with one of W + ΔW.
        if x is None:
            buffer = empty_as(weight, dY.new_empty, len(B), A.shape[1])
        else:
            x2 = x.reshape(-1, A.shape[1])
            buffer = (x2.T @ dY2).T if is_transposed(weight) else dY2.T @ x2
        gradients = () if x is None else turn(buffer, factors, scale, weight, needs_x)
        if x is None:
            fill(buffer, factors, scale, weight)
        dx = (dY2 @ buffer).view(*dY.shape[:-1], A.shape[1]) if needs_x else dY.new_empty(0)
    if not gradients:
        return dx, dY.new_empty(0), dY.new_empty(0), dY.new_empty(0), dY.new_empty(0)
    dA, dB, dC, dD = (gradient.to(f.dtype) for gradient, f in zip(gradients, (A, B, C, D), strict=True))
    return dx, dA, dB, dC, dD


@_forward.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], B.shape[0])


@_backward.register_fake
def _(dY: Tensor, x: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *more: Any) -> tuple[Tensor, ...]:
    dx = dY.new_empty(*dY.shape[:-1], A.shape[1]) if more[-1] else dY.new_empty(0)
    return dx, *(dY.new_empty(0) if x is None else torch.empty_like(factor) for factor in (A, B, C, D))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A, B, C, D, scale, weight, _ = inputs
    trained = any(ctx.needs_input_grad[1:5])
    ctx.save_for_backward(x if trained else None, A, B, C, D, scale, weight)


def _differentiate(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = torch.ops.loraplex.gated_linear_backward(dY, *ctx.saved_tensors, needs[0])
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), *[None] * 3)


_forward.register_autograd(_differentiate, setup_context=_save)


# torch's FlopCounterMode sees no products inside an operator: these formulas tell it. They get shapes for tensors.


@register_flop_formula(torch.ops.loraplex.gated_linear)
def _(x: torch.Size, A: torch.Size, B: torch.Size, C: torch.Size, *_: Any, **__: Any) -> int:
    size = B[0] * A[1]
    return 2 * size * (math.prod(x[:-1]) + A[0] + C[0])


@register_flop_formula(torch.ops.loraplex.gated_linear_backward)
def _(dY: torch.Size, x: torch.Size | None, A: torch.Size, B: torch.Size, C: torch.Size, *rest: Any, **_: Any) -> int:
    size, tokens, ranks = B[0] * A[1], math.prod(dY[:-1]), A[0] + C[0]
    needs_x = rest[-1]
    return 2 * size * (tokens * needs_x + ranks) + (2 * size * (tokens + 2 * ranks) if x is not None else 0)
