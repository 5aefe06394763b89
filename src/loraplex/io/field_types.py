"""Checks the values of a config's fields, which come from a user or a file, against the fields' type hints."""

from __future__ import annotations

import enum
import math
import reprlib
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_COLLECTIONS = (list, set, frozenset, tuple)
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a mapping"}
_show = reprlib.Repr()
_show.maxstring = _show.maxother = 200


def shown(value: object) -> str:
    """`repr(value)`; only the beginning of it if the value is large."""
    text = _show.repr(value)
    return text if len(text) <= 400 else f"{text[:400]}…"


def check_types(cls: Any, values: Mapping[str, Any]) -> None:
    """Check that each value has the type of the field of `cls` with its name; other names are ignored.

    Raises:
        ValueError: names the field, the value and the type that is expected.
    """
    hints = _hints(cls)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            raise ValueError(f"{name}={shown(value)} must be {expected(hints[name])}.")


@lru_cache(maxsize=64)
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def fits(value: object, hint: Any) -> bool:
    """Whether `value` has the type of the hint; a hint that names no type fits every value."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin in _COLLECTIONS:
        return isinstance(value, _COLLECTIONS) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) else True


def expected(hint: Any) -> str:
    """The type of a hint in words: "a list of strings or a string or none"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # Enumerations of strings are strings to users.
        kinds = [arg for arg in args if not (isinstance(arg, type) and issubclass(arg, enum.Enum) and str in args)]
        return " or ".join(expected(arg) for arg in kinds)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in _COLLECTIONS:
        return f"a list of {_plural(args[0])}"
    if origin is dict:
        return f"a mapping from {_plural(args[0])} to {_plural(args[1])}"
    if hint in (None, type(None)):
        return "none"
    return _NAMES.get(hint) or str(getattr(hint, "__name__", hint))


def _plural(hint: Any) -> str:
    return f"{expected(hint).removeprefix('an ').removeprefix('a ')}s"


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float; integers can be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
