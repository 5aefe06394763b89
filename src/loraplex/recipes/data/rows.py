"""Rows of a data set as they lie in a file, a folder, a hub repository or a registry package."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from loraplex.io.field_types import shown
from loraplex.io.reading import expanded, file_name, message_of, parse_json, read_json
from loraplex.recipes.packages import PACKAGE_PREFIX, read_package

Rows = Sequence[Mapping[str, Any]]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_table(path: str, split: str = "train", subset: str | None = None) -> Rows:
    """Read one split of the data set at `path`: a file, a folder, a hub id or `package:NAME`.

    Raises FileNotFoundError for a missing file, ModuleNotFoundError for a missing package, ValueError for
    content that cannot be read (it names the line) and for an empty data set.
    """
    if path.startswith(PACKAGE_PREFIX):
        rows: Rows = read_package(path, split, subset)
    else:
        rows = _read_local_or_hub(path, split, subset)
    if len(rows) == 0:
        raise ValueError(f"data set {path!r} is empty (split {split!r}): give one with at least one row")
    return rows


def class_names(rows: Rows, column: str) -> list[str] | None:
    """The names of a `ClassLabel` column, whose rows hold only integers; None for any other column."""
    feature = rows.features.get(column) if isinstance(rows, Dataset) else None
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _read_local_or_hub(path: str, split: str, subset: str | None) -> Rows:
    place = expanded(path)
    if place.is_dir():
        return _read_folder(place, split)
    if place.is_file():
        if split != "train":
            raise ValueError(f"{path} is one file and has no split {split!r}: name its own file in eval_path")
        return _read_file(place)
    if place.suffix in SUFFIXES or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"data file {path!r} does not exist (looked in {Path.cwd()})")
    with _reading(path):
        rows = load_dataset(path, subset, split=split)
    if not isinstance(rows, Dataset):
        raise ValueError(f"data set {path!r} gave {type(rows).__name__} for split {split!r}: name one split")
    return rows


def _read_folder(folder: Path, split: str) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        _check_saved(folder)
        with _reading(str(folder)):
            saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{folder} has no split {split!r}: choose one of {', '.join(saved)}")
            return saved[split]
        return saved
    for suffix in SUFFIXES:
        file = folder / f"{split}{suffix}"
        if file.is_file():
            return _read_file(file)
    inside = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"{folder} has no {split}.jsonl, .json, .csv or .parquet; it holds {inside}")


def _check_saved(folder: Path) -> None:
    """Check the names of files and splits in what `save_to_disk` wrote: each becomes a path that is read."""
    listed = folder / "dataset_dict.json"
    splits = read_json(listed, dict).get("splits") if listed.is_file() else None
    if splits is not None and not isinstance(splits, list):
        raise ValueError(f"{listed}: splits is {shown(splits)}, not a list of names")
    for part in [folder, *(folder / file_name(name, listed) for name in splits or ())]:
        state = part / "state.json"
        if not state.is_file():
            continue
        files = read_json(state, dict).get("_data_files")
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise ValueError(f"{state}: _data_files is {shown(files)}, not a list of files")
        for file in files:
            file_name(file.get("filename"), state)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What `datasets` says of files that it can't read, as a ValueError that names them."""
    try:
        yield
    except (OSError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise ValueError(f"data set {path!r} can't be read: {type(error).__name__}: {message_of(error)}") from error


def _read_file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path}: {path.suffix!r} is not a known kind of data file: use {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    return readers[path.suffix](path, text)


def _read_jsonl(path: Path, text: str) -> Rows:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028, which is no line end here.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        rows.append(_object(parse_json(line, f"{path}, line {number}"), f"{path}, line {number}"))
    return rows


def _read_json(path: Path, text: str) -> Rows:
    try:
        rows = parse_json(text, str(path))
    except ValueError as error:
        hint = "; one object per line needs the suffix .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{str(error).rstrip('.')}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}: it must be a list of objects")
    return [_object(row, f"{path}, item {number}") for number, row in enumerate(rows, start=1)]


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}: each row must be an object with named columns")
    return row


def _read_csv(path: Path, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise ValueError(f"{path}, line {reader.line_num} does not have the header's {columns} cells")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error
    return rows


def _read_parquet(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {message_of(error)}") from error
