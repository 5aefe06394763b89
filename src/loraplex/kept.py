"""A tensor made from factors before x is seen, kept for as long as they stay the same: decoding sees one token a time.

A change is seen by the parameter's version counter, which counts in-place operations; by its storage, which
`parameter.data = …` and a move or cast of the model replace without counting; and by the parameter itself, which
loaders replace. What none of them shows is a write to `parameter.data` or by a kernel of its own, as fused optimizers'
are: so nothing is kept while training, and `model.eval()` forgets what was kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class Kept:
    """One tensor and what it was made from. A copy starts empty, since its layer's factors are other tensors."""

    def __init__(self) -> None:
        # In one tuple, so that threads see a value with its own sources.
        self._kept: tuple[Tensor, object, list[_Source]] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Kept, ()

    def drop(self) -> None:
        """Forget it."""
        self._kept = None

    def get(self, make: Callable[..., Tensor], parameters: tuple[Tensor, ...], key: object) -> Tensor:
        """`make(*parameters)`, from memory if neither they nor `key` have changed. Not for use while training."""
        if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
            # Replays of a CUDA graph have to follow the parameters, and must not read what is freed when they change.
            return make(*parameters)
        kept = self._kept
        if kept is not None and kept[1] == key and all(map(_Source.is_still, kept[2], parameters)):
            return kept[0]
        self.drop()
        value = make(*parameters)
        if _can_be_watched(parameters):
            self._kept = value, key, [_Source(parameter) for parameter in parameters]
        return value


class _Source:
    """A parameter as it was when something was made from it, without keeping it alive."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter: Callable[[], Any] = weakref.ref(parameter)
        self.version = parameter._version
        # While it is referred to, no other storage gets its address.
        self.storage = StorageWeakRef(parameter.untyped_storage())

    def is_still(self, parameter: Tensor) -> bool:
        return (
            self.parameter() is parameter
            and self.version == parameter._version
            and self.storage.cdata == parameter.untyped_storage()._cdata
        )


def _can_be_watched(parameters: tuple[Tensor, ...]) -> bool:
    # Engines of several processes refill a parameter's memory before a forward and preserve its version counter.
    if dist.is_initialized():
        return False
    # Subclasses of Parameter may have no storage; tensors made under torch.inference_mode have no version counter.
    return all(type(parameter) in (nn.Parameter, Tensor) and not parameter.is_inference() for parameter in parameters)
