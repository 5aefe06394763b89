"""The cache of converted adapters: one folder per content, whole or absent, the least recently used removed first.

$LORAPLEX_CACHE/plain/
  DIGEST/         a plain LoRA's folder; its modification time is its last use
  DIGEST.json     where it came from, and the sizes of its files
  DIGEST.lock     held by the process that converts
  DIGEST.held     shared lock of each server that has the folder loaded
  seen/KEY.json   which content a folder had when it was last read, by its files' times and sizes
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraplex.export.wish import read_json
from loraplex.io.files import write_text
from loraplex.io.reading import printable

_LOG = logging.getLogger(__name__)
_GRACE = 600.0
"""Seconds after its last use in which an entry is not removed: whoever asked for it is about to load it."""
_DEFAULT_GIB = 20.0
_SMALL = 1 << 20
_DIGEST = re.compile("[0-9a-f]{40}")


def cache_folder() -> Path:
    """The folder for converted weights: `$LORAPLEX_CACHE`, or `~/.cache/loraplex`."""
    return Path(os.environ.get("LORAPLEX_CACHE") or "~/.cache/loraplex").expanduser().absolute()


def size_limit() -> float:
    """Bytes that the cache may hold: `$LORAPLEX_CACHE_GIB`, or 20 GiB.

    Raises:
        ValueError: the variable is no positive number.
    """
    text = os.environ.get("LORAPLEX_CACHE_GIB") or str(_DEFAULT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1
    if not limit > 0:
        raise ValueError(f"LORAPLEX_CACHE_GIB={text} must be a positive number of GiB.")
    return limit * 2**30


@dataclass(frozen=True)
class Entry:
    """One converted adapter."""

    path: Path
    method: str
    source: str
    """The folder that it was converted from."""
    size: int
    """Bytes."""
    last_used: float
    """Seconds since the epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "path": str(self.path)}


@dataclass
class PlainCache:
    """The converted adapters of this user."""

    root: Path = field(default_factory=lambda: cache_folder() / "plain")

    def find(self, digest: str) -> Path | None:
        """The folder of this content, marked as used now; None if it is not there or not whole."""
        path = self.root / digest
        try:
            sizes = self._read_note(digest)["files"]
            if any((path / name).stat().st_size != size for name, size in sizes.items()):
                return None
        except (OSError, ValueError):
            return None
        try:
            os.utime(path)
        except PermissionError:  # a cache that another user fills
            _LOG.debug("the last use of %s can't be noted", path)
        return path

    @contextmanager
    def locked(self, digest: str) -> Iterator[None]:
        """Let one process at a time convert this content; the others wait for it."""
        # Here, so that a hit does not pay for the import.
        from filelock import FileLock

        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f"{digest}.lock"):
            # What a converter that was killed has left; nobody else writes under this name now.
            for rest in self.root.glob(f".*{digest}*"):
                shutil.rmtree(rest, ignore_errors=True)
            yield

    def staging(self, digest: str) -> Path:
        """Where the holder of the lock writes before `put`."""
        return self.root / f".{digest}.staging"

    def put(self, digest: str, method: str, source: Path) -> Path:
        """Put the staged folder in place; only the holder of the lock may."""
        staged, target = self.staging(digest), self.root / digest
        sizes = {file.name: file.stat().st_size for file in staged.iterdir()}
        if target.exists():
            self._remove(target)
        self._write(self._note(digest), {"method": method, "source": str(source), "files": sizes})
        os.rename(staged, target)
        return target

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        found = []
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if path.is_dir() and not path.name.startswith(".") and self._note(path.name).is_file():
                try:
                    note = self._read_note(path.name)
                    size = sum(file.stat().st_size for file in path.iterdir())
                    found.append(Entry(path, note["method"], note["source"], size, path.stat().st_mtime))
                except (OSError, ValueError):
                    _LOG.debug("%s went away, or is not whole", path)
        return sorted(found, key=lambda entry: -entry.last_used)

    def shrink(self, limit: float) -> None:
        """Remove the least recently used entries until the cache holds at most `limit` bytes.

        Entries that a server holds, or that were asked for in the last ten minutes, stay.
        """
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        for entry in reversed(entries):
            if total <= limit:
                break
            if time.time() - entry.last_used > _GRACE and self.drop(entry):
                total -= entry.size
        if total > limit:
            _LOG.warning("%s holds %d bytes, more than its limit, and all of it is in use", self.root, total)
        self._forget()

    def drop(self, entry: Entry) -> bool:
        """Remove an entry unless a server holds it; returns whether it is gone."""
        lock = Hold(self.root / f"{entry.path.name}.held")
        try:
            if not lock.take(shared=False):
                return False
            self._remove(entry.path)
        finally:
            lock.close()
        for ending in ("held", "lock", "json"):
            (self.root / f"{entry.path.name}.{ending}").unlink(missing_ok=True)
        return True

    def clear(self) -> list[Entry]:
        """Remove all entries; returns those that servers hold, which stay."""
        held = [entry for entry in self.entries() if not self.drop(entry)]
        self._forget()
        return held

    def hold(self, path: Path) -> Hold | None:
        """Keep an entry from being removed while the returned lock is held; None for a folder outside the cache."""
        if path.parent != self.root:
            return None
        lock = Hold(self.root / f"{path.name}.held")
        lock.take(shared=True)
        return lock

    def seen(self, key: str, signature: list[Any]) -> str | None:
        """The digest under which a folder with this signature was last seen."""
        try:
            note = read_json(self.root / "seen" / f"{key}.json", _SMALL)
        except (OSError, ValueError):
            return None
        digest = note.get("digest")
        known = isinstance(digest, str) and _DIGEST.fullmatch(digest) and note.get("signature") == signature
        return digest if known else None

    def see(self, key: str, signature: list[Any], digest: str) -> None:
        """Remember a folder's content by its files' times and sizes."""
        folder = self.root / "seen"
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder / f"{key}.json", {"signature": signature, "digest": digest})

    def _forget(self) -> None:
        for path in (self.root / "seen").glob("*.json"):
            try:
                digest = read_json(path, _SMALL).get("digest")
            except (OSError, ValueError):
                digest = None
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not (self.root / digest).is_dir():
                path.unlink(missing_ok=True)

    def _note(self, digest: str) -> Path:
        return self.root / f"{digest}.json"

    def _read_note(self, digest: str) -> dict[str, Any]:
        """What is written about an entry; a ValueError if it is not what `put` writes."""
        note = read_json(self._note(digest), _SMALL)
        texts, sizes = (note.get("method"), note.get("source")), note.get("files")
        if not all(isinstance(text, str) for text in texts) or not isinstance(sizes, dict):
            raise ValueError(f"{self._note(digest)} is no note of a converted adapter.")
        return note

    def _remove(self, path: Path) -> None:
        # Renamed first, so that a reader finds a whole folder or none.
        gone = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.gone")
        try:
            os.rename(path, gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    @staticmethod
    def _write(path: Path, value: dict[str, Any]) -> None:
        write_text(path, json.dumps(value))


def print_entries(cache: PlainCache, entries: list[Entry]) -> None:
    """Print a table of entries: sizes, last uses, and where they came from."""
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        size = f"{entry.size / 2**20:9.1f} MiB"
        print(printable(f"{entry.path.name[:12]}  {entry.method.lower():9}  {size}  {used}  {entry.source}"))
    total = sum(entry.size for entry in entries) / 2**20
    print(f"{len(entries)} converted adapters, {total:.1f} MiB, in {cache.root}")


class Hold:
    """A lock on a file, given up by `close` or when nothing refers to it any more."""

    _descriptor: int | None = None

    def __init__(self, path: Path) -> None:
        # Not a file object: Python warns of one that a server keeps until it ends.
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)

    def take(self, shared: bool) -> bool:
        """Lock the file; returns False if another one's lock stands against it."""
        if sys.platform == "win32":  # no server that loads from here runs there
            return True
        import fcntl

        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Give the lock up."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()
