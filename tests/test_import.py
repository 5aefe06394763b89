"""What `import loraplex` loads: its own modules, and little that torch, transformers and PEFT have not loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loraplex

HEAVY = {"bitsandbytes", "datasets", "deepspeed", "matplotlib", "pandas", "scipy", "torchao", "triton", "trl"}
HOSTS = "torch, transformers, peft, accelerate"
SOURCE = Path(loraplex.__file__).parents[1]


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that `import loraplex` loads beside those of its hosts."""
    code = f"import sys, {HOSTS}; before = {{*sys.modules}}; import loraplex; print(*({{*sys.modules}} - before))"
    return {*subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True).split()}


def test_no_other_package_is_loaded(loaded: set[str]) -> None:
    # torch's counter of operations, whose formulas Dual LoRA registers, looks for tabulate.
    packages = {name.partition(".")[0] for name in loaded} - {"tabulate", "wcwidth"}
    assert packages <= {"loraplex", "peft", "torch", "transformers"}
    slow = ("torch._dynamo", "torch._inductor", "torch.distributed", "transformers.models", "transformers.trainer")
    assert not [name for name in loaded if name in slow or name.startswith(tuple(f"{one}." for one in slow))]


def test_no_loaded_module_asks_for_a_heavy_package(loaded: set[str]) -> None:
    """PEFT and accelerate may have loaded some of them already, which would hide it from the test above."""
    ours = {name for name in loaded if name.partition(".")[0] == "loraplex"}
    assert len(ours) > 50
    for name in ours:
        path = SOURCE.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        asked = {package for node in ast.parse(file.read_text(encoding="utf-8")).body for package in packages_of(node)}
        assert not asked & HEAVY, name


def packages_of(node: ast.stmt) -> set[str]:
    """The packages that a statement imports when its module is loaded."""
    found = set()
    for inner in [] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            found.add(str(inner.module).partition(".")[0])
    return found
