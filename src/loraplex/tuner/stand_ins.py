"""Objects that stand for an adapted parameter while its module computes: torch hands them what is called with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from loraplex.tuner.layer import AdapterLinear

_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
"""torch's products of sorted rows with their expert's matrix, and transformers' own."""


class StandIn(ABC):
    """Something that a module takes for its parameter."""

    def __init__(self, tensor: Tensor, transposed: bool) -> None:
        self.tensor = tensor
        """What it stands for."""
        self.transposed = transposed
        """Whether its matrices are `(in, out)`."""
        self.dtype, self.device, self.requires_grad = tensor.dtype, tensor.device, tensor.requires_grad

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""
        return self.tensor.shape

    def size(self, dim: int) -> int:
        """Of one dimension."""
        return self.shape[dim]

    def data_ptr(self) -> int:
        """Of the tensor that it stands for."""
        return self.tensor.data_ptr()

    def type(self, dtype: torch.dtype) -> StandIn:
        """The same in another dtype: routers compute in float32."""
        other = copy(self)
        other.tensor, other.dtype = self.tensor.to(dtype), dtype
        return other

    to = type

    def float(self) -> StandIn:
        """The same in float32."""
        return self.type(torch.float32)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (at, one), *more = [(i, arg) for i, arg in enumerate(args) if isinstance(arg, StandIn)]
        if not more and one.knows(func.__name__, at):
            base = func(*(one.tensor if arg is one else arg for arg in args), **(kwargs or {}))
            return one.with_updates(base, *args, **(kwargs or {}))
        raise NotImplementedError(
            f"torch's {func.__name__} is called with an adapted parameter {tuple(one.shape)} in a way that loraplex "
            "does not know: leave the parameter out of target_parameters, or merge the adapter first."
        )

    @abstractmethod
    def knows(self, func: str, at: int) -> bool:
        """Whether it can take the part of argument number `at` of this function of torch."""

    @abstractmethod
    def with_updates(self, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`base`, which the function computed from these arguments with the tensor itself, plus the updates."""


class Matrix(StandIn):
    """One matrix, by which a batch is multiplied."""

    def __init__(self, layer: AdapterLinear, tensor: Tensor, transposed: bool) -> None:
        super().__init__(tensor, transposed)
        self.layer = layer

    def knows(self, func: str, at: int) -> bool:
        return at == 1 and func in (("matmul", "mm", "__matmul__") if self.transposed else ("linear",))

    def with_updates(self, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.with_updates(args[0], base)

    def t(self) -> Matrix:
        """The same transposed."""
        return Matrix(self.layer, self.tensor.T, not self.transposed)

    T = property(t)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]


class Chosen(StandIn):
    """A matrix for each row of a batch, that of the row's expert."""

    def __init__(self, layers: Sequence[AdapterLinear], ids: Tensor, tensor: Tensor, transposed: bool) -> None:
        super().__init__(tensor, transposed)
        self.layers, self.ids = layers, ids

    def knows(self, func: str, at: int) -> bool:
        return func == "bmm" and at == (1 if self.transposed else 0)

    def with_updates(self, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = 1 if self.transposed else -1  # (S, 1, in) @ (S, in, out), or (S, out, in) @ (S, in, 1)
        x = args[0 if self.transposed else 1].squeeze(dim)
        order = self.ids.argsort(stable=True)
        ends = self.ids.bincount(minlength=len(self.layers)).cumsum(0)
        done = _by_group(self.layers, x[order], base.squeeze(dim)[order], ends)
        return done[order.argsort()].unsqueeze(dim)


class Stack(StandIn):
    """The matrices of all experts."""

    def __init__(self, layers: Sequence[AdapterLinear], tensor: Tensor, transposed: bool) -> None:
        super().__init__(tensor, transposed)
        self.layers = layers

    def __getitem__(self, index: Any) -> Matrix | Chosen:
        if isinstance(index, Tensor) and index.ndim == 1:
            return Chosen(self.layers, index, self.tensor[index], self.transposed)
        return Matrix(self.layers[int(index)], self.tensor[index], self.transposed)

    def transpose(self, one: int, other: int) -> Stack:
        """The same with the last two dimensions exchanged."""
        assert {one % 3, other % 3} == {1, 2}, "experts are not a dimension of the matrices"
        return Stack(self.layers, self.tensor.transpose(one, other), not self.transposed)

    def knows(self, func: str, at: int) -> bool:
        return at == 1 and self.transposed and func in (*_GROUPED, "bmm")

    def with_updates(self, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0]
        if x.ndim == 3:  # bmm: (experts, tokens, in)
            return torch.stack([layer.with_updates(*pair) for layer, *pair in zip(self.layers, x, base, strict=True)])
        return _by_group(self.layers, x, base, kwargs["offs"] if "offs" in kwargs else args[2])


def _by_group(layers: Sequence[AdapterLinear], x: Tensor, base: Tensor, ends: Tensor) -> Tensor:
    """Rows of x `(S, in)` and of `base`, sorted by expert, with their expert's updates. The last may belong to none."""
    parts, start = [], 0
    for layer, end in zip(layers, ends.tolist(), strict=True):
        if end > start:
            parts.append(layer.with_updates(x[start:end], base[start:end]))
            start = end
    return torch.cat([*parts, base[start:]])
