"""`loraplex exec`: arguments, exit codes, output and signals are the program's own, and children know the methods."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forking
from loraplex.commands.cli import main

LORAPLEX = (sys.executable, "-m", "loraplex", "exec")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`loraplex exec` with some arguments, in a fork that has imported loraplex already."""

    def forked(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return forking.run(main, ["exec", *map(str, arguments)], folder=tmp_path, **options)

    return forked


def program(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(text)
    return path


SHOW = "import json, sys\nprint(json.dumps([__name__, sys.argv, 'loraplex' in sys.modules]))\n"


def test_a_file(tmp_path: Path) -> None:
    path = program(tmp_path, SHOW + "import beside\nsys.exit(beside.CODE)\n")
    (tmp_path / "beside.py").write_text("CODE = 7\n")
    arguments = ["--help", "-o", "--train.max_steps", "a b", "--", "", "--adapter.r=3"]
    done = subprocess.run([*LORAPLEX, str(path), *arguments], capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == ["__main__", [str(path), *arguments], True]
    assert (done.returncode, "Traceback" in done.stderr) == (7, False)


def test_a_module(run: Any, tmp_path: Path) -> None:
    program(tmp_path, SHOW + "sys.exit('a reason')\n")
    done = run("-m", "program", "-m", "--version", cwd=tmp_path)
    assert json.loads(done.stdout) == ["__main__", [str(tmp_path / "program.py"), "-m", "--version"], True]
    assert done.returncode == 1
    assert done.stderr.endswith("a reason\n")


@pytest.mark.parametrize("how", [["accelerate"], ["-m", "accelerate.commands.accelerate_cli"]])
def test_a_console_script(run: Any, how: list[str]) -> None:
    done = run(*how, "--help")
    assert done.returncode == 0
    assert "usage: accelerate" in done.stdout
    assert run(*how, "env", "--nonsense").returncode == 2


def test_unknown_programs(run: Any, tmp_path: Path) -> None:
    done = run("acelerate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: acelerate is no console script of this environment" in done.stderr
    assert "Did you mean accelerate" in done.stderr
    for arguments, message in (
        (["-m"], "-m needs the name of a module"),
        (["-m", "no.such.module"], "there is no module no.such.module"),
        (["/bin/ls"], "/bin/ls is no Python program"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"error: {message}" in done.stderr
    done = run("--help")
    assert done.returncode == 0
    assert "usage: loraplex exec" in done.stdout


def test_errors_are_the_programs_own(run: Any, tmp_path: Path) -> None:
    done = run(program(tmp_path, "raise ValueError('mine')\n"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ValueError: mine\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("handled", [False, True])
def test_signals_reach_the_program(number: int, handled: bool, tmp_path: Path) -> None:
    handler = f"signal.signal({int(number)}, lambda *_: sys.exit(9))\n" if handled else ""
    path = program(tmp_path, f"import signal, sys, time\n{handler}print('ready', flush=True)\ntime.sleep(60)\n")
    out = tmp_path / "out"
    process = forking.start(main, ["exec", str(path)], out=out, err=tmp_path / "err")
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_text() != "ready\n":
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # it sleeps by then
    os.kill(process.pid, number)
    process.join(60)
    # What importing PEFT brings makes Python end with 1 after a KeyboardInterrupt that nobody handles.
    unhandled = {-number, 1} if number == signal.SIGINT else {-number}
    assert process.exitcode in ({9} if handled else unhandled)


CHILD = """
import subprocess, sys
code = "import sys; print('loraplex' in sys.modules, sys.modules['sitecustomize'].__file__)"
nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
subprocess.run([sys.executable, "-c", code], check=True)
subprocess.run([sys.executable, "-c", nested, code])
"""


def test_children_and_their_children_know_the_methods(run: Any, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("")
    path = os.pathsep.join([str(theirs), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(program(tmp_path, CHILD), env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    # Their own sitecustomize was run too.
    assert done.stdout.splitlines() == [f"True {theirs / 'sitecustomize.py'}"] * 2


def test_children_of_other_environments_are_left_alone(run: Any, tmp_path: Path) -> None:
    child = (
        f"import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-S', '-c', {'print(1)'!r}]).returncode)\n"
    )
    done = run(program(tmp_path, child))
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


LAUNCHED = """
import os, sys
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
print("MASA" in configs, sys.argv[1:], flush=True)
"""


@pytest.mark.parametrize(
    "launcher", [["accelerate", "launch", "--cpu", "--num_processes", "1"], ["torchrun", "--nproc-per-node", "2"]]
)
def test_launchers(run: Any, launcher: list[str], tmp_path: Path) -> None:
    done = run(*launcher, program(tmp_path, LAUNCHED), "--lr", "1", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True ['--lr', '1']") == int(launcher[-1])
    failing = program(tmp_path, "import sys; sys.exit(3)")
    assert run(*launcher[:-1], "1", failing).returncode == 1
