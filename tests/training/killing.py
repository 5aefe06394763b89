"""Training in processes that are killed: by their parent after a while, or by themselves at a chosen moment."""

from __future__ import annotations

import inspect
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from forking import start
from loraplex.commands.cli import main
from loraplex.io import files
from loraplex.methods.aslora.shared import AsLoraShared

_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Launcher:
    """Starts `loraplex train RUN` in processes of their own; `errors` is what the last one wrote to stderr."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def start(self, run: Path, *options: str, prepare: Callable | None = None, given: tuple = ()):
        return start(_train, ["train", str(run), *options], prepare, given, out=self._log)

    def __call__(self, run: Path, *options: str, kill_after: float | None = None, **prepared) -> int:
        """Its exit code, or minus the signal that ended it."""
        process = self.start(run, *options, **prepared)
        process.join(kill_after)
        process.kill()
        process.join()
        return process.exitcode

    @property
    def errors(self) -> str:
        return self._log.read_text()


def _train(argv: list[str], prepare: Callable | None, given: tuple) -> int:
    if prepare is not None:
        prepare(*given)
    return main(argv)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _on_file_operations(root: Path, seen: Callable[[str, Path], None]) -> None:
    """Tell about everything that is about to be changed under `root`: ("os.rename checkpoint-*", path)."""

    def hook(event: str, args: tuple) -> None:
        if event not in _OPERATIONS or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = os.fspath(args[0])
        within = event in ("os.remove", "os.rmdir") and not os.path.isabs(path)  # shutil.rmtree
        if within or path.startswith(str(root)):
            name = re.sub(r"(?<=adapter-)\w+|[0-9a-f]{8}(?=\.tmp)|\d+", "*", path.removeprefix(f"{root}/"))
            seen(f"{event} {name}", Path(path))

    sys.addaudithook(hook)

    # These two open their files without telling.
    def told(write: Callable, position: int) -> Callable:
        def tell(*args, **kwargs):
            sys.audit("open", str(args[position]), "w", os.O_WRONLY)
            return write(*args, **kwargs)

        return tell

    torch.save = told(torch.save, 1)
    safetensors.torch.serialize_file = told(safetensors.torch.serialize_file, 1)


def die_at(root: Path, moment: str) -> None:
    """Be killed when an operation of this kind is about to happen."""
    _on_file_operations(root, lambda kind, path: _die() if kind == moment else None)


def die_between_renames(root: Path, moment: str) -> None:
    """`die_at` on a system that can't exchange two names in one step."""
    files.exchange = lambda one, other: False
    die_at(root, moment)


def die_writing(root: Path, moment: str, after: int) -> None:
    """Be ended by the kernel in the middle of a write: once `after` bytes are added to a file that is opened."""

    def seen(kind: str, path: Path) -> None:
        if kind == moment:
            size = path.stat().st_size if path.exists() and path.name == "metrics.jsonl" else 0
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + after, size + after))

    _on_file_operations(root, seen)


def die_merging(line: str) -> None:
    """Be killed inside an ASLoRA merge, before this line of it."""
    merge = AsLoraShared._merge
    lines, first = inspect.getsourcelines(merge)
    number = first + next(i for i, text in enumerate(lines) if line in text)

    def trace(frame, event, arg):
        if frame.f_code is not merge.__code__:
            return None
        if event == "line" and frame.f_lineno == number:
            _die()
        return trace

    sys.settrace(trace)
