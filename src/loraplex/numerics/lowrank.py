"""Singular values of updates ΔW that are never formed as a whole: from two factors, or tile by tile.

Shapes: W (out, in), A (r, in), B (out, r), k singular values; all arithmetic on factors in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.numerics.products import product

_OVERSAMPLING = 16
_POWER_STEPS = 4
_TILE_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Svd:
    """The leading k singular triplets of a matrix M ≈ U S V, and the size of the rest."""

    U: Tensor
    """(out, k)"""
    S: Tensor
    """(k,), largest first"""
    V: Tensor
    """(k, in)"""
    rest: float = 0.0
    """‖M − U S V‖²_F."""

    @property
    def norm(self) -> float:
        """‖M‖_F."""
        return (self.rest + self.S.square().sum().item()) ** 0.5

    def error(self, rank: int) -> float:
        """‖M − M_rank‖_F / ‖M‖_F with the first `rank` triplets."""
        tail = (self.rest + self.S[rank:].square().sum().item()) ** 0.5
        return tail / self.norm if tail else 0.0

    def rank(self) -> int:
        """Number of singular values that are not rounding errors of float64, at least 1."""
        tolerance = max(self.U.shape[0], self.V.shape[1]) * torch.finfo(torch.float64).eps
        return max(1, int((tolerance * self.S.max() < self.S).sum()))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of the best approximation; both carry √S, which suits narrow dtypes."""
        root = self.S[:rank].sqrt()
        return root[:, None] * self.V[:rank], self.U[:, :rank] * root


def svd_of_product(A: Tensor, B: Tensor) -> Svd:
    """SVD of B A: with B = Q_B R_B and Aᵀ = Q_A R_A it is that of R_B R_Aᵀ (r, r), at a cost in r.

    Raises:
        ValueError: a factor holds NaN or Inf.
    """
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError("The adapter's factors hold NaN or Inf, so ΔW has no singular values: load an earlier one.")
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Svd(Q_B @ U, S, Vh @ Q_A.T)


def norm_of_product(A: Tensor, B: Tensor) -> float:
    """‖B A‖_F without forming B A."""
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.double().T, mode="r").R
    return (R_B @ R_A.T).norm().item()


def row_tiles(rows: int, columns: int) -> list[slice]:
    """Slices of rows that cover a matrix in tiles of about 2²³ elements."""
    step = max(1, _TILE_ELEMENTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def randomized_svd(tile: Callable[[slice], Tensor], out_features: int, in_features: int, rank: int) -> Svd:
    """The leading `rank` singular triplets of a matrix, of which one tile of rows is computed at a time.

    This is the range finder of Halko, Martinsson and Tropp (2011, algorithm 4.4) with power iterations. The seed is
    always the same, so that an export can be repeated.

    Args:
        tile: returns rows of the matrix, `(rows, in)`.
        rank: how many triplets; all of them if the matrix has no more.
    """
    tiles = row_tiles(out_features, in_features)
    width = min(rank + _OVERSAMPLING, out_features, in_features)
    first = tile(slice(0, 1))
    generator = torch.Generator(first.device).manual_seed(0)
    Q_in = torch.randn(in_features, width, generator=generator, device=first.device, dtype=first.dtype)
    Q_out, square = first.new_empty(out_features, width), 0.0
    for step in range(_POWER_STEPS + 1):
        projected = torch.zeros_like(Q_in)
        for rows in tiles:
            M = tile(rows)
            Q_out[rows] = product(M, Q_in)
            if step == 0:
                square += M.double().square().sum().item()
        Q_out = torch.linalg.qr(Q_out).Q
        for rows in tiles:
            projected += product(tile(rows).T, Q_out[rows])
        if step < _POWER_STEPS:
            Q_in = torch.linalg.qr(projected).Q
    U, S, Vh = torch.linalg.svd(projected.T.double(), full_matrices=False)
    # M ≈ Q_out Q_outᵀ M, and ‖M − Q_out Q_outᵀ M‖² = ‖M‖² − ‖Q_outᵀ M‖² since Q_out has orthonormal columns.
    k = min(rank, width)
    rest = 0.0 if k == min(out_features, in_features) else max(0.0, square - S[:k].square().sum().item())
    return Svd(Q_out.double() @ U[:, :k], S[:k], Vh[:k], rest)
