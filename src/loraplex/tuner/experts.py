"""Adapters on weights that no linear layer holds: experts, which are stacked in one parameter, and their routers.

Each matrix of a stack is a linear layer with adapters of its own, so that equation, sharing, merging, files and
inspection are those of any other layer. While the module of the experts computes, its parameter is replaced by an
object that stands for all of them: where the module multiplies with an expert's matrix, the expert's layer adds its
update.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loraplex.runtime.parallel import refuse_fsdp1
from loraplex.runtime.placement import is_offloaded
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.expert_weight import ExpertLinear
from loraplex.tuner.families import layer_depth
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.stand_ins import Matrix, Stack, StandIn

_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
"""Classes of transformers whose stacks are `(experts, in, out)`, and that don't say so by `is_transposed`."""
_CHILD = "adapted_"
_LOCK = threading.Lock()
_USERS: Counter[tuple[int, str]] = Counter()
"""How many forwards compute with the stand-in of a module's parameter."""


class AdapterMatrix(AdapterLinear):
    """The adapted layer of one matrix. By its name "all-linear" does not take it for a linear layer of the model."""


class AdapterParameters(nn.Module):
    """A module some of whose own parameters are adapted: for each, a list of its experts' layers or one layer.

    The children are called after the parameters, `adapted_…`: PEFT would take the parameters' own names for those of
    modules to adapt. `base_layer` is the module as it was.
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
        if f"{_CHILD}{name}" not in self._modules:
            parameter = self.base_layer._parameters[name]
            assert parameter is not None
            transposed = _is_transposed(self.base_layer, f"{self.module_name}.{name}", parameter)
            whole = f"{self.module_name}.{name}"
            if parameter.ndim == 2:
                self.add_module(
                    f"{_CHILD}{name}", AdapterMatrix(ExpertLinear(self.base_layer, name, None, transposed), whole)
                )
            else:
                experts = (ExpertLinear(self.base_layer, name, i, transposed) for i in range(len(parameter)))
                layers = nn.ModuleList(AdapterMatrix(e, f"{whole}.{e.index}") for e in experts)
                self.add_module(f"{_CHILD}{name}", layers)
        return self._list(name)

    def _list(self, name: str) -> list[AdapterLinear]:
        child: Any = self._modules[f"{_CHILD}{name}"]
        return [child] if isinstance(child, AdapterLinear) else list(child)

    def adapted(self) -> Iterator[tuple[str, list[AdapterLinear]]]:
        """The adapted parameters' names, with their layers."""
        for child in self._modules:
            if child != "base_layer":
                name = child.removeprefix(_CHILD)
                yield name, self._list(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_offloaded(self.base_layer):
            raise ValueError(f"{self.module_name} was offloaded after it was adapted: keep the experts in memory.")
        if self.training and not torch.compiler.is_compiling():
            refuse_fsdp1(self)  # the experts' layers, which do so, are not called
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
        stand_in: StandIn = Matrix(layers[0], parameter, inner.transposed)
        if parameter.ndim == 3:
            stand_in = Stack(layers, parameter, inner.transposed)
        # An attribute of the instance hides the parameter of the same name, for all threads that compute with it.
        key = id(self.base_layer), name
        with _LOCK:
            _USERS[key] += 1
            self.base_layer.__dict__.setdefault(name, stand_in)
        try:
            yield
        finally:
            with _LOCK:
                _USERS[key] -= 1
                if not _USERS[key]:
                    del _USERS[key], self.base_layer.__dict__[name]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module as it was, its parameters merged if `merge` says so. PEFT puts it in the place of this one."""
        for _, layers in self.adapted():
            for layer in layers:
                layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer


def adapt_parameters(model: nn.Module, config: AdapterConfig, add: Callable[[AdapterLinear], None]) -> list[str]:
    """Adapt the bare parameters that the config names, each matrix of a stack as a linear layer of its own.

    Args:
        model: any model, adapted or not.
        config: of the adapter.
        add: puts the adapter's factors on one layer.

    Returns:
        The parameters' names.
    """
    found, missing = [], {*(config.target_parameters or ())}
    for module_name, module in list(model.named_modules()):
        name = module_name.removesuffix(".base_layer")
        for parameter in list(module._parameters):
            whole = f"{name}.{parameter}"
            ends = {end for end in config.target_parameters or () if f".{whole}".endswith(f".{end}")}
            missing -= ends
            if ends and not _is_left_out(config, whole):
                for layer in _holder_of(model, name, module).layers_of(parameter):
                    if not _is_excluded(config, layer.module_name):
                        add(layer)
                found.append(whole)
    if missing:
        raise ValueError(
            f"target_parameters names {', '.join(sorted(missing))}, which the model has not as plain parameters: "
            "correct the names, or leave them out."
        )
    return found


def _holder_of(model: nn.Module, name: str, module: nn.Module) -> AdapterParameters:
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


@contextmanager
def patterns_for_parameters(model: nn.Module, config: AdapterConfig, adapter_name: str) -> Iterator[None]:
    """Warn of patterns that match nothing in PEFT's place, which does not know of the layers of bare parameters."""
    if not config.target_parameters:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield
    layers = (module for module in model.modules() if isinstance(module, AdapterLinear))
    names = [layer.module_name for layer in layers if layer.factors(adapter_name) is not None]
    for field in ("rank_pattern", "alpha_pattern"):
        ends = {key: re.compile(rf"(.*\.)?({key})(\.\d+)?$") for key in getattr(config, field)}
        if unused := sorted(key for key, end in ends.items() if not any(map(end.match, names))):
            warnings.warn(f"The following {field} keys did not match anything: {unused}.", RuntimeWarning, stacklevel=2)


def _is_left_out(config: AdapterConfig, name: str) -> bool:
    """Whether the settings leave out the layer or the module that the parameter belongs to."""
    layers = config.layers_to_transform
    if layers is not None:
        depth = layer_depth(name, config.layers_pattern)
        if depth not in ([layers] if isinstance(layers, int) else layers):
            return True
    return _is_excluded(config, name) or _is_excluded(config, name.rpartition(".")[0])


def _is_excluded(config: AdapterConfig, name: str) -> bool:
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in excluded)


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
