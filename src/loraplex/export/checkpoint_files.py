"""The safetensors files of a checkpoint: which tensor lies in which of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from loraplex.io.field_types import shown
from loraplex.io.reading import file_name, message_of, read_json


def files_of_tensors(base: Path) -> dict[str, str]:
    """Tensor → file, as transformers reads it: one whole file, or else by the index."""
    whole, index = base / SAFE_WEIGHTS_NAME, base / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not whole.is_file():
        named = indexed(index)
        if missing := sorted(file for file in {*named.values()} if not (base / file).is_file()):
            raise ValueError(f"{index} names {', '.join(missing[:3])}, not there: copy or download it again.")
        return named
    files = [whole] if whole.is_file() else sorted(base.glob("*.safetensors"))
    where: dict[str, str] = {}
    for file in files:
        with opened(file) as tensors:
            where |= dict.fromkeys(tensors.keys(), file.name)
    return where


def indexed(index: Path) -> dict[str, str]:
    """A checkpoint's index: tensor → the file of the folder that holds it.

    Raises:
        ValueError: it is no such index, or names anything but safetensors files of its own folder.
    """
    where = read_json(index, dict).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map of tensors to files: copy or download it again.")
    for file in where.values():
        if not file_name(file, index).endswith(".safetensors"):
            raise ValueError(f"{index} names the file {shown(file)}: weights are read from .safetensors files only.")
    return where


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({message_of(error, 500)}): copy or download it again."
        ) from None
