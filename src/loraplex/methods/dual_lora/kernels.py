"""Dual LoRA on a GPU (Triton).  W' = W + s · ReLU(B A) ⊙ Sign(D C), and the gradients of A, B, C and D.

Neither kernel keeps a matrix of W's size: `build` writes W' once, `gradients` reads G = dYᵀX and computes B A and D C
again tile by tile. Float32 throughout: TF32 would flip signs of D C. Runs on CUDA and ROCm; import this module only
where triton is installed.
"""

# Names in the kernels: P = B A, N = D C (both out × in); R1, R2: the ranks r₁, r₂ padded to a power of two, at least 16
# (what tl.dot takes). Rows and columns are int64: an embedding may have more than 2³¹ elements.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

MAX_RANK = 128
"""The largest r₁ or r₂: a program holds its rows of B and D, all their ranks, at once."""

_PROGRAMS = 512
"""About what fills a GPU of today, at several programs for each of its 100 to 300 cores. A constant, not a property
of the device: the order of summation then depends on the shapes alone."""
_SPAN = 128
"""Each program of `gradients` loops over a multiple of this; every BLOCK_N divides it."""


CONFIGS = [
    # 32 rows: from 64 on, Triton before 3.9 computes on Blackwell (sm_100) in TF32, whatever input_precision says.
    # Eight warps: with four, products of rank 32 and more spill registers. Two stages, not Triton's three: gfx942 has
    # 64 KiB of shared memory.
    triton.Config({"BLOCK_M": 32, "BLOCK_N": block_n}, num_warps=8, num_stages=2)
    for block_n in (32, 64, 128)
]
"""What is tried, once for each shape, rank and dtype. Smallest first: the one that fits the highest ranks."""


def _fitting(configs: list[triton.Config], args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """The first config and those whose tiles, of the factors and one of G, take up to 64 KiB in float32."""
    ranks = kwargs["R1"] + kwargs["R2"]

    def tiles(BLOCK_M: int, BLOCK_N: int) -> int:
        return 4 * (ranks * (BLOCK_M + BLOCK_N) + BLOCK_M * BLOCK_N)

    return [config for config in configs if config is configs[0] or tiles(**config.kwargs) <= 64 * 1024]


_tuned = triton.autotune(
    # The interpreter has no clock to tune by, and a single config is not timed.
    CONFIGS[:1] if knobs.runtime.interpret else CONFIGS,
    key=["num_rows", "num_columns", "R1", "R2"],
    prune_configs_by={"early_config_prune": _fitting},
)

_OPTIONS: dict[str, Any] = {
    # a·b + c as one FMA. Said here, since Triton 3.10 turns the default (TRITON_DEFAULT_FP_FUSION) off: without it the
    # products take twice the instructions, and both kernels must round, and so find the signs, alike.
    "enable_fp_fusion": True,
}


@triton.jit
def _load(
    matrix: tl.tensor, rows: tl.tensor, columns: tl.tensor, row: int, column: int, num_rows: int, num_columns: int
) -> tl.tensor:
    """The tile at `rows` and `columns` in float32, zero outside of the matrix. `row`, `column`: its strides."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(matrix + rows[:, None] * row + columns[None, :] * column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sign(x: tl.tensor) -> tl.tensor:
    return tl.where(x > 0.0, 1.0, -1.0)


@triton.jit
def _relu(x: tl.tensor) -> tl.tensor:
    # tl.maximum(x, 0) would turn NaN into 0.
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _nearest(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """`x`, float32, rounded to the nearest value of `dtype`, ties to even; still float32."""
    if dtype == tl.bfloat16:
        # By its bits, and so in the interpreter too, which cuts them off.
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        # NaN plus something may carry into the sign bit and become −0.
        return tl.where(x == x, nearest, x)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _round(
    x: tl.tensor, rows: tl.tensor, columns: tl.tensor, num_columns: int, key: tl.int64, dtype: tl.constexpr
) -> tl.tensor:
    """`x` at a value of `dtype` (bfloat16 or float16), up or down at random, so that the mean over all keys is x.

    Random bits are added below the last bit that stays, and what is below is cut off. The result is still float32.
    """
    # Philox yields 4 × 32 bits: 16 bits each for 8 neighbours in a row, whatever the tiles.
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    groups = tl.min(columns, 0) // 8 + tl.arange(0, BLOCK_N // 8)
    a, b, c, d = tl.randint4x(key, rows[:, None] * tl.cdiv(num_columns, 8) + groups[None, :])
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    noise = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (BLOCK_M, BLOCK_N))
    bits = x.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((bits + noise) & -0x10000).to(tl.float32, bitcast=True)
    else:
        noise = noise & 0x1FFF
        rounded = ((bits + noise) & -0x2000).to(tl.float32, bitcast=True)
        # Below float16's smallest normal number its values are 2⁻²⁴ apart.
        small = tl.floor(x * 16777216.0 + noise.to(tl.float32) * (1.0 / 8192.0)) * (1.0 / 16777216.0)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, small, rounded)
    # NaN plus noise may carry into the sign bit and become −0; so may infinity become NaN.
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def _sampled(
    matrix: tl.tensor, num_rows: int, num_columns: int, row: int, column: int, SAMPLE: tl.constexpr
) -> tl.tensor:
    """A number from the bits of `SAMPLE` elements that are spread over the matrix."""
    i = tl.arange(0, SAMPLE).to(tl.int64)
    x = tl.load(matrix + i * num_rows // SAMPLE * row + i * 37 % num_columns * column)
    # Odd multipliers: the same bits elsewhere are another number.
    return tl.sum(x.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) * (2 * i + 1))


@triton.jit
def key_kernel(
    key: tl.tensor,
    weight: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    num_rows: int,
    num_columns: int,
    r1: int,
    r2: int,
    weight_row: int,
    weight_column: int,
    A_row: int,
    A_column: int,
    B_row: int,
    B_column: int,
    C_row: int,
    C_column: int,
    D_row: int,
    D_column: int,
    SAMPLE: tl.constexpr,
) -> None:
    """One number that changes with the factors, and differs between layers that have the same ones."""
    found = _sampled(weight, num_rows, num_columns, weight_row, weight_column, SAMPLE)
    found = found * 0x5851F42D4C957F2D + _sampled(A, r1, num_columns, A_row, A_column, SAMPLE)
    found = found * 0x5851F42D4C957F2D + _sampled(B, num_rows, r1, B_row, B_column, SAMPLE)
    found = found * 0x5851F42D4C957F2D + _sampled(C, r2, num_columns, C_row, C_column, SAMPLE)
    found = found * 0x5851F42D4C957F2D + _sampled(D, num_rows, r2, D_row, D_column, SAMPLE)
    tl.store(key, found & 0x7FFFFFFFFFFFFFFF)


@_tuned
@triton.jit
def build_kernel(
    out: tl.tensor,
    weight: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    scale: tl.tensor,
    key: tl.tensor,
    num_rows: int,
    num_columns: int,
    r1: int,
    r2: int,
    out_row: int,
    out_column: int,
    weight_row: int,
    weight_column: int,
    A_row: int,
    A_column: int,
    B_row: int,
    B_column: int,
    C_row: int,
    C_column: int,
    D_row: int,
    D_column: int,
    R1: tl.constexpr,
    R2: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One tile of out = W + s · ReLU(B A) ⊙ Sign(D C), rounded to DTYPE: at random if there is a `key`."""
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k1, k2 = tl.arange(0, R1), tl.arange(0, R2)
    P = tl.dot(
        _load(B, rows, k1, B_row, B_column, num_rows, r1),
        _load(A, k1, columns, A_row, A_column, r1, num_columns),
        input_precision="ieee",
    )
    N = tl.dot(
        _load(D, rows, k2, D_row, D_column, num_rows, r2),
        _load(C, k2, columns, C_row, C_column, r2, num_columns),
        input_precision="ieee",
    )
    x = tl.load(scale) * _relu(P) * _sign(N)
    if weight is not None:
        W = _load(weight, rows, columns, weight_row, weight_column, num_rows, num_columns)
        # W in the dtype of the product, as without an adapter: only ΔW is rounded at random.
        x += _nearest(W, DTYPE) if key is not None and weight.dtype.element_ty != DTYPE else W
    if key is not None:
        x = _round(x, rows, columns, num_columns, tl.load(key), DTYPE)
    elif tl.bfloat16 == DTYPE:
        x = _nearest(x, DTYPE)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + rows[:, None] * out_row + columns[None, :] * out_column, x.to(out.dtype.element_ty), mask=inside)


@_tuned
@triton.jit
def gradients_kernel(
    G: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    scale: tl.tensor,
    bound: tl.tensor,
    dB: tl.tensor,
    dD: tl.tensor,
    num_rows: int,
    num_columns: int,
    span: int,
    r1: int,
    r2: int,
    G_row: int,
    G_column: int,
    A_row: int,
    A_column: int,
    B_row: int,
    B_column: int,
    C_row: int,
    C_column: int,
    D_row: int,
    D_column: int,
    dB_part: int,
    dB_row: int,
    dB_column: int,
    dD_part: int,
    dD_row: int,
    dD_column: int,
    R1: tl.constexpr,
    R2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """dB = s · gP Aᵀ and dD = gN Cᵀ for a block of rows, summed over `span` columns."""
    part = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k1, k2 = tl.arange(0, R1), tl.arange(0, R2)
    s = tl.load(scale)
    high = tl.load(bound)
    B_tile = _load(B, rows, k1, B_row, B_column, num_rows, r1)
    D_tile = _load(D, rows, k2, D_row, D_column, num_rows, r2)
    dB_tile = tl.zeros((BLOCK_M, R1), tl.float32)
    dD_tile = tl.zeros((BLOCK_M, R2), tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, num_columns), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        A_tile = _load(A, k1, columns, A_row, A_column, r1, num_columns)
        C_tile = _load(C, k2, columns, C_row, C_column, r2, num_columns)
        G_tile = _load(G, rows, columns, G_row, G_column, num_rows, num_columns)
        P = tl.dot(B_tile, A_tile, input_precision="ieee")
        N = tl.dot(D_tile, C_tile, input_precision="ieee")
        gP = tl.where(P > 0.0, G_tile * _sign(N), 0.0)
        gN = G_tile * (s * _relu(P))
        # tl.clamp would turn NaN into a number.
        gN = tl.where(gN > high, high, tl.where(gN < -high, -high, gN))
        dB_tile += tl.dot(gP, tl.trans(A_tile), input_precision="ieee")
        dD_tile += tl.dot(gN, tl.trans(C_tile), input_precision="ieee")
    inside = (rows < num_rows)[:, None]
    dB_tiles = dB + part * dB_part + rows[:, None] * dB_row + k1[None, :] * dB_column
    dD_tiles = dD + part * dD_part + rows[:, None] * dD_row + k2[None, :] * dD_column
    tl.store(dB_tiles, s * dB_tile, mask=inside & (k1 < r1)[None, :])
    tl.store(dD_tiles, dD_tile, mask=inside & (k2 < r2)[None, :])


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
    """What random rounding depends on: int64 without dimensions, on the device of W."""
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
    """`build` with a key, or None to round to the nearest value of `dtype`, than which `out` may be wider."""
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
