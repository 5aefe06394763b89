"""One process at a time writes into a run's folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from loraplex.io.reading import read_json
from loraplex.recipes.config.run_config import ConfigError
from loraplex.recipes.progress import note

LOCK_NAME = ".lock"
_SAME_START = 10.0
"""Seconds by which two readings of one process's start may differ: the clock is corrected now and then."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` inside the block; what a process that no longer lives held is taken over.

    Raises:
        ConfigError: another process of this machine holds it.
    """
    path = folder / LOCK_NAME
    holder = _holder(path)
    if holder is not None and holder["host"] != socket.gethostname():
        note(f"warning: {folder} was in use by process {holder['pid']} on {holder['host']}: make sure that it ended")
    elif holder is not None and _lives(holder):
        raise _in_use(folder, holder["pid"])
    path.unlink(missing_ok=True)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(mine))
    except FileExistsError:
        raise _in_use(folder, "that started just now") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _in_use(folder: Path, process: Any) -> ConfigError:
    return ConfigError(
        f"{folder} is in use by process {process}: let it end or stop it, or choose another --output_dir."
    )


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = read_json(path, dict)
    except (FileNotFoundError, ValueError):  # ValueError: killed before it was written
        return None
    known = isinstance(holder.get("host"), str) and isinstance(holder.get("pid"), int)
    return holder if known and isinstance(holder.get("started"), float) else None


def _lives(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(holder["pid"])
        # Numbers are given out again, in a container often the same one to the next process.
        same = abs(process.create_time() - holder["started"]) < _SAME_START
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # or a number that no process has
        return False
