"""Which B's ASLoRA merges, and when (eq. 4).  Score of a pair of layers: ‖B̄_i − B̄_j‖_F; the smallest is merged."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import torch
from torch import Tensor


def merge_due(t: int, start: int, interval: int) -> bool:
    """Whether step t > T_s is a multiple of m after T_s: with T_s=320, m=240 the first is step 560."""
    return t > start and (t - start) % interval == 0


def distance(B_i: Tensor, B_j: Tensor, A: Tensor | None = None) -> float:
    """‖B̄_i − B̄_j‖_F (eq. 4), or ‖(B̄_i − B̄_j) A‖_F if A is given.

    The second does not change with the basis of the rank space. With Aᵀ = Q R it is ‖(B̄_i − B̄_j) Rᵀ‖_F, so that no
    (out, in) matrix is formed.
    """
    difference = B_i.double() - B_j.double()
    if A is not None:
        R = torch.linalg.qr(A.double().T, mode="r").R
        difference = difference @ R.T
    return difference.norm().item()


def closest_pair(averages: dict[int, Tensor], candidates: str, A: Tensor | None = None) -> tuple[int, int]:
    """The pair (lower, upper) of layers whose B's are to be merged; on a tie, the pair of the lowest layers.

    Args:
        averages: layer → B̄, of the layers that own a B.
        candidates: "adjacent" compares neighbours among these layers, "all" every pair.
        A: given for the "update" distance.

    Raises:
        FloatingPointError: a distance is NaN, which is neither small nor large.
    """
    layers = sorted(averages)
    pairs = pairwise(layers) if candidates == "adjacent" else combinations(layers, 2)
    distances = {pair: distance(averages[pair[0]], averages[pair[1]], A) for pair in pairs}
    for (lower, upper), value in distances.items():
        if math.isnan(value):
            raise FloatingPointError(f"The distance between the averages of layers {lower} and {upper} is NaN")
    return min(distances, key=distances.__getitem__)


def check_merges(name: str, merges: Tensor) -> None:
    """Check a saved record of merges `(2, layers)`: m(l), and the step at which layer l gave up its own B.

    The top layer never gives up its B. Its place in the second row holds the number of steps that were averaged.

    Raises:
        ValueError: no sequence of merges leads to this record.
    """
    mapped, steps = merges.tolist()
    for layer, (owner, step) in enumerate(zip(mapped, steps, strict=True)):
        # A lower layer goes over to an upper one, and all its readers with it.
        possible = layer <= owner < len(mapped) and mapped[owner] == owner
        is_top = layer == len(mapped) - 1
        if not possible or step < 0 or (not is_top and (step > 0) != (owner != layer)):
            raise ValueError(
                f"{name} says that layer {layer} reads the B of layer {owner} since step {step}, which no merge of "
                f"{len(mapped)} layers leads to: the file is broken; copy or download the adapter again."
            )
