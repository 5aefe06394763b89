"""What a command prints beside tables: reports for programs, and the one message of an error."""

from __future__ import annotations

import argparse
import sys
from typing import Any

_OF_TRAIN = {"trl", "datasets", "pydantic", "yaml", "gguf", "matplotlib", "psutil", "scipy"}
"""Modules that the extra `train` brings along."""


def print_json(report: dict[str, Any]) -> None:
    """Print a report for programs."""
    from loraplex.io.reading import json_text

    print(json_text(report))


def fail(args: argparse.Namespace, error: Exception, message: str) -> int:
    """Print the message and return exit code 2; with `--debug` raise the error instead."""
    if args.debug:
        raise error
    from loraplex.io.reading import message_of

    print(f"error: {message_of(message)}", file=sys.stderr)
    return 2


def missing_module(error: ModuleNotFoundError) -> str:
    """The message that names the extra to install."""
    if error.name == "lm_eval":
        return 'lm-evaluation-harness is not installed: pip install "loraplex[eval]"'
    if error.name in _OF_TRAIN:
        return f'{error.name} is not installed: pip install "loraplex[train]"'
    return str(error)
