"""Singular values of matrices that are never formed, against torch's SVD of the formed matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Watch, relative
from loraplex.numerics import lowrank
from loraplex.numerics.lowrank import Svd, norm_of_product, randomized_svd, row_tiles, svd_of_product

F64 = torch.float64
SHAPES = [(40, 30, 4), (30, 40, 7), (5, 40, 9), (40, 5, 9), (6, 6, 6), (3, 4, 20), (17, 1, 2), (1, 17, 3), (8, 9, 1)]
"""(out, in, r), with r above and below both sides."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def best_error(M: Tensor, rank: int) -> float:
    """‖M − M_rank‖ / ‖M‖ of the best approximation (Eckart and Young), by a full SVD."""
    S = torch.linalg.svdvals(M.double())
    return (S[rank:].square().sum() / S.square().sum()).sqrt().item()


def product(svd: Svd, rank: int | None = None) -> Tensor:
    A, B = svd.factors(svd.S.numel() if rank is None else rank)
    return B @ A


def orthonormal(rows: Tensor, tolerance: float = 1e-12) -> bool:
    return bool(((rows @ rows.T) - torch.eye(len(rows), dtype=F64)).abs().max() < tolerance)


# Two factors


@pytest.mark.parametrize(("out_features", "in_features", "r"), SHAPES)
def test_svd_of_a_product(out_features: int, in_features: int, r: int) -> None:
    A, B = draw(r, in_features), draw(out_features, r, seed=1)
    svd, expected = svd_of_product(A, B), torch.linalg.svdvals(B @ A)
    k = svd.S.numel()
    assert k == min(r, out_features, in_features)
    assert svd.U.shape == (out_features, k)
    assert svd.V.shape == (k, in_features)
    torch.testing.assert_close(svd.S, expected[:k], rtol=1e-12, atol=1e-12 * expected[0].item())
    assert orthonormal(svd.U.T)
    assert orthonormal(svd.V)
    assert relative((svd.U * svd.S) @ svd.V, B @ A) < 1e-13
    assert relative(product(svd), B @ A) < 1e-13
    assert svd.norm == pytest.approx((B @ A).norm().item(), rel=1e-13)
    assert norm_of_product(A, B) == pytest.approx((B @ A).norm().item(), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_factors_are_multiplied_in_float64(dtype: torch.dtype) -> None:
    A, B = draw(4, 30, dtype=dtype), draw(20, 4, seed=1, dtype=dtype)
    exact = B.double() @ A.double()
    assert relative(product(svd_of_product(A, B)), exact) < 1e-13
    assert norm_of_product(A, B) == pytest.approx(exact.norm().item(), rel=1e-13)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_errors_and_best_approximation(rank: int) -> None:
    A, B = draw(6, 25), draw(20, 6, seed=1)
    svd, M = svd_of_product(A, B), B @ A
    U, S, Vh = torch.linalg.svd(M)
    truncated = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert relative(product(svd, rank), truncated) < 1e-12
    assert svd.error(rank) == pytest.approx(relative(truncated, M) if rank < 6 else 0.0, rel=1e-10)


def test_both_factors_carry_the_root_of_the_singular_values() -> None:
    """One of them alone would carry all of the range, and lose it in float16."""
    A, B = svd_of_product(draw(4, 20) * 1e3, draw(30, 4, seed=1) * 1e3).factors(4)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def duplicated(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([A, 2 * A]), torch.cat([B, B], 1)


def dependent_rows(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([A, A[:1] - 3 * A[1:2]]), torch.cat([B, draw(len(B), 1, seed=5)], 1)


def unused_column(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([A, draw(1, A.shape[1], seed=5)]), torch.cat([B, torch.zeros(len(B), 1, dtype=F64)], 1)


def cancelled(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A direction that one pair adds and another takes away: neither factor is rank-deficient by itself."""
    a, b = draw(1, A.shape[1], seed=5), draw(len(B), 1, seed=6)
    return torch.cat([A, a, a]), torch.cat([B, b, -b], 1)


@pytest.mark.parametrize("deficient", [duplicated, dependent_rows, unused_column, cancelled])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_true_rank(deficient: Any, scale: float) -> None:
    A, B = deficient(draw(3, 40), draw(30, 3, seed=1))
    svd = svd_of_product(A * scale, B)
    assert len(A) > 3
    assert svd.rank() == 3
    assert relative(product(svd, 3), B @ A * scale) < 1e-13


def test_true_rank_counts_what_is_small_but_there() -> None:
    """Nine orders of magnitude below the rest is far above rounding."""
    A, B = draw(3, 40), draw(30, 3, seed=1)
    B[:, 2] *= 1e-9
    assert svd_of_product(A, B).rank() == 3


def test_nothing_has_rank_one_and_no_error() -> None:
    svd = svd_of_product(torch.zeros(3, 8), draw(6, 3))
    assert svd.rank() == 1
    assert (svd.norm, svd.error(1), svd.error(3)) == (0.0, 0.0, 0.0)
    assert product(svd, 1).abs().max() == 0


def test_products_are_never_formed() -> None:
    A, B = draw(5, 300), draw(200, 5, seed=1)
    with Watch() as watch:
        svd = svd_of_product(A, B)
        svd.factors(svd.rank())
        norm_of_product(A, B)
    assert watch.largest() <= 300 * 5


# Tiles


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (10, 3), (7, 100), (101, 7), (3, 1000)])
def test_tiles_cover_each_row_once(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_TILE_ELEMENTS", 70)
    tiles = row_tiles(rows, columns)
    assert [row for tile in tiles for row in range(rows)[tile]] == list(range(rows))
    assert all(1 <= tile.stop - tile.start <= max(1, 70 // columns) for tile in tiles)


def dual(out_features: int, in_features: int, r: int = 4, dtype: torch.dtype = F64) -> Tensor:
    """ΔW of a Dual LoRA with random factors: no direction stands out."""
    P = draw(out_features, r, seed=1) @ draw(r, in_features, seed=2)
    Q = draw(out_features, r, seed=3) @ draw(r, in_features, seed=4)
    return (P.relu() * torch.where(Q > 0, 1.0, -1.0)).to(dtype)


def decaying(out_features: int, in_features: int, dtype: torch.dtype = F64) -> Tensor:
    k = min(out_features, in_features)
    U = torch.linalg.qr(draw(out_features, k, seed=1)).Q
    V = torch.linalg.qr(draw(in_features, k, seed=2)).Q
    return ((U * 0.8 ** torch.arange(k)) @ V.T).to(dtype)


MATRICES = {
    "dual": dual(150, 110),
    "dual, wide": dual(90, 160),
    "dual, float32": dual(120, 130, dtype=torch.float32),
    "decaying": decaying(100, 120),
    "noise": draw(120, 100),
}


class Tiles:
    """Hands out a matrix tile by tile and remembers what was asked for."""

    def __init__(self, M: Tensor) -> None:
        self.M, self.asked = M, []

    def __call__(self, rows: slice) -> Tensor:
        self.asked.append(rows)
        return self.M[rows].clone()

    def largest(self) -> int:
        return max(self.M[rows].numel() for rows in self.asked)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 5, 16, 40, 75])
def test_randomized_svd_is_near_the_best(name: str, rank: int) -> None:
    M = MATRICES[name]
    svd = randomized_svd(lambda rows: M[rows], *M.shape, rank)
    assert svd.S.numel() == rank
    assert orthonormal(svd.U.T, 1e-5 if M.dtype == torch.float32 else 1e-11)
    best = best_error(M, rank)
    measured = relative(product(svd), M)
    floor = 1e-6 if M.dtype == torch.float32 else 1e-13
    assert best - floor <= measured <= 1.01 * best + floor
    # What it says of itself is what it is.
    assert svd.error(rank) == pytest.approx(measured, rel=1e-3, abs=1e-6)
    assert svd.norm == pytest.approx(M.double().norm().item(), rel=1e-6)
    for fewer in {1, rank // 2} - {0, rank}:
        assert svd.error(fewer) == pytest.approx(relative(product(svd, fewer), M), rel=1e-3)
        assert svd.error(fewer) <= 1.01 * best_error(M, fewer)


@pytest.mark.parametrize("rank", [90, 500])
def test_randomized_svd_of_full_rank_is_exact(rank: int) -> None:
    M = dual(90, 130)
    svd = randomized_svd(lambda rows: M[rows], *M.shape, rank)
    assert svd.S.numel() == 90
    assert svd.rest == 0
    assert relative(product(svd), M) < 1e-12
    torch.testing.assert_close(svd.S, torch.linalg.svdvals(M), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_randomized_svd_of_less_than_the_rank_asked_for(rank: int) -> None:
    M = draw(60, 2) @ draw(2, 50, seed=1)
    svd = randomized_svd(lambda rows: M[rows], *M.shape, rank)
    assert relative(product(svd), M) < 1e-12
    assert svd.error(rank) < 1e-7


def test_randomized_svd_of_nothing() -> None:
    svd = randomized_svd(lambda rows: torch.zeros(60, 50)[rows], 60, 50, 4)
    assert svd.error(4) == 0
    assert product(svd).abs().max() == 0


@pytest.mark.parametrize("tile", [500, 110, 50])
def test_randomized_svd_asks_for_one_tile_at_a_time(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MATRICES["dual"]
    expected = randomized_svd(lambda rows: whole[rows], *whole.shape, 12)
    monkeypatch.setattr(lowrank, "_TILE_ELEMENTS", tile)
    tiles = Tiles(whole)
    with Watch() as watch:
        svd = randomized_svd(tiles, *whole.shape, 12)
    assert tiles.largest() <= max(tile, 110)
    # Beside a tile there is nothing but panels of 12 columns and some more, for oversampling.
    assert watch.largest() <= max(tile, 32 * max(whole.shape))
    torch.testing.assert_close(svd.S, expected.S, rtol=1e-10, atol=0)
    assert relative(product(svd), product(expected)) < 1e-8


def test_randomized_svd_is_repeatable_and_leaves_the_random_numbers_alone() -> None:
    M = MATRICES["dual, float32"]
    state = torch.get_rng_state()
    first = randomized_svd(lambda rows: M[rows], *M.shape, 20)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = randomized_svd(lambda rows: M[rows], *M.shape, 20)
    for name in ("U", "S", "V"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.rest == second.rest
