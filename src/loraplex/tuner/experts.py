"""Adapters on weights that no linear layer holds: experts, which are stacked in one parameter, and their routers.

Each matrix of a stack is a linear layer with adapters of its own, so that equation, sharing, merging, files and
inspection are those of any other layer. While the module of the experts computes, its parameter is replaced by an
object that stands for all of them: where the module multiplies with an expert's matrix, the expert's layer is called.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loraplex.runtime.placement import is_offloaded
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.expert_weight import ExpertLinear
from loraplex.tuner.families import layer_depth
from loraplex.tuner.layer import AdapterLinear

_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
"""Classes of transformers whose stacks are `(experts, in, out)`, and that don't say so by `is_transposed`."""


class AdapterParameters(nn.Module):
    """A module some of whose own parameters are adapted: for each, a list of its experts' layers or one layer.

    The children have the parameters' names; `base_layer` is the module as it was.
    """

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        if is_offloaded(base_layer):
            raise ValueError(
                f"{module_name} is offloaded, and its bare parameters can't be adapted then: give the model's experts "
                "a place in memory (device_map), or leave target_parameters out."
            )
        self.base_layer = base_layer
        self.module_name = module_name

    def get_base_layer(self) -> nn.Module:
        """The module as it was."""
        return self.base_layer

    def layers_of(self, name: str) -> list[AdapterLinear]:
        """The layers of the parameter `name`, made when they are first asked for."""
        if name not in self._modules:
            parameter = self.base_layer._parameters[name]
            assert parameter is not None
            transposed = _is_transposed(self.base_layer, f"{self.module_name}.{name}", parameter)
            whole = f"{self.module_name}.{name}"
            if parameter.ndim == 2:
                self.add_module(name, AdapterLinear(ExpertLinear(self.base_layer, name, None, transposed), whole))
            else:
                experts = (ExpertLinear(self.base_layer, name, i, transposed) for i in range(len(parameter)))
                self.add_module(name, nn.ModuleList(AdapterLinear(e, f"{whole}.{e.index}") for e in experts))
        return self._list(name)

    def _list(self, name: str) -> list[AdapterLinear]:
        child: Any = self._modules[name]
        return [child] if isinstance(child, AdapterLinear) else list(child)

    def adapted(self) -> Iterator[tuple[str, list[AdapterLinear]]]:
        """The adapted parameters' names, with their layers."""
        yield from ((name, self._list(name)) for name in self._modules if name != "base_layer")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for name, layers in self.adapted():
                if any(layer.disable_adapters or layer.merged for layer in layers):
                    if layers[0].disable_adapters:
                        for layer in layers:
                            layer.unmerge()
                    continue
                if any(layer.factors(active) for layer in layers for active in layer.active_adapters):
                    stack.enter_context(self._standing_in(name, layers))
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _standing_in(self, name: str, layers: list[AdapterLinear]) -> Iterator[None]:
        parameter: Any = self.base_layer._parameters[name]
        inner: Any = layers[0].get_base_layer()
        stand_in: Any = Matrix(layers[0], parameter, inner.transposed)
        if parameter.ndim == 3:
            stand_in = Stack(layers, parameter, inner.transposed)
        # An attribute of the instance hides the parameter of the same name.
        self.base_layer.__dict__[name] = stand_in
        try:
            yield
        finally:
            del self.base_layer.__dict__[name]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module as it was, its parameters merged if `merge` says so. PEFT puts it in the place of this one."""
        for _, layers in self.adapted():
            for layer in layers:
                layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer


def holder_of(model: nn.Module, name: str, module: nn.Module) -> AdapterParameters:
    """What stands in `model` in the place of `module`, some of whose parameters are adapted."""
    found = model.get_submodule(name)
    if isinstance(found, AdapterParameters):
        return found
    if isinstance(found, BaseTunerLayer):
        raise ValueError(f"{name} is adapted as a layer: leave its parameters out of target_parameters.")
    parent, _, last = name.rpartition(".")
    holder = AdapterParameters(module, name)
    setattr(model.get_submodule(parent), last, holder)
    return holder


def takes_parameter(config: AdapterConfig, name: str) -> bool:
    """Whether `target_parameters` names the parameter, and the layers and names to leave out don't."""
    if not any(f".{name}".endswith(f".{end}") for end in config.target_parameters or ()):
        return False
    layers = config.layers_to_transform
    if layers is not None and layer_depth(name, config.layers_pattern) not in (
        [layers] if isinstance(layers, int) else layers
    ):
        return False
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is None
    return not any(f".{name}".endswith(f".{end}") for end in excluded)


def _is_transposed(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is `(experts, in, out)`, not `(experts, out, in)`."""
    if parameter.ndim == 2:
        return False
    known = getattr(module, "is_transposed", None)  # of transformers' use_experts_implementation
    if type(module).__name__ in _TRANSPOSED_EXPERTS:
        known = True
    if known is None or parameter.ndim != 3:
        raise ValueError(
            f"{name} is a parameter {tuple(parameter.shape)} of a {type(module).__name__}, which is neither a matrix "
            "nor a stack of matrices whose layout is known: leave it out of target_parameters."
        )
    return bool(known)


class _StandIn(ABC):
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

    def type(self, dtype: torch.dtype) -> _StandIn:
        """The same in another dtype: routers compute in float32."""
        other = copy(self)
        other.tensor, other.dtype = self.tensor.to(dtype), dtype
        return other

    to = type

    def float(self) -> _StandIn:
        """The same in float32."""
        return self.type(torch.float32)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (at, one), *more = [(i, arg) for i, arg in enumerate(args) if isinstance(arg, _StandIn)]
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


class Matrix(_StandIn):
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


class Chosen(_StandIn):
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


class Stack(_StandIn):
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
        return at == 1 and self.transposed and func in ("grouped_mm", "_grouped_mm", "bmm")

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
