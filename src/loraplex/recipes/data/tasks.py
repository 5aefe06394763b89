"""Tasks: data sets turned into training and held-out examples, and mixtures of them.

For `sft` the examples have TRL's columns `prompt` and `completion`, so that the loss is on the answers only:
lists of messages where a chat template is used, else plain strings. For `classification`
they have `text`, perhaps `text_pair`, and an integer `label`.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets

from loraplex.recipes.config.data_spec import DataSpec, Kind, with_defaults
from loraplex.recipes.data.examples import Convert, Example, classifier, label_map, writer
from loraplex.recipes.data.rows import Rows, read_table

__all__ = ["DataSpec", "Task", "build_mixture", "holds_out", "load_task"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One task's examples, ready for a trainer; `eval` and `test` are None when nothing is held out for them.

    Where the answer is one of several, `eval` and `test` have two more columns: `choices`, the candidates in the form
    of `completion`, and `answer`, the index of the right one.
    """

    name: str
    kind: Kind
    train: Dataset
    eval: Dataset | None
    weight: float | None = None
    label_names: tuple[str, ...] = ()
    dropped: int = 0
    """Training examples left out because a held-out part has the same one."""
    generate: int = 0
    """Evaluate by generating up to so many tokens, too; 0 does not."""
    test: Dataset | None = None
    """Untouched by training, for the last word on an adapter."""


def _data_set(examples: list[dict[str, Any]], path: str) -> Dataset:
    try:
        return Dataset.from_list(examples)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path!r} holds half of a surrogate pair, which is no character ({error}): remove it"
        ) from None


def load_task(spec: DataSpec, seed: int, kind: Kind = "sft", chat: bool = False) -> Task:
    """Read a data set, hold parts out and turn its rows into examples of `kind`.

    `chat` says whether `sft` examples are lists of messages: true for a tokenizer with a chat template. The held-out
    parts depend only on the data and on `split_seed`, or else `seed`; no example of theirs stays in the training part,
    and none of the test part in the other.

    Raises FileNotFoundError, ModuleNotFoundError (a missing package) and ValueError; each names the value at
    fault and the remedy.
    """
    spec = with_defaults(spec)
    rows = read_table(spec.path, spec.split, spec.subset)
    test, evaluation, train_order = _hold_out(spec, seed if spec.split_seed is None else spec.split_seed, rows)
    if kind == "sft":
        label_names: tuple[str, ...] = ()
        convert = writer(spec, rows, chat)
    else:
        names = label_map(spec, rows, evaluation.rows, test.rows)
        label_names = tuple(dict.fromkeys(names.values()))
        convert = classifier(spec, names)
    tested = test.examples(convert)
    secret = {_identity(example) for example in tested}
    evaluated = [example for example in evaluation.examples(convert) if _identity(example) not in secret]
    if evaluation.order and not evaluated:
        raise ValueError(f"{spec.path!r}: every example to evaluate on is also one to test on: change eval_… or test_…")
    secret |= {_identity(example) for example in evaluated}
    train, dropped = _training_part(spec, rows, train_order, convert, secret)
    return Task(
        name=spec.title,
        kind=kind,
        train=_data_set(train, spec.path),
        eval=_data_set(evaluated, spec.path) if evaluated else None,
        test=_data_set(tested, spec.path) if tested else None,
        weight=spec.weight,
        label_names=label_names,
        dropped=dropped,
        generate=spec.generate or 0,
    )


def holds_out(spec: DataSpec, part: Literal["eval", "test"]) -> bool:
    """Whether a data set holds examples out for `part`; told from its description alone."""
    spec = with_defaults(spec)
    return any(getattr(spec, f"{part}_{name}") is not None for name in ("fraction", "size", "split", "path"))


def build_mixture(tasks: Sequence[Task], seed: int, size: int | None = None) -> Dataset:
    """Mix the training parts of several tasks into one data set of `size` examples, in random order.

    Each task gets its exact share by `weight`; without weights, a share by its number of examples. A task that
    must give more than it has is repeated, each pass in a new order. By default `size` is the number of examples
    of all tasks together, so that without weights each is there once.

    Raises ValueError for tasks that cannot be mixed, or when only some of them have a weight.
    """
    _check_mixable(tasks)
    lengths = [len(task.train) for task in tasks]
    total = sum(lengths) if size is None else size
    if total < 1:
        raise ValueError(f"a mixture of {total} examples cannot be trained on: give a size of at least 1")
    weights = [
        float(length) if task.weight is None else task.weight for task, length in zip(tasks, lengths, strict=True)
    ]
    indices: list[int] = []
    start = 0
    for number, (count, length) in enumerate(zip(_shares(total, weights), lengths, strict=True)):
        indices += [start + index for index in _draw(count, length, f"{seed}/{number}")]
        start += length
    random.Random(seed).shuffle(indices)
    return concatenate_datasets([task.train for task in tasks]).select(indices)


@dataclass(frozen=True)
class _Part:
    """Rows of one data set, in the order in which they are used."""

    place: str
    rows: Rows
    order: list[int]

    def examples(self, convert: Convert) -> list[Example]:
        return [e for index in self.order for e in convert(self.rows[index], _where(self.place, index))]


def _hold_out(spec: DataSpec, seed: int, rows: Rows) -> tuple[_Part, _Part, list[int]]:
    """What to test on, what to evaluate on, and the order of the rows to train on."""
    order, held_out, places = _permutation(len(rows), seed), [], [(spec.path, spec.split)]
    for part in ("test", "eval"):
        path, split, fraction, size = (
            getattr(spec, f"{part}_{name}") for name in ("path", "split", "fraction", "size")
        )
        if path is None and split is None:
            count = max(1, round(fraction * len(rows))) if fraction is not None else size or 0
            if count >= len(order):
                asked = f"{part}_fraction {fraction}" if fraction is not None else f"{part}_size {size}"
                raise ValueError(
                    f"{asked} holds out {count} of the {len(rows)} rows of {spec.path!r} and leaves none to train on: "
                    "lower it, or give more data"
                )
            held_out.append(_Part(spec.path, rows, order[:count]))
            order = order[count:]
            continue
        place = path or spec.path, split or "train"
        if place in places:
            raise ValueError(
                f"{place[0]!r}, split {place[1]!r} is given for two of training, evaluation and test: give another "
                f"{part}_split"
            )
        places.append(place)
        others = read_table(*place, spec.subset if place[0] == spec.path else None)
        if (size or 0) > len(others):
            raise ValueError(f"{part}_size {size} is more than the {len(others)} rows of {place[0]!r}: lower it")
        held_out.append(_Part(place[0], others, _permutation(len(others), seed)[:size]))
    return held_out[0], held_out[1], order


def _training_part(
    spec: DataSpec, rows: Rows, order: list[int], convert: Convert, held_out: set[str]
) -> tuple[list[Example], int]:
    """At most `max_examples` rows as examples, without those held out, and the number left out."""
    train: list[Example] = []
    dropped = used = 0
    for index in order:
        if used == spec.max_examples:
            break
        examples = convert(rows[index], _where(spec.path, index))
        fresh = [example for example in examples if _identity(example) not in held_out]
        dropped += len(examples) - len(fresh)
        used += bool(fresh)
        train += [
            {key: value for key, value in example.items() if key not in ("choices", "answer")} for example in fresh
        ]
    if not train:
        raise ValueError(f"{spec.path!r} has nothing to train on: all {dropped} examples are held out for evaluation")
    if dropped:
        logger.warning("%s: left out %d training examples that are also held out", spec.title, dropped)
    return train, dropped


def _where(place: str, index: int) -> str:
    return f"{place}, row {index + 1}"


def _identity(example: Example) -> str:
    return json.dumps({key: value for key, value in example.items() if key != "choices"}, sort_keys=True)


def _permutation(length: int, seed: int | str) -> list[int]:
    return random.Random(seed).sample(range(length), length)


def _draw(count: int, length: int, seed: str) -> Iterator[int]:
    """`count` of the numbers below `length`: whole passes, each in its own order, and a part of one more."""
    for number in range(math.ceil(count / length)):
        yield from _permutation(length, f"{seed}/{number}")[: count - number * length]


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` by weight into whole numbers: rounded down, and what is left to the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _check_mixable(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise ValueError("a mixture needs at least one task")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks of a mixture need different names, got {names}: set name")
    unweighted = [task.name for task in tasks if task.weight is None]
    if 0 < len(unweighted) < len(tasks):
        raise ValueError(f"tasks {unweighted} have no weight, the others have: give all of them one, or none")
    for task in tasks[1:]:
        if task.kind != tasks[0].kind or task.label_names != tasks[0].label_names:
            raise ValueError(
                f"tasks {names[0]!r} ({tasks[0].kind}, classes {tasks[0].label_names}) and {task.name!r} "
                f"({task.kind}, classes {task.label_names}) cannot share a model: give labels the same class names"
            )
        if task.train.features != tasks[0].train.features:
            raise ValueError(
                f"tasks {names[0]!r} and {task.name!r} have different columns: "
                f"{tasks[0].train.features} and {task.train.features}"
            )
