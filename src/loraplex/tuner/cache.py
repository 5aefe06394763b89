"""A cache for a tensor that is computed from factors: Dual LoRA's ΔW in evaluation, on request (`cache_delta`).

The cache notices that a factor was changed in place (by its version counter), that its storage was replaced
(`parameter.data = …`, a move or cast of the model), and that the parameter itself was replaced (by a loader). It can't
notice a write into `parameter.data`, nor the write of a fused optimizer's kernel. So it is empty while the model trains
or computes with gradients, every switch between `train()` and `eval()` empties it, and `clear_cache` does at any time.
Nothing else is cached in evaluation: all other methods follow every write.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from loraplex.tuner.factors import Factors


def clear_cache(model: nn.Module) -> None:
    """Empty the caches of `model`. Call it after writing to `parameter.data`.

    It is needed only with `DualLoraConfig(cache_delta=True)`, in evaluation mode and without gradients. `model.eval()`
    does the same.
    """
    for module in model.modules():
        if isinstance(module, Factors):
            module.clear_cache()


class TensorCache:
    """One tensor and its sources. A copy starts empty, since the factors of the copied layer are other tensors."""

    def __init__(self) -> None:
        # One tuple, so that every thread sees a value with its own sources.
        self._entry: tuple[Tensor, object, list[_Source]] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return TensorCache, ()

    def clear(self) -> None:
        """Forget the tensor."""
        self._entry = None

    def get(self, make: Callable[[], Tensor], sources: tuple[Tensor, ...], key: object) -> Tensor:
        """The cached tensor, or `make()` if its `sources` or `key` have changed.

        Args:
            make: computes the tensor.
            sources: the tensors from which it is computed.
            key: whatever else it depends on.
        """
        if sources[0].is_cuda and torch.cuda.is_current_stream_capturing():
            # Replays of a CUDA graph have to follow the sources, and must not read a tensor that is freed meanwhile.
            return make()
        entry = self._entry
        if entry is not None and entry[1] == key and all(map(_Source.is_unchanged, entry[2], sources)):
            return entry[0]
        self.clear()
        value = make()
        if _can_be_watched(sources):
            self._entry = value, key, [_Source(source) for source in sources]
        return value


class _Source:
    """What tells whether a tensor has changed since. It does not keep the tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Callable[[], Any] = weakref.ref(tensor)
        self.version = tensor._version
        # While this reference exists, no other storage gets the address.
        self.storage = StorageWeakRef(tensor.untyped_storage())

    def is_unchanged(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )


def _can_be_watched(sources: tuple[Tensor, ...]) -> bool:
    # Engines of several processes write a parameter's memory before a forward and preserve its version counter.
    if dist.is_initialized():
        return False
    # Subclasses of Parameter may have no storage; tensors made under torch.inference_mode have no version counter.
    return all(type(source) in (nn.Parameter, Tensor) and not source.is_inference() for source in sources)
