"""What inspection shows of Dual LoRA: how many gates are closed, and how many signs are negative."""

from __future__ import annotations

from loraplex.methods.dual_lora.tiles import Factors
from loraplex.numerics.lowrank import row_tiles
from loraplex.numerics.products import product
from loraplex.tuner.factors import wide
from loraplex.tuner.findings import Finding, OverLayers, Panel


def closed_and_negative(factors: Factors) -> tuple[float, float]:
    """The share of ΔW where ReLU(BA) is zero, and the share of negative signs in the rest."""
    A, B, C, D = map(wide, factors)
    opened = negative = 0
    for rows in row_tiles(len(B), A.shape[1]):
        is_open = product(B[rows], A) > 0
        opened += int(is_open.sum())
        negative += int((is_open & ~(product(D[rows], C) > 0)).sum())
    return 1 - opened / (len(B) * A.shape[1]), negative / opened if opened else 0.0


def gates_and_signs(shares: dict[str, tuple[float, float]]) -> Finding:
    """Module → `closed_and_negative`, as two panels of one figure."""
    closed = {name: share[0] for name, share in shares.items()}
    negative = {name: share[1] for name, share in shares.items()}
    panels = [
        Panel("closed", "share of closed gates (BA ≤ 0)", closed, "closed gates, %"),
        Panel("negative", "negative share of open gates", negative, "negative signs, %"),
    ]
    return OverLayers("gates", "Dual LoRA: gates and signs", panels, top=1)
