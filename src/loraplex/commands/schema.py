"""`loraplex schema`: the JSON schema of RUN.yaml or STUDY.yaml, for editors."""

from __future__ import annotations

import argparse
import json

from loraplex.commands.command import Command, CommandParser

_EPILOG = """\
With a schema, an editor that speaks to yaml-language-server completes keys and
values, shows their descriptions and marks what is wrong. Write it to a file and
name that file in the first line of RUN.yaml:

  # yaml-language-server: $schema=run.schema.json

examples:
  loraplex schema run > run.schema.json
  loraplex schema study > study.schema.json"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("file", nargs="?", choices=("run", "study"), default="run", help="default: run")


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    print(schema_text(args.file), end="")
    return 0


def schema_text(file: str) -> str:
    """The schema of "run" or "study", of the methods and the PEFT that are installed."""
    from loraplex.recipes.config.schema import run_schema
    from loraplex.study.schema import study_schema

    return json.dumps(run_schema() if file == "run" else study_schema(), indent=1, ensure_ascii=False) + "\n"


COMMAND = Command(
    "schema", "print the JSON schema of RUN.yaml or STUDY.yaml, for editors", _add_arguments, _run, _EPILOG
)
