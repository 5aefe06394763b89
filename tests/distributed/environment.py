"""Leaves the environment that a launcher gave to each of its processes in a folder."""

import json
import os
import sys
from pathlib import Path


def leave_environment(folder: Path) -> None:
    """Write it to a file of the rank's name."""
    (folder / f"{os.environ['RANK']}.environment.json").write_text(json.dumps(dict(os.environ)))


if __name__ == "__main__":
    leave_environment(Path(sys.argv[1]))
