"""Saved adapters back on their base models, and what their runs say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, load_peft_weights
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel

from loraplex.export.plain_settings import check_plain
from loraplex.io.field_types import shown
from loraplex.io.files import recover
from loraplex.io.reading import message_of, read_json
from loraplex.recipes.config.arguments import config_class, method_of
from loraplex.recipes.config.run_config import ConfigError, RunConfig, build_run, parse_yaml, read_yaml, set_key
from loraplex.recipes.evaluation import Evaluator, Metrics
from loraplex.recipes.models.loading import load_skeleton
from loraplex.recipes.prepare import PreparedRun
from loraplex.recipes.progress import note
from loraplex.recipes.training.checkpoints import LABELS_NAME, RUN_NAME
from loraplex.tuner.adapter_files import check_adapter_files, read_settings
from loraplex.tuner.config import AdapterConfig


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter's folder, with the run that the adapter comes from."""

    folder: Path
    run: PreparedRun

    @cached_property
    def class_names(self) -> list[str] | None:
        """The classes that a classifier's adapter was trained on, in order; None for a language model's."""
        return _class_names(self.folder) if self.run.config.task == "classification" else None

    @property
    def names_classes(self) -> bool:
        """Whether a file beside the adapter lists its classes."""
        return _beside(self.folder, LABELS_NAME).is_file()

    def load(self, class_names: list[str] | None = None, dtype: str | None = None) -> PeftModel:
        """The base model with the adapter on it.

        Args:
            class_names: of a classifier; None takes those that it was trained on.
            dtype: of the base weights; None takes the run's.

        Raises:
            ConfigError: the adapter does not fit the base model.
        """
        # A classifier's fresh head is the one that training began with.
        base = self.run.load_base(class_names or self.class_names, dtype)
        if torch.cuda.is_available():
            base.to("cuda")
        note(f"loading {self.folder}")
        return _adapted(base, self.folder, self.run.config)

    def load_on_skeleton(self) -> PeftModel:
        """The adapter on its base model's modules, whose weights stay on the meta device.

        Raises:
            ConfigError: the adapter does not fit the base model.
        """
        config = self.run.config
        skeleton = load_skeleton(config.model, config.task, label_names=self.class_names, **config.source)
        model = _adapted(skeleton, self.folder, config, low_cpu_mem_usage=True)
        if isinstance(model.peft_config["default"], LoraConfig):
            _load_lora_factors(model, self.folder, config.model)
        marks = ("_factors.", "_shared.", ".lora_")
        _of_one_dtype([p for name, p in model.named_parameters() if any(mark in name for mark in marks)])
        return model


def open_adapter(
    adapter: Path,
    run_file: Path | None,
    data: list[str],
    overrides: list[tuple[str, Any]],
    data_option: str | None = "--data",
    allow_code: Sequence[str] = (),
) -> SavedAdapter:
    """A saved adapter with its run: `run_file`, or the `run.yaml` beside the adapter, or what its config says.

    Only what the user typed may name code that is run. `run_file` and `overrides` are typed. What lies in the adapter's
    folder may come from anywhere: a `run.yaml` that asks for code is refused unless an override or `allow_code` names
    the same.

    Args:
        adapter: folder of a saved adapter.
        run_file: a run that the user named.
        data: data sets that the user named, in place of the run's.
        overrides: dotted keys and values from the command line.
        data_option: how the command takes data; None where it needs none.
        allow_code: `module:Class` that may be imported for the adapter.

    Raises:
        ConfigError: no adapter there, no way to tell what data to use, a wrong key, or code that nobody allowed.
    """
    recover(adapter)
    if not adapter.is_dir():
        raise ConfigError(f"adapter {adapter} is not a folder: give the folder that holds adapter_config.json.")
    check_adapter_files(str(adapter))
    import_allowed(allow_code)
    beside = _beside(adapter, RUN_NAME)
    path = run_file or beside
    known = run_file is not None or path.is_file()
    given = dict(overrides)
    tree = read_yaml(path) if known else _tree_from_adapter(adapter, given.get("method"))
    if data:
        tree["data"] = [data_entry(text) for text in data]
    for key, value in overrides:
        set_key(tree, key, value)
    if not tree.get("data"):
        if data_option:
            raise ConfigError(
                f"{beside} does not exist, so it is not known what data to use: give {data_option} or --run."
            )
        tree["data"] = [{"path": "-"}]
    run = build_run(tree, str(path) if known else "adapter_config.json", set(given))
    if run_file is None:
        _check_code(run, path, {*given}, allow_code)
    return SavedAdapter(adapter, PreparedRun(run))


def import_allowed(allow_code: Sequence[str]) -> None:
    """Import the methods `module:Class` that the user allows by name, which register themselves.

    Raises:
        ConfigError: a name is not of this form, or there is no such class.
    """
    for name in allow_code:
        if ":" not in name:
            raise ConfigError(f"--allow-code {name}: write module:Class, as in the run's method.")
        config_class(name)


def _check_code(run: RunConfig, path: Path, typed: set[str], allow_code: Sequence[str]) -> None:
    """Refuse code that only the adapter's own folder names."""
    if ":" in run.method and "method" not in typed and run.method not in allow_code:
        raise ConfigError(
            f"{path} names code to import, method: {run.method}. Only what you type may do that. If you trust it: "
            f"--allow-code {run.method}"
        )
    if run.trust_remote_code and "trust_remote_code" not in typed:
        raise ConfigError(
            f"{path} asks for the code that {run.model} brings along, trust_remote_code: true. Only what you type may "
            "do that. If you trust it: --trust-remote-code"
        )


def _beside(adapter: Path, name: str) -> Path:
    """A file that a run wrote beside its adapter; for a checkpoint it lies one folder up."""
    folder = adapter.resolve()
    return (folder.parent if folder.name.startswith("checkpoint-") else folder) / name


def _tree_from_adapter(adapter: Path, method: str | None) -> dict[str, Any]:
    config = adapter_json(adapter)
    if method is None:
        method = method_of(config["peft_type"])
        config_class(method)  # no code: the type's name holds no ":"
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise ConfigError(f"{adapter}: base_model_name_or_path is {shown(base)}, not a name: give --model.")
    task = "classification" if config.get("task_type") == "SEQ_CLS" else "sft"
    # Without a base model the error is that of a missing key, which names --model.
    return {"model": base, "method": method, "task": task, "output_dir": str(adapter)} if base else {
        "method": method, "task": task, "output_dir": str(adapter)
    }  # fmt: skip


def adapter_json(adapter: Path) -> dict[str, Any]:
    """What `adapter_config.json` says: a mapping whose `peft_type` is a plain name.

    Raises:
        ValueError: it is not, or it asks PEFT for more than an adapter's own tensors.
    """
    path, settings = adapter / CONFIG_NAME, read_settings(adapter)
    if settings.get("megatron_config"):
        raise ConfigError(f"{path} has a megatron_config, for which PEFT imports code: remove it, or load it yourself.")
    if settings["peft_type"] == "XLORA":
        raise ConfigError(f"{path} is an X-LoRA adapter, which names other folders to load: load it with PEFT.")
    check_plain(adapter, settings)
    return settings


def gated_config(adapter: Path, method: str) -> AdapterConfig | None:
    """The settings of a saved adapter whose update depends on the input; None for any other."""
    cls = config_class(method)
    if not issubclass(cls, AdapterConfig):
        return None
    config = cls.from_pretrained(str(adapter))
    return config if config.depends_on_input else None


def data_entry(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"path": text}
    entry = parse_yaml(text, "the value of --data")
    if not isinstance(entry, dict):
        raise ConfigError(f"--data {text!r} is no mapping: write a path, or '{{path: …, prompt: …}}'.")
    return entry


def _load_lora_factors(model: PeftModel, adapter: Path, base: str) -> None:
    """Load a plain LoRA's factors again: PEFT's own layers follow their base to the meta device and lose them there."""
    state = {
        key.replace(".weight", ".default.weight"): tensor
        for key, tensor in load_peft_weights(str(adapter), device="cpu").items()
        if ".lora_" in key
    }
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # of another shape
        raise ConfigError(f"{adapter} does not fit {base}: {message_of(error)}") from error
    if missing := [name for name, p in model.named_parameters() if ".lora_" in name and p.is_meta]:
        raise ConfigError(f"{adapter} lacks {', '.join(missing[:3])}: copy or download the adapter again.")


def _of_one_dtype(factors: list[nn.Parameter]) -> None:
    """Bring factors that a file stores in several dtypes to the widest of them, as products need one."""
    if len({factor.dtype for factor in factors}) > 1:
        wide = reduce(torch.promote_types, (factor.dtype for factor in factors))
        for factor in factors:
            factor.data = factor.data.to(wide)


def _adapted(base: PreTrainedModel, adapter: Path, config: RunConfig, **options: Any) -> PeftModel:
    config_class(config.method)  # a method from the user's own module is registered by its import
    adapter_json(adapter)
    try:
        return PeftModel.from_pretrained(base, str(adapter), **options)
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        # PEFT checks little of a config before it computes with it: a broken one ends in any kind of error.
        raise ConfigError(
            f"{adapter} does not fit {config.model}: {message_of(error)}. Give its own base model with --model."
        ) from error


def _class_names(adapter: Path) -> list[str]:
    path = _beside(adapter, LABELS_NAME)
    if not path.is_file():
        raise ConfigError(f"{path} is missing: write the classes into it, in order, as a JSON list.")
    names = read_json(path, list, "write the classes into it, in order, as a JSON list")
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"{path} holds {shown(names)}: it must list the classes, in order, each once and as text.")
    return list(names)


def evaluate_adapter(
    adapter: SavedAdapter, with_base: bool, part: Literal["eval", "test"] = "eval"
) -> dict[str, dict[str, Metrics]]:
    """task → {"base": metrics, "adapted": metrics}, on the part that was held out for evaluation or for the test.

    Raises:
        ConfigError: no task holds examples out, or the data's classes are not those of the adapter.
    """
    names = adapter.run.class_names
    if names and adapter.names_classes and adapter.class_names != names:
        raise ConfigError(f"the data has the classes {names}, the adapter {adapter.class_names}.")
    evaluators = adapter.run.evaluators(part)
    if not evaluators:
        keys = ", ".join(f"{part}_{name}" for name in ("fraction", "size", "split"))
        raise ConfigError(f"data: nothing is held out: set {keys} or {part}_path.")
    model = adapter.load(names)
    return {name: _base_and_adapted(model, evaluator, with_base) for name, evaluator in evaluators.items()}


def _base_and_adapted(model: PeftModel, evaluator: Evaluator, with_base: bool) -> dict[str, Metrics]:
    metrics = {}
    if with_base:
        with model.disable_adapter():
            metrics["base"] = evaluator(model, "base")
    metrics["adapted"] = evaluator(model, "adapted")
    return metrics
