"""Settings for the tests of whole runs."""

from pathlib import Path

import pytest
from runs import furnish


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data."""
    return furnish(tmp_path_factory.mktemp("room"))
