"""The console script `loraplex`: it reads the command line before it imports what the command needs.

Importing `loraplex` registers the methods with PEFT, which takes seconds of torch, PEFT and transformers. `--help`,
`--version` and mistyped options need none of it, so the package's own `__init__` runs only once a command begins.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

# What libraries say of their own optional parts while they are imported is nothing that a user can act on.
_NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree", "DeepSpeed")


def main() -> int:
    """Run the command line; returns the exit code."""
    if "loraplex" in sys.modules:
        begin = _nothing
    else:
        spec = importlib.util.find_spec("loraplex")
        assert spec is not None
        assert spec.loader is not None
        package, loader = importlib.util.module_from_spec(spec), spec.loader
        # Its modules can be imported from now on, those that need nothing but the standard library.
        sys.modules["loraplex"] = package

        def begin() -> None:
            for name in _NOISY:
                logging.getLogger(name).setLevel(logging.ERROR)
            loader.exec_module(package)

    from loraplex.commands.cli import main as command

    return command(begin=begin)


def _nothing() -> None:
    """The package is imported already."""
