"""loraplex-autoload: `pip install` alone makes PEFT know our types, and nothing can break `import torch`.

Its entry point is laid where torch looks for it, beside the module itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "autoload"
KNOWN = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as types; assert 'MASA' in types, types\n"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that, on the path, is what pip would have installed."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["torch.backends"]
    info = tmp_path / "loraplex_autoload-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loraplex-autoload\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )
    (tmp_path / "loraplex_autoload.py").write_bytes((SOURCE / "loraplex_autoload.py").read_bytes())
    return tmp_path


def lay_a_small_peft(folder: Path) -> None:
    """In place of the real one, whose import takes seconds."""
    (folder / "peft.py").write_text("class PeftModel: ...\n")


def run(folder: Path, code: str, **env: str) -> str:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import torch; import peft",
        "from peft import PeftModel; import json.tool",
        "from transformers.trainer_utils import IntervalStrategy; import json.tool",
        "import transformers; from transformers import Trainer; import json.tool",
    ],
    ids=["torch first", "peft first", "peft inside transformers", "the Trainer"],
)
def test_peft_knows_our_types(first: str, installed: Path) -> None:
    check = f"""
    {first}
    import sys, peft
    {KNOWN.strip()}
    assert type(peft.__spec__.loader).__module__ != "loraplex_autoload"
    assert not any(type(finder).__module__ == "loraplex_autoload" for finder in sys.meta_path)
    """
    run(installed, check)


def test_it_can_be_switched_off(installed: Path) -> None:
    lay_a_small_peft(installed)
    code = "import torch, peft, sys; assert 'loraplex' not in sys.modules and 'loraplex_autoload' not in sys.modules"
    run(installed, code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_without_it_nothing_runs(tmp_path: Path) -> None:
    run(tmp_path, "import torch, peft, sys; assert 'loraplex' not in sys.modules")


def test_a_program_without_peft_pays_next_to_nothing(installed: Path) -> None:
    code = """
    import sys, time
    import torch
    assert "loraplex" not in sys.modules and "peft" not in sys.modules
    import loraplex_autoload
    assert isinstance(sys.meta_path[0], loraplex_autoload._Waiting)
    sys.meta_path.pop(0)
    for name in ("loraplex_autoload", "importlib.metadata"):
        sys.modules.pop(name, None)
    spent = time.process_time()
    import loraplex_autoload
    loraplex_autoload.start()
    import wave, calendar
    spent = time.process_time() - spent
    del sys.meta_path[0], sys.modules["wave"], sys.modules["calendar"]
    without = time.process_time()
    import wave, calendar
    without = time.process_time() - without
    assert spent - without < 0.005, (spent, without)
    """
    run(installed, code)


@pytest.mark.parametrize("fault", ["raise OSError('mine')", "import no_such_module", "raise RuntimeError('mine')"])
def test_no_error_reaches_torch_or_peft(fault: str, installed: Path) -> None:
    """A loraplex that can't be imported, in place of the real one."""
    if fault.startswith("raise"):
        lay_a_small_peft(installed)
    (installed / "loraplex.py").write_text(f"{fault}\n")
    log = run(installed, "import torch, peft, json.tool; assert peft.PeftModel and torch.ones(1)")
    assert "loraplex could not be imported: PEFT does not know its adapter types" in log


def test_an_error_in_the_entry_point_itself(installed: Path) -> None:
    code = """
    import sys
    import loraplex_autoload
    class Broken(list):
        def insert(self, *_): raise RuntimeError("mine")
    sys.meta_path = Broken(sys.meta_path)
    loraplex_autoload.start()
    """
    assert "loraplex does not wait for PEFT" in run(installed, code)
