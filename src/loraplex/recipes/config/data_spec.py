"""What a run says about one data set: where it lies and how its rows become examples."""

from __future__ import annotations

import re
import string
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from loraplex.io.field_types import shown
from loraplex.io.reading import printable
from loraplex.recipes.packages import PACKAGE_PREFIX, package_data

Kind = Literal["sft", "classification"]
EVAL_FIELDS = frozenset({"eval_path", "eval_split", "eval_fraction", "eval_size"})
TEST_FIELDS = frozenset({"test_path", "test_split", "test_fraction", "test_size"})
ANSWER_FIELDS = frozenset({"prompt", "response", "messages", "labels", "choices"})

_WIDEST = 1000
"""Characters that a template's format may pad a field to."""


def _without_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a null character, which no name of a file has")
    return text


Whole = Annotated[int, Field(le=2**31 - 1)]
"""An integer that every library behind it can take."""
PathText = Annotated[str, Field(max_length=4096), AfterValidator(_without_null)]
"""What becomes a path, or a name on the hub."""
Name = Annotated[str, Field(max_length=500)]
"""The name of a split, a column and the like; messages repeat it."""


class DataSpec(BaseModel):
    """One data set, and how its rows become examples. A packaged data set has defaults of its own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: PathText = Field(
        min_length=1, description="File (.jsonl, .json, .csv, .parquet), folder, hub id or package:NAME"
    )
    name: Name = Field("", description="What reports call the task; the last part of `path` if left out")
    split: Name = Field("train", description="Split to train on, where `path` has splits")
    subset: Name | None = Field(None, description="Configuration of a hub data set, or subset of a packaged one")
    eval_path: PathText | None = Field(None, description="Separate held-out data, in any form that `path` may have")
    eval_split: Name | None = Field(None, description="Split to evaluate on, of `eval_path` or else of `path`")
    eval_fraction: float | None = Field(None, gt=0, lt=1, description="Share of the rows to hold out at random")
    eval_size: Whole | None = Field(None, gt=0, description="Number of rows to hold out at random")
    test_path: PathText | None = Field(
        None, description="Separate data to test on, which no training run looks at, in any form that `path` may have"
    )
    test_split: Name | None = Field(None, description="Split to test on, of `test_path` or else of `path`")
    test_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of the rows to hold out for testing, at random"
    )
    test_size: Whole | None = Field(None, gt=0, description="Number of rows to hold out for testing, at random")
    split_seed: Whole | None = Field(
        None, ge=0, description="Seed that decides which rows are held out; the run's seed if left out"
    )
    weight: float | None = Field(
        None, gt=0, le=1e9, description="Share in the mixture, relative to the other data sets"
    )
    max_examples: Whole | None = Field(None, gt=0, description="Train on at most so many rows, drawn at random")
    prompt: str | None = Field(None, description="Template over the columns, e.g. 'Review: {text}\\nSentiment:'")
    response: str | None = Field(None, description="Template of the answer, e.g. '{label}'")
    messages: Name | None = Field(None, description="Column of chat messages (role, content), instead of templates")
    labels: dict[str, str] | None = Field(None, description="Raw label → answer text or class name")
    text_column: Name = Field("text", description="Text to classify")
    text_pair_column: Name | None = Field(None, description="Second text to classify together with the first")
    label_column: Name = Field("label", description="Column of the class to predict, which `labels` translates")
    choices: list[str] | Name | None = Field(
        None,
        description="Candidate answers, or the column that lists them; they follow from `labels` if the response is "
        "the label alone",
    )

    generate: Whole | None = Field(
        None,
        gt=0,
        le=100_000,
        description="Evaluate exact_match too, by greedy decoding of up to so many tokens",
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
            raise ValueError(
                f"template {shown(template)} has an empty {{}}: name a column, or write {{{{ }}}} for braces"
            )
        return template

    @model_validator(mode="after")
    def _fields_agree(self) -> DataSpec:
        if self.messages is not None and (self.prompt is not None or self.response is not None):
            raise ValueError(f"messages={shown(self.messages)} excludes prompt and response: keep one form")
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
            raise ValueError(f"choices={shown(self.choices)} must hold at least two different answers")
        return self

    @property
    def title(self) -> str:
        """The task's name: `name`, or else the last part of `path` without its suffix, as one line."""
        name = self.name or PurePath(self.path.removeprefix(PACKAGE_PREFIX)).stem
        return printable(name).replace("\n", " ")


def template_columns(template: str) -> list[str]:
    """The columns that a template names; ValueError if its braces do not match or a format is none to fill in.

    A format such as `{price:.2f}` may not hold fields of its own, nor pad to a width that no text has.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {shown(template)}: {error}; write {{{{ }}}} for literal braces") from error
    for _, field, form, conversion in parts:
        if field is None:
            continue
        if conversion not in (None, "r", "s", "a"):
            raise ValueError(f"template {shown(template)}: after {field}! stands {shown(conversion)}: use r, s or a")
        if form and ("{" in form or any(int(number) > _WIDEST for number in re.findall("[0-9]+", form[:100]))):
            raise ValueError(
                f"template {shown(template)}: {shown(form)} is no format to fill in: no field, and no number above "
                f"{_WIDEST:,}, may stand after {field}:"
            )
        if form and len(form) > 100:
            raise ValueError(f"template {shown(template)}: the format after {field}: is {len(form)} characters long")
    return [field for _, field, _, _ in parts if field is not None]


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
