"""The JSON schema (draft 2020-12) of RUN.yaml, by which editors complete and check it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any, get_type_hints

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from loraplex.recipes.config.arguments import adapter_fields
from loraplex.recipes.config.run_config import RunConfig
from loraplex.tuner.registry import METHODS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_OTHER_FIELDS = "Any other field of TRL's SFTConfig (task: sft) or transformers' TrainingArguments (classification)"
ADAPTER_OF = "adapter_{}"
"""Name of the definition of a method's settings."""


def run_schema() -> dict[str, Any]:
    """The schema of RUN.yaml: `adapter` has the fields of the method's config, of an unknown method any."""
    schema = schema_of(RunConfig, "RUN.yaml of loraplex train")
    schema["properties"]["method"] |= any_method()
    schema["$defs"]["TrainSection"]["additionalProperties"] = {"description": _OTHER_FIELDS}
    schema["$defs"] |= adapters()
    schema["allOf"] = [
        {
            "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
            "then": {"properties": {"adapter": reference_to(name)}},
        }
        for name in known_methods()
    ]
    return schema


def schema_of(model: type[BaseModel], title: str) -> dict[str, Any]:
    """The schema of a pydantic model, without the titles that repeat each field's name."""
    schema: dict[str, Any] = _without_titles(model.model_json_schema())
    return {"$schema": DIALECT, "title": title} | schema


def known_methods() -> dict[str, Any]:
    """The methods whose settings the schema knows: name → config class."""
    return {**METHODS, "lora": LoraConfig}


def any_method() -> dict[str, Any]:
    """The keywords of a field that names a method: editors offer the known ones."""
    return {"anyOf": [{"enum": list(known_methods())}, {"type": "string"}]}


def reference_to(method: str) -> dict[str, str]:
    """A reference to the definition of a method's settings."""
    return {"$ref": f"#/$defs/{ADAPTER_OF.format(method)}"}


def adapters() -> dict[str, Any]:
    """The definitions of the known methods' settings. PEFT's may have more fields in other versions of it."""
    return {ADAPTER_OF.format(name): _adapter(cls, closed=name in METHODS) for name, cls in known_methods().items()}


def _adapter(cls: Any, closed: bool) -> dict[str, Any]:
    documents, hints = _field_docs(cls), get_type_hints(cls)
    properties = {}
    for field in adapter_fields(cls).values():
        property = _type_schema(hints[field.name])
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if isinstance(default, bool | int | float | str | dict | list | None):
            property["default"] = default
        property["description"] = _in_yaml(documents.get(field.name) or field.metadata.get("help", ""))
        properties[field.name] = property
    return {"type": "object", "properties": properties} | ({"additionalProperties": False} if closed else {})


def _type_schema(hint: Any) -> dict[str, Any]:
    """The schema of a field's type; of a type that has none, one that takes everything."""
    try:
        schema = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    return {} if "$defs" in schema else _without_titles(schema)


def _field_docs(cls: Any) -> dict[str, str]:
    """Field → the text below it in the class, the class's own before those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = text.value.value
    return found


def _in_yaml(text: str) -> str:
    """A description on one line, with YAML's names of Python's constants."""
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda found: words[found[0]], " ".join(text.split()))


def _without_titles(value: Any) -> Any:
    """The schema without `title`, except where that is the name of a property."""
    if isinstance(value, list):
        return [_without_titles(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {name: _without_titles(one) for name, one in part.items()}
        if key in ("properties", "$defs")
        else _without_titles(part)
        for key, part in value.items()
        if key != "title"
    }
