"""Rounding float32 to half precision at random: up or down, with the probabilities that make the mean exact.

The random bits depend only on a layer's factors and W. So a step's forward and backward pass, activation checkpointing
and a second forward build the same matrix, whatever torch's generators do. It differs from layer to layer, and after
each step that changes a factor, so that the error has mean zero over the steps too.
"""

from __future__ import annotations

import torch
from torch import Tensor

DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Half-precision type → number of low bits of a float32 for which it has no room."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALLEST_NORMAL = {torch.float16: 2.0**-14}  # bfloat16's is float32's


def key(factors: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """A number from the bits of the factors and of W's first row; int32 without dimensions, on their device."""
    found = torch.zeros((), dtype=torch.int64, device=weight.device)
    for tensor in (*factors, weight[0]):
        found = found * 0x5851F42D4C957F2D + tensor.view(_INTEGERS[tensor.itemsize]).sum()
    return (found ^ (found >> 32)).bitwise_and_(0x7FFFFFFF).to(torch.int32)


def noise(key: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """int32 numbers to add to the bits of a tile, before those are cut off for which `dtype` has no room."""
    # A hash of each element's index, in integers that overflow.
    x = torch.arange(rows * columns, dtype=torch.int32, device=key.device).mul_(-1640531535).add_(key)
    x.bitwise_xor_(x >> 15).mul_(0x2C1B3C6D)
    x.bitwise_xor_(x >> 12).mul_(0x297A2D39)
    return x.bitwise_right_shift_(32 - DROPPED[dtype]).bitwise_and_((1 << DROPPED[dtype]) - 1).view(rows, columns)


def store(out: Tensor, x: Tensor, noise: Tensor) -> None:
    """out ← x (float32, may be overwritten), rounded with `noise`. NaN and infinity stay what they are."""
    dropped = DROPPED[out.dtype]
    small: Tensor | None = None
    if out.dtype in _SMALLEST_NORMAL:
        # Below the smallest normal number, the values of `out` are 2⁻²⁴ apart.
        small = torch.floor(x * 2.0**24 + noise * 2.0**-dropped) * 2.0**-24
        is_small = x.abs() < _SMALLEST_NORMAL[out.dtype]
    bits = x.view(torch.int32)
    # Not for NaN: its bits may overflow into those of a number.
    bits += noise * x.isfinite()
    bits &= -1 << dropped
    out.copy_(x if small is None else torch.where(is_small, small, x))
