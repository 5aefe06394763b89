"""Every registered method has its page, its row in the tables, its example and its tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import helpers
from loraplex.tuner.registry import METHODS
from tests.fuzz import oracle

ROOT = Path(__file__).parents[1]
OURS = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("loraplex.")}
each = pytest.mark.parametrize("name", OURS)


def test_all_are_public() -> None:
    import loraplex

    assert {getattr(loraplex, cls.__name__) for cls in OURS.values()} == set(OURS.values())
    assert {name for name in loraplex.__all__ if name.endswith("Config")} == {cls.__name__ for cls in OURS.values()}


@each
def test_documents(name: str) -> None:
    page = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {OURS[name].title}")
    assert OURS[name].source.removeprefix("arXiv ") in page
    row = rf"^\| \[{OURS[name].title}\]\(docs/methods/{name}\.md\) \|"
    assert re.search(row, (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))["method"] == name


@each
def test_tests(name: str) -> None:
    cls = OURS[name]
    assert [v for v in helpers.PLAIN if isinstance(helpers.config(v), cls)], "tests/helpers.py has no row in PLAIN"
    assert cls.method in oracle.METHODS
    assert (ROOT / f"tests/methods/test_{name}.py").is_file()
