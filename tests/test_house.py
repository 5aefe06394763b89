"""The house: which rooms the package has, what each is for, and that arrows run down only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import loraplex
from loraplex.tuner.registry import METHODS

SOURCE = Path(loraplex.__file__).parent
REPOSITORY = Path(__file__).parents[1]
CORE = ("io", "numerics", "runtime", "tuner", "methods", "export", "inspection", "integrations")
ROOMS = (*CORE, "recipes", "study", "commands")
"""From the ground up: a room imports from itself and from those before it."""
FLOORS = ("config", "data", "evaluation", "models", "prepare", "training", "adapters")
"""The same within recipes; modules that lie in none of these are for all of them."""


def modules() -> dict[str, Path]:
    """Dotted name below the package → file; a room's `__init__` has the room's name, the package's own is ""."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        if "children" not in file.parts:  # is on no path of imports: it is what child processes start with
            found[".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").strip(".")] = file
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The package's modules that a module imports, lazily and for types only included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one.removeprefix("loraplex.") in MODULES else str(node.module) for one in full}
    ours = {one.removeprefix("loraplex").strip(".") for one in found if one.partition(".")[0] == "loraplex"}
    return {one for one in ours if one != name}


GRAPH = {name: imports(name) for name in MODULES}


def test_no_circle() -> None:
    todo = {name: set(targets) for name, targets in GRAPH.items()}
    while free := {name for name, targets in todo.items() if not targets}:
        todo = {name: targets - free for name, targets in todo.items() if name not in free}
    assert not todo, f"in or above a circle of imports: {sorted(todo)}"


def test_every_import_is_of_a_module() -> None:
    assert {target for targets in GRAPH.values() for target in targets} <= MODULES.keys()


def floor(name: str) -> int:
    room, _, rest = name.partition(".")
    if room == "version":
        return -1
    if room in ("", "__main__"):  # the package's own names are those of the core
        return 100 * (ROOMS.index("commands") + 1 if room else len(CORE)) - 1
    inner = rest.partition(".")[0]
    return 100 * ROOMS.index(room) + (FLOORS.index(inner) + 1 if room == "recipes" and inner in FLOORS else 0)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_run_down(name: str) -> None:
    up = {target for target in GRAPH[name] if floor(target) > floor(name)}
    assert not up, f"{name} imports {sorted(up)} from above"


def test_methods_do_not_know_each_other() -> None:
    rooms = {name: name.split(".")[1] for name in MODULES if name.startswith("methods.")}
    for name, room in rooms.items():
        assert {rooms[target] for target in GRAPH[name] if target in rooms} <= {room}


def test_nothing_knows_a_method_but_its_room() -> None:
    """The registry is the only table of methods: nobody else imports from a room of theirs, or asks for a name."""
    names = {spelling for run_name, cls in METHODS.items() for spelling in (run_name, cls.method, cls.title)}
    for module, file in MODULES.items():
        if module.partition(".")[0] == "methods":
            continue
        # The package itself makes their configs public.
        allowed = {"methods"} if not module else set()
        assert {target for target in GRAPH[module] if target.partition(".")[0] == "methods"} <= allowed, module
        texts = (node.value for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Constant))
        assert not names & {text for text in texts if isinstance(text, str)}, module


def test_the_root_is_small() -> None:
    assert {*MODULES} - {name for name in MODULES if name.partition(".")[0] in ROOMS} == {"", "__main__", "version"}
    assert {path.name for path in SOURCE.iterdir() if path.is_dir()} - {"__pycache__"} == {*ROOMS}


def test_every_room_says_what_it_is_for_and_stands_in_the_tree() -> None:
    tree = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, file in MODULES.items():
        if file.name == "__init__.py":
            purpose = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert purpose, f"{file} has no docstring"
            if name:
                line = rf"^ +{name.rpartition('.')[2]}/ "
                assert re.search(line, tree, re.MULTILINE), f"CONTRIBUTING.md has no line for {name}"
