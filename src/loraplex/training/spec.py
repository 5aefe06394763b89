"""What a run says about one data set: where it lies and how its rows become examples."""

from __future__ import annotations

import string
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loraplex.training.packages import PACKAGE_PREFIX, package_data

Kind = Literal["sft", "classification"]
EVAL_FIELDS = frozenset({"eval_path", "eval_split", "eval_fraction", "eval_size"})
TEST_FIELDS = frozenset({"test_path", "test_split", "test_fraction", "test_size"})
ANSWER_FIELDS = frozenset({"prompt", "response", "messages", "labels", "choices"})


class DataSpec(BaseModel):
    """One data set, and how its rows become examples. A packaged data set has defaults of its own."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1, description="File (.jsonl, .json, .csv, .parquet), folder, hub id or package:NAME")
    name: str = Field("", description="What reports call the task; the last part of `path` if left out")
    split: str = Field("train", description="Split to train on, where `path` has splits")
    subset: str | None = Field(None, description="Configuration of a hub data set, or subset of a packaged one")
    eval_path: str | None = Field(None, description="Separate held-out data, in any form that `path` may have")
    eval_split: str | None = Field(None, description="Split to evaluate on, of `eval_path` or else of `path`")
    eval_fraction: float | None = Field(None, gt=0, lt=1, description="Share of the rows to hold out at random")
    eval_size: int | None = Field(None, gt=0, description="Number of held-out rows, drawn at random")
    test_path: str | None = Field(None, description="Data to test on, which no training run looks at; like eval_path")
    test_split: str | None = Field(None, description="Split to test on, of `test_path` or else of `path`")
    test_fraction: float | None = Field(None, gt=0, lt=1, description="Share of the rows to test on, drawn at random")
    test_size: int | None = Field(None, gt=0, description="Number of rows to test on, drawn at random")
    split_seed: int | None = Field(
        None, ge=0, description="Which rows are held out at random; the run's seed if left out"
    )
    weight: float | None = Field(None, gt=0, description="Share in a mixture, relative to the other tasks")
    max_examples: int | None = Field(None, gt=0, description="Train on at most so many rows, drawn at random")
    prompt: str | None = Field(None, description="Template over the columns, e.g. 'Review: {text}\\nSentiment:'")
    response: str | None = Field(None, description="Template of the answer, e.g. '{label}'")
    messages: str | None = Field(None, description="Column of chat messages (role, content), instead of templates")
    labels: dict[str, str] | None = Field(None, description="Raw label to answer text or class name")
    text_column: str = Field("text", description="Text to classify")
    text_pair_column: str | None = Field(None, description="Second text to classify together with the first")
    label_column: str = Field("label", description="Column that `labels` translates; the class to predict")
    choices: list[str] | str | None = Field(
        None, description="Candidate answers, or the column that lists them: evaluation scores them by likelihood"
    )

    generate: int | None = Field(
        None, gt=0, description="Evaluate exact_match too: greedy decoding of up to so many tokens writes the answer"
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _label_keys_are_text(cls, labels: Any) -> Any:
        # YAML reads 0: and true: as numbers and booleans.
        return {str(key): value for key, value in labels.items()} if isinstance(labels, dict) else labels

    @field_validator("prompt", "response")
    @classmethod
    def _template_parses(cls, template: str | None) -> str | None:
        if template is not None and "" in template_columns(template):
            raise ValueError(f"template {template!r} has an empty {{}}: name a column, or write {{{{ }}}} for braces")
        return template

    @model_validator(mode="after")
    def _fields_agree(self) -> DataSpec:
        if self.messages is not None and (self.prompt is not None or self.response is not None):
            raise ValueError(f"messages={self.messages!r} excludes prompt and response: keep one form")
        # A packaged data set brings the other half.
        if (self.prompt is None) != (self.response is None) and not self.path.startswith(PACKAGE_PREFIX):
            raise ValueError("prompt and response belong together: give both, or neither")
        for part in ("eval", "test"):
            fraction, *others = (getattr(self, f"{part}_{name}") for name in ("fraction", "size", "split", "path"))
            if fraction is not None and any(others):
                raise ValueError(
                    f"{part}_fraction={fraction} excludes {part}_size, {part}_split and {part}_path: keep one"
                )
        if self.labels is not None and not self.labels:
            raise ValueError("labels is empty: give each raw label its text, or leave labels out")
        if isinstance(self.choices, list) and len(set(self.choices)) < 2:
            raise ValueError(f"choices={self.choices} must hold at least two different answers")
        return self

    @property
    def title(self) -> str:
        """The task's name: `name`, or else the last part of `path` without its suffix."""
        return self.name or PurePath(self.path.removeprefix(PACKAGE_PREFIX)).stem


def template_columns(template: str) -> list[str]:
    """The columns that a template names; ValueError if its braces do not match."""
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ }}}} for literal braces") from error


def with_defaults(spec: DataSpec) -> DataSpec:
    """`spec` with a packaged data set's defaults for what the user left out.

    A held-out part or an answer of the user's own replaces the defaults that would contradict it.
    Raises ValueError for an unknown package name.
    """
    if not spec.path.startswith(PACKAGE_PREFIX):
        return spec
    defaults = dict(package_data(spec.path).defaults)
    given = {field for field in spec.model_fields_set if getattr(spec, field) is not None}
    dropped: set[str] = set(EVAL_FIELDS) if given & EVAL_FIELDS else set()
    dropped |= set(TEST_FIELDS) if given & TEST_FIELDS else set()
    if "messages" in given:
        dropped |= ANSWER_FIELDS
    if "response" in given:
        dropped |= {"choices"}
    kept = {field: value for field, value in defaults.items() if field not in given | dropped}
    return spec.model_copy(update=kept)
