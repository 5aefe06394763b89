"""How an adapter wants to become a plain LoRA: `loraplex.json` beside it, written by `loraplex export --remember`.

An update that has no low rank needs one to be chosen, and gates that depend on the input need their means. A server
that is handed the folder has nobody to ask.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraplex.io.files import write_text

WISH_NAME = "loraplex.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_FORMAT = 1
_MAX_BYTES = 16 << 20
_MAX_RANK = 4096
"""A file may come from anywhere: a rank of billions would end in the allocator."""


@dataclass(frozen=True)
class Wish:
    """What `loraplex.json` holds. At most one of `rank`, `max_error` and `exact` is set.

    Raises:
        ValueError: a value is of the wrong type or out of range; the message names it.
    """

    rank: int | None = None
    """The best approximation of this rank."""
    max_error: float | None = None
    """The smallest rank with which every module's relative error stays at or below this."""
    exact: bool = False
    """The true rank of each update."""
    mean_gates: dict[str, list[float]] | None = None
    """Of gates that depend on the input: module → mean gate of each part."""
    weights: str | None = None
    """SHA-256 of the weights that the mean gates were measured with; gates of other weights would be wrong."""

    def __post_init__(self) -> None:
        rank, error = self.rank, self.max_error
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MAX_RANK):
            raise ValueError(f"rank is {_short(rank)}: it must be an integer from 1 to {_MAX_RANK}.")
        if error is not None and (isinstance(error, bool) or not isinstance(error, float) or not 0 < error < 1):
            raise ValueError(f"max_error is {_short(error)}: it must be a number between 0 and 1.")
        if not isinstance(self.exact, bool):
            raise ValueError(f"exact is {_short(self.exact)}: it must be true or false.")
        if (rank is not None) + (error is not None) + self.exact > 1:
            raise ValueError("rank, max_error and exact exclude each other: keep one of them.")
        if self.mean_gates is not None:
            _check_gates(self.mean_gates)
        if (self.weights is not None) != (self.mean_gates is not None) or not isinstance(self.weights, str | None):
            raise ValueError("mean_gates and weights, the SHA-256 of the adapter's weights as text, belong together.")

    @classmethod
    def read(cls, folder: Path) -> Wish:
        """The wish beside an adapter; an empty one if there is no file.

        Raises:
            ValueError: the file is not as `loraplex export --remember` writes it.
        """
        path = folder / WISH_NAME
        if not os.path.lexists(path):
            return cls()
        remedy = "remove it, or write it again with loraplex export --remember."
        try:
            settings = read_json(path, _MAX_BYTES)
            written = settings.pop("format", None)
            if written != _FORMAT or isinstance(written, bool):
                raise ValueError(f"format is {_short(written)}: this loraplex reads {_FORMAT}.")
            if unknown := sorted(set(settings) - set(cls.__dataclass_fields__)):
                raise ValueError(f"it has unknown keys: {_short(unknown)}.")
            return cls(**settings)
        except ValueError as error:
            raise ValueError(f"{path} can't be used: {error} Remedy: {remedy}") from None

    def write(self, folder: Path) -> None:
        """Write the wish beside an adapter, whole or not at all."""
        write_text(folder / WISH_NAME, self.text())

    def text(self) -> str:
        """The file's text: the same for equal wishes."""
        settings = {key: value for key, value in asdict(self).items() if value}
        return json.dumps({"format": _FORMAT, **settings}, indent=2, sort_keys=True) + "\n"


def _check_gates(gates: Any) -> None:
    if not isinstance(gates, dict) or not gates:
        raise ValueError("mean_gates must map each module to the mean gate of each expert.")
    for module, values in gates.items():
        numbers = isinstance(values, list) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
            for value in values
        )
        if not numbers or not math.isclose(sum(values), 1, abs_tol=1e-3):
            raise ValueError(f"the mean gates of {_short(module)} must be numbers of at least 0 that add up to 1.")


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The mapping in a JSON file that may come from anywhere.

    Raises:
        ValueError: it is no file, too large, no JSON, or no mapping.
    """
    # A pipe or a device in the file's place would never end.
    if not path.is_file():
        raise ValueError(f"{path.name} is missing, or not a file.")
    with path.open("rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"{path.name} is larger than {max_bytes} bytes.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no mapping, but {_short(value)}.")
    return value


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
