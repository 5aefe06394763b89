"""`loraplex train`: one run, as a YAML file says."""

from __future__ import annotations

import argparse
from pathlib import Path

from loraplex.commands.command import Command, CommandParser, add_trust
from loraplex.commands.output import fail

_EPILOG = """\
Every key of RUN.yaml can be overridden: --key value or --key=value, with dots
for sections and numbers for list entries. Values are YAML.

example:
  loraplex train configs/masa.yaml --adapter.r 16 --train.learning_rate 1e-4

Ctrl-C ends training after the current step and leaves a checkpoint; --resume
continues from it."""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml", type=Path, help="the run's configuration")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in output_dir")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration, print every key with its value, and stop"
    )
    add_trust(parser, folder=False)


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.recipes.config.arguments import adapter_config, check_train
    from loraplex.recipes.config.run_config import load_run, parse_overrides, to_yaml

    config = load_run(args.run, parse_overrides(overrides))
    check_train(config)
    if args.dry_run:
        adapter_config(config)
        print(to_yaml(config), end="")
        return 0
    from loraplex.commands.report import print_summary
    from loraplex.recipes.prepare import PreparedRun
    from loraplex.recipes.progress import is_main, note
    from loraplex.recipes.training.checkpoints import RUN_NAME, checkpoints
    from loraplex.recipes.training.run import train

    run = PreparedRun(config, resume=args.resume)
    resuming = f"continue with: loraplex train {run.output_dir / RUN_NAME} --resume"
    try:
        result = train(run)
    except KeyboardInterrupt:
        if not checkpoints(run.output_dir):
            raise
        note(f"\nstopped at once\n{resuming}")
        return 130
    except (RuntimeError, MemoryError) as error:
        from loraplex.recipes.training.memory import explain, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return fail(args, error, explain(run, error))
    if result.signal is None:
        if is_main():
            print_summary(result)
        return 0
    note(f"stopped at step {result.step}, checkpoint in {result.checkpoint}\n{resuming}")
    return 128 + result.signal


COMMAND = Command(
    "train", "train an adapter as a YAML file says", _add_arguments, _run, _EPILOG, keys="run", lists_keys=True
)
