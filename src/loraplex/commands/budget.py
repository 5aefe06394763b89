"""`loraplex budget`: what each method would cost on a model."""

from __future__ import annotations

import argparse
import gc
from typing import Any

from loraplex.commands.command import Command, CommandParser, add_trust
from loraplex.commands.output import print_json

_EPILOG = """\
Nothing is loaded but the model's config. Without --match or --params each
method is counted at its defaults and the settings below; with one of them, r is
chosen so that the count comes nearest. Every setting holds for those methods
that have it:

  --adapter.FIELD VALUE     a field of the methods' configs: r, target_modules,
                            num_experts, …
  --revision R, --gguf_file F, --trust_remote_code true
                            where the model comes from

examples:
  loraplex budget package:smollm2-135m
  loraplex budget meta-llama/Llama-3.1-70B --match lora:r=16 \\
      --adapter.target_modules all-linear
  loraplex budget ./model --params 0.5% --tokens 8192 --dtype bfloat16"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder, or package:NAME; a config is enough")
    parser.add_argument("--methods", metavar="A,B", help="count these methods; default: all of ours, and lora")
    parser.add_argument(
        "--match", metavar="METHOD:FIELD=V", help="plan as many trainable parameters as this adapter has: lora:r=16"
    )
    parser.add_argument(
        "--params", metavar="N", help="plan this many: 2M, 300k, 4194304, or 0.5%% of the base model's parameters"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="T", help="tokens of a step, batch × length; default: 4096"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the base model's weights; default: what the config says",
    )
    parser.add_argument(
        "--task", choices=("sft", "classification"), default="sft", help="classification: count a new head too"
    )
    parser.add_argument(
        "--autocast", action="store_true", help="plan a step in half precision, as loraplex train takes on a GPU"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_trust(parser, folder=False)


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    gc.disable()  # a short command with millions of small objects and little garbage: a second of ten for 70B
    from loraplex.recipes.console import quiet

    quiet(data=False)
    from loraplex.commands.report import print_budgets
    from loraplex.recipes.config.run_config import parse_overrides
    from loraplex.recipes.models.budgeting import BudgetJob, plan_methods

    chosen: dict[str, Any] = (
        {} if args.methods is None else {"methods": [method.strip() for method in args.methods.split(",")]}
    )
    names = ("model", "match", "params", "tokens", "dtype", "task", "autocast")
    job = BudgetJob(**chosen, **{name: getattr(args, name) for name in names})
    report = plan_methods(job, parse_overrides(overrides))
    if args.json:
        print_json(report.to_dict())
    else:
        print_budgets(report)
    return 0


COMMAND = Command(
    "budget",
    "plan parameters, memory and file size of each method from a model's config",
    _add_arguments,
    _run,
    _EPILOG,
    keys="run",
)
