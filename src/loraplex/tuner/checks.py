"""Checks of single settings. Each raises a ValueError that names the setting, its value and the values it may have."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from loraplex.io.field_types import is_finite, shown
from loraplex.version import __version__

_MOST_STEPS = 10**12


def check_count(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise a ValueError unless `value` is an integer of at least `minimum` and at most `maximum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={shown(value)} must be an integer of at least {minimum}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}={shown(value)} must be an integer of at most {maximum}.")


def check_number(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a finite positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and is_finite(value)):
        raise ValueError(f"{name}={shown(value)} must be a positive number.")


def check_steps(name: str, value: object) -> None:
    """Raise a ValueError unless `value` counts steps (integer ≥ 1) or is a fraction of the run (0 < value < 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={shown(value)} must be a number of steps or a fraction of the run.")
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"{name}={value} as a fraction of the run must lie between 0 and 1; steps are integers.")
    if isinstance(value, int) and not 1 <= value <= _MOST_STEPS:
        raise ValueError(f"{name}={shown(value)} must be at least 1 step and at most {_MOST_STEPS}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} is unknown: use one of {', '.join(map(repr, choices))}.")


def is_newer(version: object) -> bool:
    """Whether a version of loraplex comes after this one; what is no version does not."""
    try:
        return Version(str(version)) > Version(__version__)
    except InvalidVersion:
        return False
