"""Settings that give methods the same number of trainable parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig
from torch import nn

from loraplex.inspection.budget import count, match
from loraplex.recipes.config.arguments import adapter_config, config_class, plannable
from loraplex.recipes.config.run_config import ConfigError, RunConfig
from loraplex.recipes.models.budgeting import parse_match, parse_parameters
from loraplex.study.config import MethodEntry, StudyConfig


@dataclass(frozen=True)
class Sized:
    """A method's settings in a study."""

    adapter: dict[str, Any]
    parameters: int
    """Trainable, a classifier's head included."""
    excess: int | None = None
    """Beyond the budget; None where there is none, or the settings are given."""


def solve(study: StudyConfig, skeleton: nn.Module) -> dict[str, Sized]:
    """Each method's settings: those given, with the size that comes nearest to the study's budget.

    Args:
        study: whose methods.
        skeleton: the base model, weights on the meta device.

    Raises:
        ConfigError: a field that nothing has, a method that does not fit the model, or has no field to solve for.
    """
    known = {name: {f.name for f in fields(config_class(entry.method))} for name, entry in study.methods.items()}
    for key in study.adapter:
        if not any(key in names for names in known.values()):
            raise ConfigError(f"adapter.{key}: no method of the study has this field.")
    base, target = sum(p.numel() for p in skeleton.parameters()), None
    if study.budget is not None and ":" in study.budget:
        method = study.budget.partition(":")[0]
        common = {k: v for k, v in study.adapter.items() if k in {f.name for f in fields(config_class(method))}}
        _, config = parse_match(study.budget, common, study.task, "budget")
        try:
            target = count(skeleton, config)
        except ValueError as error:
            raise ConfigError(f"budget {study.budget}: {error}") from None
    elif study.budget is not None:
        target = parse_parameters(study.budget, base, "budget")
    found = {}
    for name, entry in study.methods.items():
        common = {k: v for k, v in study.adapter.items() if k in known[name]}
        try:
            found[name] = _solve(study, entry, {**common, **entry.adapter}, known[name], skeleton, target)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"methods.{name}: {error}") from None
    return found


def _solve(
    study: StudyConfig,
    entry: MethodEntry,
    adapter: dict[str, Any],
    known: set[str],
    skeleton: nn.Module,
    target: int | None,
) -> Sized:
    default_r = next((f.default for f in fields(config_class(entry.method)) if f.name == "r"), None)
    default_r = default_r if isinstance(default_r, int) else None

    def settings(size: int | None = None) -> dict[str, Any]:
        sized = adapter if size is None or entry.size is None else {**adapter, entry.size: size}
        r = sized.get("r", default_r)
        if study.alpha_over_r is None or "lora_alpha" not in known or "lora_alpha" in entry.adapter or not r:
            return sized
        alpha = study.alpha_over_r * r
        return {**sized, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}

    def config(size: int | None = None) -> PeftConfig:
        return adapter_config(RunConfig.model_construct(method=entry.method, adapter=settings(size), task=study.task))

    if target is None or entry.size is None:
        return Sized(settings(), count(skeleton, config()))
    if entry.size not in known:
        raise ValueError(
            f"{config_class(entry.method).__name__} has no field {entry.size!r}: name the field that sets the size "
            "(size), or size: null and settings that come near the budget"
        )
    first = getattr(config(), entry.size)
    if not isinstance(first, int) or isinstance(first, bool) or first < 1:
        raise ValueError(f"{entry.size} is {first!r}, not a number to start from: give it under adapter")
    if entry.size == "r" and plannable(entry.method):
        size = match(skeleton, config(), target).settings["r"]
    else:
        size = nearest_size(lambda value: count(skeleton, config(value)), target, first)
    parameters = count(skeleton, config(size))
    return Sized(settings(size), parameters, parameters - target)


def nearest_size(parameters: Callable[[int], int], target: int, first: int) -> int:
    """The size whose number of parameters, which grows with it, is nearest to `target`; ties go to the smaller one.

    Args:
        parameters: raises a ValueError for a size below the smallest that there is.
        target: parameters wanted.
        first: a size that there is.
    """

    def at(size: int) -> int:
        try:
            return parameters(size)
        except ValueError:
            if size >= first:
                raise
            return -1

    if at(first) == at(2 * first):
        raise ValueError(f"{at(first):,} parameters, whatever the size: leave its settings alone with size: null")
    low = high = first
    while low > 1 and at(low) > target:
        low = max(1, low // 2)
    while at(high) < target:
        if high > 2**20:
            raise ValueError(f"even {high} gives only {at(high):,} parameters, fewer than {target:,}")
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    return min((size for size in (low, high) if at(size) >= 0), key=lambda size: (abs(at(size) - target), size))
