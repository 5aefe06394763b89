"""The settings that all methods share, under LoraConfig's names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from peft import PeftConfig, TaskType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key

from loraplex.io.field_types import check_types, fits, shown
from loraplex.tuner.adapter_files import check_adapter_files
from loraplex.tuner.checks import check_choice, check_count, check_number, is_newer
from loraplex.tuner.lora_fields import unknown_field
from loraplex.tuner.model_card import say_how_to_load
from loraplex.tuner.patterns import check_pattern
from loraplex.version import __version__

_BIAS = ("none", "all", "lora_only")
_LARGEST_RANK = 2**16
MOST_PARTS = 1024
"""Experts or modules side by side; the papers use up to eight."""


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
    """Name of the method, for people."""
    source: ClassVar[str] = ""
    """Where its equation comes from, for people."""
    factors_cls: ClassVar[type[Any]]
    """The method's `Factors`."""
    shared_cls: ClassVar[type[Any] | None] = None
    """The method's `SharedFactors`, or None."""

    rank_fields: ClassVar[tuple[str, ...]] = ("rank_pattern",)
    """Fields beside r that say what the ranks are."""
    training_fields: ClassVar[tuple[str, ...]] = ("init_weights",)
    """Fields that say how an adapter starts or is trained, and nothing about what it computes."""

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
    target_parameters: list[str] | None = None
    """Bare parameters to adapt, by name ending: stacks of experts such as "mlp.experts.gate_up_proj", routers."""
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
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings are trained and saved: indices into the input embedding, or module name → indices."""
    ensure_weight_tying: bool = False
    """Keep what `modules_to_save` or `trainable_token_indices` trains tied to the modules that the base ties to it."""
    bias: str = "none"
    """Which biases of the base model are trained: "none", "all" or "lora_only" (those of adapted modules)."""
    init_weights: bool = True
    """True starts at the base model's function; False draws random factors (for tests)."""
    loraplex_version: str | None = None
    """Version that wrote the adapter; filled in."""

    def __new__(cls, *args: Any, **settings: Any) -> AdapterConfig:
        """A new config, after a check of the names of its settings; the dataclass's own error names no remedy.

        Raises:
            TypeError: a setting is unknown, or is LoRA's alone.
        """
        for name in settings.keys() - {f.name for f in fields(cls)}:
            raise unknown_field(cls, name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_numbers()
        check_types(type(self), vars(self))
        if self.task_type is not None:
            check_choice("task_type", self.task_type, tuple(kind.value for kind in TaskType))
        if self.peft_type not in (None, self.method):
            raise ValueError(
                f"peft_type={shown(self.peft_type)} is not that of {type(self).__name__}: {self.method!r}."
            )
        super().__post_init__()
        self.peft_type = PeftType(self.method)
        self.loraplex_version = self.loraplex_version or __version__
        for name in ("target_modules", "exclude_modules"):
            if not isinstance(value := getattr(self, name), str | None):
                # A set, as PEFT's own configs have it: matching asks for membership, and order means nothing.
                setattr(self, name, set(value))
        if self.modules_to_save is not None:
            # PEFT adds a classifier's head to it.
            self.modules_to_save = list(self.modules_to_save)
        self._check_common()
        self._check_tokens()
        self._check_patterns()

    def _check_numbers(self) -> None:
        check_count("r", self.r, maximum=_LARGEST_RANK)
        check_number("lora_alpha", self.lora_alpha)
        if not fits(self.lora_dropout, float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={shown(self.lora_dropout)} is not a probability: use 0 ≤ lora_dropout < 1.")
        check_choice("bias", self.bias, _BIAS)

    def _check_common(self) -> None:
        for pattern, rank in self.rank_pattern.items():
            check_count(f"rank_pattern[{shown(pattern)}]", rank, maximum=_LARGEST_RANK)
        for pattern, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{shown(pattern)}]", alpha)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={shown(self.layers_to_transform)} can't be used with target_modules="
                f"{shown(self.target_modules)}: give target_modules as a list, or put the layers into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None and not self.shares_across_layers:
            raise ValueError(
                f"layers_pattern={shown(self.layers_pattern)} has no effect without layers_to_transform: "
                "set layers_to_transform too, or leave layers_pattern out."
            )

    def _check_tokens(self) -> None:
        wanted = self.trainable_token_indices
        if wanted is None:
            return
        named = {name: list(tokens) for name, tokens in (wanted if isinstance(wanted, dict) else {"": wanted}).items()}
        # Lists, as PEFT needs them to index with.
        self.trainable_token_indices = named if isinstance(wanted, dict) else named[""]
        for name, tokens in named.items():
            if (
                not tokens
                or min(tokens) < 0
                or len(set(tokens)) < len(tokens)
                or (isinstance(wanted, dict) and not name)
            ):
                raise ValueError(
                    f"trainable_token_indices={shown(wanted)} must name tokens, each once, by their indices from 0: a "
                    'list for the input embedding, or {"embed_tokens": […]}. Leave it out to train none.'
                )

    def _check_patterns(self) -> None:
        """Check every field that PEFT matches as a regular expression, in the form in which it does."""
        if isinstance(self.target_modules, str) and self.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            check_pattern("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            check_pattern("exclude_modules", self.exclude_modules)
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                check_pattern(name, pattern, r"(.*\.)?({})$")
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in layers or []:
            check_pattern("layers_pattern", pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
        if "" in (self.modules_to_save or []):
            raise ValueError(f"modules_to_save={shown(self.modules_to_save)} holds an empty name, which means all.")
        for pattern in self.modules_to_save or []:
            check_pattern("modules_to_save", pattern, r"(^|.*\.){}($|\..*)")

    @classmethod
    def full_title(cls) -> str:
        """Name and source of the method, for people."""
        return f"{cls.title} ({cls.source})" if cls.source else cls.title

    @classmethod
    def run_name(cls) -> str:
        """What run files and the command line call the method."""
        return cls.method.lower()

    @property
    def shares_across_layers(self) -> bool:
        """Whether layers read factors of other layers."""
        return False

    @property
    def parts(self) -> int:
        """How many factors of rank r lie side by side in one tensor, such as a layer's experts."""
        return 1

    @property
    def lowest_rank(self) -> int:
        """The smallest r that goes with the other settings."""
        return 1

    @property
    def depends_on_input(self) -> bool:
        """Whether ΔW depends on the input through `Factors.gates`, so that it is exported with mean gates only."""
        return False

    @property
    def constant_instead(self) -> str:
        """Where ΔW depends on the input: settings of the method with which it does not. Empty if there are none."""
        return ""

    def holding(self, rank: int, configs: list[AdapterConfig]) -> AdapterConfig:
        """Settings of an adapter that can hold any sum of rank `rank` of adapters with these configs; scaling is 1.

        Raises:
            ValueError: no adapter of this method can.
        """
        raise ValueError(f"Updates of {self.title} don't add up to one adapter: merge them (merge_adapter) instead.")

    def rank(self, module_name: str) -> int:
        """Rank on the module `module_name`, `rank_pattern` taken into account."""
        return self._by_pattern(self.rank_pattern, module_name, self.r)

    def alpha(self, module_name: str) -> float:
        """Strength on the module `module_name`, `alpha_pattern` taken into account."""
        return self._by_pattern(self.alpha_pattern, module_name, self.lora_alpha)

    def _by_pattern(self, patterns: dict[str, Any], module_name: str, default: Any) -> Any:
        stack = [re.sub(r"\.\d+$", "", module_name)] if self.target_parameters else []
        for name in (module_name, *stack):  # an expert, "experts.down_proj.3", or all of a stack
            if (key := get_pattern_key(list(patterns), name)) in patterns:
                return patterns[key]
        return default

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
        say_how_to_load(save_directory, self.full_title(), self.method.lower())

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
            cls._check_fields(check_adapter_files(folder))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # Read from a file: if its weights turn out not to fit, the adapter is taken off the model again.
        config._unproven = True
        weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        config._weights = weights if os.path.isdir(folder) else None
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse unknown fields: PEFT would drop them with a warning and load another adapter than was saved."""
        cls._check_fields(kwargs)
        return super().check_kwargs(**kwargs)

    @classmethod
    def _check_fields(cls, settings: dict[str, Any]) -> None:
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown:
            written_by = settings.get("loraplex_version") or "unknown"
            remedy = "pip install -U loraplex" if is_newer(written_by) else f"remove the field from {CONFIG_NAME}"
            raise ValueError(
                f"{CONFIG_NAME} has fields that loraplex {__version__} does not know: {shown(', '.join(unknown))} "
                f"(written by loraplex {shown(written_by)}). Remedy: {remedy}."
            )


def unscaled(config: Any, r: int, **settings: Any) -> Any:
    """`config` with another rank, and scaling 1 everywhere."""
    unit = {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return replace(config, **unit, **settings)
