"""`loraplex completion`: a script by which a shell completes commands, options and keys."""

from __future__ import annotations

import argparse
from pathlib import Path

from loraplex.commands.command import Command, CommandParser
from loraplex.commands.keys import sections

_EPILOG = """\
The script is static: no Python starts when you press Tab.

examples:
  loraplex completion bash > ~/.local/share/bash-completion/completions/loraplex
  loraplex completion zsh > "${fpath[1]}/_loraplex"
  loraplex completion fish > ~/.config/fish/completions/loraplex.fish
  eval "$(loraplex completion bash)"      # for this shell only"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to write for")


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    import shtab

    root: CommandParser = args.root
    for parser in root.commands.values():
        for argument in parser.arguments:
            if argument.type is Path:
                argument.complete = shtab.FILE  # type: ignore[attr-defined]
        if parser.keys:
            _add_keys(parser, parser.keys)
    print(shtab.complete(root, args.shell))
    return 0


def _add_keys(parser: CommandParser, file: str) -> None:
    """Let every key of the file be an option, so that it is completed. Entries of lists are known as the first one."""
    for section in sections(file):
        for key in section.keys:
            option = f"--{section.prefix}{key.name}".replace(".N.", ".0.")
            if ".NAME." in option or option in parser.options:
                continue
            parser.add_argument(option, help=key.description.replace("%", "%%"), choices=key.choices or None)


COMMAND = Command(
    "completion", "print a script by which bash, zsh or fish completes this command", _add_arguments, _run, _EPILOG
)
