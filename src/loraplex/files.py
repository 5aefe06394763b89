"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def check_target(target: Path, force: bool) -> None:
    """Raise a ValueError if `target` holds something that would be lost."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not force:
        raise ValueError(f"{target} is not empty: choose another folder, or replace it (--force, force=True).")


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file that whoever may read its folder can read; safetensors itself closes it to others."""
    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path, {"format": "pt", **metadata})
    path.chmod(path.parent.stat().st_mode & 0o666)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; what stood there goes once the new one is in place."""
    old = folder.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(folder, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes when not."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's id: in a container the next process often has the same one.
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir()
    try:
        yield folder
        put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
