"""`loraplex exec`: another Python program, with the methods registered."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from loraplex.commands.command import Command, CommandParser

_EPILOG = """\
PROGRAM is a console script of this environment, -m and a module, or a Python
file. It runs in this process: arguments, exit code and signals are its own.
Python processes that it starts know the methods too.

examples:
  loraplex exec lm_eval --model hf --tasks hellaswag \\
      --model_args pretrained=BASE,peft=runs/masa
  loraplex exec accelerate launch train.py
  loraplex exec -m my_package.serve --adapter runs/masa"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("program", metavar="PROGRAM", help="a console script, -m MODULE, or a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments, passed on as they are")


def _run(args: argparse.Namespace, overrides: list[str]) -> Any:
    return run_program([args.program, *args.arguments])


def run_program(arguments: Sequence[str]) -> Any:
    """Run a program with its arguments; returns what it returns, or 2 if there is no such program."""
    from loraplex.integrations.run_program import find_program
    from loraplex.io.reading import message_of

    try:
        run = find_program(arguments)
    except ValueError as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    return run()


COMMAND = Command("exec", "run another Python program with the methods registered", _add_arguments, _run, _EPILOG)
