"""The `loraplex` command: its line is read here, and each command has a module of its own beside this one.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from loraplex.commands import budget, cache, compare, completion, eval, exec, export, inspect, merge, schema, train
from loraplex.commands.command import CommandParser
from loraplex.commands.output import fail, missing_module
from loraplex.version import __version__

COMMANDS = {
    module.COMMAND.name: module.COMMAND
    for module in (train, eval, compare, export, merge, inspect, budget, exec, cache, schema, completion)
}


def build_parser() -> CommandParser:
    """The parser of the whole command line; `commands` are those of the commands."""
    parser = CommandParser("loraplex", description="Fine-tune with MASA, ASLoRA, Dual LoRA and MultiLoRA.")
    parser.add_argument("--version", action="version", version=f"loraplex {__version__}")
    group = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        own = group.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=command.epilog,
            keys=command.keys,
            lists_keys=command.lists_keys,
        )
        command.add_arguments(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.commands[name] = own
    parser.set_defaults(root=parser)
    return parser


def split_overrides(argv: Sequence[str], own_options: set[str]) -> tuple[list[str], list[str]]:
    """(arguments of the command itself, overrides `--key value` of its YAML file)."""
    own: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        if rest[0] == "--trust-remote-code" and rest[1:2] and rest[1].lower() in ("true", "false"):
            rest[:2] = [f"--trust_remote_code={rest[1]}"]  # with a value it is the run's key like any other
        argument = rest.pop(0)
        if not argument.startswith("--") or argument.partition("=")[0] in own_options:
            own.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


def main(argv: Sequence[str] | None = None, begin: Callable[[], None] = lambda: None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error of the user's, 130 / 143 for a signal.

    Args:
        argv: the command line; None takes the process's.
        begin: called once it is read, before the command does anything.
    """
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) > 1 and argv[0] == exec.COMMAND.name and argv[1] not in ("-h", "--help", "--debug"):
        # Before everything else: the options after it are not ours, nor are the program's errors.
        begin()
        return exec.run_program(argv[1:])
    parser = build_parser()
    command = parser.commands.get(argv[0]) if argv else None
    takes_keys = command is not None and command.keys != ""
    own, overrides = split_overrides(argv, command.options) if command and takes_keys else (list(argv), [])
    args = parser.parse_args(own)
    if takes_keys and args.trust_remote_code:
        overrides += ["--trust_remote_code", "true"]
    try:
        begin()
        return COMMANDS[args.command].run(args, overrides)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        return fail(args, error, missing_module(error))
    except (ValueError, OSError) as error:
        return fail(args, error, str(error))


if __name__ == "__main__":
    sys.exit(main())
