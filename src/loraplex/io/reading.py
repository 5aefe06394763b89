"""Reads files that others wrote: JSON with limits, names before they become paths, and text before it is shown.

Adapters, base models, runs and data sets are files that people download. Their contents are checked here, once, for all
commands. This module does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraplex.io.field_types import shown

MAX_BYTES = 64 * 2**20
"""The largest JSON file that is read. The index of the largest checkpoints has a few MiB."""
MAX_DEPTH = 100
"""The most levels of nested lists and mappings."""
MAX_MESSAGE = 3000
"""The longest error message, in characters."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
# Control characters, those that reorder text, line separators, and halves of surrogate pairs: a terminal obeys some of
# them, and others hide what a name says.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with escapes for all characters that a terminal would obey instead of showing them."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def json_text(value: Any) -> str:
    """A value as JSON for the terminal: with the letters of all languages, and escapes for what a terminal obeys."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def yaml_text(value: object) -> str:
    """A name as a value in YAML or a model card's head: in quotes if it holds unusual characters."""
    text = str(value)
    return text if re.fullmatch(r"[\w./@+-]+", text) else json.dumps(text)


def message_of(error: BaseException | str, most: int = MAX_MESSAGE) -> str:
    """An error's message for printing: without control characters, and of at most `most` characters.

    The default is a screen or two. A message that is a part of another one takes less.
    """
    text = printable(str(error))
    if len(text) <= most:
        return text
    half = most // 2 - 40
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters left out) … {text[-half:]}"


def file_name(name: object, source: object) -> str:
    """`name`, after a check that it is a file name and stays in the folder to which it is joined.

    Args:
        name: a name that comes from a file.
        source: that file, for the message.

    Raises:
        ValueError: it is not text, is a path, or has a meaning on some system.
    """
    ok = (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "surrogatepass")) <= 255
        and not set(name) & set('/\\:*?"<>|')
        and not _UNSEEN.search(name)
        and "\n" not in name
        and "\t" not in name
        and name.strip(". ") != ""
        and not _RESERVED.fullmatch(name)
    )
    if not ok:
        raise ValueError(f"{source} names the file {shown(name)}: only plain file names are read or written there.")
    assert isinstance(name, str)
    return name


def relative_path(name: object, source: object) -> Path:
    """`name` as a path below a folder, each part of which `file_name` accepts.

    Raises:
        ValueError: it is absolute, leaves the folder, or has a part with a meaning on some system.
    """
    if not isinstance(name, str) or not name:
        file_name(name, source)
    return Path(*(file_name(part, source) for part in str(name).split("/")))


def expanded(path: str) -> Path:
    """`path` with `~` and `~user` replaced by the home folder.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{shown(path)} starts with the name of a user whose home folder is not known.") from None


def read_text(path: Path, what: str = "text", limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file of at most `limit` bytes.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not a file, is too large, or is not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file, but {what} should stand there.")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is larger than {limit:,} bytes: that is no {what} that is read here.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8.") from None


def read_json(
    path: Path, kind: type[dict[Any, Any]] | type[list[Any]] | None = None, remedy: str = "copy or download it again"
) -> Any:
    """The value in a JSON file of at most `MAX_BYTES` bytes and `MAX_DEPTH` levels.

    Args:
        path: the file.
        kind: `dict` or `list`, if it must be one.
        remedy: what to do about a file that can't be read.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is too large, not UTF-8, not JSON, nested too deeply, or of another kind; names file and remedy.
    """
    value = parse_json(read_text(path, "JSON file"), str(path), remedy)
    if kind is not None and not isinstance(value, kind):
        wanted = "a mapping" if kind is dict else "a list"
        raise ValueError(f"{path} holds {shown(value)}, not {wanted}: {remedy}.")
    return value


def parse_json(text: str, where: str, remedy: str = "") -> Any:
    """The value of a JSON text of at most `MAX_DEPTH` levels. `where` names the text in errors.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    end = f": {remedy}." if remedy else "."
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested in more than {MAX_DEPTH} levels{end}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}){end}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{where} holds a number that can't be read ({error}){end}") from None
    # Few texts have enough brackets to be that deep: only theirs is counted.
    if text.count("[") + text.count("{") > MAX_DEPTH and depth_of(value, MAX_DEPTH) > MAX_DEPTH:
        raise ValueError(f"{where} is nested in more than {MAX_DEPTH} levels{end}")
    return value


def depth_of(value: Any, limit: int) -> int:
    """How many levels of lists and mappings are nested in a value. Counting stops beyond `limit`."""
    level, depth = [value], 0
    while level and depth <= limit:
        level = [inner for item in level for inner in _items(item)]
        depth += bool(level)
    return depth


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
