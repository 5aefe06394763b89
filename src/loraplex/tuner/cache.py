"""Dual LoRA's ΔW in evaluation, cached on request (`cache_delta`): building it costs far more than one token's layer.

The cache sees that a factor was changed in place (its version counter), that its storage was replaced
(`parameter.data = …`, a move or cast of the model), and that the parameter itself was replaced (loaders). It can't see
a write into `parameter.data`, nor one by a kernel of its own, as fused optimizers do. So it holds nothing while the
model trains or computes with gradients, every switch between `train()` and `eval()` empties it, and `clear_cache` does
so at any time. Nothing else in evaluation is cached: all other methods follow every write.
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
    """Make the next forward of `model` build what `cache_delta` has cached; call it after writing to `parameter.data`.

    Needed only with `DualLoraConfig(cache_delta=True)`, in evaluation mode and without gradients; `model.eval()` does
    it too.
    """
    for module in model.modules():
        if isinstance(module, Factors):
            module.clear_cache()


class TensorCache:
    """One tensor and what it was made from. A copy starts empty, since its layer's factors are other tensors."""

    def __init__(self) -> None:
        # In one tuple, so that threads see a value with its own sources.
        self._entry: tuple[Tensor, object, list[_Source]] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return TensorCache, ()

    def clear(self) -> None:
        """Forget the tensor."""
        self._entry = None

    def get(self, make: Callable[[], Tensor], sources: tuple[Tensor, ...], key: object) -> Tensor:
        """`make()`, or its cached result while neither `sources`, from which it is made, nor `key` have changed."""
        if sources[0].is_cuda and torch.cuda.is_current_stream_capturing():
            # Replays of a CUDA graph have to follow the sources, and must not read what is freed when they change.
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
    """A tensor as it was when something was made from it, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Callable[[], Any] = weakref.ref(tensor)
        self.version = tensor._version
        # While it is referred to, no other storage gets its address.
        self.storage = StorageWeakRef(tensor.untyped_storage())

    def is_unchanged(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )


def _can_be_watched(sources: tuple[Tensor, ...]) -> bool:
    # Engines of several processes refill a parameter's memory before a forward and preserve its version counter.
    if dist.is_initialized():
        return False
    # Subclasses of Parameter may have no storage; tensors made under torch.inference_mode have no version counter.
    return all(type(source) in (nn.Parameter, Tensor) and not source.is_inference() for source in sources)
