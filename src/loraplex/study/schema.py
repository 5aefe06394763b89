"""The JSON schema (draft 2020-12) of STUDY.yaml, by which editors complete and check it."""

from __future__ import annotations

from typing import Any

from loraplex.recipes.config.schema import adapters, any_method, known_methods, reference_to, run_schema, schema_of
from loraplex.study.config import StudyConfig

_DECIDED = ("learning_rate", "seed")
"""Fields of `train` that a study decides itself."""


def study_schema() -> dict[str, Any]:
    """The schema of STUDY.yaml, with the short forms that it may be written in."""
    schema = schema_of(StudyConfig, "STUDY.yaml of loraplex compare")
    definitions, properties = schema["$defs"] | adapters(), schema["properties"]
    schema["$defs"] = definitions
    train = run_schema()["$defs"]["TrainSection"]
    train["properties"] = {name: part for name, part in train["properties"].items() if name not in _DECIDED}
    definitions["TrainSection"] = train
    for section in (properties, definitions["TaskEntry"]["properties"]):
        section["train"] = {"$ref": "#/$defs/TrainSection", "description": section["train"]["description"]}
    properties["tasks"]["additionalProperties"] = {
        "anyOf": [{"$ref": "#/$defs/TaskEntry"}, definitions["TaskEntry"]["properties"]["data"]]
    }
    properties["methods"] = _methods(properties["methods"]["description"])
    properties["adapter"]["properties"] = _common_fields(definitions)
    _complete_entry(definitions["MethodEntry"])
    return schema


def _methods(description: str) -> dict[str, Any]:
    """A list of names, or entries. An entry without `method` is of the method that has the entry's name."""
    entry: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/MethodEntry"}, {"type": "null"}]}
    named = {
        name: {
            **entry,
            "if": {"type": "object", "not": {"required": ["method"]}},
            "then": {"properties": {"adapter": reference_to(name)}},
        }
        for name in known_methods()
    }
    entries = {"type": "object", "minProperties": 1, "properties": named, "additionalProperties": entry}
    names = {"type": "array", "minItems": 1, "items": any_method()}
    return {"description": description, "anyOf": [entries, names]}


def _complete_entry(entry: dict[str, Any]) -> None:
    entry["properties"]["method"] |= any_method()
    entry["allOf"] = [
        {
            "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
            "then": {"properties": {"adapter": reference_to(name)}},
        }
        for name in known_methods()
    ]


def _common_fields(definitions: dict[str, Any]) -> dict[str, Any]:
    """The fields that mean the same in every method that has them."""
    every = [definition["properties"] for name, definition in adapters().items()]
    names = {name for fields in every for name in fields}
    found = {name: [fields[name] for fields in every if name in fields] for name in sorted(names)}
    return {name: same[0] for name, same in found.items() if all(one == same[0] for one in same)}
