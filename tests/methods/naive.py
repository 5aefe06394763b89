"""Tiny models whose layers see inputs of their own, and the loops that the equations are compared with.

The loops know nothing of the package: nested lists of scalars go in, scalars come out, and autograd differentiates
the loops themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

IN, OUT, TOKENS = 5, 4, 3


class Block(nn.Module):
    def __init__(self, roles: Sequence[str], in_features: int, out_features: int) -> None:
        super().__init__()
        for role in roles:
            setattr(self, role, nn.Linear(in_features, out_features, bias=False))


class Stack(nn.Module):
    """`layers.<l>.<role>`; forward maps x `(layers, tokens, in)` to `(layers, tokens, out)`, layer by layer."""

    def __init__(
        self, depth: int, in_features: int = IN, out_features: int = OUT, roles: Sequence[str] = ("q",)
    ) -> None:
        super().__init__()
        self.roles = tuple(roles)
        self.layers = nn.ModuleList(Block(roles, in_features, out_features) for _ in range(depth))

    def forward(self, x: Tensor, role: str = "q") -> Tensor:
        return torch.stack([getattr(layer, role)(x_l) for layer, x_l in zip(self.layers, x, strict=True)])


def adapt(config, depth: int = 1, dtype: torch.dtype = torch.float64, **stack) -> PeftModel:
    """A `Stack` in `dtype` with the adapter of `config` on its first role, or on `config.target_modules`."""
    torch.manual_seed(0)
    base = Stack(depth, **stack).to(dtype)
    config.target_modules = config.target_modules or {base.roles[0]}
    return get_peft_model(base, config)


def layer(model: PeftModel, index: int, role: str = "q") -> nn.Module:
    return getattr(model.base_model.model.layers[index], role)


def factors(model: PeftModel, index: int = 0, role: str = "q") -> nn.Module:
    return layer(model, index, role).factors("default")


def base_weight(model: PeftModel, index: int = 0, role: str = "q") -> Tensor:
    return layer(model, index, role).get_base_layer().weight


def randomize(model: PeftModel, seed: int = 1) -> None:
    """Every trainable parameter gets non-zero values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def draw(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(tensor: Tensor) -> Tensor:
    """A copy that collects a gradient of its own."""
    return tensor.detach().clone().requires_grad_()


def matvec(M: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    """M x, one scalar at a time."""
    rows, columns = M.shape
    assert columns == len(x)
    result = []
    for i in range(rows):
        total = torch.zeros((), dtype=M.dtype)
        for j in range(columns):
            total = total + M[i, j] * x[j]
        result.append(total)
    return result


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
