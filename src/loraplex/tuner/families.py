"""Families: the adapted modules that have the same role and shape in different layers of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors
from loraplex.tuner.layer import AdapterLinear


@dataclass(frozen=True)
class Member:
    """One adapted module of a family."""

    name: str
    depth: int
    layer: AdapterLinear
    factors: Factors


def group_families(members: Iterable[Member], config: AdapterConfig) -> dict[str, list[Member]]:
    """Group modules of the same role and shape, ordered by depth.

    The role is the module's name without the layer's index, so encoder and decoder stacks are different families.
    Keys are legal attribute names: "layers.3.self_attn.q_proj" belongs to "layers__N__self_attn__q_proj".

    Raises:
        ValueError: modules of one role differ in shape or rank.
    """
    families: dict[str, list[Member]] = {}
    for member in sorted(members, key=lambda m: m.depth):
        families.setdefault(role(member.name, config.layers_pattern), []).append(member)
    if config.shares_across_layers:
        for family in families.values():
            _check_alike(family, config)
    return families


def _check_alike(family: list[Member], config: AdapterConfig) -> None:
    first = family[0]
    for member in family[1:]:
        shapes = [(m.layer.out_features, m.layer.in_features) for m in (first, member)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{config.title} shares factors between {first.name} and {member.name}, but their weights are "
                f"{shapes[0]} and {shapes[1]}: adapt one of the shapes (exclude_modules, layers_to_transform), or "
                "name the list of layers with layers_pattern if the names hold more than one number."
            )
        if first.factors.r != member.factors.r:
            raise ValueError(
                f"{config.title} shares factors between {first.name} and {member.name}, but rank_pattern gives them "
                f"r={first.factors.r} and r={member.factors.r}: use one rank for both."
            )


def _index_span(name: str, layers_pattern: list[str] | str | None) -> tuple[int, int] | None:
    """Where in `name` the layer's index stands: the first number, or the one after `layers_pattern`."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
    for pattern in patterns:
        if match := re.search(rf"(?:^|\.){pattern}\.(\d+)(?=\.|$)", name):
            return match.span(1)
    # The first number, not the last: in T5's block.3.layer.0.SelfAttention.q it is the depth.
    match = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return match.span(1) if match else None


def layer_depth(name: str, layers_pattern: list[str] | str | None = None) -> int:
    """Index of the layer to which the module `name` belongs; 0 for a module outside the stack of layers."""
    span = _index_span(name, layers_pattern)
    return int(name[slice(*span)]) if span else 0


def role(name: str, layers_pattern: list[str] | str | None = None) -> str:
    """`name` without the layer's index, as an attribute name."""
    span = _index_span(name, layers_pattern)
    if span:
        name = f"{name[: span[0]]}N{name[span[1] :]}"
    return name.replace(".", "__")
