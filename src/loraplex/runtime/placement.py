"""Where adapters are when accelerate places a model: on the device where their layer runs.

accelerate offloads the tensors of a module to the CPU or the disk and loads them, as new parameters, for the module's
own forward. That suits a base weight. But a factor would not be trained, since no forward would read the parameter that
the optimizer holds; a shared factor would not be loaded when other layers read it; and merging, exporting and combining
read factors without a forward. Factors are small, so they are never offloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn


class NeverOffloaded(nn.Module):
    """A module whose own tensors accelerate does not offload. They move to the device where the module runs."""

    def __setattr__(self, name: str, value: Any) -> None:
        # add_hook_to_module sets _old_forward, then takes the tensors away, then sets _hf_hook.
        if name == "_old_forward":
            self.__dict__["_before_hook"] = dict(self._parameters), dict(self._buffers)
        elif name == "_hf_hook":
            value = self._without_offloading(value)
            # Loaders of whole models hook a module last, when its tensors are new: train() reads them again.
            self.train(self.training)
        super().__setattr__(name, value)

    def _without_offloading(self, hook: Any) -> Any:
        """The hook to use instead of `hook`, after putting back the tensors that it took away."""
        before = self.__dict__.pop("_before_hook", None)
        if isinstance(hook, SequentialHook):
            return SequentialHook(*(self._stay(one, before) for one in hook.hooks))
        return self._stay(hook, before)

    def _stay(self, hook: Any, before: tuple[dict[str, Any], dict[str, Any]] | None) -> Any:
        if not (isinstance(hook, AlignDevicesHook) and hook.offload):
            return hook
        if before is not None:
            # The same parameters as before, since optimizers and schedules may hold them already.
            self._parameters.update(before[0])
            self._buffers.update(before[1])
        _check_that_buffers_are_read(self._buffers, hook.weights_map)
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                # accelerate would load it from here: load_checkpoint_and_dispatch reads a file into the map only.
                if tensor is not None and hook.weights_map is not None and name in hook.weights_map:
                    tensors[name] = _filled(tensor, hook.weights_map[name])  # type: ignore[assignment]
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        if hook.execution_device is not None and not any(tensor.is_meta for tensor in own):
            self.to(device=hook.execution_device)
        return AlignDevicesHook(hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)


def _check_that_buffers_are_read(buffers: dict[str, Any], weights: Any) -> None:
    """Raise a ValueError if load_checkpoint_and_dispatch has not read a schedule's state.

    It reads the parameters only of modules that the device map puts on the disk.
    """
    loader = weights.dataset if isinstance(weights, PrefixedDataset) else None
    index = loader.index if isinstance(loader, OffloadedWeightsLoader) else {}
    lost = [name for name in buffers if name not in weights] if index else []
    # PEFT's map is of the base model's own files. The adapter's tensors are not in it, but all are loaded.
    if lost and any("safetensors_file" not in entry for entry in index.values()):
        raise ValueError(
            f"accelerate has not read {', '.join(lost)}: of modules that the device map puts on the disk it leaves out "
            'the buffers. Give "loraplex_bank" another device, or pass offload_buffers=True.'
        )


@torch.no_grad()
def _filled(tensor: Tensor, value: Tensor) -> Tensor:
    """`tensor` with this value; a new tensor if it is on the meta device."""
    if not tensor.is_meta:
        return tensor.copy_(value)
    value = value.to(tensor.dtype)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    hook = module.__dict__.get("_hf_hook")
    for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if isinstance(one, AlignDevicesHook):
            yield one


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's own tensors for each forward."""
    return any(hook.offload for hook in _hooks(module))


def device_of(module: Any) -> torch.device | None:
    """The device on which a linear layer runs: the one to which accelerate loads it, else that of its weight."""
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    weights = (getattr(module, name, None) for name in ("weight", "qweight", "W_q"))
    return next((weight.device for weight in weights if weight is not None), None)


def input_device(model: nn.Module) -> torch.device:
    """The device for a model's inputs."""
    for module in model.modules():
        if (
            device := next((h.execution_device for h in _hooks(module) if h.execution_device is not None), None)
        ) is not None:
            return torch.device(device)
    return next(model.parameters()).device


def loaded(layer: Any) -> AbstractContextManager[None]:
    """A context in which the base weight of an adapted layer is loaded, to be read and written, if it is offloaded.

    PEFT's own calls of merge and unmerge load it already; then this does nothing.
    """
    inner = layer.get_base_layer()
    return onload_layer(layer) if is_offloaded(inner) and inner.weight.is_meta else nullcontext()


def refuse_loaded_with_parent(model: nn.Module) -> None:
    """Raise a ValueError if accelerate loads trained factors with a larger module, and so as new parameters."""
    for name, module in model.named_modules():
        if any(hook.offload and hook.place_submodules for hook in _hooks(module)):
            inside = (m for m in module.modules() if isinstance(m, NeverOffloaded))
            if any(p.requires_grad for m in inside for p in m.parameters()):
                raise ValueError(
                    f"accelerate loads {name} ({type(module).__name__}) as a whole for each forward, adapters "
                    "included, so they would not be trained. Offload without preload_module_classes, or add the "
                    "adapters after the model was offloaded."
                )
