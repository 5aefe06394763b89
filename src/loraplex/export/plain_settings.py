"""A plain LoRA's folder, checked before anything is computed from it: PEFT takes what a file says as it stands."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from loraplex.tuner.config import AdapterConfig

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_PATTERNS = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "modules_to_save",
)  # fmt: skip
"""Which all of PEFT's types match against module names."""
_CHECKED = (*_PATTERNS, "r", "lora_alpha", "use_rslora", "bias", "task_type")


@dataclass
class _Settings(AdapterConfig):
    """The settings that LoRA has in common with our methods, for their checks."""

    method: ClassVar[str] = "LORA"
    title: ClassVar[str] = "LoRA"
    shared_cls: ClassVar[type[Any] | None] = None


def check_plain(folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Check a saved LoRA's settings as ours are checked, and that its factors are floating-point numbers.

    Args:
        folder: where the adapter lies.
        settings: what its `adapter_config.json` says; of other types than LORA only names and patterns are checked.

    Raises:
        ValueError: names the setting or the tensor, and what it should be.
    """
    plain = settings["peft_type"] == "LORA"
    known = {name: settings[name] for name in (_CHECKED if plain else _PATTERNS) if settings.get(name) is not None}
    if plain:
        known |= {"lora_alpha": _positive(settings.get("lora_alpha", 8)), "r": settings.get("r", 8)}
    if isinstance(patterns := known.get("alpha_pattern"), dict):
        known["alpha_pattern"] = {key: _positive(value) for key, value in patterns.items()}
    try:
        _Settings(**known)
    except ValueError as error:
        raise ValueError(f"{os.fspath(folder)}: {error} Correct its adapter_config.json.") from None
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if plain and os.path.isfile(weights):
        with safe_open(weights, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                if ".lora_" in key and (kind := tensors.get_slice(key).get_dtype()) not in _FLOATS:
                    raise ValueError(
                        f"{weights} holds {key[:200]} as {kind}, which no factor of a LoRA can be: copy or download "
                        "the adapter again."
                    )


def _positive(alpha: Any) -> Any:
    """A LoRA's alpha may be negative or zero, ours not."""
    return abs(alpha) or 1 if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) else alpha
