"""Progress bars and notes, all alike; of several processes one speaks."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from tqdm import tqdm

from loraplex.io.reading import printable


def is_main() -> bool:
    """Whether this process is the one that speaks and writes: the launcher's rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """A line about what is going on, to stderr: stdout is for results."""
    if is_main():
        print(printable(text), file=sys.stderr, flush=True)


def progress(desc: str, total: int, unit: str, **options: Any) -> tqdm[Any]:
    """A bar on stderr that is short-lived by default: it shows after a second, and goes when done."""
    # Left to measure a terminal that does not know its size, tqdm draws nothing.
    width = min(shutil.get_terminal_size().columns, 120)
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs few lines
    settings = {"leave": False, "delay": 1.0, "ncols": width, "nrows": 20, "mininterval": interval, **options}
    return tqdm(desc=printable(desc), total=total, unit=unit, disable=not is_main(), **settings)
