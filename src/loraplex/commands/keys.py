"""The keys of RUN.yaml and STUDY.yaml, for `--help`, shell completion and the documents.

They are read from `run.schema.json` and `study.schema.json`, which hold what `loraplex schema` prints: the fields of
the pydantic models and of the methods' config classes. A test compares. Reading them needs the standard library only.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_ADAPTER = "adapter_"
_INDENT = 24
_WIDEST = 100


@dataclass(frozen=True)
class Key:
    """One key of a YAML file, with its type and default in words."""

    name: str
    type: str
    default: str | None
    """None if the key has no default."""
    required: bool
    description: str
    choices: tuple[str, ...]
    """Known values; there may be others."""

    @property
    def facts(self) -> str:
        """Type and default, as help shows them."""
        if self.required:
            return f"{self.type}; required"
        return self.type if self.default is None else f"{self.type}; default: {self.default}"


@dataclass
class Section:
    """Keys that stand side by side."""

    prefix: str
    """What leads to them: "", "train.", "data.N." or "tasks.NAME."."""
    description: str
    keys: list[Key] = field(default_factory=list)
    others: str = ""
    """Which further keys there may be."""


@cache
def schema(file: str) -> dict[str, Any]:
    """The JSON schema of the file "run" or "study"."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name(f"{file}.schema.json").read_text(encoding="utf-8"))
    return found


def sections(file: str) -> list[Section]:
    """Every key of the file "run" or "study"."""
    tree = schema(file)
    return [*_collect(f"Keys of {file.upper()}.yaml", tree), *_adapters(tree["$defs"])]


def help_text(file: str) -> str:
    """Every key of the file with type, default and description, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
    lines = []
    for section in sections(file):
        lines += ["", *textwrap.wrap(f"--{section.prefix}KEY VALUE: {section.description}", width)]
        for key in section.keys:
            lines += _entry(key, width)
        if section.others:
            lines += textwrap.wrap(section.others, width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines[1:]) + "\n"


def _entry(key: Key, width: int) -> list[str]:
    text = f"{key.description} ({key.facts})"
    lines = textwrap.wrap(text, width, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)
    if len(key.name) + 4 > _INDENT:
        return [f"  {key.name}", *lines]
    return [f"  {key.name}".ljust(_INDENT) + lines[0][_INDENT:], *lines[1:]]


def _collect(title: str, tree: dict[str, Any]) -> list[Section]:
    """The keys of the file, then those of the mappings in it, from the outside in and each kind of mapping once."""
    definitions, seen = tree["$defs"], set()
    sections, nodes = [_section("", title, tree)], [tree]
    for section, node in zip(sections, nodes, strict=False):  # both grow on the way
        for key, part in node["properties"].items():
            suffix, name = _mapping_in(part) or ("", "")
            if name and name not in seen and not name.startswith(_ADAPTER):
                seen.add(name)
                nodes.append(definitions[name])
                sections.append(_section(f"{section.prefix}{key}{suffix}.", part["description"], definitions[name]))
    return sections


def _section(prefix: str, description: str, node: dict[str, Any]) -> Section:
    required = node.get("required", ())
    keys = [_key(key, part, key in required) for key, part in node["properties"].items()]
    others = node.get("additionalProperties")
    return Section(prefix, description, keys, f"{others['description']}." if isinstance(others, dict) else "")


def _mapping_in(part: dict[str, Any]) -> tuple[str, str] | None:
    """(what leads to it, name of its definition) of the mapping that is a value, or a value's items."""
    if "$ref" in part:
        return "", part["$ref"].rpartition("/")[2]
    for inner, step in ((part.get("items"), ".N"), (part.get("additionalProperties"), ".NAME")):
        if isinstance(inner, dict) and (found := _mapping_in(inner)):
            return f"{step}{found[0]}", found[1]
    return next(filter(None, map(_mapping_in, part.get("anyOf", ()))), None)


def _adapters(definitions: dict[str, Any]) -> list[Section]:
    """The settings of the methods: those that all of ours share, then what each has beside them."""
    every = {name.removeprefix(_ADAPTER): part for name, part in definitions.items() if name.startswith(_ADAPTER)}
    ours = {name: part["properties"] for name, part in every.items() if "additionalProperties" in part}
    first = next(iter(ours.values()))
    shared = {key for key, part in first.items() if all(fields.get(key) == part for fields in ours.values())}
    common = [_key(key, part, False) for key, part in first.items() if key in shared]
    found = [Section("adapter.", f"Settings of {', '.join(ours)}", common)]
    for name, part in every.items():
        fields = part["properties"]
        if name in ours:
            keys = [_key(key, one, False) for key, one in fields.items() if key not in shared]
            found.append(Section("adapter.", f"Settings of {name} alone", keys))
        else:
            names = f"Those of the method's class in PEFT: {', '.join(fields)}."
            found.append(Section("adapter.", f"Settings of {name}", others=names))
    return found


def _key(name: str, part: dict[str, Any], required: bool) -> Key:
    default = None
    if "default" in part:
        value = part["default"]
        default = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    choices = tuple(str(one) for one in _choices(part))
    return Key(name, _type(part, default), default, required, part["description"].rstrip("."), choices)


def _choices(part: dict[str, Any]) -> list[Any]:
    inner = [choice for one in part.get("anyOf", ()) for choice in _choices(one)]
    return [*part.get("enum", ()), *(["true", "false"] if part.get("type") == "boolean" else []), *inner]


def _type(part: dict[str, Any], default: str | None = None) -> str:
    """A type in words. That a value may be null goes without saying where null is the default."""
    if "anyOf" in part:
        words = dict.fromkeys(_type(one) for one in part["anyOf"])
        return " or ".join(word for word in words if word != "null" or default != "null")
    if "enum" in part:
        return " | ".join(map(str, part["enum"]))
    if part.get("type") == "array":
        return f"list of {_type(part.get('items', {}))}s"
    if "$ref" in part:
        return "mapping"
    names = {"string": "text", "boolean": "true | false", "object": "mapping"}
    return names.get(part.get("type", "any value"), part.get("type", "any value"))
