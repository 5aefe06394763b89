"""Imported by every Python process that a program under `loraplex exec` starts: registers the methods there too."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HERE = str(Path(__file__).parent)


def _import_loraplex() -> None:
    try:
        import loraplex  # noqa: F401
    except ModuleNotFoundError as error:
        # A child of another environment has no loraplex, and goes on without it.
        if error.name != "loraplex":
            raise


def _import_theirs() -> None:
    """Run the sitecustomize that ours stands before, if there is one."""
    others = [part for part in sys.path if part != _HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_import_loraplex()
_import_theirs()
