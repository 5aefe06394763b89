"""The methods that are compared, through the public API, and linear layers to put them on."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import peft
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from common import autocast, dtype_name, tensors
from loraplex import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig

EXPERTS, MODULES = 4, 3
"""MASA's and MultiLoRA's n (the configs' defaults); Lily gets as many B's as MASA has A's."""


@dataclass(frozen=True)
class Method:
    """How to configure a method at rank r, and how wide its product A x is, in units of r."""

    config: Callable[..., PeftConfig]
    width: int = 1
    """LoRA of equal total rank has rank width · r."""


def _config(cls: type, **settings: Any) -> Callable[..., PeftConfig]:
    def build(r: int, **more: Any) -> PeftConfig:
        return cls(**{"r": r, **settings, **more})

    return build


def _loha(r: int, **more: Any) -> PeftConfig:
    # Two pairs of factors: half the rank makes as many parameters, as Dual LoRA's r₁ + r₂ = r does.
    return peft.LoHaConfig(r=max(1, r // 2), alpha=max(1, r // 2), **more)


# Random factors; for Dual LoRA the warm-up is over, so that its work is the whole work.
_random = partial(_config, init_weights=False, lora_alpha=16)
_later = {"merge_start_step": 10**6, "merge_interval": 10**6}

METHODS: dict[str, Method] = {
    "lora": Method(_config(peft.LoraConfig, lora_alpha=16)),
    "dora": Method(_config(peft.LoraConfig, lora_alpha=16, use_dora=True)),
    "loha": Method(_loha),
    "masa": Method(_random(MasaConfig, num_experts=EXPERTS), EXPERTS),
    "masa_sum": Method(_random(MasaConfig, num_experts=EXPERTS, expert_mixing="sum")),
    "masa_concat": Method(_random(MasaConfig, num_experts=EXPERTS, expert_mixing="concat"), EXPERTS),
    "aslora": Method(_random(AsLoraConfig, **_later)),
    "dual_lora": Method(_random(DualLoraConfig)),
    "multilora": Method(_random(MultiLoraConfig, num_modules=MODULES), MODULES),
}
if hasattr(peft, "LilyConfig"):
    METHODS["lily"] = Method(_config(peft.LilyConfig, num_B=EXPERTS))
_dual_fields = {field.name for field in fields(DualLoraConfig)}
if "compute" in _dual_fields:
    METHODS["dual_lora_reference"] = Method(_random(DualLoraConfig, compute="reference"))
if "cache_delta" in _dual_fields:
    METHODS["dual_lora_cached"] = Method(_random(DualLoraConfig, cache_delta=True))


def known(names: list[str]) -> list[str]:
    """Those of `names` that are installed here, in METHODS' order; LoRA comes first."""
    unknown = set(names) - {*METHODS, "frozen", "dual_lora_reference", "dual_lora_cached", "lily"}
    if unknown:
        raise SystemExit(f"unknown methods: {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    return [name for name in METHODS if name in names]


def adapt(model: nn.Module, name: str, r: int, adapter_dtype: str, **settings: Any) -> nn.Module:
    """Put the adapter on `model`, with random factors of such a size that deep models stay finite.

    Args:
        adapter_dtype: "peft" for PEFT's default, "base" for that of the base's weights.
    """
    config = METHODS[name].config(r, **settings)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype == "peft")
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in key:  # DoRA's are the norms of W's rows
                parameter.normal_(std=0.02)
    return adapted


@dataclass(frozen=True)
class Entry:
    """A method at a rank; the frozen model has neither."""

    name: str = "frozen"
    r: int = 0

    @property
    def total(self) -> int:
        """The rank of its product A x."""
        return self.r * METHODS[self.name].width if self.r else 0

    @property
    def lora(self) -> Entry | None:
        """LoRA of equal total rank."""
        return Entry("lora", self.total) if self.r else None


FROZEN = Entry()


def side_by_side(names: list[str], r: int) -> list[Entry]:
    """The frozen model, LoRA at every total rank of these methods at rank r, then the methods."""
    entries = [Entry(name, r) for name in names if name != "lora"]
    totals = sorted({r, *(entry.total for entry in entries)})
    return [FROZEN, *(Entry("lora", total) for total in totals), *entries]


def trained(model: nn.Module) -> list[Tensor]:
    """The adapter's parameters."""
    return [p for p in model.parameters() if p.requires_grad]


def share(model: nn.Module) -> Any:
    """A copy of the modules that reads the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors(model)})


def adapter_dtypes(model: nn.Module) -> str:
    """Of the adapter's parameters."""
    return "+".join(sorted({dtype_name(p.dtype) for p in trained(model)}))


def linears(weights: list[Tensor]) -> nn.Sequential:
    """Linear layers one after the other, on these frozen weights `(out, in)`."""
    stack = nn.Sequential()
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        stack.append(layer)
    return stack


def layers(weights: list[Tensor], entry: Entry, args: argparse.Namespace, **settings: Any) -> nn.Module:
    """`linears` with an adapter on each, in training."""
    model = linears(weights)
    if entry == FROZEN:
        return model
    targets = [str(number) for number in range(len(weights))]
    return adapt(model, entry.name, entry.r, args.adapter_dtype, target_modules=targets, **settings).train()


def step_of(model: nn.Module, x: Tensor, args: argparse.Namespace) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """(forward, forward and backward), with a fixed dy; gradients are dropped before each step."""
    parameters = [x, *trained(model)]

    def forward() -> Tensor:
        with autocast(args):
            return model(x)

    with torch.no_grad():
        dy = torch.randn_like(forward())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        forward().backward(dy)

    return forward, step
