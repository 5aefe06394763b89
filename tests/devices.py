"""Several devices on a machine that has one: tensors on the CPU with a device, which `to` changes and mixing breaks.

The devices are called "cpu:1", "cpu:2", …: torch knows such names, and accelerate takes them for other devices than
"cpu". Values and gradients are real. Tensors that only autograd has made are on no particular device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

CPU = torch.device("cpu")
_MAY_MIX = (Tensor.copy_, Tensor.__setitem__, torch._has_compatible_shallow_copy_type)


# Not an attribute: accelerate hands a parameter's attributes on to its class.
_places: Any = WeakTensorKeyDictionary()


def place(tensor: Tensor) -> torch.device | None:
    """The device that a tensor is said to be on, None for any."""
    return torch.device("meta") if tensor.is_meta else _places.get(tensor)


def _binding(tensor: Tensor) -> torch.device | None:
    """The device that what is computed from a tensor must be on: a number on the CPU binds nothing."""
    where = place(tensor)
    return None if where == CPU and not tensor.ndim else where


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those among arguments; much faster than torch's own trees."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


class _Devices(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return place(args[0]) or CPU
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            func(*args)
            _put(args[0], place(args[1]))
            return None
        if func in (Tensor.to, Tensor.cpu):
            return self._to(func, *args, **kwargs)
        if func.__name__ == "_parse_to":
            return func(*args, **kwargs)
        if func.__name__ == "__get__":  # by far the most
            result = func(*args)
            return _put(result, _binding(args[0])) if isinstance(result, Tensor) else result
        tensors = list(_tensors((args, kwargs)))
        places = {_binding(t) for t in tensors} - {None, torch.device("meta")}
        if len(places) > 1 and func not in _MAY_MIX:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {places} in {func.__name__}")
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type != "meta":
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if asked is not None:
            where = torch.device(asked)
        elif func in _MAY_MIX:
            where = place(args[0])
        else:
            where = next(iter(places), CPU if not tensors else None)
        if result is None or isinstance(result, bool | int | float | torch.Size):
            return result
        return tree_map_only(Tensor, lambda t: _put(t, where), result)

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if func is Tensor.cpu:
            args = (CPU,)
        like = args[0] if args and isinstance(args[0], Tensor) else None
        if like is not None:
            args = (place(like) or CPU, like.dtype, *args[1:])
        asked, dtype, _, _ = torch._C._nn._parse_to(
            *args, **{k: v for k, v in kwargs.items() if k not in ("copy", "memory_format")}
        )
        here = place(tensor)
        if asked is not None and asked.type == "meta":
            return tensor.to(asked, dtype or tensor.dtype)
        if tensor.is_meta and asked is not None:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        moved = tensor if dtype is None else tensor.to(dtype)
        if (asked is not None and asked != (here or CPU)) or kwargs.get("copy"):
            moved = moved.clone() if moved is tensor else moved
        return _put(moved, asked or here)


def _put(tensor: Tensor, where: torch.device | None) -> Tensor:
    if where is not None and where.type != "meta" and not tensor.is_meta:
        _places[tensor] = where
    return tensor


@contextmanager
def several_devices() -> Iterator[None]:
    """Inside, devices "cpu:1", "cpu:2", … exist."""
    new = nn.Parameter.__new__

    def parameter(cls: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        made = new(cls, data, *args, **kwargs)
        return _put(made, place(data)) if isinstance(data, Tensor) else made

    with mock.patch.object(nn.Parameter, "__new__", parameter), _Devices():
        yield
