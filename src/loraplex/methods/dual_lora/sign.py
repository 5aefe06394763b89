"""Dual LoRA's Sign, which is +1 for positive inputs and −1 otherwise, with its straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraplex.runtime import loss_scaling


def sign_(x: Tensor) -> Tensor:
    """x ← Sign(x) in place: +1 where x > 0, −1 elsewhere; a positive number below the smallest normal one counts as 0.

    torch.where would take ten times as long on CPUs, with a branch for each element.
    """
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x.sub_(torch.finfo(x.dtype).tiny), out=x)


class Sign(torch.autograd.Function):
    """+1 where the input is positive, −1 elsewhere (Sign(0) = −1); backward clips the gradient to [−1, 1].

    Under a loss scale S it clips to [−S, S]. `half`: whether the gradient comes from float16, where S must be known.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: bool = False) -> Tensor:
        ctx.half = half
        return sign_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return loss_scaling.clip(grad, ctx.half), None
