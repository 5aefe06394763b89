"""What an adapter consists of: parameters per module, which layers share what, what has been merged when."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from loraplex.export.lora_format import read_lora
from loraplex.export.plain_settings import check_plain
from loraplex.io.field_types import shown
from loraplex.numerics.lowrank import svd_of_product
from loraplex.tuner.adapter_files import check_adapter_files
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.families import role
from loraplex.tuner.findings import Finding, as_dict, find
from loraplex.tuner.sharing import foreign

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
    findings: list[Finding] = field(default_factory=list)
    """What the method tells of the adapter's schedule."""
    fully_trained: dict[str, int] = field(default_factory=dict)
    """Modules and biases that are trained and saved in full → parameters."""
    against: dict[str, float] = field(default_factory=dict)
    """Of an exported LoRA: module → relative error against the adapter it came from."""

    def finding(self, key: str) -> Any:
        """What the method tells under this key, such as "merges"; a KeyError lists the keys that there are."""
        return find(self.findings, key)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; each finding under its own key."""
        plain = asdict(replace(self, findings=[]))
        del plain["findings"]
        return plain | as_dict(self.findings, taken=plain)


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
        # Experts' layers have a name of their own in the file, beside the parameter's.
        module, mark, factor = _split(key.removeprefix(_ROOT).replace(".adapted_", "."), method.lower())
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
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(description.method)  # type: ignore[call-overload]
    kind = cls.shared_cls if cls is not None and issubclass(cls, AdapterConfig) else None
    if kind is None:
        if shared and cls is None:
            raise ValueError(
                f"The adapter shares factors between layers, and its type {shown(description.method)} is not known "
                "here, so it can't be said which: import the module that registers the type first (on the command "
                "line: --allow-code module:Class)."
            )
        if shared:
            raise foreign(next(iter(shared)))
        return
    for name, tensor in shared.items():
        if not tensor.is_floating_point() and name.rpartition("__")[2] not in kind.state_names:
            raise foreign(name)
    description.findings = kind.stored_findings(shared)
    depths = Counter(role(row.module, config.get("layers_pattern")) for row in description.modules)
    for name, tensor in shared.items():
        family, _, factor = name.rpartition("__")
        if tensor.is_floating_point():
            layers = kind.stored_readers(config, shared, family, factor, depths[family])
            description.shared.append(SharedRow(family, factor, list(tensor.shape), tensor.numel(), layers))
    description.shared.sort(key=lambda row: (row.family, row.factor[:6], row.layers))
