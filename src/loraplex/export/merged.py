"""An adapter merged into its base as a complete checkpoint, written one file at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from loraplex.export.checkpoint_files import files_of_tensors, opened
from loraplex.io.files import check_target, replaced_folder, write_tensors
from loraplex.tuner.bank import BANK
from loraplex.tuner.expert_weight import ExpertLinear
from loraplex.tuner.finite import check_finite
from loraplex.tuner.tokens import token_rows, token_wrappers
from loraplex.tuner.updates import Update, adapted

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".index.json")

_WRAPPERS = ("base_layer", "original_module", "token_adapter")
"""What PEFT puts into the names of a base model's tensors."""
_OWN = ("lora_", "trainable_tokens_")
"""How the names of PEFT's own tensors begin."""


class OtherLayout(Exception):
    """The checkpoint's tensors have other names than the model's: only loading it can tell which is which."""


@dataclass(frozen=True)
class MergedModule:
    """One merged weight."""

    module: str
    norm: float
    """‖ΔW‖_F."""
    lost: float
    """‖W′ − W − ΔW‖_F / ‖ΔW‖_F, where W′ is what the checkpoint holds: what rounding to its dtype took away."""


@dataclass(frozen=True)
class MergedExport:
    """What a merge wrote."""

    folder: str
    modules: list[MergedModule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """The same over all modules: √(Σ lost² ‖ΔW‖² / Σ ‖ΔW‖²)."""
        whole = sum(module.norm**2 for module in self.modules)
        return (sum((module.lost * module.norm) ** 2 for module in self.modules) / whole) ** 0.5 if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "lost": self.lost}


def merge_checkpoint(
    model: PeftModel,
    base: Path,
    output_dir: Path,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    safe: bool = False,
    force: bool = False,
) -> MergedExport:
    """Write the checkpoint in `base` with the adapter merged in; at most one of its files is in memory at a time.

    Args:
        model: the adapter on its base model, whose own weights are on the meta device.
        base: folder with safetensors weights, a config and a tokenizer.
        output_dir: the new folder; it appears whole or not at all.
        adapter_name: which adapter.
        dtype: of the new weights; None keeps each weight's own.
        safe: refuse to write NaN or Inf, of the base's own or by overflow in `dtype`. The adapter's are refused anyway.
        force: replace a folder that is not empty.

    Raises:
        OtherLayout: the tensors in `base` have other names than in the model.
        ValueError: ΔW is not constant, the base is quantised, or there is NaN or Inf in the adapter (see
            `loraplex.allow_nonfinite`), or where `safe` forbids it.
    """
    check_target(output_dir, force)
    layers = adapted(model, adapter_name)
    if getattr(model.get_base_model().config, "quantization_config", None) is not None:
        raise ValueError(f"{base} is quantised: merge into the unquantised checkpoint it was made from.")
    if any(isinstance(layer.get_base_layer(), ExpertLinear) for layer, _ in layers):
        raise OtherLayout(f"{base} may store the matrices of its experts one by one")
    plan = _Plan(model, base, {f.module_name: (layer, f) for layer, f in layers}, adapter_name)
    modules: list[MergedModule] = []
    with replaced_folder(output_dir) as folder:
        index: dict[str, str] = {}
        size = 0
        for file, keys in plan.files.items():
            tensors = {}
            for key, tensor in plan.read(file, keys):
                merged, module = merged_weight(tensor, plan.targets.get(key), key, dtype, safe)
                tensors[key] = plan.with_tokens(key, merged)
                modules += [module] if module else []
                index[key] = file
                size += tensors[key].nbytes
            write_tensors(folder / file, tensors)
        if len(plan.files) > 1 or SAFE_WEIGHTS_NAME not in plan.files:
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}, indent=2)
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        _copy_rest(base, folder)
        _save_config(model, folder, plan, dtype)
    return MergedExport(str(output_dir), modules, sorted({note for _, f in layers for note in f.notes()}))


class _Plan:
    """Which tensors go into which file of the merged checkpoint, and where they come from."""

    def __init__(
        self, model: PeftModel, base: Path, layers: dict[str, tuple[BaseTunerLayer, Update]], adapter_name: str
    ) -> None:
        self.base = base
        names = plain_names(model.get_base_model(), adapter_name)
        self.targets = {f"{name}.weight": pair for name, pair in layers.items()}
        # What the adapter trained in full is the only part of a meta model that is not on the meta device.
        self.trained = {key: own for key, (own, _) in names.items() if not own.is_meta}
        where = files_of_tensors(base)
        uses = Counter(id(original) for _, original in names.values())
        tied = {key for key, (_, original) in names.items() if uses[id(original)] > 1}
        # A weight that was tied to another and is changed gets a tensor of its own, and the others too.
        self.tokens = _trained_tokens(model.get_base_model(), adapter_name)
        self.untied = any(key in self.targets for key in tied) or self._differ(names, tied)
        first = {id(original): key for key, (_, original) in names.items() if key in where}
        self.sources: dict[str, str] = {}
        self.files: dict[str, list[str]] = {}
        for key, (_, original) in names.items():
            source = key if key in where else first.get(id(original))
            if source is None and key not in self.trained:
                raise OtherLayout(f"{base} has no tensor {key}")
            changed = key in self.targets or key in self.trained
            if source == key or (self.untied if key in tied else changed):
                self.sources[key] = source or ""
                self.files.setdefault(where[source] if source else max(where.values()), []).append(key)

    def _differ(self, names: dict[str, tuple[Tensor, Tensor]], tied: set[str]) -> bool:
        """Whether weights that are tied have different values after training, in full or token by token."""
        first: dict[int, str] = {}
        for key in tied:
            other = first.setdefault(id(names[key][1]), key)
            if self.tokens.get(key, (None, None))[1] is not self.tokens.get(other, (None, None))[1]:
                return True
            own, others = self.trained.get(key), self.trained.get(other)
            if (own is None) != (others is None) or (own is not None and not torch.equal(own, others)):  # type: ignore[arg-type]
                return True
        return False

    def with_tokens(self, key: str, weight: Tensor) -> Tensor:
        """`weight` with the rows of the tokens that were trained."""
        if key not in self.tokens:
            return weight
        indices, rows = self.tokens[key]
        check_finite(key, [rows])
        return weight.index_copy(0, torch.tensor(indices), rows.detach().cpu().to(weight.dtype))

    def read(self, file: str, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        with opened(self.base / file) as tensors:
            for key in keys:
                trained = self.trained.get(key)
                if trained is not None:
                    check_finite(key, [trained])
                yield key, trained.detach().cpu() if trained is not None else tensors.get_tensor(self.sources[key])


def _trained_tokens(model: nn.Module, adapter_name: str) -> dict[str, tuple[list[int], Tensor]]:
    """Name of a weight in the plain model → the rows that the adapter trained, and their values."""
    return {
        f"{name}.weight": token_rows(wrapper, adapter_name)
        for name, wrapper in token_wrappers(model, adapter_name, remove_duplicate=False)
    }


def plain_names(model: nn.Module, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Name in the plain model's state dict → its tensor, the adapter's if it has one, and the base model's."""
    own: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        parts = key.split(".")
        if BANK in parts or any(part.endswith("_factors") or part.startswith(_OWN) for part in parts):
            continue
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            if parts[at + 1] == adapter_name:
                own[".".join(parts[:at] + parts[at + 2 :])] = tensor
        else:
            base[".".join(part for part in parts if part not in _WRAPPERS)] = tensor
    return {key: (own.get(key, base.get(key)), base.get(key, own.get(key))) for key in {**base, **own}}  # type: ignore


@torch.no_grad()
def merged_weight(
    weight: Tensor, target: tuple[BaseTunerLayer, Update] | None, key: str, dtype: torch.dtype | None, safe: bool
) -> tuple[Tensor, MergedModule | None]:
    kind = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    if target is None:
        return weight.to(kind), None
    layer, factors = target
    # float64: what rounding takes from a float32 weight would not show in float32.
    delta = factors.delta_weight().double().cpu()
    delta = delta.T if layer.fan_in_fan_out else delta  # type: ignore[attr-defined]
    if weight.shape != delta.shape or not weight.is_floating_point():
        raise ValueError(
            f"{key} is {tuple(weight.shape)} of {weight.dtype} in the base's files, and its update is "
            f"{tuple(delta.shape)}: give the unquantised model that the adapter was trained on."
        )
    total = delta + weight
    if safe and not total.isfinite().all():
        raise ValueError(f"{key} would hold NaN or Inf: the adapter is broken; load an earlier checkpoint.")
    stored, norm = total.to(kind), delta.norm().item()
    lost = (stored - total).norm().item() / norm if norm else 0.0
    return stored, MergedModule(factors.module_name, norm, lost)


def _copy_rest(base: Path, folder: Path) -> None:
    """Tokenizer, generation settings, code: all files but the weights.

    Raises:
        ValueError: one is a link that leads out of the base's own files: what it points to might be anything.
    """
    for path in base.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            if not is_own(path, base):
                raise ValueError(
                    f"{path} is a link to {os.path.realpath(path)}, outside of the base model: put the file itself "
                    "there if it belongs to the model, or remove the link."
                )
            shutil.copyfile(path, folder / path.name)


def is_own(path: Path, base: Path) -> bool:
    """Whether a file in the folder `base` lies in it, or where the hub's cache keeps the files of its snapshots."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(base))
    # In the cache a snapshot's files are links: models--x/snapshots/REVISION/config.json → models--x/blobs/HASH.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return real.is_relative_to(root) or real.is_relative_to(blobs)


def _save_config(model: PeftModel, folder: Path, plan: _Plan, dtype: torch.dtype | None) -> None:
    plain: Any = model.get_base_model()
    config = plain.config
    config.architectures = [type(plain).__name__]
    if plan.untied:
        config.tie_word_embeddings = False
    if dtype is not None:
        config.dtype = dtype
    os.remove(folder / "config.json")
    config.save_pretrained(folder)
