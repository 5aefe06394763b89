"""YAML as runs and studies are written in it: plain values only, with limits on what a small text may become."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from loraplex.io.field_types import shown
from loraplex.io.reading import MAX_DEPTH, message_of, read_text
from loraplex.recipes.config.errors import ConfigError

MAX_BYTES = 2**20
MAX_VALUES = 100_000
"""Keys and values of a text, each alias counted as what it stands for."""

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML where `1e-4` is a number (as in YAML 1.2), a key given twice is an error, and so is too much of anything."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        # A node that stands for itself, by an alias within it, is still being composed when the alias is met.
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"line {mark.line + 1}: nested in more than {MAX_DEPTH} levels.")
        # Counted as they come: to compose a text of a MiB takes many seconds.
        self._nodes += 1
        if self._nodes > MAX_VALUES:
            raise ConfigError(f"line {mark.line + 1}: more than {MAX_VALUES:,} values.")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise ConfigError(f"line {mark.line + 1}: an alias stands for a value that it is itself a part of.")
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if self._sizes[id(node)] > MAX_VALUES:
            written = f"more than {MAX_VALUES:,} values once its aliases are written out"
            raise ConfigError(f"line {mark.line + 1}: {written}.")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, before `<<` brings in keys that the mapping's own may replace.
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{shown(key)} is given twice (line {line}): keep one of them.")
            seen.add(key)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            # JSON writes a character beyond 16 bits as two escapes, which PyYAML takes for two characters.
            return value.encode("utf-16", "surrogatepass").decode("utf-16") if isinstance(value, str) else value
        except UnicodeDecodeError:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: {shown(node.value)} holds half of a surrogate pair, which is no "
                "character: write the whole character."
            ) from None
        except (ConfigError, yaml.YAMLError):
            raise
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            # PyYAML converts what a tag announces without a look at it: `!!bool maybe`, `!!timestamp x`, 2001-99-99.
            kind = node.tag.rpartition(":")[2]
            raise ConfigError(
                f"line {node.start_mark.line + 1}: {shown(node.value)} is no {kind} ({message_of(error)})."
            ) from None


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a text such as "12e4567", which may be a commit, gets quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def dump_yaml(tree: Any) -> str:
    """The YAML text of plain values, in their order; `parse_yaml` reads equal ones from it."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; `source` names it in errors.

    Raises:
        ConfigError: it is not YAML, too large, nested too deeply, or holds a value that is not what its tag says.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source} has {len(text):,} characters: at most {MAX_BYTES:,} are read as YAML.")
    try:
        # A subclass of SafeLoader: builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {message_of(error)}") from None
    except (OverflowError, ValueError) as error:
        # PyYAML's scanner hands an escape such as "\UFFFFFFFF" to `chr` as it stands.
        raise ConfigError(f"{source} holds an escape that is no character ({message_of(error)}).") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is no such file, or it holds no such thing.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}: give the path of a run's YAML file (see configs/ for examples).")
    try:
        text = read_text(path, "YAML file", MAX_BYTES)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not a mapping: write `key: value` lines.")
    for key in tree:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: {shown(key)} is no key: keys are names.")
    return tree
