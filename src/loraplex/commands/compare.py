"""`loraplex compare`: methods on one model and data, at one budget."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from loraplex.commands.command import Command, CommandParser, add_trust

_EPILOG = """\
STUDY.yaml names a model, tasks, methods, learning rates and seeds
(configs/studies/ has examples). Every method tries the same number of learning
rates on the eval parts. The best one is trained with every seed, and tested
once. Every key can be overridden: --seeds [0,1] --train.max_steps 20.

A study can be killed and started again: a finished trial is never trained or
tested again. Its folder gets report.html, report.md, results.csv, results.json,
and every trial's configuration, metrics and adapter.

examples:
  loraplex compare configs/studies/quick.yaml
  loraplex compare configs/studies/quick.yaml --report"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("study", metavar="STUDY.yaml", type=Path, help="the study's configuration")
    parser.add_argument("--jobs", type=int, metavar="N", help="trials at a time; default: one per GPU, or one")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the study, print settings and number of trials, and stop"
    )
    parser.add_argument("--report", action="store_true", help="only write the report, from the trials that have run")
    add_trust(parser, folder=False)


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.recipes.config.run_config import parse_overrides
    from loraplex.study.config import load_study
    from loraplex.study.report import HTML_NAME, write_report
    from loraplex.study.run import choose_rates, prepare, run_study
    from loraplex.study.terminal import print_plan, print_results

    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: give at least 1.")
    study = load_study(args.study, parse_overrides(overrides))
    state = prepare(study)
    if args.dry_run:
        print_plan(state)
        return 0
    if args.report:
        if not Path(study.output_dir).is_dir():
            raise ValueError(f"output_dir {study.output_dir} does not exist, so there is nothing to report.")
        state.choices = choose_rates(state)
    else:
        print_plan(state)
        run_study(state, args.jobs)
    print_results(study, write_report(state))
    print(f"report: {Path(study.output_dir) / HTML_NAME}")
    if state.stopped:
        command = shlex.join(["loraplex", "compare", str(args.study), *overrides])
        print(f"continue with: {command}", file=sys.stderr)
        return 130
    return 0


COMMAND = Command(
    "compare",
    "compare methods on your model and data, at one budget",
    _add_arguments,
    _run,
    _EPILOG,
    keys="study",
    lists_keys=True,
)
