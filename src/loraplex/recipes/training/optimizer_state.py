"""An optimizer's state that comes from a checkpoint, checked before the first step that uses it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from loraplex.io.field_types import shown

_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What torch's optimizers keep in the shape of the parameter; others may use other names, and other shapes."""


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each group, without its parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def check_optimizer(optimizer: Any, before: list[dict[str, Any]]) -> None:
    """Check that what was loaded can be stepped with; torch takes any shape and type.

    Args:
        optimizer: after the load.
        before: its `settings_of` before.

    Raises:
        ValueError: names the setting or the tensor.
    """
    for index, (group, known) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        for name, value in known.items():
            if not _is_like(group.get(name), value):
                raise ValueError(f"the optimizer's {name} of group {index} is {shown(group.get(name))}, not {value!r}")
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if name in _LIKE_PARAMETER and getattr(value, "shape", None) != parameter.shape:
                    raise ValueError(
                        f"the optimizer's {name} is {shown(value if not isinstance(value, Tensor) else value.shape)} "
                        f"for a parameter of shape {tuple(parameter.shape)}"
                    )


def _is_like(found: object, known: object) -> bool:
    """Whether a setting is a finite number where a number is known, and so on within tuples."""
    if isinstance(known, (tuple, list)):
        return isinstance(found, (tuple, list)) and len(found) == len(known) and all(map(_is_like, found, known))
    if isinstance(known, bool) or not isinstance(known, (int, float)):
        return True
    if isinstance(found, Tensor):
        return found.numel() == 1
    return isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
