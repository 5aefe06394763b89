"""A folder that is replaced: whatever ends the process, at whichever line, the old output or the new one stands.

Every line of `files.py` and `exchange.py` that runs is a moment at which a forked process is killed, or hears Ctrl-C;
in `shutil`, where the old folder is removed, as well. Afterwards the next command finds one of the two, and the next
run leaves nothing else behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interrupting import NEW, OLD, contents, exchange, fill, leftovers, replace

from loraplex.io.files import check_target, recover, replaced_folder

WORKER = Path(__file__).with_name("interrupting.py")
CASES = [("old", "kill", True), ("old", "kill", False), ("link", "kill", True), ("nothing", "kill", True)]
CASES += [("file", "kill", False), ("old", "ctrl-c", True), ("old", "ctrl-c", False), ("empty", "ctrl-c", True)]
CASES += [("link", "ctrl-c", False)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("there", "how", "swaps"), CASES)
def test_ended_at_every_line(tmp_path: Path, there: str, how: str, swaps: bool) -> None:
    command = [sys.executable, str(WORKER), str(tmp_path / "room"), there, how, str(swaps)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count, *wrong = output.splitlines()
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
