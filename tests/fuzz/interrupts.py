"""Writes that end at the k-th change of a file: by Ctrl-C, by a full disk, by SIGKILL. The old output or the new one
stands, whole; an error that can clean up does; the next run removes what a kill left behind. And loads that end by
Ctrl-C, which leave the model as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from loraplex import export_lora
from loraplex.commands.cli import main
from tests.fuzz.commands import captured
from tests.fuzz.draw import Draw
from tests.fuzz.loading import run_interrupted
from tests.fuzz.room import Room
from tests.fuzz.verdict import Result, text_of
from tests.fuzz.watch import Watch, limited

Operation = Callable[[Room], int]
OLD = {"old.txt": b"the old output", "sub/more.txt": b"and more of it"}


def _export_lora(room: Room) -> int:
    export_lora(room.host("multilora"), "out/result", force=True)
    return 0


def _command(*arguments: str) -> Operation:
    return lambda room: main([*arguments, "-o", "out/result", "--force"])


OPERATIONS: dict[str, Callable[[Room], Operation]] = {
    "export_lora": lambda room: _export_lora,
    "export": lambda room: _command("export", str(room.folder / "adapters" / "aslora")),
    "merge": lambda room: _command("merge", str(room.folder / "adapters" / "dual_lora")),
    "export --format merged": lambda room: _command(
        "export", str(room.folder / "adapters" / "masa-extras"), "--format", "merged"
    ),
}
_wholes: dict[str, dict[str, bytes]] = {}
"""Operation → what it writes when nobody stops it."""


def run(draw: Draw, room: Room, place: Path, watch: Watch) -> Result:
    """One case."""
    if draw.chance(0.35):
        return run_interrupted(draw, room, place)
    name = draw.choice(list(OPERATIONS))
    how = draw.choice(["ctrl-c", "full disk", "kill"])
    before = draw.choice(["nothing", "old", "old", "link"])
    at = draw.randrange(1, 26)
    result = Result("interrupt", f"interrupt {name}")
    result.mutations = [how, f"at change {at}", f"there was {before}"]
    operation = OPERATIONS[name](room)
    out = place / "out"
    out.mkdir()
    if name not in _wholes:
        _quietly(operation, room)
        _wholes[name] = contents(out / "result")
        _empty(out)
    _prepare(before, place, out)
    old = contents(out / "result")
    if how == "kill":
        _killed(operation, room, watch, place, at)
    else:
        _stopped(result, operation, room, watch, place, at, how)
    after = contents(out / "result")
    if after not in (old, _wholes[name]):
        missing = "gone" if not after and old else "torn"
        result.bad(f"the output is {missing}: {sorted(after)[:4]}")
    left = sorted(path.name for path in out.iterdir() if path.name not in ("result", "real"))
    if left and how != "kill":
        result.bad(f"leaves {len(left)} behind: {[path.rpartition('.')[2] for path in left]}")
    _again(result, operation, room, watch, place, name)
    result.where = f"{how}, {before}" if result.problems else ""
    return result


def _prepare(before: str, place: Path, out: Path) -> None:
    if before == "nothing":
        return
    target = out / ("real" if before == "link" else "result")
    for name, content in OLD.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    if before == "link":
        (out / "result").symlink_to("real")


def _interrupter(watch: Watch, at: int, act: Callable[[], None]) -> None:
    left = [at]

    def count(_: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    watch.on_change = count


def _stopped(result: Result, operation: Operation, room: Room, watch: Watch, place: Path, at: int, how: str) -> None:
    def act() -> None:
        if how == "ctrl-c":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watch.on(place, place / "out") as seen:
        _interrupter(watch, at, act)
        code, error = _quietly(operation, room)
    result.problems += [f"forbidden: {event}" for event in seen]
    if error is not None and not isinstance(error, (KeyboardInterrupt, OSError, ValueError)):
        result.bad(f"raises {type(error).__name__}: {text_of(error)[:200]}", error)
    if code not in (0, 2, 130):
        result.bad(f"exit code {code}")
    result.outcome = "equal" if code == 0 and error is None else "refused"


def _killed(operation: Operation, room: Room, watch: Watch, place: Path, at: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            with watch.on(place, place / "out"):
                _interrupter(watch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                _quietly(operation, room)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _again(result: Result, operation: Operation, room: Room, watch: Watch, place: Path, name: str) -> None:
    """The next run succeeds and tidies up."""
    code, error = _quietly(operation, room)
    out = place / "out"
    if code != 0 or error is not None:
        result.bad(f"the next run fails: {code} {text_of(error)[:200] if error else ''}", error)
    elif contents(out / "result") != _wholes[name]:
        result.bad("the next run writes something else")
    if left := sorted(path.name for path in out.iterdir() if path.name not in ("result", "real")):
        result.bad(f"the next run leaves {len(left)} behind: {[path.rpartition('.')[2] for path in left]}")


def _quietly(operation: Operation, room: Room) -> tuple[int, BaseException | None]:
    try:
        with limited(10), captured():
            return operation(room), None
    except BaseException as error:
        return 0, error


def contents(folder: Path) -> dict[str, bytes]:
    """Path → bytes of everything in a folder; safetensors writes its metadata in any order."""
    return {str(path.relative_to(folder)): _bytes_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _bytes_of(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    length = int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode() + content[8 + length :]


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
