"""Dual LoRA's W + ΔW and its gradients, built tile by tile, by Triton kernels or in torch.

    M = s·B A,  N = D C,  S = ±1 (N > 0 or not)          the tile's update is ReLU(M) ⊙ S
    dM = G ⊙ S where M > 0, else 0                         dB = s·dM Aᵀ,  dA = s·Bᵀ dM
    dN = clip(G ⊙ ReLU(M), −1, 1)                          dD = dN Cᵀ,    dC = Dᵀ dN

The clip is meant for the gradient of the loss: where the loss is multiplied by a scale, its bounds are ∓ that scale
(`loss_scaling.py`). W + ΔW in half precision is rounded at random (`rounding.py`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loraplex.methods.dual_lora.sign import sign_
from loraplex.numerics import rounding
from loraplex.numerics.products import product, tiles
from loraplex.runtime import loss_scaling
from loraplex.tuner.factors import wide

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""A (r₁, in), B (out, r₁), C (r₂, in), D (out, r₂)."""


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
        fill(out, (wide(A), wide(B), wide(C), wide(D)), scale, None)
    return out


@cache
def has_kernels(device: str, rank: int) -> bool:
    """Whether Triton kernels build the tiles on this type of device; LORAPLEX_TRITON=0 says no."""
    if device != "cuda" or os.environ.get("LORAPLEX_TRITON") == "0" or not importlib.util.find_spec("triton"):
        return False
    from loraplex.methods.dual_lora.kernels import MAX_RANK

    return rank <= MAX_RANK


def _launcher(factors: Factors) -> Any:
    """The module that launches Triton kernels, if they can be used here; else None."""
    A, _, C, _ = factors
    if A.dtype != torch.float32 or not has_kernels(A.device.type, max(len(A), len(C))):
        return None
    from loraplex.methods.dual_lora import launch

    return launch


def is_transposed(weight: Tensor | None) -> bool:
    """Whether W is stored as Wᵀ (in, out), as GPT-2's Conv1D does.

    W + ΔW is then built in the same layout: libraries may sum products of another layout in another order, and the
    output must equal the base's bit for bit where ΔW is 0. The transpose of ΔW has the same form, with other factors.
    """
    return weight is not None and weight.T.is_contiguous() and not weight.is_contiguous()


def empty_as(weight: Tensor | None, new: Callable[..., Tensor], rows: int, columns: int) -> Tensor:
    """An uninitialised matrix (rows, columns) in the layout of W."""
    return new(columns, rows).T if is_transposed(weight) else new(rows, columns)


def _transposed(factors: Factors) -> Factors:
    """The factors of ΔWᵀ = s · ReLU(Aᵀ Bᵀ) ⊙ Sign(Cᵀ Dᵀ)."""
    A, B, C, D = factors
    return B.T, A.T, D.T, C.T


def fill(out: Tensor, factors: Factors, scale: Tensor, weight: Tensor | None) -> None:
    """out ← W + ΔW."""
    if weight is not None and is_transposed(weight):
        fill(out.T, _transposed(factors), scale, weight.T)
        return
    if (launch := _launcher(factors)) is not None:
        launch.build(out, weight, *factors, scale)
        return
    A, B, C, D = factors
    noise = _noise(out, factors, weight)
    for rows in tiles(out):
        M, S = _parts(A, B, C, D, scale, rows)
        _store(out[rows], M.mul_(S), None if weight is None else weight[rows], noise)


def _parts(A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """ReLU(s·B A) and Sign(D C) of one tile."""
    return product(scale * B[rows], A).relu_(), sign_(product(D[rows], C))


def turn(buffer: Tensor, factors: Factors, scale: Tensor, weight: Tensor | None, refill: bool) -> Factors:
    """The factors' gradients from G, which `buffer` holds. With `refill`, it holds W + ΔW afterwards."""
    if weight is not None and is_transposed(weight):
        dB, dA, dD, dC = turn(buffer.T, _transposed(factors), scale, weight.T, refill)
        return dA.T.contiguous(), dB.T.contiguous(), dC.T.contiguous(), dD.T.contiguous()
    bound = loss_scaling.bound(buffer.device, half=buffer.dtype == torch.float16)
    if (launch := _launcher(factors)) is not None:
        found: Factors = launch.gradients(buffer, *factors, scale, bound)
        if refill:
            fill(buffer, factors, scale, weight)
    else:
        found = _turn_tiles(buffer, factors, scale, bound, weight, refill)
    dA, dB, dC, dD = found
    # The clip makes an overflow finite, but a gradient scaler has to find it, whichever factors are trained.
    overflow = 0 * dB.sum()
    return dA, dB, dC.add_(overflow), dD.add_(overflow)


def _turn_tiles(
    buffer: Tensor, factors: Factors, scale: Tensor, bound: Tensor, weight: Tensor | None, refill: bool
) -> Factors:
    A, B, C, D = factors
    dA, dB, dC, dD = (torch.zeros_like(factor) for factor in factors)
    noise = _noise(buffer, factors, weight) if refill else None
    # On a CPU, clamping by a number is many times as fast; elsewhere, reading the number would wait for the device.
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
    """The noise for the largest tile of `out`, if W + ΔW is to be rounded at random; else None."""
    if weight is None or out.dtype not in rounding.DROPPED:
        return None
    rows = min(next(tiles(out)).stop, len(out))
    return rounding.noise(rounding.key(factors, weight), rows, out.shape[1], out.dtype)


def _store(out: Tensor, delta: Tensor, weight: Tensor | None, noise: Tensor | None) -> None:
    """out ← W + ΔW for one tile, rounded up or down at random if there is noise. `delta` may be overwritten."""
    if weight is None:
        out.copy_(delta)
    elif noise is None:
        torch.add(delta, weight, out=out)
    else:
        # W is cast to the product's dtype, as without an adapter: only ΔW is rounded at random.
        delta += weight.to(out.dtype)
        rounding.store(out, delta.float(), noise[: len(out)])
