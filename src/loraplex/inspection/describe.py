"""What an adapter consists of: parameters per module, which layers share what, what has been merged when."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from loraplex.export.lora_format import read_lora
from loraplex.export.plain_settings import check_plain
from loraplex.io.field_types import shown
from loraplex.methods.aslora import check_merges
from loraplex.methods.dual_lora.method import check_warmup
from loraplex.numerics.lowrank import svd_of_product
from loraplex.tuner.adapter_files import check_adapter_files
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.sharing import role

_ROOT = "base_model.model."


@dataclass(frozen=True)
class ModuleRow:
    """An adapted module: what it owns, and which shared factors it reads."""

    module: str
    parameters: int
    """Number of parameters that belong to this module alone."""
    factors: dict[str, list[int]]
    """Own factor → shape."""
    rank: int | None = None
    """Of a plain LoRA: the true rank of B A, without padding."""
    norm: float | None = None
    """Of a plain LoRA: ‖ΔW‖_F."""


@dataclass(frozen=True)
class SharedRow:
    """A factor that several layers read, stored once."""

    family: str
    """The modules' name, with N in place of the layer's index."""
    factor: str
    shape: list[int]
    parameters: int
    layers: list[int]
    """Which layers of the family read it, counted from 0 in order of depth."""


@dataclass(frozen=True)
class Merge:
    """One of ASLoRA's merges: at `step`, `layer` gave up its B; it reads the B of `reads` now."""

    step: int
    family: str
    layer: int
    reads: int


@dataclass
class Description:
    """An adapter at a glance."""

    method: str
    base_model: str | None
    r: int | None
    lora_alpha: float | None
    parameters: int = 0
    """Parameters that are stored."""
    file_bytes: int | None = None
    modules: list[ModuleRow] = field(default_factory=list)
    shared: list[SharedRow] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    warmup: tuple[int, int] | None = None
    """Dual LoRA: warm-up steps done, and steps in all (0: not known yet)."""
    fully_trained: dict[str, int] = field(default_factory=dict)
    """Modules and biases that are trained and saved in full → parameters."""
    against: dict[str, float] = field(default_factory=dict)
    """Of an exported LoRA: module → relative error against the adapter it came from."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def describe(source: str | os.PathLike[str] | nn.Module, adapter_name: str = "default") -> Description:
    """Describe a saved adapter or one on a model; a saved one needs no base model.

    Args:
        source: folder of a saved adapter, or a PeftModel.
        adapter_name: which adapter of the model.

    Raises:
        ValueError: the folder holds no readable adapter, or the model no adapter of that name.
    """
    if isinstance(source, nn.Module):
        configs: dict[str, PeftConfig] = source.peft_config  # type: ignore[assignment]
        if adapter_name not in configs:
            raise ValueError(f"The model has no adapter {adapter_name!r}, only {sorted(configs)}.")
        state = get_peft_model_state_dict(source, adapter_name=adapter_name, save_embedding_layers=False)
        return _describe(configs[adapter_name].to_dict(), state, None)
    folder = os.fspath(source)
    config = _settings(folder)
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(weights):
        raise ValueError(f"{folder} holds no adapter: {SAFETENSORS_WEIGHTS_NAME} is missing.")
    with safe_open(weights, framework="pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    description = _describe(config, state, os.path.getsize(weights))
    if config["peft_type"] == "LORA" and not config.get("use_dora"):
        svds = {module: svd_of_product(A, B) for module, (A, B) in read_lora(folder).items()}
        description.modules = [
            replace(row, rank=svd.rank(), norm=svd.norm) if (svd := svds.get(row.module)) else row
            for row in description.modules
        ]
    return description


def _settings(folder: str) -> dict[str, Any]:
    """The settings of a saved adapter; those of our methods are checked, and have all their fields."""
    settings = check_adapter_files(folder)
    check_plain(folder, settings)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(settings["peft_type"], PeftConfig)
    return cls.from_pretrained(folder).to_dict() if issubclass(cls, AdapterConfig) else settings


def _describe(config: dict[str, Any], state: dict[str, Tensor], file_bytes: int | None) -> Description:
    # A str-enum in a live config, a plain string in a file.
    method = getattr(config["peft_type"], "value", config["peft_type"])
    description = Description(
        method, config.get("base_model_name_or_path"), config.get("r"), config.get("lora_alpha"), file_bytes=file_bytes
    )
    own: dict[str, dict[str, list[int]]] = defaultdict(dict)
    shared: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, mark, factor = _split(key.removeprefix(_ROOT), method.lower())
        if mark == "shared":
            shared[factor] = tensor
        elif mark == "factors":
            own[module][factor] = list(tensor.shape)
        else:
            description.fully_trained[module] = tensor.numel()
    description.modules = [ModuleRow(m, sum(map(prod, f.values())), f) for m, f in sorted(own.items(), key=_by_depth)]
    _add_shared(description, shared, config)
    rows: list[ModuleRow | SharedRow] = [*description.modules, *description.shared]
    description.parameters = sum(row.parameters for row in rows) + sum(description.fully_trained.values())
    return description


def _split(key: str, method: str) -> tuple[str, str, str]:
    """(module, "factors" | "shared" | "", factor) of a key in an adapter file."""
    for mark in ("factors", "shared"):
        module, found, factor = key.partition(f".{method}_{mark}.")
        if found:
            return module, mark, factor
    module, found, factor = key.partition(".lora_")
    return (module, "factors", f"lora_{factor.removesuffix('.weight')}") if found else (key, "", "")


def _by_depth(item: tuple[str, Any]) -> list[tuple[int, str]]:
    # "layers.10" after "layers.9".
    return [(int(p), "") if re.fullmatch(r"\d{1,9}", p, re.ASCII) else (-1, p) for p in item[0].split(".")]


def _add_shared(description: Description, shared: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name, tensor in shared.items():
        family, _, factor = name.rpartition("__")
        if factor in ("merges", "warmup"):
            _check_state(name, factor, tensor)
        if factor == "merges":
            description.merges += [
                Merge(step, family, layer, int(tensor[0, layer]))
                for layer, step in enumerate(tensor[1, :-1].tolist())  # the last: see AsLoraShared
                if step
            ]
        elif factor == "warmup":
            description.warmup = (int(tensor[0]), int(tensor[1]))
    description.merges.sort(key=lambda merge: (merge.step, merge.family))
    for name, tensor in shared.items():
        family, _, factor = name.rpartition("__")
        if factor.startswith("lora_"):
            layers = _readers(family, factor, shared, description, config)
            row = SharedRow(family, factor, list(tensor.shape), tensor.numel(), layers)
            description.shared.append(row)
    description.shared.sort(key=lambda row: (row.family, row.factor[:6], row.layers))


def _check_state(name: str, factor: str, state: Tensor) -> None:
    """Raise a ValueError unless `state` is one that a schedule can be in."""
    fits = state.ndim == 2 and len(state) == 2 and state.numel() > 0 if factor == "merges" else state.shape == (2,)
    if state.dtype != torch.int64 or not fits:
        raise ValueError(
            f"{shown(name)} is {state.dtype} {tuple(state.shape)} in the adapter's weights, which no {factor} can be: "
            "the file is broken; copy or download the adapter again."
        )
    if factor == "merges":
        check_merges(name, state)
    else:
        check_warmup(state)


def _readers(
    family: str, factor: str, shared: dict[str, Tensor], description: Description, config: dict[str, Any]
) -> list[int]:
    """Layers of `family` that read `factor`."""
    merges = shared.get(f"{family}__merges")
    if merges is not None:
        owner = factor.rpartition("_")[2]
        mapped = merges[0].tolist()
        return [layer for layer, m in enumerate(mapped) if not owner.isdigit() or m == int(owner)]
    group = factor.rpartition("_")[2]
    if not config.get("num_experts") or not re.fullmatch(r"\d{1,6}", group, re.ASCII):
        raise ValueError(
            f"The adapter's weights hold {shown(f'{family}__{factor}')}, but nothing that says which layers read it: "
            "the file is broken; copy or download the adapter again."
        )
    # MASA: groups of adjacent layers of the family.
    depth = sum(role(row.module, config.get("layers_pattern")) == family for row in description.modules)
    size = config["share_layers"] or config["num_experts"]
    start = int(group) * size
    return list(range(start, min(start + size, depth)))
