"""Triton kernels of Dual LoRA.  W' = W + s · ReLU(B A) ⊙ Sign(D C), and the gradients of A, B, C and D.

They compute in float32 throughout: TF32 would flip signs of D C. They run on CUDA and ROCm. Import this module only
where triton is installed; `launch.py` calls the kernels.
"""

# Names in the kernels: P = B A, N = D C (both out × in); R1, R2: the ranks r₁, r₂ padded to a power of two, at least 16
# (what tl.dot takes). Rows and columns are int64: an embedding may have more than 2³¹ elements.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton import knobs

MAX_RANK = 128
"""The largest r₁ or r₂: a program holds its rows of B and D with all their ranks at once."""


CONFIGS = [
    # 32 rows: from 64 on, Triton before 3.9 computes on Blackwell (sm_100) in TF32, whatever input_precision says.
    # Eight warps: with four, products of rank 32 and more spill registers. Two stages, not Triton's three: gfx942 has
    # 64 KiB of shared memory.
    triton.Config({"BLOCK_M": 32, "BLOCK_N": block_n}, num_warps=8, num_stages=2)
    for block_n in (32, 64, 128)
]
"""The configs that are tuned over, for each shape, rank and dtype. The first is the smallest, for the highest ranks."""


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
