"""The weighted sum of several adapters of one method as one adapter, if that is exact: ΔW = Σₖ wₖ ΔWₖ.

"cat" puts the factors side by side, A = [A₁; A₂; …] and B = [w₁B₁, w₂B₂, …]; its rank is the sum of the ranks. "linear"
keeps the rank, with B = Σ wₖ Bₖ, and is exact only if all adapters have the same A.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from loraplex.tuner.attempt import all_or_nothing
from loraplex.tuner.bank import shared_by
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors
from loraplex.tuner.layer import AdapterLinear

COMBINATIONS = ("cat", "linear")


def add_weighted_adapter(
    tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    """Add the adapter `adapter_name`, whose update is the weighted sum of those of `adapters`.

    Raises:
        ValueError: the sum is no adapter of this method, or the arguments don't fit together. The model is unchanged.
    """
    configs = _check(tuner, adapters, weights, adapter_name, combination_type)
    layers = [layer for layer in tuner.model.modules() if isinstance(layer, AdapterLinear)]
    parts = {id(layer): [layer.factors(name) for name in adapters] for layer in layers}
    sums = {key: _add(factors, weights, combination_type) for key, factors in parts.items() if any(factors)}
    ranks = {len(A) for A, _ in sums.values()}
    if len(ranks) > 1:
        raise ValueError(
            f"The sum of {adapters} has the ranks {sorted(ranks)} on different modules, and one adapter has one rank: "
            "adapters with rank_pattern can't be combined. Export each with loraplex.export_lora and combine there."
        )
    layouts = [part.layout() for name in adapters if (part := shared_by(tuner.model, name)) is not None]
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError("The adapters share along other layers (layers_pattern): such factors don't add up.")
    config = configs[0].holding(ranks.pop(), configs)

    def add() -> None:
        tuner.peft_config[adapter_name] = config
        tuner.inject_adapter(tuner.model, adapter_name)
        # As PEFT does with every new adapter: float32 over a base of half precision.
        tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
        for layer in layers:
            if id(layer) in sums:
                layer.factors(adapter_name).hold(*sums[id(layer)])  # type: ignore[union-attr]
        shared = shared_by(tuner.model, adapter_name)
        if shared is not None:
            shared.share_like([part for name in adapters if (part := shared_by(tuner.model, name)) is not None])

    all_or_nothing(tuner, add)


def _check(
    tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> list[AdapterConfig]:
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type={combination_type!r} is not exact for these methods: use one of "
            f"{', '.join(COMBINATIONS)} where ΔW = B A (not Dual LoRA's, nor that of MASA's router), or export the "
            "adapters with loraplex.export_lora and combine the plain LoRAs with PEFT."
        )
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"There are {len(adapters)} adapters and {len(weights)} weights: give one weight for each.")
    if unknown := sorted({*adapters} - {*tuner.peft_config}):
        raise ValueError(f"The model has no adapter {unknown}, only {sorted(tuner.peft_config)}.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"The model has an adapter {adapter_name!r} already: choose another name.")
    configs: list[AdapterConfig] = [tuner.peft_config[name] for name in adapters]  # type: ignore[misc]
    if len({config.method for config in configs}) > 1:
        methods = {name: config.method for name, config in zip(adapters, configs, strict=True)}
        raise ValueError(f"The adapters are of different methods, {methods}: only those of one can be combined.")
    for name, config in zip(adapters, configs, strict=True):
        if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
            raise ValueError(
                f"{name!r} trained modules, tokens or biases in full, which don't add up: merge it instead."
            )
    return configs


@torch.no_grad()
def _add(parts: list[Factors | None], weights: list[float], combination_type: str) -> tuple[Tensor, Tensor]:
    """A and B of the sum on one layer."""
    if not all(parts):
        name = next(part.module_name for part in parts if part)
        raise ValueError(f"Not all of the adapters adapt {name}: only adapters of the same modules can be combined.")
    forms = [(part, part.lora_form()) for part in parts if part is not None]
    if missing := [part for part, form in forms if form is None or not part.is_exact()]:
        raise ValueError(
            f"The sum of updates on {missing[0].module_name} is no adapter of the same method: only ΔW = B A adds up. "
            "Keep the adapters active together, merge them (merge_adapter), or export them as LoRA and combine those."
        )
    first = next(form for _, form in forms if form is not None)
    # Banks of two adapters may be on different devices.
    pairs = [(A.to(first[0].device), B.to(first[1].device)) for _, form in forms if form is not None for A, B in [form]]
    if combination_type == "cat":
        return torch.cat([A for A, _ in pairs]), torch.cat([w * B for w, (_, B) in zip(weights, pairs, strict=True)], 1)
    A = pairs[0][0]
    if not all(torch.equal(A, other) for other, _ in pairs):
        raise ValueError(
            f'combination_type="linear" is exact only where the adapters have the same A, and on '
            f'{forms[0][0].module_name} they do not: use "cat", whose rank is the sum of the ranks.'
        )
    return A, torch.stack([w * B for w, (_, B) in zip(weights, pairs, strict=True)]).sum(0)
