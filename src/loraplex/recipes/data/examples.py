"""One row of a data set → examples: prompts with answers, conversations, or texts with a class."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loraplex.io.field_types import shown
from loraplex.recipes.config.data_spec import DataSpec, template_columns
from loraplex.recipes.data.rows import Rows, class_names

Row = Mapping[str, Any]
Example = dict[str, Any]
# (row, where it stands, for error messages) → its examples; several for a conversation with several answers.
Convert = Callable[[Row, str], list[Example]]


class _Template(string.Formatter):
    """`str.format` where a field is the whole name of a column: no attributes, no indices."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def writer(spec: DataSpec, rows: Rows, chat: bool) -> Convert:
    """How rows become `prompt` and `completion`, with `choices` and `answer` where there are candidates.

    Raises ValueError if neither the spec nor the columns say how, or for messages without a chat template.
    """
    columns = list(rows[0])
    if spec.messages is None and spec.prompt is None:
        spec = spec.model_copy(update=_form_of_columns(columns, spec.path))
    if spec.messages is None:
        labels = _labels(spec, rows)
        return lambda row, where: [_answered(spec, labels, row, where, chat)]
    if not chat:
        raise ValueError(
            f"{spec.path} holds chat messages, but the tokenizer has no chat template, or train.chat is false: set "
            "train.chat, use a chat model, or prompt and response templates"
        )
    column = spec.messages
    return lambda row, where: _conversation(value_of(row, column, where), where)


def classifier(spec: DataSpec, labels: Mapping[str, str]) -> Convert:
    """How rows become `text`, `label` and, with a `text_pair_column`, `text_pair`."""
    names = list(dict.fromkeys(labels.values()))

    def convert(row: Row, where: str) -> list[Example]:
        example: Example = {"text": _text(row, spec.text_column, where)}
        if spec.text_pair_column is not None:
            example["text_pair"] = _text(row, spec.text_pair_column, where)
        example["label"] = names.index(_translate(row, spec.label_column, labels, where))
        return [example]

    return convert


def label_map(spec: DataSpec, *parts: Rows) -> dict[str, str]:
    """Raw label, as text → class name: by `labels`, by the data set's own class names, or by the values found.

    Raises ValueError if there are fewer than two classes.
    """
    names = _labels(spec, parts[0])
    if names is None:
        where = f"{spec.path}, row {{}}"
        found = {
            str(value_of(row, spec.label_column, where.format(index)))
            for rows in parts
            for index, row in enumerate(rows, start=1)
        }
        names = {value: value for value in sorted(found, key=_number_first)}
    if len(set(names.values())) < 2:
        raise ValueError(
            f"{spec.path} has one class only, {shown(list(names.values()))}, in column {spec.label_column!r}"
        )
    return names


def value_of(row: Row, column: str, where: str) -> Any:
    """A row's value in `column`; ValueError if the row has no such column, or None or NaN in it."""
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}: its columns are {_some(row)}")
    value = row[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{where}: column {column!r} is {value}: fill it in, or remove the row")
    return value


def _some(names: Iterable[str], most: int = 30) -> str:
    """Names in a message, of many the first."""
    known = list(names)
    rest = f" and {len(known) - most:,} more" if len(known) > most else ""
    return ", ".join(name if len(name) < 100 else shown(name) for name in known[:most]) + rest


def _form_of_columns(columns: Sequence[str], path: str) -> dict[str, str]:
    if {"prompt", "completion"} <= set(columns):
        return {"prompt": "{prompt}", "response": "{completion}"}
    if "messages" in columns:
        return {"messages": "messages"}
    raise ValueError(f"{path} needs prompt and response templates; its columns are {_some(columns)}")


def _labels(spec: DataSpec, rows: Rows) -> dict[str, str] | None:
    if spec.labels is not None:
        return spec.labels
    names = class_names(rows, spec.label_column)
    return None if names is None else {str(index): name for index, name in enumerate(names)}


def _number_first(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _translate(row: Row, column: str, labels: Mapping[str, str], where: str) -> str:
    value = str(value_of(row, column, where))
    if value not in labels:
        raise ValueError(f"{where}: {column} {shown(value)} is not in labels, which has {_some(labels)}: add it")
    return labels[value]


def _text(row: Row, column: str, where: str) -> str:
    value = value_of(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: column {column!r} is {shown(value)}, not a text: fill it in, or remove the row")
    return value


def _answered(spec: DataSpec, labels: Mapping[str, str] | None, row: Row, where: str, chat: bool) -> Example:
    """A prompt and its answer, both filled in from templates."""
    assert spec.prompt is not None
    assert spec.response is not None
    prompt = _render(spec, spec.prompt, labels, row, where)
    response = _render(spec, spec.response, labels, row, where)
    if not response.strip():
        raise ValueError(f"{where}: the response {shown(spec.response)} comes out empty: fill the column in")
    example: Example = dict(zip(("prompt", "completion"), _pair(prompt, response, chat), strict=True))
    choices = _choices(spec, labels, row, where)
    if choices is None:
        return example
    if response not in choices:
        raise ValueError(
            f"{where}: the response {shown(response)} is not among the choices {shown(choices)}: correct one of them"
        )
    example["choices"] = [_pair(prompt, choice, chat)[1] for choice in choices]
    return example | {"answer": choices.index(response)}


def _render(spec: DataSpec, template: str, labels: Mapping[str, str] | None, row: Row, where: str) -> str:
    values = {column: value_of(row, column, where) for column in template_columns(template)}
    if labels is not None and spec.label_column in values:
        values[spec.label_column] = _translate(row, spec.label_column, labels, where)
    try:
        return _Template().vformat(template, (), values)
    except (ValueError, TypeError) as error:  # a format that the column's value has not
        raise ValueError(f"{where}: the template {shown(template)} can't be filled in: {error}") from None


def _choices(spec: DataSpec, labels: Mapping[str, str] | None, row: Row, where: str) -> list[str] | None:
    if isinstance(spec.choices, str):
        found = value_of(row, spec.choices, where)
        if not isinstance(found, list) or len(found) < 2:
            raise ValueError(
                f"{where}: choices column {spec.choices!r} is {shown(found)}: it must list two answers or more"
            )
        return [str(choice) for choice in found]
    if spec.choices is None and labels is not None and spec.response == f"{{{spec.label_column}}}":
        return list(dict.fromkeys(labels.values()))
    return spec.choices


def _pair(prompt: str, response: str, chat: bool) -> tuple[Any, Any]:
    """Prompt and answer as messages, or as two strings whose border is also a border between tokens."""
    if chat:
        answer = {"role": "assistant", "content": response.strip()}
        return [{"role": "user", "content": prompt}], [answer]
    # Tokenizers join a space with the word after it, so the space belongs to the answer.
    prompt = prompt.rstrip(" ")
    separated = not prompt or prompt[-1].isspace() or response[:1].isspace()
    return prompt, response if separated else f" {response}"


def _conversation(messages: Any, where: str) -> list[Example]:
    """One example for each answer of the assistant, with all that came before it as its prompt."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: messages must be a list of objects with role and content, got {shown(messages)}")
    turns = [{key: _text(message, key, where) for key in ("role", "content")} for message in messages]
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and index > 0]
    if not answers:
        raise ValueError(
            f"{where}: no assistant message follows a prompt; roles: {shown([turn['role'] for turn in turns])}"
        )
    return [{"prompt": turns[:index], "completion": [turns[index]]} for index in answers]
