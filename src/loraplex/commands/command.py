"""What every command is made of: its parser, which knows its own options, and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraplex.commands.keys import help_text


class CommandParser(argparse.ArgumentParser):
    """A parser that remembers its options; every other option may be a key of a YAML file.

    Args:
        keys: the file, "run" or "study", whose keys the command takes as overrides; none if empty.
        lists_keys: whether `--help` lists these keys.
    """

    def __init__(self, *args: Any, keys: str = "", lists_keys: bool = False, **settings: Any) -> None:
        # argparse adds --help before its own __init__ ends.
        self.arguments: list[argparse.Action] = []
        self.keys, self.lists_keys = keys, lists_keys
        self.commands: dict[str, CommandParser] = {}
        """Parsers of the commands, for the parser of the whole line."""
        settings |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.arguments.append(action)
        return action

    @property
    def options(self) -> set[str]:
        """The command's own options, as they are written: "--resume"."""
        return {option for action in self.arguments for option in action.option_strings}

    def format_help(self) -> str:
        keys = f"\n{help_text(self.keys)}" if self.lists_keys else ""
        return super().format_help() + keys


@dataclass(frozen=True)
class Command:
    """One command of `loraplex`."""

    name: str
    summary: str
    """One sentence without its capital letter and full stop: what the command does."""
    add_arguments: Callable[[CommandParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
    """Takes the command's own arguments, with the parser of the whole line as `root`, and the overrides `--key value`.
    Returns the exit code."""
    epilog: str = ""
    keys: str = ""
    lists_keys: bool = False
    """As in `CommandParser`."""


def add_trust(parser: CommandParser, folder: bool) -> None:
    """Add the options that allow code to run. `folder`: the command reads an adapter's folder, which may ask for it."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings along")
    if folder:
        parser.add_argument(
            "--allow-code",
            action="append",
            default=[],
            metavar="module:Class",
            help="import the method that ADAPTER's own run.yaml names; repeatable",
        )
