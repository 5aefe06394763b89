"""What an adapter's files say, computed by themselves: naive float64 formulas, no code of the package.

`Expectation` holds a function x → Δy for each adapted module, and the tensors that are trained in full. `Invalid` is
raised for files that say nothing sensible: a loader that takes them is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.tuner import registry
from tests.fuzz import raw

ROOT = "base_model.model."
BANK = "loraplex_bank"
_CLASSES = {cls.method: cls for cls in registry.METHODS.values()}
METHODS = tuple(_CLASSES)
Update = Callable[[Tensor], Tensor]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Invalid(Exception):
    """The files contradict themselves."""


@dataclass
class Expectation:
    """What a model with this adapter must do."""

    updates: dict[str, Update] = field(default_factory=dict)
    """Module → its update of the output, float64."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Plain parameter name → tensor that was trained in full."""
    finite: bool = True
    moderate: bool = True
    """No factor is so large that float32 overflows where float64 does not, nor a sign's so small that it underflows."""


def is_number(value: Any) -> bool:
    """A finite number that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _steps(value: Any) -> bool:
    return _count(value) or (isinstance(value, float) and 0 < value < 1)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _mapping(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and check(v) for k, v in value.items())


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, str) or _strings(value)


COMMON: dict[str, Callable[[Any], bool]] = {
    "r": _count,
    "lora_alpha": _positive,
    "lora_dropout": lambda value: is_number(value) and 0 <= value < 1,
    "use_rslora": _flag,
    "target_modules": _optional(_names),
    "exclude_modules": _optional(_names),
    "layers_to_transform": _optional(
        lambda v: _count(v, -(2**70)) or (isinstance(v, list) and all(_count(i, -(2**70)) for i in v))
    ),
    "layers_pattern": _optional(_names),
    "rank_pattern": _optional(_mapping(_count)),
    "alpha_pattern": _optional(_mapping(_positive)),
    "modules_to_save": _optional(_strings),
    "bias": _one_of("none", "all", "lora_only"),
    "init_weights": _flag,
    "loraplex_version": _optional(lambda value: isinstance(value, str)),
}
OWN: dict[str, dict[str, Callable[[Any], bool]]] = {
    "MULTILORA": {"num_modules": _count, "scaling_granularity": _one_of("channel", "module")},
    "MASA": {
        "num_experts": _count,
        "share_layers": _optional(_count),
        "expert_mixing": _one_of("router", "sum", "concat"),
    },
    "ASLORA": {
        "merge_start_step": _optional(_steps),
        "merge_interval": _optional(_steps),
        "num_merges": _optional(lambda value: _count(value, 0)),
        "merge_candidates": _one_of("adjacent", "all"),
        "merge_distance": _one_of("factor", "update"),
    },
    "DUALLORA": {
        "r_magnitude": _optional(_count),
        "r_direction": _optional(_count),
        "warmup_steps": _optional(_steps),
        "init_std": _positive,
        "compute": _one_of("auto", "added", "apart", "reference"),
        "cache_delta": _flag,
    },
}
"""Field → whether a value is one that its documentation allows."""


def check_settings(config: Any) -> None:
    """Raise Invalid for a field whose value has another type or lies outside its range."""
    if not isinstance(config, dict) or config.get("peft_type") not in METHODS:
        raise Invalid("no adapter of ours")
    for name, check in {**COMMON, **OWN[config["peft_type"]]}.items():
        if name in config and not check(config[name]):
            raise Invalid(f"{name}={str(config[name])[:40]}")


def read_config(folder: Path) -> Any:
    """adapter_config.json; Invalid where it is none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise Invalid("config: no file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Invalid(f"config: {type(error).__name__}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights by their keys without the prefix; Invalid where the file does not hold together."""
    try:
        tensors = raw.read(folder / "adapter_model.safetensors")
        plain = {_without_name(key.removeprefix(ROOT)): value.tensor() for key, value in tensors.items()}
    except Exception as error:
        raise Invalid(f"weights: {type(error).__name__} {error}") from error
    if len(plain) < len(tensors):
        raise Invalid("a key twice, once with the prefix")
    return plain


def _without_name(key: str) -> str:
    """A live model's keys name its adapter, "default" mostly; the tensor is no other."""
    return re.sub(r"_(factors|shared)\.default\.", r"_\1.", key)


def expect(config: Any, tensors: dict[str, Tensor], modules: Mapping[str, tuple[int, int]]) -> Expectation:
    """What a model whose `modules` (name → out, in) are adapted must compute."""
    check_settings(config)
    return _Reader(config, dict(tensors), dict(modules)).read()


class _Reader:
    """Takes each tensor once; one that is left over belongs to nothing."""

    def __init__(self, config: dict[str, Any], left: dict[str, Tensor], modules: dict[str, tuple[int, int]]) -> None:
        self.config, self.left, self.modules = config, left, modules
        self.method = config["peft_type"]
        self.found = Expectation()
        self.shared: dict[str, Tensor] = {}

    def read(self) -> Expectation:
        families: dict[str, list[str]] = {}
        for name in sorted(self.modules, key=lambda name: _depth(name)):
            families.setdefault(_role(name), []).append(name)
        for family, members in families.items():
            for index, name in enumerate(members):
                self.found.updates[name] = self._update(name, family, index, members)
        for key in list(self.left):
            self.found.extras[key] = self._extra(key)
        return self.found

    def _update(self, name: str, family: str, index: int, members: list[str]) -> Update:
        out, width = self.modules[name]
        r = _pattern(self.config.get("rank_pattern"), name, self._setting("r"))
        alpha = _pattern(self.config.get("alpha_pattern"), name, self._setting("lora_alpha"))
        scale = alpha / (r**0.5 if self._setting("use_rslora") else r)
        build = {"MULTILORA": self._multilora, "MASA": self._masa, "ASLORA": self._aslora, "DUALLORA": self._dual}
        return build[self.method](name, family, index, members, r, alpha, scale, out, width)

    def _multilora(self, name: str, family: str, index: int, members: Any, r: int, alpha: float, scale: float,
                   out: int, width: int) -> Update:  # fmt: skip
        n = self._setting("num_modules")
        channels = out if self._setting("scaling_granularity") == "channel" else 1
        A, B = self._own(name, "lora_A", (n * r, width)), self._own(name, "lora_B", (out, n * r))
        c = self._own(name, "lora_scaling", (n, channels))
        delta = sum(c[i][:, None] * (B[:, i * r : i * r + r] @ A[i * r : i * r + r]) for i in range(n))
        return lambda x: x @ (scale * delta).T

    def _masa(self, name: str, family: str, index: int, members: Any, r: int, alpha: float, scale: float,
              out: int, width: int) -> Update:  # fmt: skip
        n, mixing = self._setting("num_experts"), self._setting("expert_mixing")
        group = index // (self._setting("share_layers") or n)
        A = self._common(f"{family}__lora_A_{group}", (n * r, width))
        B = self._own(name, "lora_B", (out, n * r if mixing == "concat" else r))
        experts = [A[i * r : i * r + r] for i in range(n)]
        if mixing == "concat":
            return lambda x: scale * x @ A.T @ B.T
        if mixing == "sum":
            return lambda x: scale * sum(x @ expert.T for expert in experts) @ B.T
        R = self._own(name, "lora_router", (n, width))

        def routed(x: Tensor) -> Tensor:
            gates = (x @ R.T).softmax(-1)
            return scale * sum(gates[..., i : i + 1] * (x @ experts[i].T) for i in range(n)) @ B.T

        return routed

    def _aslora(self, name: str, family: str, index: int, members: list[str], r: int, alpha: float, scale: float,
                out: int, width: int) -> Update:  # fmt: skip
        merges = self._state(f"{family}__merges", (2, len(members))).tolist()
        owners = merges[0]
        if any(not 0 <= owner < len(members) or owners[owner] != owner for owner in owners):
            raise Invalid(f"merge map {owners}")
        A = self._common(f"{family}__lora_A", (r, width))
        B = self._common(f"{family}__lora_B_{owners[index]}", (out, r))
        for layer, owner in enumerate(owners):
            # Beside those in use there may be the B that a layer gave up.
            if layer != owner and f"{self._prefix}{family}__lora_B_{layer}" in self.left:
                self._common(f"{family}__lora_B_{layer}", (out, r))
        return lambda x: scale * x @ A.T @ B.T

    def _dual(self, name: str, family: str, index: int, members: Any, r: int, alpha: float, scale: float,
              out: int, width: int) -> Update:  # fmt: skip
        r1, r2 = self._setting("r_magnitude"), self._setting("r_direction")
        if r1 is not None and r2 is not None:
            r = r1 + r2
        r2 = r - r1 if r1 is not None else (r // 2 if r2 is None else r2)
        r1 = r - r2
        done, steps = self._state("warmup", (2,)).tolist()
        if done < 0 or steps < 0:
            raise Invalid(f"warm-up {done} of {steps}")
        A, B = self._own(name, "lora_A", (r1, width)), self._own(name, "lora_B", (out, r1))
        C, D = self._own(name, "lora_C", (r2, width)), self._own(name, "lora_D", (out, r2))
        self.found.moderate &= all(bool(((t == 0) | (t.abs() > 1e-15)).all()) for t in (C, D))
        scale = alpha / (r1 * r2) ** (0.25 if self._setting("use_rslora") else 0.5)
        delta = scale * min(1.0, done / max(steps, 1)) * (B @ A).clamp(min=0) * torch.where(D @ C > 0, 1.0, -1.0)
        return lambda x: x @ delta.T

    def _setting(self, name: str) -> Any:
        """A field's value; what the file leaves out has the class's default."""
        return self.config.get(name, getattr(_CLASSES[self.method], name))

    @property
    def _prefix(self) -> str:
        return f"{BANK}.{self.method.lower()}_shared."

    def _own(self, module: str, factor: str, shape: tuple[int, ...]) -> Tensor:
        return self._take(f"{module}.{self.method.lower()}_factors.{factor}", shape)

    def _common(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.shared:
            self.shared[name] = self._take(f"{self._prefix}{name}", shape)
        return self.shared[name]

    def _state(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.shared:
            tensor = self._take(f"{self._prefix}{name}", shape, floats=False)
            self.shared[name] = tensor
        return self.shared[name]

    def _take(self, key: str, shape: tuple[int, ...], floats: bool = True) -> Tensor:
        if key not in self.left:
            raise Invalid(f"{key} is missing")
        tensor = self.left.pop(key)
        if tuple(tensor.shape) != shape:
            raise Invalid(f"{key} is {tuple(tensor.shape)}, not {shape}")
        if floats != (tensor.dtype in _FLOATS) or tensor.dtype == torch.bool:
            raise Invalid(f"{key} is {tensor.dtype}")
        if floats:
            self.found.finite &= bool(tensor.float().isfinite().all())
            self.found.moderate &= bool((tensor.double().abs() < 1e15).all())
            return tensor.double()
        return tensor

    def _extra(self, key: str) -> Tensor:
        """A tensor of a module that is trained in full, or of a bias; Invalid for any other."""
        module, _, last = key.rpartition(".")
        names = self.config.get("modules_to_save") or []
        if self.config.get("task_type") == "SEQ_CLS":
            names = [*names, "classifier", "score"]
        full = any(part == name or part.endswith(f".{name}") for name in names for part in _parents(key))
        bias = self._setting("bias")
        adapted = module.endswith(".base_layer") and module.removesuffix(".base_layer") in self.modules
        trained = last == "bias" and (adapted if bias == "lora_only" else bias == "all" and module not in self.modules)
        if not full and not trained:
            raise Invalid(f"{key} belongs to nothing")
        tensor = self.left.pop(key)
        if tensor.dtype not in _FLOATS:
            raise Invalid(f"{key} is {tensor.dtype}")
        self.found.finite &= bool(tensor.float().isfinite().all())
        return tensor


def targeted(config: dict[str, Any], names: list[str]) -> list[str] | None:
    """Which of these linear modules the settings name; None where only PEFT can say."""
    targets = config.get("target_modules")
    # PEFT adapts nothing in what is trained in full.
    full = [rf"(^|.*\.){name}($|\..*)" for name in config.get("modules_to_save") or []]
    names = [name for name in names if not any(re.match(pattern, name) for pattern in full)]
    simple = not any(config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if not simple or targets is None or targets == "all-linear":
        return None
    if isinstance(targets, str):
        try:
            return [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise Invalid(f"target_modules={targets}") from error
    return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _role(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name, count=1).replace(".", "__")


def _depth(name: str) -> int:
    return int(next((part for part in name.split(".") if part.isdigit()), 0))


def _pattern(pattern: Any, name: str, default: Any) -> Any:
    try:
        return next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except re.error as error:
        raise Invalid(f"pattern {error}") from error
