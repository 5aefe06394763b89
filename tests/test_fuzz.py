"""The fuzzer finds nothing in the package, and finds every broken version of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_few_hundred_cases() -> None:
    """`make fuzz` runs many more. A process of its own: limits and audit hooks stay with a process for good."""
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "0", "--cases", "400", "--self-check"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert "400 cases" in ran.stdout
    assert "0 different findings" in ran.stdout
    assert "0 of them not found" in ran.stdout
