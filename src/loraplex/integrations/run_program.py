"""`loraplex exec PROGRAM [ARG …]`: run a Python program that knows nothing of loraplex, with the methods registered.

The program runs in this process, so that its exit code, its output and the signals that reach it are its own. Python
processes that it starts find `children/sitecustomize.py` through PYTHONPATH and import loraplex too.
"""

from __future__ import annotations

import difflib
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHILDREN = Path(__file__).parent / "children"
"""A folder whose `sitecustomize.py` imports loraplex."""


def find_program(arguments: Sequence[str]) -> Callable[[], Any]:
    """A program, ready to run as if it had been started itself. Called, it returns its exit code or raises SystemExit.

    Args:
        arguments: a console script's name, `-m` and a module, or the path of a Python file; then its own arguments.

    Raises:
        ValueError: there is no such program, or it is not written in Python.
    """
    run, argv = _found(list(arguments))

    def run_as_itself() -> Any:
        _reach_children()
        sys.argv = argv
        return run()

    return run_as_itself


def _found(arguments: list[str]) -> tuple[Callable[[], Any], list[str]]:
    """What to call, and the program's own sys.argv."""
    program = arguments[0]
    if program == "-m":
        return _module(arguments[1:])
    scripts = entry_points(group="console_scripts")
    script = next((script for script in scripts if script.name == program), None)
    path = shutil.which(program) or program
    if script is not None:
        return _console_script(script), [path, *arguments[1:]]
    if Path(path).is_file() and _is_python(Path(path)):
        # As Python itself does, so that a script finds the modules beside it.
        sys.path[0:0] = [str(Path(path).resolve().parent)]
        return lambda: runpy.run_path(path, run_name="__main__") and None, [path, *arguments[1:]]
    if Path(path).is_file():
        raise ValueError(f"{path} is no Python program: loraplex exec can't import anything into it.")
    near = difflib.get_close_matches(program, {script.name for script in scripts}, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"{program} is no console script of this environment ({sys.prefix}), no module after -m and no file.{hint}"
    )


def _console_script(script: EntryPoint) -> Callable[[], Any]:
    def run() -> Any:
        return script.load()()

    return run


def _module(arguments: list[str]) -> tuple[Callable[[], Any], list[str]]:
    if not arguments:
        raise ValueError("-m needs the name of a module: loraplex exec -m MODULE [ARG …].")
    # As `python -m` does: modules in the working directory count.
    sys.path.insert(0, os.getcwd())
    try:
        spec = find_spec(arguments[0])
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ValueError(f"there is no module {arguments[0]}: give one that python -m runs.")

    def run() -> None:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)

    return run, [spec.origin or arguments[0], *arguments[1:]]


def _is_python(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(200)
    return path.suffix == ".py" or (line.startswith(b"#!") and b"python" in line)


def _reach_children() -> None:
    before = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if str(CHILDREN) not in before:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHILDREN), *before])
