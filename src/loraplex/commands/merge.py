"""`loraplex merge`: an adapter, merged into its base model."""

from __future__ import annotations

import argparse

from loraplex.commands.command import Command
from loraplex.commands.export import add_common, write_export

_EPILOG = """\
This is the same as loraplex export --format merged.

example:
  loraplex merge runs/aslora -o merged/aslora --safe"""


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    return write_export(args, overrides, format="merged")


COMMAND = Command(
    "merge", "merge an adapter into its base model and save a plain model", add_common, _run, _EPILOG, keys="run"
)
