"""A plain LoRA's folder: the config that puts it on exactly the adapted modules, and reading it back."""

from __future__ import annotations

import os
from collections.abc import Iterator

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from loraplex.export.plain_settings import check_plain
from loraplex.export.servers import Engine
from loraplex.io.field_types import shown
from loraplex.tuner.adapter_files import check_adapter_files
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.families import layer_depth
from loraplex.tuner.layer import AdapterLinear
from loraplex.tuner.updates import ROOT, adapted, difference

_FACTORS = (".lora_A.weight", ".lora_B.weight")


def plain_config(
    model: nn.Module, config: AdapterConfig | LoraConfig, modules: list[str], rank: int, extras: dict[str, Tensor]
) -> LoraConfig:
    """The LoraConfig that puts a LoRA of this rank on exactly these modules, beside what was trained in full."""
    wanted = set(modules)
    layers = [m for m in model.modules() if isinstance(m, (AdapterLinear, LoraLayer))]
    plain = LoraConfig(
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers),
        # Only where such tensors go along: servers refuse the mere setting.
        bias=config.bias if any(key.endswith(".bias") for key in extras) else "none",  # type: ignore[arg-type]
        modules_to_save=config.modules_to_save if extras else None,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    names = set(_module_names(model))
    # Servers know modules by the ends of their names; whole names are the last resort.
    endings = {name.rpartition(".")[2] for name in modules}
    depths = sorted({layer_depth(name, config.layers_pattern) for name in modules})
    for targets, layers_to_transform in ((endings, None), (endings, depths), (wanted, None)):
        # In order, so that equal adapters give equal files.
        plain.target_modules, plain.layers_to_transform = sorted(targets), layers_to_transform
        if {name for name in names if check_target_module_exists(plain, name)} == wanted:
            break
    return plain


def _module_names(model: nn.Module) -> Iterator[str]:
    """Names of the base model's modules, as they are without adapters."""
    for name, _ in model.named_modules():
        name = f"{name}.".removeprefix(ROOT)
        yield name.replace(".base_layer.", ".").removesuffix(".")


def partners(model: nn.Module, names: list[str], engine: Engine) -> dict[str, tuple[int, int]]:
    """Modules that the engine wants beside the adapted ones, with their weights' shapes."""
    wanted = {
        f"{stem}.{partner}"
        for stem, _, ending in (name.rpartition(".") for name in names)
        for endings, others in engine.together
        if ending in endings
        for partner in others
    } - {*names}
    modules = {name.removeprefix(ROOT): module for name, module in model.named_modules()}
    kinds = (nn.Linear, AdapterLinear, LoraLayer)
    present = {name: modules[name] for name in sorted(wanted) if isinstance(modules.get(name), kinds)}
    return {name: (module.out_features, module.in_features) for name, module in present.items()}


def export_errors(
    exported: str | os.PathLike[str], model: nn.Module, adapter_name: str = "default"
) -> dict[str, float]:
    """Module → relative error ‖ΔW − B A‖_F / ‖ΔW‖_F of an exported LoRA against the adapter it was made from.

    Raises:
        ValueError: the folder is no plain LoRA, or it does not adapt the same modules.
    """
    named = {update.module_name: update for _, update in adapted(model, adapter_name)}
    # Modules with zero factors are there for servers that want them.
    pairs = {name: pair for name, pair in read_lora(exported).items() if name in named or pair[1].any()}
    if apart := sorted(set(pairs) ^ set(named)):
        raise ValueError(f"{exported} is no export of this adapter: only one of them adapts {', '.join(apart[:5])}.")
    for name, update in named.items():
        A, B = pairs[name]
        shapes = (B.shape[0], A.shape[1]), (update.out_features, update.in_features)
        if shapes[0] != shapes[1]:
            raise ValueError(f"{exported} is no export of this adapter: {name} is {shapes[0]} in it, not {shapes[1]}.")
    return {name: difference(update, *pairs[name])[1] for name, update in named.items()}


def read_lora(folder: str | os.PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → A and B of the linear layers in a plain LoRA's file, scaling inside B.

    Raises:
        ValueError: the folder holds no plain LoRA.
    """
    settings = check_adapter_files(os.fspath(folder))
    check_plain(folder, settings)
    kind = settings["peft_type"]
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{folder} is an adapter of type {shown(kind)}, which PEFT does not know.")
    try:
        config = PeftConfig.from_pretrained(os.fspath(folder))
    except TypeError as error:
        raise ValueError(f"{folder}: {error} Correct its adapter_config.json.") from None
    if not isinstance(config, LoraConfig) or config.use_dora:
        kind = "DoRA" if isinstance(config, LoraConfig) else config.peft_type.value
        raise ValueError(f"{folder} is a {kind} adapter, not a plain LoRA.")
    tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    names = {key.rpartition(".lora_")[0] for key, t in tensors.items() if key.endswith(_FACTORS) and t.ndim == 2}
    return {name.removeprefix(ROOT): _pair(folder, name, tensors, config) for name in sorted(names)}


def _pair(
    folder: str | os.PathLike[str], name: str, tensors: dict[str, Tensor], config: LoraConfig
) -> tuple[Tensor, Tensor]:
    """A and B of the module `name`, scaling inside B."""
    for key in (f"{name}{factor}" for factor in _FACTORS):
        if key not in tensors:
            raise ValueError(f"{folder} lacks {key[:200]}: copy or download the adapter again.")
    A, B = (tensors[f"{name}{factor}"] for factor in _FACTORS)
    module = name.removeprefix(ROOT)
    r = _setting(config.rank_pattern, module, config.r)
    alpha = _setting(config.alpha_pattern, module, config.lora_alpha)
    # On parameters of experts the factors of all of them lie side by side.
    width = len(A) if config.target_parameters and A.ndim == 2 and len(A) % r == 0 else r
    if A.ndim != 2 or B.ndim != 2 or not width == len(A) == B.shape[1] or 0 in (*A.shape, *B.shape):
        raise ValueError(
            f"{folder}: the factors of {module[:200]} are A {tuple(A.shape)} and B {tuple(B.shape)}, its settings ask "
            f"for rank {r}: they must be (r, in) and (out, r). Copy or download the adapter again."
        )
    if not (A.double().isfinite().all() and B.double().isfinite().all()):
        raise ValueError(f"{folder} holds NaN or Inf on {module[:200]}: it is broken; load an earlier checkpoint.")
    return A, B.double() * (alpha / (r**0.5 if config.use_rslora else r))


def _setting(pattern: dict[str, float] | None, module: str, default: float) -> float:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)
