"""A run with everything that its configuration names, each made once and handed down to whoever needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from loraplex.recipes.config.arguments import adapter_config, check_launch, training_arguments
from loraplex.recipes.config.data_spec import DataSpec
from loraplex.recipes.config.run_config import ConfigError, RunConfig
from loraplex.recipes.data.encode import encode_texts, encode_training
from loraplex.recipes.data.tasks import Task, holds_out, load_task
from loraplex.recipes.evaluation import Evaluator
from loraplex.recipes.models.loading import load_model, load_tokenizer
from loraplex.recipes.progress import note


@dataclass(frozen=True)
class PreparedRun:
    """A run's configuration, and what is made of it: at the first use, and once.

    Nothing is loaded before it is needed. `check` refuses a wrong configuration before anything is loaded or written.
    """

    config: RunConfig
    resume: bool = False
    """Whether training continues from the last whole checkpoint."""

    @property
    def output_dir(self) -> Path:
        """The folder that the run writes into."""
        return Path(self.config.output_dir)

    @cached_property
    def peft_config(self) -> PeftConfig:
        """The method's PEFT config; a ConfigError names the field that is wrong."""
        return adapter_config(self.config)

    @cached_property
    def arguments(self) -> TrainingArguments:
        """The trainer's arguments; evaluations are planned only if a data set holds examples out."""
        evaluated = any(holds_out(spec, "eval") for spec in self.config.data)
        planned = {} if evaluated and self.config.train.eval_steps else {"eval_strategy": "no"}
        on_start = evaluated and not self.resume and self.config.train.eval_on_start
        return training_arguments(self.config, eval_on_start=on_start, **planned)

    def check(self) -> None:
        """Raise a ConfigError for settings that can't be trained with, before anything is loaded or written."""
        _ = self.peft_config
        check_launch(self.arguments)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return load_tokenizer(self.config.model, **self.config.source)

    @cached_property
    def tasks(self) -> list[Task]:
        """The run's data sets as tasks; a ConfigError says which two of them don't fit together."""
        tasks = [self.read(spec) for spec in self.config.data]
        _check_tasks(tasks)
        return tasks

    def read(self, spec: DataSpec) -> Task:
        """A data set as a task of this run; the run need not name it."""
        chat = self.config.train.chat and self.tokenizer.chat_template is not None
        note(f"reading {spec.path}")
        return load_task(spec, self.config.train.seed, self.config.task, chat)

    @property
    def class_names(self) -> list[str] | None:
        """The classes that the data has, in order; None if the model does not classify."""
        return list(self.tasks[0].label_names) or None

    def encode(self, rows: Dataset) -> Dataset:
        """Examples as the tokens and labels that training takes."""
        encode = encode_training if self.config.task == "sft" else encode_texts
        return encode(self.tokenizer, rows, self.config.train.max_length)

    def evaluators(self, part: Literal["eval", "test"] = "eval") -> dict[str, Evaluator]:
        """task → its evaluator, for the tasks that hold examples out for `part`."""
        length, batch = self.config.train.max_length, self.config.train.per_device_eval_batch_size
        held_out = [task for task in self.tasks if getattr(task, part) is not None]
        return {task.name: Evaluator(task, self.tokenizer, length, batch, part) for task in held_out}

    def load_base(self, class_names: Sequence[str] | None = None, dtype: str | None = None) -> Any:
        """Load the base model; one that classifies gets a fresh head, the same each time.

        Args:
            class_names: classes of the head; None takes the data's.
            dtype: of the weights; None takes the run's.
        """
        config = self.config
        if config.task == "classification" and class_names is None:
            class_names = self.class_names
        note(f"loading {config.model}")
        set_seed(config.train.seed)
        return load_model(
            config.model, config.task, label_names=class_names, dtype=dtype or config.dtype, **config.source
        )


def _check_tasks(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"two data sets are called {name!r}: give data.{index}.name.")
    for task in tasks[1:]:
        if task.label_names != tasks[0].label_names:
            raise ConfigError(
                f"{task.name!r} has the classes {list(task.label_names)}, {names[0]!r} has "
                f"{list(tasks[0].label_names)}: one classifier needs the same classes; use data.N.labels to rename."
            )
