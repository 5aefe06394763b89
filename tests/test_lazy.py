"""`import loraplex` costs milliseconds, and the methods are registered wherever PEFT is used after it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import loraplex
from loraplex import lazy, public

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(code: str, *arguments: str, **env: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=ENV | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_alone_is_light() -> None:
    run(
        """
        import sys
        import loraplex, loraplex.cli
        heavy = {"torch", "peft", "transformers", "numpy", "safetensors", "rich"} & set(sys.modules)
        assert not heavy, heavy
        assert "MasaConfig" in dir(loraplex)
        """
    )


@pytest.mark.parametrize(
    "first",
    [
        "import loraplex; from peft import PeftModel, convert_to_lora",
        "from peft import PeftModel; import loraplex; from peft import convert_to_lora",
        "from loraplex.config import AdapterConfig; from peft import convert_to_lora",
        "import loraplex; assert loraplex.config; from peft import convert_to_lora",
    ],
    ids=["before peft", "after peft", "by a module", "by an attribute"],
)
def test_the_methods_are_registered(first: str) -> None:
    run(
        f"""
        {first}
        import sys
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
        import loraplex, loraplex.config
        assert configs["MASA"] is loraplex.MasaConfig
        assert issubclass(loraplex.MasaConfig, loraplex.config.AdapterConfig)
        assert convert_to_lora.__wrapped__
        assert loraplex.config.__spec__.origin and loraplex.config is sys.modules["loraplex.config"]
        assert not any(type(finder).__module__ == "loraplex.lazy" for finder in sys.meta_path)
        """
    )


HOST = """
import sys
steps = sys.modules.setdefault("steps", type(sys)("steps"))
steps.log = ["begins"]
import trigger
steps.log.append("ends")
"""


@pytest.mark.parametrize("broken", [False, True])
def test_the_end_of_an_import_that_is_under_way(broken: bool, tmp_path: Path) -> None:
    """What we rely on of Python's import: a spec whose `_initializing` is cleared once the module was executed."""
    (tmp_path / "host.py").write_text(HOST + ("raise OSError\n" if broken else ""))
    (tmp_path / "trigger.py").write_text(
        "import steps\nfrom loraplex.lazy import when_imported\n"
        "assert when_imported('host', lambda: steps.log.append('then'))\nassert not when_imported('other', print)\n"
    )
    run(
        f"""
        import sys
        try:
            import host
        except OSError:
            assert {broken}
        import steps
        assert steps.log == ["begins", "ends"] + ["then"] * {not broken}, steps.log
        if not {broken}:
            assert type(host.__spec__).__name__ == "ModuleSpec"
            from loraplex.lazy import when_imported
            assert when_imported("host", lambda: steps.log.append("now")) and steps.log[-1] == "now"
        """,
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ENV.get('PYTHONPATH', '')}",
    )


def test_public_names_are_listed_twice_alike() -> None:
    assert set(loraplex.__all__) == {*public.__all__, "__version__", "to_plain"}
    for name in loraplex.__all__:
        assert getattr(loraplex, name) is not None
    with pytest.raises(AttributeError, match="module 'loraplex' has no attribute 'nothing'"):
        loraplex.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(lazy.LIGHT - {"__main__"}))
def test_light_modules_exist(name: str) -> None:
    assert (Path(loraplex.__file__).parent / name).with_suffix(".py").is_file() or (
        Path(loraplex.__file__).parent / name / "__init__.py"
    ).is_file()
