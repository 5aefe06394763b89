"""`loraplex eval`: a saved adapter, measured on held-out data."""

from __future__ import annotations

import argparse
from pathlib import Path

from loraplex.commands.command import Command, CommandParser, add_trust
from loraplex.commands.output import print_json

_EPILOG = """\
The run.yaml that training left beside the adapter says which data to use and
how. Its keys can be overridden as for train: --data.0.eval_size 200,
--train.per_device_eval_batch_size 32, --model PATH.

example:
  loraplex eval runs/masa --base"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a saved adapter")
    parser.add_argument("--run", metavar="RUN.yaml", type=Path, help="take data and model from this run")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help="measure on this file, hub id, package:NAME or '{path: …}' instead; repeatable",
    )
    parser.add_argument("--base", action="store_true", help="measure the base model too")
    parser.add_argument("--test", action="store_true", help="measure on the part that test_… holds out, not eval_…")
    parser.add_argument(
        "--harness", metavar="A,B", help="measure on these tasks of lm-evaluation-harness, instead of the run's data"
    )
    parser.add_argument("--harness-path", metavar="DIR", type=Path, help="a folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N examples of each harness task")
    parser.add_argument("--fewshot", type=int, metavar="N", help="put N examples into each prompt of the harness")
    parser.add_argument("--chat", action="store_true", help="put the harness's prompts into the chat template")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_trust(parser, folder=True)


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.commands.report import print_metrics
    from loraplex.recipes.adapters.saved import evaluate_adapter, open_adapter
    from loraplex.recipes.config.run_config import parse_overrides

    given = parse_overrides(overrides)
    if args.harness is None:
        if args.harness_path or args.limit or args.fewshot or args.chat:
            raise ValueError("--harness-path, --limit, --fewshot and --chat belong to --harness: name its tasks.")
        adapter = open_adapter(args.adapter, args.run, args.data, given, allow_code=args.allow_code)
        report = evaluate_adapter(adapter, args.base, "test" if args.test else "eval")
    else:
        from loraplex.recipes.adapters.harness import Harness, evaluate_by_harness

        if args.data or args.test:
            raise ValueError("--harness brings its own data: leave --data and --test out.")
        adapter = open_adapter(args.adapter, args.run, [], given, data_option=None, allow_code=args.allow_code)
        for option, value, least in (("--limit", args.limit, 1), ("--fewshot", args.fewshot, 0)):
            if value is not None and not least <= value < 2**31:
                raise ValueError(f"{option} {value}: give at least {least}.")
        harness = Harness(args.harness.split(","), args.harness_path, args.limit, args.fewshot, args.chat)
        report = evaluate_by_harness(adapter, harness, args.base)
    config = adapter.run.config
    if args.json:
        print_json({"adapter": str(args.adapter), "model": config.model, "method": config.method, "tasks": report})
    else:
        print_metrics(report, f"{args.adapter} on {config.model}")
    return 0


COMMAND = Command(
    "eval", "measure an adapter on held-out data, task by task", _add_arguments, _run, _EPILOG, keys="run"
)
