"""The configuration of a run: one YAML file, every field overridable by a dotted key.

YAML + overrides → tree of plain values → `RunConfig` (checked) → the resolved `run.yaml` beside the adapter.
Nothing here imports torch: reading a configuration is quick, and so is refusing a wrong one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraplex.io.field_types import shown
from loraplex.recipes.config.data_spec import DataSpec, PathText, Whole
from loraplex.recipes.config.errors import ConfigError
from loraplex.recipes.config.yaml_text import dump_yaml, parse_yaml, read_yaml

# What people write first → the name that transformers' TrainingArguments has for it.
_LONGEST_NAME = 200
_TRAIN_SYNONYMS = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "max_seq_length": "max_length",
}


class TrainSection(BaseModel):
    """How to train: fields of TRL's SFTConfig (task: sft) or transformers' TrainingArguments (classification).

    The fields below have defaults of their own; any other field of those classes may be given too.
    """

    model_config = ConfigDict(extra="allow", validate_default=True, allow_inf_nan=False)

    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate")
    per_device_train_batch_size: Whole = Field(8, ge=1, description="Examples per device and micro-step")
    per_device_eval_batch_size: Whole = Field(16, ge=1, description="Examples per device and batch of an evaluation")
    gradient_accumulation_steps: Whole = Field(1, ge=1, description="Micro-steps per update")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time")
    num_train_epochs: float = Field(
        1.0, gt=0, description="Passes over the mixture of data sets; max_steps wins over it"
    )
    max_steps: Whole = Field(-1, ge=-1, description="Number of updates; -1 takes num_train_epochs instead")
    warmup_steps: float = Field(
        0, ge=0, description="Updates over which the learning rate rises; below 1 a fraction of the run"
    )
    lr_scheduler_type: str = Field(
        "linear", description="How the learning rate falls: linear, cosine, constant_with_warmup, …"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Weight decay of AdamW; never applied to MultiLoRA's scaling factors"
    )
    max_length: Whole = Field(
        512, ge=8, description="Tokens per example. A longer prompt loses its middle; the answer is kept"
    )
    chat: bool = Field(True, description="Put prompts and answers into the tokenizer's chat template, if it has one")
    logging_steps: Whole = Field(
        1,
        ge=1,
        description="Updates between two `train` rows of metrics.jsonl; a row is the mean since the previous one",
    )
    eval_steps: Whole | None = Field(
        100, ge=1, description="Updates between two evaluations; null evaluates before and after training only"
    )
    eval_on_start: bool = Field(True, description="Evaluate the base model before training")
    save_steps: Whole = Field(100, ge=1, description="Updates between two checkpoints")
    save_total_limit: Whole | None = Field(2, ge=1, description="How many checkpoints are kept; null keeps all")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="What happens at a NaN or Inf in loss or gradients: stop the run, or skip the update"
    )
    seed: Whole = Field(
        0, ge=0, description="Seed of the adapter, the held-out part, the mixture and the order of the examples"
    )

    @property
    def extra(self) -> dict[str, Any]:
        """Fields that only the trainer's own class knows; checked in `arguments.py`."""
        return dict(self.model_extra or {})


class RunConfig(BaseModel):
    """One training run."""

    # Settings of adapters are checked later: until then their NaN and Inf must not turn into null on the way.
    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
    )

    model: PathText = Field(description="Base model: hub id, local folder, .gguf file, or package:NAME")
    gguf_file: PathText | None = Field(None, description="GGUF file inside the model's folder or repository")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="Run the code that the model brings along")
    dtype: Literal["float32", "bfloat16", "auto"] = Field("float32", description="Dtype of the base model's weights")
    task: Literal["sft", "classification"] = Field(
        "sft", description="sft trains a causal language model on the answers; classification trains a new head too"
    )
    method: str = Field(
        description="Method of the adapter: one of ours, lora for comparison, another of PEFT's by the name of its "
        "type (loha, adalora, …), or a config class of your own, package.module:Class"
    )
    adapter: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the method's config: r, lora_alpha, target_modules, …"
    )
    data: list[DataSpec] = Field(
        min_length=1, description="Data sets, one entry each; several are mixed by their weights"
    )
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}), description="How to train")
    output_dir: PathText = Field(
        min_length=1, description="Folder for the adapter, checkpoints, metrics and the plot of the loss"
    )

    @property
    def source(self) -> Any:
        """Where the model comes from, beside its name."""
        return {
            "gguf_file": self.gguf_file,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """`--key value` and `--key=value` pairs; values are YAML, so `8`, `1e-4`, `[q_proj, v_proj]`, `null` work."""
    pairs = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"{shown(argument)} stands where an option is expected: write --key value or --key=value."
            )
        key, equals, text = argument[2:].partition("=")
        name = key if len(key) <= _LONGEST_NAME else f"{key[:_LONGEST_NAME]}…"
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"--{name} has no value: write --{name} value or --{name}=value.")
            text = remaining.pop(0)
        pairs.append((key.replace("-", "_"), parse_yaml(text, f"the value of --{name}")))
    return pairs


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a tree of mappings and lists: `train.seed`, `data.0.weight`."""
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        fresh: Any = [] if part == "data" and depth == 0 else {}
        node = _child(node, part, fresh, key)
    if isinstance(node, list):
        index = _index(node, last, key)
        node[index : index + 1] = [value]
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--{key}: {'.'.join(parents)} is the value {shown(node)} and has no fields.")


def _child(node: Any, part: str, fresh: Any, key: str) -> Any:
    if isinstance(node, list):
        index = _index(node, part, key)
        if index == len(node):
            node.append({})
        return node[index]
    if not isinstance(node, dict):
        raise ConfigError(f"--{key}: {part!r} can't be looked up in the value {shown(node)}.")
    if node.get(part) is None:
        node[part] = fresh
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not (part.isascii() and part.isdigit() and len(part) < 10) or int(part) > len(node):
        raise ConfigError(
            f"--{key}: {part!r} is no position in a list of {len(node)}: use 0 to {len(node) - 1}, "
            f"or {len(node)} to append."
        )
    return int(part)


def load_run(path: str | Path, overrides: Iterable[tuple[str, Any]] = ()) -> RunConfig:
    """Read a run's YAML file and lay the overrides over it.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest name), or a value out of its range.
    """
    tree = read_yaml(Path(path))
    overrides = list(overrides)
    given = {key for key, _ in overrides}
    for key, value in overrides:
        set_key(tree, key, value)
    return build_run(tree, str(path), given)


def build_run(tree: dict[str, Any], source: str, overridden: set[str] | None = None) -> RunConfig:
    """Check a tree of plain values; `overridden` names the keys that came from the command line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        sections: dict[str, type[BaseModel]] = {"train": TrainSection, "data": DataSpec}
        lines = [explain(entry, source, overridden or set(), RunConfig, sections) for entry in error.errors()]
        raise ConfigError(joined(lines)) from None


def joined(lines: Iterable[str], most: int = 20) -> str:
    """Different lines of a message, of many only the first."""
    different = list(dict.fromkeys(lines))
    rest = len(different) - most
    return "\n".join([*different[:most], *([f"and {rest:,} more"] if rest > 0 else [])])


def explain(
    entry: Any, source: str, overridden: set[str], root: type[BaseModel], sections: dict[str, type[BaseModel]]
) -> str:
    """One of pydantic's errors in our words. `sections`: key → the model of what stands under it."""
    path = ".".join(part if len(part := str(name)) < 200 else shown(part) for name in entry["loc"])
    place = "the command line" if any(path == k or path.startswith(f"{k}.") for k in overridden) else source
    if entry["type"] == "extra_forbidden":
        return unknown_key(path, _names_beside(entry["loc"], root, sections), place)
    if entry["type"] == "missing":
        return f"{source}: {path} is missing: add `{path}: …` or give --{path}."
    message = entry["msg"].removeprefix("Value error, ")
    if isinstance(entry["input"], dict) or len(message) > 200:
        return f"{place}: {path}: {message}"
    return f"{place}: {path} is {shown(entry['input'])}: {message}"


def _names_beside(location: tuple[Any, ...], root: type[BaseModel], sections: dict[str, type[BaseModel]]) -> list[str]:
    inner = [sections[part] for part in location[:-1] if part in sections]
    return list((inner[-1] if inner else root).model_fields)


def unknown_key(path: str, names: Iterable[str], place: str) -> str:
    """The message for a key that nothing knows: with the nearest name, or all of them if there are few."""
    names = sorted(names)
    prefix, _, last = path.rpartition(".")
    near = nearest(last, names, _TRAIN_SYNONYMS if prefix == "train" else {})
    if near is None and not prefix and last in {*TrainSection.model_fields, *_TRAIN_SYNONYMS}:
        return f"{place}: unknown key {shown(path)}: did you mean 'train.{_TRAIN_SYNONYMS.get(last, last)}'?"
    if near is not None:
        return f"{place}: unknown key {shown(path)}: did you mean {f'{prefix}.{near}'.lstrip('.')!r}?"
    known = ", ".join(names) if len(names) <= 40 else "those that loraplex train --help lists"
    return f"{place}: unknown key {shown(path)}: known keys here are {known}."


def nearest(name: str, names: Iterable[str], synonyms: dict[str, str] | None = None) -> str | None:
    """The known name that `name` was probably meant to be."""
    names = list(names)
    synonym = (synonyms or {}).get(name)
    if synonym in names:
        return synonym
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return close[0] if close else None


def to_yaml(run: RunConfig) -> str:
    """The resolved configuration; `load_run` reads it back to an equal one."""
    return dump_yaml(run.model_dump(mode="json"))
