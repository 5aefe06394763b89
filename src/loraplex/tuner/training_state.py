"""A checkpoint's file of what schedules need and neither adapter nor optimizer holds, checked before it counts."""

from __future__ import annotations

import os

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from loraplex.io.field_types import shown
from loraplex.io.reading import message_of
from loraplex.runtime.parallel import whole_shape

_MOST_STEPS = 10**12
_AGAIN = "Copy the checkpoint again, or resume from an earlier one."
_OLD = "explicit"
"""A mark that earlier versions wrote; it means nothing now."""


def read_training_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Key → tensor of the file.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({message_of(error, 500)}). {_AGAIN}") from None


def check_training_state(
    state: dict[str, Tensor], parameters: dict[str, nn.Parameter], kinds: dict[str, bool]
) -> dict[str, dict[str, Tensor]]:
    """Parameter's name → what is kept for it, by name.

    Args:
        state: "PARAMETER/NAME" → tensor.
        parameters: the adapter's shared factors, by name.
        kinds: which names there are → whether it counts steps; the others have the parameter's shape.

    Raises:
        ValueError: something belongs to no parameter, has another shape or kind, or is missing beside the others.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in state.items():
        name, _, key = path.partition("/")
        if key == _OLD:
            continue
        if name not in parameters or key not in kinds:
            raise ValueError(f"The training state holds {shown(path)}, which belongs to nothing here. {_AGAIN}")
        shape = () if kinds[key] else tuple(whole_shape(parameters[name]))
        if tuple(value.shape) != shape or value.is_floating_point() == kinds[key] or value.is_complex():
            raise ValueError(
                f"{shown(path)} is {value.dtype} {shown(tuple(value.shape))} in the training state; it must be "
                f"{'an integer' if kinds[key] else 'floating-point numbers'} of shape {shape}. {_AGAIN}"
            )
        if kinds[key] and not 0 <= int(value) <= _MOST_STEPS:
            raise ValueError(f"{shown(path)} is {int(value)} in the training state, which counts no steps. {_AGAIN}")
        found.setdefault(name, {})[key] = value
    for name, entries in found.items():
        if missing := sorted(set(kinds) - set(entries)):
            raise ValueError(f"The training state of {name} lacks {', '.join(missing)}. {_AGAIN}")
    return found
