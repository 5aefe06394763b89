"""Tiny models and data, from the tests of whole runs."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))

from runs import furnish


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data; no test changes it."""
    return furnish(tmp_path_factory.mktemp("room"))
