"""Writes files and folders whole or not at all, even if the process that writes them is killed.

A folder is written beside its target, under a name such as `.target.1f2e3d4c.tmp`, and then takes the target's place.
Where the system can exchange two names in one step (Linux), the old output or the new one stands at every moment.
Elsewhere the old one is first renamed to `.target.1f2e3d4c.old`; if the process is killed before the new one is in
place, the next command that looks for the target puts the old one back.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.io.exchange import exchange
from loraplex.io.field_types import shown

if TYPE_CHECKING:
    from torch import Tensor
if sys.platform != "win32":
    import fcntl


def check_target(target: Path, force: bool) -> None:
    """Raise a ValueError if `target` holds something that would be lost, or can't become a folder."""
    recover(target)
    place = place_of(target)
    if place.exists() and (not place.is_dir() or any(place.iterdir())) and not force:
        raise ValueError(f"{target} is not empty: choose another folder, or replace it (--force, force=True).")


def place_of(target: Path) -> Path:
    """The absolute path of the folder that will be replaced; of a link, the folder to which it points.

    Raises:
        ValueError: `target` is not the path of a folder that can be replaced.
    """
    if "\0" in str(target):
        raise ValueError(f"{shown(str(target))} is no path: it holds a null character.")
    place = Path(os.path.realpath(target))
    if place.is_symlink():
        raise ValueError(f"{target} is a link that leads to itself: remove it, or choose another folder.")
    if not place.name:
        raise ValueError(f"{target} is the root of the file system: choose a folder in it.")
    return place


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file that all who may read its folder can read. safetensors alone would shut out others."""
    from safetensors.torch import save_file  # commands that only look for a folder need no torch

    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path, {"format": "pt", **metadata})
    path.chmod(path.parent.stat().st_mode & 0o666)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`. The file that the block writes there takes the place of `path` at its end.

    Readers see the old file or the new one, never half of one. If the block fails, the old file stays.
    """
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block succeeds, and is removed if it fails.

    Folders that a killed process has left beside `target` are removed first.
    """
    target = place_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    remove_leftovers(target)
    with _new_folder(target) as folder:
        yield folder
        put_in_place(folder, target)


def put_in_place(folder: Path, target: Path) -> None:
    """Let `folder` take the place of `target`. The old folder is removed last, so that it stays if anything fails."""
    with _uninterrupted():
        if not target.exists():
            os.rename(folder, target)
            return
        old = folder if exchange(folder, target) else _rename_twice(folder, target)
    _remove(old)


def _rename_twice(folder: Path, target: Path) -> Path:
    old = folder.with_name(_beside(target, "old").name)
    with _claimed(target):  # so that no process takes it for a leftover
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(old, target)
            raise
    return old


def recover(target: Path) -> None:
    """Put the old `target` back if a process was killed after moving it away and before the new one was in place.

    Nothing is done if `target` exists, or if several folders could have been the old one.
    """
    target = place_of(target)
    if target.exists():
        return
    left = [path for path in _leftovers(target) if path.suffix == ".old"]
    if len(left) == 1:
        with _claimed(left[0]) as ours:
            if ours is not False and not target.exists():
                os.rename(left[0], target)


def remove_leftovers(target: Path) -> None:
    """Remove the folders that dead processes have left beside `target`; the old output only if `target` exists."""
    for path in _leftovers(target):
        if path.suffix == ".old" and not target.exists():
            continue
        with _claimed(path) as ours:
            if ours:
                _remove(path)


def _beside(target: Path, suffix: str) -> Path:
    # Not the process's id, which the next process in a container often has again.
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def _leftovers(target: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    try:
        return [path for path in target.parent.iterdir() if name.fullmatch(path.name) and not path.is_symlink()]
    except OSError:  # no such folder, or it can't be listed
        return []


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which this process claims, and which is removed when the block ends."""
    while True:
        folder = _beside(target, "tmp")
        try:
            folder.mkdir()
            with _claimed(folder) as ours:
                if ours is not False:  # else another process took it for a leftover
                    yield folder
                    return
        finally:
            _remove(folder)


@contextmanager
def _claimed(path: Path) -> Iterator[bool | None]:
    """Hold a lock on `path` that ends with this process.

    Yields True, False if another process holds it or `path` is gone, and None where there are no such locks.
    """
    if sys.platform == "win32":
        yield None
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    except OSError:
        yield None
        return
    try:
        yield _lock(handle, path)
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> bool | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return None


def _remove(path: Path) -> None:
    with _uninterrupted():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A block after whose end Ctrl-C takes effect. Only the main thread gets the signal."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    received: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received and callable(before):
            before(*received[0])
