"""A folder that is replaced: whatever ends the process, at whichever line, the old output or the new one stands.

Every line of `files.py` and `exchange.py` that runs is a moment at which a forked process is killed, or hears Ctrl-C;
in `shutil`, where the old folder is removed, as well. Afterwards the next command finds one of the two, and the next
run leaves nothing else behind.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loraplex.exchange as exchange
import loraplex.files as files
from loraplex.files import check_target, recover, replaced_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

OLD = {"old.txt": "old", "sub/more.txt": "more"}
NEW = {"new.txt": "new"}
_TRACED = {module.__file__ for module in (files, exchange, shutil)}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["loraplex.files"])


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
    check_target(target, force=True)
    with replaced_folder(target) as folder:
        fill(folder, NEW)


def at_line(number: int, act: Callable[[], None]) -> None:
    """Call `act` before the so-manyeth line of the traced modules."""
    left = [number]

    def trace(frame, event, argument):  # type: ignore[no-untyped-def]
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


def _every_line(room: Path, there: str, how: str, swaps: bool, found: Path) -> None:
    """Writes what is wrong into `found`, and how many moments were tried."""
    if not swaps:
        files.exchange = lambda one, other: False  # type: ignore[assignment]
    wrong: list[str] = []
    number, code = 0, -1
    while code != 0:
        number += 1
        target = prepare(room, there)
        before = contents(target) if there in ("old", "link") else {}
        code = _ends_at(target, number, how)
        wrong += [f"line {number}: {text}" for text in _look(target, there, before, how, code)]
    found.write_text("\n".join([str(number), *wrong]))


def _look(target: Path, there: str, before: dict[str, str], how: str, code: int) -> list[str]:
    wrong = [] if code in (0, 130, -signal.SIGKILL) else [f"exit code {code}"]
    recover(target)  # as every command does before it says that something is missing
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


CASES = [("old", "kill", True), ("old", "kill", False), ("link", "kill", True), ("nothing", "kill", True)]
CASES += [("file", "kill", False), ("old", "ctrl-c", True), ("old", "ctrl-c", False), ("empty", "ctrl-c", True)]
CASES += [("link", "ctrl-c", False)]


@pytest.mark.parametrize(("there", "how", "swaps"), CASES)
def test_ended_at_every_line(tmp_path: Path, there: str, how: str, swaps: bool) -> None:
    # In a process that has one thread, or a fork may wait for ever, and little memory, or forks take long.
    process = _context.Process(target=_every_line, args=(tmp_path / "room", there, how, swaps, tmp_path / "found"))
    process.start()
    process.join()
    count, *wrong = (tmp_path / "found").read_text().splitlines()
    assert wrong == []
    assert int(count) > 50


def test_exchange_is_one_step_here(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux has it")
    fill(tmp_path / "one", OLD)
    fill(tmp_path / "other", NEW)
    assert exchange.exchange(tmp_path / "one", tmp_path / "other")
    assert (contents(tmp_path / "one"), contents(tmp_path / "other")) == (NEW, OLD)
    with pytest.raises(FileNotFoundError):
        exchange.exchange(tmp_path / "one", tmp_path / "none")


def test_an_old_output_is_not_lost_without_force(tmp_path: Path) -> None:
    """Killed between two renames: the next run sees the old output, and asks."""
    fill(tmp_path / ".target.0123abcd.old", OLD)
    with pytest.raises(ValueError, match="not empty"):
        check_target(tmp_path / "target", force=False)
    assert contents(tmp_path / "target") == OLD


def test_two_old_outputs_are_left_alone(tmp_path: Path) -> None:
    """It can't be told which of them stood there last."""
    for name in ("0123abcd", "4567abcd"):
        fill(tmp_path / f".target.{name}.old", OLD)
    recover(tmp_path / "target")
    assert not (tmp_path / "target").exists()
    replace(tmp_path / "target")
    assert leftovers(tmp_path / "target") == [] or contents(tmp_path / "target") == NEW


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with replaced_folder(target) as folder:
        fill(folder, OLD)
        replace(target)  # another run that ends first
        assert contents(folder) == OLD
        assert contents(target) == NEW
    assert contents(target) == OLD
    assert leftovers(target) == []


def test_names_that_only_look_alike(tmp_path: Path) -> None:
    for name in (".target.tmp", ".target.0123abcd.tmp.txt", ".target2.0123abcd.tmp", ".target.XYZ12345.old"):
        fill(tmp_path / name, OLD)
    before = sorted(path.name for path in tmp_path.iterdir())
    replace(tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*before, "target"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="leads to itself"):
        check_target(tmp_path / "loop", force=True)
    (tmp_path / "dangling").symlink_to("real")
    replace(tmp_path / "dangling")
    assert contents(tmp_path / "real") == NEW
    with pytest.raises(ValueError, match="null character"):
        check_target(Path("a\0b"), force=True)
    with pytest.raises(ValueError, match="root of the file system"):
        check_target(Path("/"), force=True)
