"""The configuration of a study: methods × tasks × learning rates × seeds, in one YAML file.

Like a run's configuration it is read and refused without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loraplex.io.field_types import shown
from loraplex.io.reading import file_name
from loraplex.recipes.config.data_spec import DataSpec, Kind, PathText, Whole
from loraplex.recipes.config.run_config import ConfigError, TrainSection, explain, joined, set_key
from loraplex.recipes.config.yaml_text import dump_yaml, read_yaml

Metric = Literal["accuracy", "accuracy_norm", "exact_match", "f1", "loss"]
METRICS: tuple[str, ...] = get_args(Metric)
BASE = "base"
"""The unadapted model's name in reports."""

Seed = Annotated[Whole, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class MethodEntry(BaseModel):
    """One method at its settings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    method: str = Field("", description="Method, as in a run; the entry's name if left out")
    adapter: dict[str, Any] = Field(default_factory=dict, description="Fields of the method's config")
    size: str | None = Field(
        "r", description="The field that a budget solves for; null leaves the entry's settings alone"
    )
    learning_rates: list[Rate] | None = Field(
        None, min_length=1, description="Learning rates of this entry, as many as the study's; the study's if left out"
    )


class TaskEntry(BaseModel):
    """What one model is trained on: a data set, or a mixture of several."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: list[DataSpec] = Field(
        min_length=1,
        description="Data sets, as in a run, several of them a mixture; each needs an eval_… and a test_… part",
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of the study's train section for this task"
    )

    @model_validator(mode="before")
    @classmethod
    def _data_alone(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, list) else value


class GeneralText(BaseModel):
    """Held-out general text, whose perplexity before and after tells what was forgotten."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: PathText = Field(min_length=1, description="File, folder, hub id or package:NAME")
    split: str = Field("train", description="Split to read, where `path` has splits")
    subset: str | None = Field(None, description="Configuration of a hub data set, or subset of a packaged one")
    column: str = Field("text", description="Column of the text")
    size: Whole = Field(100, ge=1, description="Number of texts, drawn at random")


class StudyConfig(BaseModel):
    """One study."""

    # As in a run: NaN and Inf in an adapter's settings must not turn into null before they are checked.
    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
    )

    title: str = Field("", description="Heading of the report; the file's name if left out")
    model: PathText = Field(description="Base model: hub id, local folder, .gguf file, or package:NAME")
    gguf_file: PathText | None = Field(None, description="GGUF file inside the model's folder or repository")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="Run the code that the model brings along")
    dtype: Literal["float32", "bfloat16", "auto"] = Field("float32", description="Dtype of the base model's weights")
    task: Kind = Field("sft", description="Causal language model (sft) or classification")
    tasks: dict[str, TaskEntry] = Field(
        min_length=1, description="What the methods are trained on; one model for each task"
    )
    methods: dict[str, MethodEntry] = Field(
        min_length=1,
        description="What is compared: a list of names, or NAME: settings; several entries may use one method",
    )
    reference: str = Field("lora", description="The entry that differences are taken to")
    budget: str | None = Field(
        None,
        description='Trainable parameters of every method: "lora:r=8", "2M", "0.5%"; null takes the settings as given',
    )
    adapter: dict[str, Any] = Field(
        default_factory=dict, description="Fields that hold for every method whose config has them"
    )
    alpha_over_r: float | None = Field(
        None, gt=0, description="lora_alpha as a multiple of r, also where r is solved for"
    )
    learning_rates: list[Rate] = Field(
        min_length=1, description="Learning rates that every method tries; validation chooses one"
    )
    seeds: list[Seed] = Field(
        min_length=1,
        description="Seeds of adapters, dropout and the order of examples; the chosen rate is trained with each",
    )
    search_seeds: list[Seed] | None = Field(
        None, min_length=1, description="Seeds of the search for a learning rate; the first seed if left out"
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="How to train, as in a run, without learning_rate and seed"
    )
    metric: Metric | None = Field(
        None, description="Metric that decides; accuracy where answers can be right, else loss, if left out"
    )
    general_text: GeneralText | None = Field(
        None, description="Held-out general text; its perplexity before and after training tells what was forgotten"
    )
    output_dir: PathText = Field(min_length=1, description="Folder for the cells and the report")

    @field_validator("methods", mode="before")
    @classmethod
    def _bare_names(cls, methods: Any) -> Any:
        if isinstance(methods, list) and all(isinstance(name, str) for name in methods):
            methods = dict.fromkeys(methods)
        if not isinstance(methods, dict):
            return methods
        entries = {str(name): {} if entry is None else entry for name, entry in methods.items()}
        return {n: {"method": n, **e} if isinstance(e, dict) and not e.get("method") else e for n, e in entries.items()}

    @field_validator("seeds", "search_seeds", "learning_rates")
    @classmethod
    def _all_different(cls, values: list[Any] | None) -> list[Any] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("each may stand here once")
        return values

    @model_validator(mode="after")
    def _agrees(self) -> StudyConfig:
        for kind, names in (("methods", self.methods), ("tasks", self.tasks)):
            for name in names:
                try:
                    file_name(name, kind)
                except ValueError:
                    raise ValueError(f"{kind}: {shown(name)} can't be the name of a folder: choose another") from None
                if name.startswith("."):
                    raise ValueError(f"{kind}: {shown(name)} can't be the name of a folder: choose another")
        if BASE in self.methods:
            raise ValueError(f"methods: {BASE!r} is the unadapted model's name: choose another")
        if self.reference not in self.methods:
            raise ValueError(f"reference is {self.reference!r}, but methods has only {', '.join(self.methods)}")
        for name, entry in self.methods.items():
            if entry.learning_rates is not None and len(entry.learning_rates) != len(self.learning_rates):
                raise ValueError(
                    f"methods.{name} has {len(entry.learning_rates)} learning rates, the study "
                    f"{len(self.learning_rates)}: every method gets the same number of tries"
                )
        for place, train in [("train", self.train), *((f"tasks.{n}.train", t.train) for n, t in self.tasks.items())]:
            for key, instead in (("learning_rate", "learning_rates"), ("seed", "seeds")):
                if key in train:
                    raise ValueError(f"{place}.{key} can't be set in a study: use {instead}")
        if self.task == "classification" and self.general_text is not None:
            raise ValueError("general_text needs a language model: leave it out with task: classification")
        return self

    @property
    def source(self) -> dict[str, Any]:
        """Where the model comes from, beside its name."""
        names = ("gguf_file", "revision", "trust_remote_code")
        return {name: getattr(self, name) for name in names}

    def rates(self, method: str) -> list[float]:
        """The learning rates that a method tries, lowest first."""
        return sorted(self.methods[method].learning_rates or self.learning_rates)

    @property
    def searched(self) -> list[int]:
        """The seeds of the search."""
        return self.search_seeds or self.seeds[:1]


def load_study(path: str | Path, overrides: Iterable[tuple[str, Any]] = ()) -> StudyConfig:
    """Read a study's YAML file and lay the overrides over it.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest name), or a value out of its range.
    """
    tree, overrides = read_yaml(Path(path)), list(overrides)
    for key, value in overrides:
        set_key(tree, key, value)
    tree.setdefault("title", Path(path).stem)
    try:
        study = StudyConfig.model_validate(tree)
        for name, task in study.tasks.items():
            check = TrainSection.model_validate({**study.train, **task.train})
            if check.extra.get("load_best_model_at_end"):
                raise ConfigError(
                    f"{path}: tasks.{name}: load_best_model_at_end would choose by validation a second time."
                )
        return study
    except ValidationError as error:
        sections: dict[str, type[BaseModel]] = {
            "train": TrainSection, "data": DataSpec, "methods": MethodEntry, "tasks": TaskEntry,
            "general_text": GeneralText,
        }  # fmt: skip
        given = {key for key, _ in overrides}
        lines = [explain(entry, str(path), given, StudyConfig, sections) for entry in error.errors()]
        raise ConfigError(joined(lines)) from None


def to_yaml(study: StudyConfig) -> str:
    """The resolved configuration; `load_study` reads it back to an equal one."""
    return dump_yaml(study.model_dump(mode="json"))
