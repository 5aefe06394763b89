"""From the run's plain values to the libraries' own objects: a PEFT config and training arguments."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from typing import Any, get_type_hints

import torch
from accelerate.utils import str_to_bool
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from loraplex.io.field_types import shown
from loraplex.recipes.config.data_spec import Kind
from loraplex.recipes.config.run_config import ConfigError, RunConfig, TrainSection, nearest, unknown_key
from loraplex.runtime.parallel import DDP_INSTEAD, FSDP2_INSTEAD
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.registry import METHODS

# Filled in by PEFT, by us or by loading; not for a run to choose.
_ADAPTER_RESERVED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "loraplex_version"),
    *("base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
}
# Each of these is decided by another key of the run, or would break what a run promises.
_TRAIN_RESERVED = {
    "output_dir": "set output_dir at the top level",
    "resume_from_checkpoint": "use --resume",
    "save_only_model": "a checkpoint without its optimizer can't be resumed",
    "disable_tqdm": "redirect stderr instead",
    "eos_token": "set it in the model's tokenizer",
    "completion_only_loss": "the loss is always on the answers",
    "assistant_only_loss": "the loss is always on the answers",
    "dataset_kwargs": "describe the data under data",
    "dataset_text_field": "describe the data under data",
    "truncation_mode": "prompts are cut and answers kept",
    "remove_unused_columns": "the columns are prepared by loraplex",
    "full_determinism": "set seed",
}
_TRAIN_OURS = {"on_nonfinite", "chat"}
"""Fields under `train` that are ours and not the trainer's."""


def method_of(peft_type: str) -> str:
    """What a run calls the method that PEFT calls `peft_type`."""
    ours = (name for name, cls in METHODS.items() if cls.method == peft_type)
    return next(ours, peft_type.lower())


def plannable(method: str) -> bool:
    """Whether budgets know the method: the registered ones, and PEFT's LoRA."""
    return issubclass(config_class(method), AdapterConfig | LoraConfig)


def plannable_methods() -> list[str]:
    """The methods that budgets know by name."""
    return [*METHODS, "lora"]


def config_class(method: str) -> Any:
    """The PEFT config class of a method: ours, PEFT's by the name of its type ("loha", …), or `module:Class`.

    A module is imported, from the working directory too, which registers what it defines.

    Raises:
        ConfigError: nothing is called so.
    """
    if ":" in method:
        return _imported(method)
    known = {method_of(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in known:
        names = list(dict.fromkeys([*METHODS, "lora", *known]))
        near = nearest(method, names)
        hint = f"did you mean {near!r}? " if near else ""
        raise ConfigError(f"method is {method!r}: {hint}Known: {', '.join(names)}.")
    return known[method]


def _imported(method: str) -> Any:
    module, _, name = method.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: no file there may stand in for a library
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"method is {method!r}, but there is no module {error.name}: start in the folder that it lies under, or "
            "install it."
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, PeftConfig)):
        raise ConfigError(f"method is {method!r}: {module} has no PeftConfig of the name {name!r}.")
    if cls not in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        raise ConfigError(f"method is {method!r}: PEFT does not know it: {module} must register it when imported.")
    return cls


def adapter_fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a method's config class that a run may set, by name."""
    return {
        field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in _ADAPTER_RESERVED
    }


def adapter_config(run: RunConfig) -> PeftConfig:
    """The method's PEFT config, its fields checked one by one.

    Raises:
        ConfigError: a field the method doesn't have (with the nearest name), of the wrong type or out of range.
    """
    cls = config_class(run.method)
    values = _checked(cls, run.adapter, set(adapter_fields(cls)), "adapter")
    values["task_type"] = "SEQ_CLS" if run.task == "classification" else "CAUSAL_LM"
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter (method {run.method}): {error}") from None


def training_arguments(run: RunConfig, **ours: Any) -> TrainingArguments:
    """SFTConfig or TrainingArguments of the run; `ours` are the values that the runner decides.

    Raises:
        ConfigError: a field the class doesn't have (with the nearest name), of the wrong type or out of range.
    """
    cls = _arguments_class(run.task)
    values: dict[str, Any] = {n: getattr(run.train, n) for n in TrainSection.model_fields if n not in _TRAIN_OURS}
    values["eval_strategy"] = "steps" if run.train.eval_steps else "no"
    values |= _precision(run.train.extra) | {
        "report_to": "none",
        "logging_nan_inf_filter": False,  # a loss that runs away must be seen
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    values |= check_train(run)
    if not values.get("packing"):
        del values["max_length"]  # examples come cut to it; TRL's own cut would drop answers
        values |= {"max_length": None} if run.task == "sft" else {}
    values |= ours
    try:
        return cls(output_dir=run.output_dir, **_renamed(cls, values))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train: {error}") from None


def check_launch(arguments: TrainingArguments) -> None:
    """Refuse, before a model is loaded, what it could not be trained under.

    Raises:
        ConfigError: several GPUs without a launcher (nn.DataParallel), a launcher's processes that would not know of
            each other, or FSDP1.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and arguments.world_size == 1:
        raise ConfigError(
            f"{launched} processes were started, but without an accelerator each would train alone: set "
            "--train.use_cpu true to train on CPUs."
        )
    if arguments.n_gpu > 1:
        raise ConfigError(f"{arguments.n_gpu} GPUs are visible to one process. {DDP_INSTEAD}")
    plugin = arguments.fsdp_plugin_args or {}
    version = plugin.get("fsdp_version") if plugin else os.environ.get("FSDP_VERSION", "1")
    if (plugin or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))) and int(version or 1) != 2:
        raise ConfigError(f"adapters can't be trained under FSDP1. {FSDP2_INSTEAD}")


def checkpoint_without_reentry(arguments: Any) -> None:
    """Undo what TRL does to activation checkpointing under ZeRO-3; factors that layers share need it.

    Its reason, that ZeRO-3's parameters look different when activations are recomputed, is met by not comparing.
    """
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if name in {f.name for f in dataclasses.fields(arguments)}:
            kwargs = getattr(arguments, name) or {}
            setattr(arguments, name, {**kwargs, "use_reentrant": False, "determinism_check": "none"})
            return


def _renamed(cls: type[TrainingArguments], values: dict[str, Any]) -> dict[str, Any]:
    """Newer transformers call gradient checkpointing activation checkpointing, and warn about the old name."""
    if "activation_checkpointing" in {f.name for f in dataclasses.fields(cls)}:
        return {name.replace("gradient_checkpointing", "activation_checkpointing"): v for name, v in values.items()}
    return values


def check_train(run: RunConfig) -> dict[str, Any]:
    """The fields under `train` that only the trainer's class knows, checked."""
    cls = _arguments_class(run.task)
    for name, remedy in _TRAIN_RESERVED.items():
        if name in run.train.extra:
            raise ConfigError(f"train.{name} can't be set in a run: {remedy}.")
    known = {f.name for f in dataclasses.fields(cls) if f.init} - set(_TRAIN_RESERVED)
    return _checked(cls, run.train.extra, known | set(TrainSection.model_fields), "train")


def _arguments_class(task: Kind) -> type[TrainingArguments]:
    if task == "classification":
        return TrainingArguments
    from trl import SFTConfig

    return SFTConfig


def _precision(given: dict[str, Any]) -> dict[str, Any]:
    # TRL turns bf16 on wherever it may; on a CPU that is slower, not faster.
    if "bf16" in given or "fp16" in given:
        return {}
    return {"bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}


def _checked(cls: type, values: dict[str, Any], known: set[str], section: str) -> dict[str, Any]:
    """The values, each converted to the type that its dataclass field declares."""
    hints = get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(unknown_key(f"{section}.{name}", known, cls.__name__))
        try:
            checked[name] = _adapter_for(hints[name]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{section}.{name} is {shown(value)}: {error.errors()[0]['msg']}") from None
    return checked


def _adapter_for(hint: Any) -> TypeAdapter[Any]:
    if dataclasses.is_dataclass(hint):
        return TypeAdapter(hint)  # pydantic refuses a config beside a type that may carry its own
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
