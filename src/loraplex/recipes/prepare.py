"""What a run's configuration names, loaded: tokenizer, tasks, evaluators and base model."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, set_seed

from loraplex.recipes.config.run_config import ConfigError, RunConfig
from loraplex.recipes.data.tasks import Task, load_task
from loraplex.recipes.evaluation import Evaluator
from loraplex.recipes.models.loading import load_model, load_tokenizer
from loraplex.recipes.progress import note


def uses_chat(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the run's prompts and answers are messages of a chat."""
    return run.train.chat and tokenizer.chat_template is not None


def load_data(run: RunConfig) -> tuple[PreTrainedTokenizerBase, list[Task]]:
    """The run's tokenizer and tasks."""
    tokenizer = load_tokenizer(run.model, **run.source)
    chat = uses_chat(run, tokenizer)
    tasks = []
    for spec in run.data:
        note(f"reading {spec.path}")
        tasks.append(load_task(spec, run.train.seed, run.task, chat))
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
    return tokenizer, tasks


def make_evaluators(
    run: RunConfig, tasks: list[Task], tokenizer: PreTrainedTokenizerBase, part: Literal["eval", "test"] = "eval"
) -> dict[str, Evaluator]:
    """task → its evaluator, for the tasks that hold examples out for `part`."""
    length, batch = run.train.max_length, run.train.per_device_eval_batch_size
    held_out = [task for task in tasks if getattr(task, part) is not None]
    return {task.name: Evaluator(task, tokenizer, length, batch, part) for task in held_out}


def load_base(run: RunConfig, tasks: list[Task]) -> Any:
    """The base model, with a fresh head for the tasks' classes if it classifies."""
    set_seed(run.train.seed)
    names = list(tasks[0].label_names) if run.task == "classification" else None
    note(f"loading {run.model}")
    return load_model(run.model, run.task, label_names=names, dtype=run.dtype, **run.source)
