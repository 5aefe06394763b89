"""Launches the Triton kernels of Dual LoRA.

Neither launch keeps a matrix of W's size: `build` writes W' = W + s · ReLU(B A) ⊙ Sign(D C) once, `gradients` reads
G = dYᵀX and computes B A and D C again tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.methods.dual_lora.kernels import MAX_RANK, build_kernel, gradients_kernel, key_kernel

_PROGRAMS = 512
"""About what fills a GPU of today, at several programs for each of its 100 to 300 cores. A constant, not a property
of the device: the order of summation then depends on the shapes alone."""
_SPAN = 128
"""Each program of `gradients` loops over a multiple of this; every BLOCK_N divides it."""

_OPTIONS: dict[str, Any] = {
    # a·b + c as one FMA. Said here, since Triton 3.10 turns the default (TRITON_DEFAULT_FP_FUSION) off: without it the
    # products take twice the instructions, and both kernels must round, and so find the signs, alike.
    "enable_fp_fusion": True,
}


def _padded(r: int) -> int:
    if r > MAX_RANK:
        raise ValueError(f"The Triton kernels take ranks up to {MAX_RANK}, not {r}: use plain torch for this layer.")
    return max(16, triton.next_power_of_2(r))


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SAMPLE = 1024
"""Elements of each factor that a key depends on."""


def build(out: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor) -> None:
    """Write W + s · ReLU(B A) ⊙ Sign(D C) into `out`, with Sign(0) = −1.

    Where there is a W and `out` is half precision, W is rounded to the nearest value and the sum up or down at random,
    with an error of mean zero: alike each time until the factors change.

    Args:
        out: `(out, in)` in float32, bfloat16 or float16, any strides. Must not share memory with `weight`: tuning runs
            the kernel several times.
        weight: W `(out, in)` in any of these dtypes, any strides; None stands for zero.
        A, B: `(r₁, in)` and `(out, r₁)`, float32, any strides.
        C, D: `(r₂, in)` and `(out, r₂)`, float32, any strides.
        scale: s, a float32 tensor without dimensions on the same device: it is not read by the host.

    Raises:
        ValueError: r₁ or r₂ is larger than `MAX_RANK`.
    """
    half = weight is not None and out.dtype != torch.float32
    build_with(out, weight, A, B, C, D, scale, key_of(weight, A, B, C, D) if half else None, out.dtype)  # type: ignore[arg-type]


def key_of(weight: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The number on which random rounding depends: int64 without dimensions, on the device of W."""
    key = torch.empty((), dtype=torch.int64, device=weight.device)
    strides = [stride for matrix in (weight, A, B, C, D) for stride in matrix.stride()]
    with torch.cuda.device_of(weight):
        key_kernel[(1,)](key, weight, A, B, C, D, *weight.shape, len(A), len(C), *strides, SAMPLE=_SAMPLE)
    return key


def build_with(
    out: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    scale: Tensor,
    key: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """`build` with a given key. Without a key, it rounds to the nearest value of `dtype`; `out` may be wider."""
    num_rows, num_columns = out.shape
    r1, r2 = len(A), len(C)
    with torch.cuda.device_of(out):
        build_kernel[lambda meta: (triton.cdiv(num_columns, meta["BLOCK_N"]), triton.cdiv(num_rows, meta["BLOCK_M"]))](
            out,
            weight,
            A,
            B,
            C,
            D,
            scale,
            key,
            num_rows,
            num_columns,
            r1,
            r2,
            *out.stride(),
            *((0, 0) if weight is None else weight.stride()),
            *A.stride(),
            *B.stride(),
            *C.stride(),
            *D.stride(),
            R1=_padded(r1),
            R2=_padded(r2),
            DTYPE=_DTYPES[dtype],
            **_OPTIONS,
        )


def gradients(
    G: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of A, B, C and D, given G, that of W' = W + s · ReLU(P) ⊙ Sign(N) with P = B A and N = D C.

    dB = s · gP Aᵀ and dA = s · Bᵀ gP with gP = G ⊙ Sign(N) ⊙ [P > 0]; dD = gN Cᵀ and dC = Dᵀ gN with
    gN = clamp(s · G ⊙ ReLU(P), −bound, bound), the straight-through gradient of Sign. No atomics: a result is the same
    each time, unless tuning in another process chose other tiles and with them another order of summation.

    Args:
        G: dYᵀ X `(out, in)` in float32, bfloat16 or float16, any strides.
        A, B, C, D, scale: as for `build`.
        bound: the loss scale, a float32 tensor without dimensions on the same device.

    Returns:
        (dA, dB, dC, dD) in float32, contiguous.

    Raises:
        ValueError: r₁ or r₂ is larger than `MAX_RANK`.
    """
    dB, dD = _left_gradients(G, A, B, C, D, scale, bound)
    # W'ᵀ has the same form with Aᵀ and Bᵀ, Cᵀ and Dᵀ changing places.
    dA, dC = _left_gradients(G.T, B.T, A.T, D.T, C.T, scale, bound)
    return dA.T.contiguous(), dB, dC.T.contiguous(), dD


def _left_gradients(
    G: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """dB and dD."""
    num_rows, num_columns = G.shape
    r1, r2 = len(A), len(C)
    # Few rows would leave most of the GPU idle: then several programs share the columns of one block of rows.
    parts = min(triton.cdiv(_PROGRAMS, triton.cdiv(num_rows, 64)), triton.cdiv(num_columns, _SPAN))
    span = triton.cdiv(num_columns, parts * _SPAN) * _SPAN
    parts = triton.cdiv(num_columns, span)
    dB, dD = (factor.new_empty(parts, *factor.shape) for factor in (B, D))
    with torch.cuda.device_of(G):
        gradients_kernel[lambda meta: (triton.cdiv(num_rows, meta["BLOCK_M"]), parts)](
            G,
            A,
            B,
            C,
            D,
            scale,
            bound,
            dB,
            dD,
            num_rows,
            num_columns,
            span,
            r1,
            r2,
            *G.stride(),
            *A.stride(),
            *B.stride(),
            *C.stride(),
            *D.stride(),
            *dB.stride(),
            *dD.stride(),
            R1=_padded(r1),
            R2=_padded(r2),
            **_OPTIONS,
        )
    return (dB[0], dD[0]) if parts == 1 else (dB.sum(0), dD.sum(0))
