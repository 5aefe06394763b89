"""Dual LoRA's linear map, y = x (W + ΔW)ᵀ + b with ΔW = s · ReLU(B A) ⊙ Sign(D C), and its gradients.

The gates are element-wise, so ΔW has no low rank to compute with: plain autograd keeps three (out, in) matrices for
each layer from forward to backward. Here nothing of that size is kept. W + ΔW is built into a buffer that lives for
one product, and again in backward, tile by tile, where the tiles of G = dYᵀ X are turned into the factors' gradients:

    M = s·B A,  N = D C,  S = ±1 (N > 0 or not)          the tile's update is ReLU(M) ⊙ S
    dM = G ⊙ S where M > 0, else 0                         dB = s·dM Aᵀ,  dA = s·Bᵀ dM
    dN = clip(G ⊙ ReLU(M), −1, 1)                          dD = dN Cᵀ,    dC = Dᵀ dN

The clip is meant for the gradient of the loss: where the loss is multiplied by a scale, its bounds are ∓ that scale
(`loss_scaling.py`).

Without W it is ΔW x alone. With it, a layer costs one product instead of two, but an update that is small beside the
steps of W's own bfloat16 would be rounded away, in the same way for every token and every step. So the sum is rounded
at random, up or down with the probabilities that make its mean exact (`rounding.py`): alike in forward, backward and
activation checkpointing, and otherwise after each step.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from loraplex.numerics import rounding
from loraplex.numerics.products import product, tiles
from loraplex.runtime import loss_scaling
from loraplex.tuner.factors import wide

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


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


def sign_(x: Tensor) -> Tensor:
    """x ← Sign(x) in place: +1 where x > 0, −1 elsewhere; a positive number below the smallest normal one counts as 0.

    Not torch.where: on CPUs it takes ten times as long, a branch for each element.
    """
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x.sub_(torch.finfo(x.dtype).tiny), out=x)


def rows_of(factors: Factors, scale: Tensor) -> Callable[[slice], Tensor]:
    """Rows of ΔW, `(rows, in)` in float32 at least, without a gradient."""
    A, B, C, D = (wide(factor.detach()) for factor in factors)

    def rows_of_delta(rows: slice) -> Tensor:
        with torch.autocast(A.device.type, enabled=False):
            M, S = _parts(A, B, C, D, scale, rows)
            return M.mul_(S)

    return rows_of_delta


@torch.no_grad()
def delta_weight(factors: Factors, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """ΔW (out, in) in `dtype`, without a gradient."""
    A, B, C, D = factors
    out = A.new_empty(len(B), A.shape[1], dtype=dtype)
    with torch.autocast(out.device.type, enabled=False):
        _fill(out, (wide(A), wide(B), wide(C), wide(D)), scale, None)
    return out


@cache
def has_kernels(device: str, rank: int) -> bool:
    """Whether Triton kernels build the tiles on this type of device; LORAPLEX_TRITON=0 says no."""
    if device != "cuda" or os.environ.get("LORAPLEX_TRITON") == "0" or not importlib.util.find_spec("triton"):
        return False
    from loraplex.methods.dual_lora.kernels import MAX_RANK

    return rank <= MAX_RANK


def _kernels(factors: Factors) -> Any:
    """The module of Triton kernels where they can be used, else None."""
    A, _, C, _ = factors
    if A.dtype != torch.float32 or not has_kernels(A.device.type, max(len(A), len(C))):
        return None
    from loraplex.methods.dual_lora import kernels

    return kernels


@torch.library.custom_op("loraplex::gated_linear", mutates_args=())
def _forward(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    loss_scaling.watch()
    loss_scaling.forward_begins()
    with torch.autocast(x.device.type, enabled=False):
        total = _laid_out_as(weight, x.new_empty, len(B), A.shape[1])
        _fill(total, (wide(A), wide(B), wide(C), wide(D)), scale, weight)
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
    """(dx, dA, dB, dC, dD), those of the factors if `x` is given; what is not asked for is empty."""
    with torch.autocast(dY.device.type, enabled=False):
        dY2 = dY.reshape(-1, len(B))
        factors = wide(A), wide(B), wide(C), wide(D)
        # One buffer: as soon as a tile of G is used, it is overwritten with one of W + ΔW.
        if x is None:
            buffer = _laid_out_as(weight, dY.new_empty, len(B), A.shape[1])
        else:
            x2 = x.reshape(-1, A.shape[1])
            buffer = (x2.T @ dY2).T if _is_transposed(weight) else dY2.T @ x2
        gradients = () if x is None else _turn(buffer, factors, scale, weight, needs_x)
        if x is None:
            _fill(buffer, factors, scale, weight)
        dx = (dY2 @ buffer).view(*dY.shape[:-1], A.shape[1]) if needs_x else dY.new_empty(0)
    if not gradients:
        return dx, dY.new_empty(0), dY.new_empty(0), dY.new_empty(0), dY.new_empty(0)
    dA, dB, dC, dD = (gradient.to(f.dtype) for gradient, f in zip(gradients, (A, B, C, D), strict=True))
    return dx, dA, dB, dC, dD


def _is_transposed(weight: Tensor | None) -> bool:
    """Whether W is stored as Wᵀ (in, out), as GPT-2's Conv1D does.

    W + ΔW is then built in the same layout, since libraries may sum products of the other one in another order: the
    output must be the base's, bit for bit, where ΔW is 0. Its transpose has the same form, with other factors.
    """
    return weight is not None and weight.T.is_contiguous() and not weight.is_contiguous()


def _laid_out_as(weight: Tensor | None, new: Callable[..., Tensor], rows: int, columns: int) -> Tensor:
    return new(columns, rows).T if _is_transposed(weight) else new(rows, columns)


def _transposed(factors: Factors) -> Factors:
    """Those of ΔWᵀ = s · ReLU(Aᵀ Bᵀ) ⊙ Sign(Cᵀ Dᵀ)."""
    A, B, C, D = factors
    return B.T, A.T, D.T, C.T


def _fill(out: Tensor, factors: Factors, scale: Tensor, weight: Tensor | None) -> None:
    """out ← W + ΔW."""
    if weight is not None and _is_transposed(weight):
        _fill(out.T, _transposed(factors), scale, weight.T)
        return
    if (kernels := _kernels(factors)) is not None:
        kernels.build(out, weight, *factors, scale)
        return
    A, B, C, D = factors
    noise = _noise(out, factors, weight)
    for rows in tiles(out):
        M, S = _parts(A, B, C, D, scale, rows)
        _store(out[rows], M.mul_(S), None if weight is None else weight[rows], noise)


def _parts(A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """ReLU(s·B A) and Sign(D C) of one tile."""
    return product(scale * B[rows], A).relu_(), sign_(product(D[rows], C))


def _turn(buffer: Tensor, factors: Factors, scale: Tensor, weight: Tensor | None, refill: bool) -> Factors:
    """The factors' gradients from G, which `buffer` holds; with `refill`, W + ΔW is in it afterwards."""
    if weight is not None and _is_transposed(weight):
        dB, dA, dD, dC = _turn(buffer.T, _transposed(factors), scale, weight.T, refill)
        return dA.T.contiguous(), dB.T.contiguous(), dC.T.contiguous(), dD.T.contiguous()
    bound = loss_scaling.bound(buffer.device, half=buffer.dtype == torch.float16)
    if (kernels := _kernels(factors)) is not None:
        found: Factors = kernels.gradients(buffer, *factors, scale, bound)
        if refill:
            _fill(buffer, factors, scale, weight)
    else:
        found = _turn_tiles(buffer, factors, scale, bound, weight, refill)
    dA, dB, dC, dD = found
    # The clip makes a finite number of an overflow, which a gradient scaler has to find whatever is trained.
    overflow = 0 * dB.sum()
    return dA, dB, dC.add_(overflow), dD.add_(overflow)


def _turn_tiles(
    buffer: Tensor, factors: Factors, scale: Tensor, bound: Tensor, weight: Tensor | None, refill: bool
) -> Factors:
    A, B, C, D = factors
    dA, dB, dC, dD = (torch.zeros_like(factor) for factor in factors)
    noise = _noise(buffer, factors, weight) if refill else None
    # On a CPU by a number, which is many times as fast; elsewhere reading it would wait for the device.
    high: Any = bound.item() if bound.device.type == "cpu" else bound
    for rows in tiles(buffer):
        G = buffer[rows].to(A.dtype)
        M, S = _parts(A, B, C, D, scale, rows)
        dN = (G * M).clamp_(-high, high)
        dM = torch.ops.aten.threshold_backward(G * S, M, 0)  # ReLU's backward: zero where M is
        dB[rows] = scale * (dM @ A.T)
        dA.addmm_((scale * B[rows]).T, dM)
        dD[rows] = dN @ C.T
        dC.addmm_(D[rows].T, dN)
        if refill:
            _store(buffer[rows], M.mul_(S), None if weight is None else weight[rows], noise)
    return dA, dB, dC, dD


def _noise(out: Tensor, factors: Factors, weight: Tensor | None) -> Tensor | None:
    """For the largest tile of `out`, if W + ΔW is to be rounded at random."""
    if weight is None or out.dtype not in rounding.DROPPED:
        return None
    rows = min(next(tiles(out)).stop, len(out))
    return rounding.noise(rounding.key(factors, weight), rows, out.shape[1], out.dtype)


def _store(out: Tensor, delta: Tensor, weight: Tensor | None, noise: Tensor | None) -> None:
    """out ← W + ΔW, rounded up or down at random if there is noise; one tile, `delta` may be overwritten."""
    if weight is None:
        out.copy_(delta)
    elif noise is None:
        torch.add(delta, weight, out=out)
    else:
        # W in the dtype of the product, as without an adapter: only ΔW is rounded at random.
        delta += weight.to(out.dtype)
        rounding.store(out, delta.float(), noise[: len(out)])


@_forward.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], B.shape[0])


@_backward.register_fake
def _(dY: Tensor, x: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *more: Any) -> tuple[Tensor, ...]:
    dx = dY.new_empty(*dY.shape[:-1], A.shape[1]) if more[-1] else dY.new_empty(0)
    return dx, *(dY.new_empty(0) if x is None else torch.empty_like(factor) for factor in (A, B, C, D))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A, B, C, D, scale, weight, _ = inputs
    trained = any(ctx.needs_input_grad[1:5])
    ctx.save_for_backward(x if trained else None, A, B, C, D, scale, weight)


def _differentiate(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = torch.ops.loraplex.gated_linear_backward(dY, *ctx.saved_tensors, needs[0])
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), *[None] * 3)


_forward.register_autograd(_differentiate, setup_context=_keep)


# What torch's FlopCounterMode, which sees no products inside an operator, adds up. Shapes stand for tensors.


@register_flop_formula(torch.ops.loraplex.gated_linear)
def _(x: torch.Size, A: torch.Size, B: torch.Size, C: torch.Size, *_: Any, **__: Any) -> int:
    size = B[0] * A[1]
    return 2 * size * (math.prod(x[:-1]) + A[0] + C[0])


@register_flop_formula(torch.ops.loraplex.gated_linear_backward)
def _(dY: torch.Size, x: torch.Size | None, A: torch.Size, B: torch.Size, C: torch.Size, *rest: Any, **_: Any) -> int:
    size, tokens, ranks = B[0] * A[1], math.prod(dY[:-1]), A[0] + C[0]
    needs_x = rest[-1]
    return 2 * size * (tokens * needs_x + ranks) + (2 * size * (tokens + 2 * ranks) if x is not None else 0)
