"""What a case must not do, seen from inside the process: write elsewhere, start programs, open sockets, run code."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Of CPU time, for one case."""
MEMORY = 1536 * 2**20
"""Bytes of address space that a worker may add to what it starts with."""

# Event → (position of a path, position of the descriptor that it is relative to).
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),),
    "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
    "os.truncate": ((0, None),), "os.utime": ((0, 3),), "os.setxattr": ((0, None),),
}  # fmt: skip
_STARTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "os.startfile", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "ctypes.dlopen", "webbrowser.open", "urllib.Request",
)  # fmt: skip


class TimedOut(BaseException):
    """A case took longer than it may. No `except Exception` catches it."""


class Watch:
    """Audit events of the case that runs now. One per process: an audit hook can't be taken off again."""

    def __init__(self) -> None:
        self.place: str | None = None
        """Folder of the case; None: nothing is watched."""
        self.allowed: tuple[str, ...] = ()
        self.seen: list[str] = []
        self.on_change: Callable[[str], None] | None = None
        """Called before each change of a file, to interrupt it."""
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self, place: Path, *allowed: Path) -> Iterator[list[str]]:
        """Watch a case in `place`; it may change files below `allowed` only. Yields what it did besides."""
        self.place, self.seen = str(place), []
        self.allowed = tuple(f"{os.path.realpath(path)}/" for path in allowed)
        try:
            yield self.seen
        finally:
            self.place, self.on_change = None, None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.place is None:
            return
        if event == "open":
            self._opened(*args)
        elif event in _CHANGES:
            for position, descriptor in _CHANGES[event]:
                self._changed(event, args[position], -1 if descriptor is None else args[descriptor])
        elif event in _STARTS:
            self._forbid(f"{event} {args[0] if args else ''!r}")
        elif event == "exec":
            self._ran(getattr(args[0], "co_filename", ""))
        elif event == "import" and args[1]:
            self._ran(args[1])

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if not isinstance(path, int) and (writes or any(letter in str(mode or "") for letter in "wax+")):
            self._changed("open", path)

    def _changed(self, event: str, path: Any, descriptor: int = -1) -> None:
        if isinstance(path, int) or path is None:
            return
        if descriptor >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
        # The last part may be a link that is replaced, not followed; what lies above it is followed.
        text = os.path.abspath(os.fsdecode(path))
        real = os.path.realpath(text) if event == "open" else os.path.join(os.path.realpath(os.path.dirname(text)), "")
        inside = real.startswith(self.allowed) or f"{os.path.realpath(text)}/" in self.allowed
        if not inside and text not in ("/dev/null", "/dev/tty"):
            self._forbid(f"{event} {text}", PermissionError(f"the fuzzer forbids {event} of {text}"))
        elif self.on_change is not None:
            self.on_change(f"{event} {text}")

    def _ran(self, path: str) -> None:
        if path and self.place and not path.startswith("<") and os.path.abspath(path).startswith(f"{self.place}/"):
            self._forbid(f"ran {path}")

    def _forbid(self, what: str, error: Exception | None = None) -> None:
        self.seen.append(what)
        raise error or PermissionError(f"the fuzzer forbids {what}")


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TimedOut when the block has used so much CPU time."""

    def stop(*_: Any) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory() -> None:
    """Let this process take no more than `MEMORY` on top of what it has: an allocation beyond it fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def files_of(folder: Path, *without: Path) -> dict[str, tuple[int, int, str]]:
    """Path → size, time of change and kind, of everything in `folder`. Writers outside Python raise no audit event."""
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(root, name) not in without]
        for name in [*folders, *names]:
            status = os.lstat(os.path.join(root, name))
            kind = "folder" if name in folders else "file"
            stamp = (0, 0) if kind == "folder" else (status.st_size, status.st_mtime_ns)
            found[os.path.relpath(os.path.join(root, name), folder)] = (*stamp, kind)
    return found
