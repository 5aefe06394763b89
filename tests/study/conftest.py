"""Tiny models and data, from the tests of whole runs."""

import sys
from pathlib import Path

import pytest

import forking

sys.path.append(str(Path(__file__).parents[1] / "training"))

from runs import furnish


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data."""
    return furnish(tmp_path_factory.mktemp("room"))


@pytest.fixture(autouse=True)
def _cells_are_forked_from_what_has_all() -> None:
    """A study in this process asks the server that the tests share."""
    forking.context()
