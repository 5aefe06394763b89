"""Replaces a folder in forks that are ended at every line; prints how many there were, and what is wrong after one.

`python interrupting.py FOLDER THERE HOW SWAPS`, by test_interrupted.py. It runs with an empty package in place of
loraplex/__init__.py, whose import would bring torch: forks of a large process take long, and wait for ever if it had
several threads.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path

OLD = {"old.txt": "old", "sub/more.txt": "more"}
NEW = {"new.txt": "new"}

if "loraplex" not in sys.modules:
    spec = importlib.util.find_spec("loraplex")
    package = types.ModuleType("loraplex")
    package.__path__ = spec.submodule_search_locations
    sys.modules["loraplex"] = package
exchange = importlib.import_module("loraplex.io.exchange")
files = importlib.import_module("loraplex.io.files")
_TRACED = {module.__file__ for module in (files, exchange, shutil)}


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def prepare(room: Path, there: str) -> Path:
    """A fresh folder with a target in it: "nothing", an "empty" or "old" folder, a "file", or a "link" to a folder."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    target = room / "target"
    if there == "empty":
        target.mkdir()
    elif there == "file":
        target.write_text("old")
    elif there == "old":
        fill(target, OLD)
    elif there == "link":
        fill(room / "real", OLD)
        target.symlink_to("real")
    return target


def replace(target: Path) -> None:
    files.check_target(target, force=True)
    with files.replaced_folder(target) as folder:
        fill(folder, NEW)


def at_line(number: int, act: Callable[[], None]) -> None:
    """Call `act` before the so-manyeth line of the traced modules."""
    left = [number]

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in _TRACED:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                act()
        return trace

    sys.settrace(trace)


def _ends_at(target: Path, number: int, how: str) -> int:
    """Exit code of a fork that replaces `target` and is ended at a line; 0 if it came through."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            wanted = signal.SIGKILL if how == "kill" else signal.SIGINT
            at_line(number, lambda: os.kill(os.getpid(), wanted))
            replace(target)
            code = 0
        except KeyboardInterrupt:
            code = 130
        finally:
            sys.settrace(None)
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def every_line(room: Path, there: str, how: str, swaps: bool) -> None:
    """Print how many moments were tried, and what was wrong after one of them."""
    if not swaps:
        files.exchange = lambda one, other: False
    wrong: list[str] = []
    number, code = 0, -1
    while code != 0:
        number += 1
        target = prepare(room, there)
        before = contents(target) if there in ("old", "link") else {}
        code = _ends_at(target, number, how)
        wrong += [f"line {number}: {text}" for text in _look(target, there, before, how, code)]
    print(number, *wrong, sep="\n")


def _look(target: Path, there: str, before: dict[str, str], how: str, code: int) -> list[str]:
    wrong = [] if code in (0, 130, -signal.SIGKILL) else [f"exit code {code}"]
    files.recover(target)  # as every command does before it says that something is missing
    kept = target.is_file() if there == "file" else contents(target) == before
    if not kept and contents(target) != NEW:
        wrong.append(f"{sorted(contents(target))} stands there")
    if code == 0 and contents(target) != NEW:
        wrong.append("success without the new output")
    if there == "link" and not target.is_symlink():
        wrong.append("the link is gone")
    if how == "ctrl-c" and files.exchange is exchange.exchange and (left := leftovers(target)):
        wrong.append(f"leaves {left}")
    replace(target)
    if contents(target) != NEW or leftovers(target):
        wrong.append(f"the next run leaves {leftovers(target)}")
    return wrong


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path.name not in ("target", "real")]


if __name__ == "__main__":
    every_line(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True")
