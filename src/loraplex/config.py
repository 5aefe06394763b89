"""The settings that all methods share, under LoraConfig's names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from huggingface_hub import ModelCard, ModelCardData
from packaging.version import Version
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from loraplex.version import __version__

_BIAS = ("none", "all", "lora_only")
_CARD_MARK = "<!-- loraplex: how to load -->"


@dataclass
class AdapterConfig(PeftConfig):
    """Settings of one adapter. Abstract: use `MasaConfig`, `AsLoraConfig`, `DualLoraConfig`, `MultiLoraConfig`.

    Every field means what it means in `peft.LoraConfig`; moving from LoRA is a change of the class name.

    Raises:
        ValueError: a setting is out of range or can't be honoured; the message names the value and the remedy.
    """

    method: ClassVar[str]
    """Name of the PEFT type, for example "MASA"."""
    title: ClassVar[str]
    """Name and source of the method, for people."""
    factors_cls: ClassVar[type[Any]]
    """The method's `Factors`."""
    shared_cls: ClassVar[type[Any] | None]
    """The method's `SharedFactors`, or None."""

    r: int = 8
    """Rank of the factors."""
    lora_alpha: float = 8
    """Strength of the update: `scaling = lora_alpha / r`."""
    lora_dropout: float = 0.0
    """Probability with which an element of the adapter's input is dropped while training."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` (rank-stabilised LoRA) instead of `lora_alpha / r`."""
    target_modules: list[str] | str | None = None
    """Modules to adapt: names or name endings, a regular expression, "all-linear", or None for PEFT's default."""
    exclude_modules: list[str] | str | None = None
    """Modules to leave alone: names or name endings, or a regular expression."""
    layers_to_transform: list[int] | int | None = None
    """Depths to adapt; None adapts every layer."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers ("layers", "h"), where a module's name holds more than one number."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some modules: name ending or regular expression → r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other strengths for some modules: name ending or regular expression → lora_alpha."""
    modules_to_save: list[str] | None = None
    """Further modules that are trained in full and saved with the adapter, such as a classification head."""
    bias: str = "none"
    """Which biases of the base model are trained: "none", "all" or "lora_only" (those of adapted modules)."""
    init_weights: bool = True
    """True starts at the base model's function; False draws random factors (for tests)."""
    loraplex_version: str | None = None
    """Version that wrote the adapter; filled in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method)
        self.loraplex_version = self.loraplex_version or __version__
        if isinstance(self.target_modules, list):
            # A set, as PEFT's own configs have it: matching asks for membership, and order means nothing.
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_common()

    def _check_common(self) -> None:
        check_count("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            check_count(f"rank_pattern[{pattern!r}]", rank)
        check_number("lora_alpha", self.lora_alpha)
        for pattern, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{pattern!r}]", alpha)
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} is not a probability: use 0 ≤ lora_dropout < 1.")
        if self.bias not in _BIAS:
            raise ValueError(f"bias={self.bias!r} is unknown: use one of {', '.join(map(repr, _BIAS))}.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} can't be used with target_modules="
                f"{self.target_modules!r}: give target_modules as a list, or put the layers into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None and not self.shares_across_layers:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: "
                "set layers_to_transform too, or leave layers_pattern out."
            )

    @property
    def shares_across_layers(self) -> bool:
        """Whether layers read factors of other layers (MASA, ASLoRA)."""
        return False

    def holding(self, rank: int, configs: list[AdapterConfig]) -> AdapterConfig:
        """Settings of an adapter that can hold any sum of rank `rank` of adapters with these configs; scaling is 1.

        Raises:
            ValueError: no adapter of this method can.
        """
        raise ValueError(f"Updates of {self.title} don't add up to one adapter: merge them (merge_adapter) instead.")

    def rank(self, module_name: str) -> int:
        """Rank on the module `module_name`, `rank_pattern` taken into account."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module_name), self.r)

    def alpha(self, module_name: str) -> float:
        """Strength on the module `module_name`, `alpha_pattern` taken into account."""
        return self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module_name), self.lora_alpha)

    def scaling(self, module_name: str) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`."""
        rank = self.rank(module_name)
        return self.alpha(module_name) / (rank**0.5 if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; sets come as sorted lists, so that equal configs give equal files."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and say in the model card what a reader has to import."""
        super().save_pretrained(save_directory, **kwargs)
        self._write_model_card(save_directory)

    def _write_model_card(self, directory: str) -> None:
        # PEFT can't load the type without the import and ends in a bare KeyError: the card is where people look.
        path = os.path.join(directory, "README.md")
        card = ModelCard.load(path) if os.path.isfile(path) else ModelCard.from_template(ModelCardData())
        if _CARD_MARK not in card.text:
            card.data["tags"] = sorted({*(card.data.get("tags") or []), "loraplex", self.method.lower()})
            card.text += (
                f"\n\n{_CARD_MARK}\n## How to load\n\n"
                f"This is a {self.title} adapter. `pip install loraplex`, then:\n\n"
                "```python\nimport loraplex  # registers the adapter's type with PEFT\n"
                "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, adapter)\n```\n"
            )
            card.save(path)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> AdapterConfig:
        """Read `adapter_config.json`, and check the weights beside it before any model is touched.

        Raises:
            ValueError: the config comes from a newer version, or the weights file is not a whole safetensors file.
        """
        folder = os.path.join(str(pretrained_model_name_or_path), subfolder or "")
        if os.path.isdir(folder):
            check_adapter_files(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # Read from a file: if its weights turn out not to fit, the adapter is taken off the model again.
        config._unproven = True
        weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        config._weights = weights if os.path.isdir(folder) else None
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse unknown fields: PEFT would drop them with a warning and load another adapter than was saved."""
        unknown = sorted(set(kwargs) - {f.name for f in fields(cls)})
        written_by = kwargs.get("loraplex_version") or "unknown"
        if unknown:
            newer = written_by != "unknown" and Version(written_by) > Version(__version__)
            remedy = "pip install -U loraplex" if newer else f"remove the field from {CONFIG_NAME}"
            raise ValueError(
                f"{CONFIG_NAME} has fields that loraplex {__version__} does not know: {', '.join(unknown)} "
                f"(written by loraplex {written_by}). Remedy: {remedy}."
            )
        return super().check_kwargs(**kwargs)


def unscaled(config: Any, r: int, **settings: Any) -> Any:
    """`config` with another rank, and scaling 1 everywhere."""
    plain = {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return replace(config, **plain, **settings)


def check_adapter_files(folder: str) -> None:
    """Check that `folder` holds an adapter that can be read: JSON, and a whole safetensors file.

    Raises:
        ValueError: names the file and the remedy.
    """
    config_file = os.path.join(folder, CONFIG_NAME)
    try:
        with open(config_file, encoding="utf-8") as file:
            settings = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no adapter: {CONFIG_NAME} is missing.") from None
    except ValueError as error:
        raise ValueError(f"{config_file} is not JSON ({error}): copy or download the adapter again.") from None
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(weights):
        try:
            # Opening checks the header against the file's length: a truncated file is found here.
            with safe_open(weights, framework="pt") as tensors:
                keys = list(tensors.keys())
        except SafetensorError as error:
            raise ValueError(
                f"{weights} is not a whole safetensors file ({error}): copy or download the adapter again."
            ) from None
        marks = [f".{(settings.get('peft_type') or '').lower()}_{kind}." for kind in ("factors", "shared")]
        if settings.get("modules_to_save") and all(any(mark in key for mark in marks) for key in keys):
            raise ValueError(
                f"{weights} lacks the modules that were trained in full ({', '.join(settings['modules_to_save'])}): "
                "copy or download the adapter again."
            )
    elif os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
        raise ValueError(
            f"{os.path.join(folder, WEIGHTS_NAME)} is a pickle, which can run code when it is read; "
            "loraplex reads safetensors only: save the adapter again with safe_serialization=True."
        )


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Raise a ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")


def check_number(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is a finite positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a positive number.")


def check_steps(name: str, value: object) -> None:
    """Raise a ValueError unless `value` counts steps (integer ≥ 1) or is a fraction of the run (0 < value < 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} must be a number of steps or a fraction of the run.")
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"{name}={value} as a fraction of the run must lie between 0 and 1; steps are integers.")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{name}={value} must be at least 1 step.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, choices))}.")
