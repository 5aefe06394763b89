"""safetensors files as they lie: the fuzzer's own reader and writer, so that a file may lie about itself."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """One tensor as the file has it."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Raw:
        """A tensor's bytes."""
        tensor = tensor.detach().contiguous()
        name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
        data = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        return cls(name, list(tensor.shape), data)

    def tensor(self) -> Tensor:
        """The tensor that these bytes are; ValueError if dtype, shape and bytes do not agree."""
        dtype = DTYPES.get(self.dtype)
        if dtype is None or prod(self.shape) * dtype.itemsize != len(self.data):
            raise ValueError(f"{self.dtype} {self.shape} in {len(self.data)} bytes")
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).reshape(self.shape)

    def with_shape(self, shape: list[int]) -> Raw:
        """Other dimensions over the same bytes."""
        return replace(self, shape=shape)


Tensors = dict[str, Raw]


def header_of(tensors: Tensors, metadata: Any = None) -> tuple[dict[str, Any], bytes]:
    """The header that a whole file has, and the bytes after it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    data = b""
    for name, raw in tensors.items():
        end = len(data) + len(raw.data)
        header[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [len(data), end]}
        data += raw.data
    return header, data


def pack(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file from a header's text; `length` is what the file says about it."""
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


def write(path: Path, tensors: Tensors) -> None:
    """A file that says the truth."""
    header, data = header_of(tensors)
    path.write_bytes(pack(json.dumps(header).encode(), data))


def read(path: Path) -> Tensors:
    """All tensors; ValueError for a file that does not hold together."""
    content = path.read_bytes()
    if len(content) < 8:
        raise ValueError("shorter than its length")
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8:
        raise ValueError("header longer than the file")
    header = json.loads(content[8 : 8 + length], object_pairs_hook=_once)
    data = content[8 + length :]
    tensors: Tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(data):
                raise ValueError(f"{name}: offsets outside the file")
            tensors[name] = Raw(entry["dtype"], entry["shape"], data[start:end])
    if sum(len(raw.data) for raw in tensors.values()) != len(data):
        raise ValueError("offsets overlap or leave holes")
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if any(found[name] != value for name, value in pairs):
        raise ValueError("a name twice, for two things")
    return found
