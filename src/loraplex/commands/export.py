"""`loraplex export`: an adapter as a plain LoRA or a merged model, for servers and for stock PEFT."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from loraplex.commands.command import Command, CommandParser, add_trust
from loraplex.commands.output import print_json
from loraplex.export.servers import ENGINES, PORTABLE

_EPILOG = """\
--format lora writes a plain LoRA that needs no loraplex: one rank, lora_alpha
equal to r, and the scaling inside B. It is exact for MultiLoRA, for ASLoRA, and
for MASA with "sum" or "concat". Dual LoRA needs --rank or --max-error, and the
error of the approximation is printed.
--format merged writes a whole model, one file at a time. It is exact for Dual
LoRA too, up to rounding, which is printed.
MASA with a router has no constant update, because its gates depend on the
input. --calibration exports its mean gates and measures what they miss; without
DATA it takes the data of the adapter's own run.

examples:
  loraplex export runs/masa -o lora/masa --engine vllm
  loraplex export runs/multilora -o lora/multilora --max-error 0.01
  loraplex export runs/dual -o merged/dual --format merged"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("--format", choices=("lora", "merged"), default="lora", help="what to write; default: lora")
    parser.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        default=PORTABLE,
        help="the server that will load it. The default, portable, suits every server; for the others the command "
        "prints how to serve the export",
    )
    parser.add_argument("--compress", choices=("exact",), help="find the true rank of each update")
    parser.add_argument("--rank", type=int, metavar="R", help="write the best approximation of rank R")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="choose the smallest rank at which no module's error exceeds E times ‖ΔW‖",
    )
    add_common(parser)
    parser.add_argument(
        "--remember",
        action="store_true",
        help="write rank and mean gates into ADAPTER/loraplex.json too: servers that load ADAPTER itself use them",
    )


def add_common(parser: CommandParser) -> None:
    """Add the arguments that `export` and `merge` share."""
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a saved adapter")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="where the export goes")
    parser.add_argument("--run", metavar="RUN.yaml", type=Path, help="take the base model from this run")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the tensors in the written file"
    )
    parser.add_argument("--safe", action="store_true", help="stop if a merged weight is not finite")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="write an adapter that holds NaN or Inf as it is"
    )
    parser.add_argument(
        "--calibration",
        nargs="*",
        metavar="DATA",
        help="measure a router's mean gates on DATA, or on the run's own data",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it is not empty")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_trust(parser, folder=True)


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.export.lora import Rank

    rank = Rank(args.compress == "exact", args.rank, args.max_error)
    if args.format == "merged" and (rank != Rank() or args.engine != PORTABLE):
        raise ValueError("a merged model has no rank and suits every engine: leave --rank, --engine and the like out.")
    if args.remember and (args.format == "merged" or (rank == Rank() and args.calibration is None)):
        raise ValueError(
            "--remember is for a LoRA's rank (--compress, --rank, --max-error) and --calibration: give one."
        )
    settings = {"format": args.format, "engine": args.engine, "rank": rank}
    return write_export(args, overrides, remembered=args.remember, **settings)


def write_export(args: argparse.Namespace, overrides: list[str], remembered: bool = False, **settings: Any) -> int:
    """Export as the arguments of `add_common` and further fields of `ExportJob` say; returns the exit code.

    Args:
        remembered: write into the adapter's folder too how it wants to be converted.
    """
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.commands.report import print_export
    from loraplex.recipes.adapters.exporting import ExportJob, export_adapter, remember
    from loraplex.recipes.adapters.saved import open_adapter
    from loraplex.recipes.config.run_config import parse_overrides
    from loraplex.tuner.finite import allow_nonfinite

    adapter = open_adapter(
        args.adapter,
        args.run,
        [],
        parse_overrides(overrides),
        data_option="--calibration DATA" if args.calibration == [] else None,
        allow_code=args.allow_code,
    )
    job = ExportJob(
        target=args.output,
        dtype=args.dtype,
        calibration=args.calibration,
        safe=args.safe,
        force=args.force,
        **settings,
    )
    with allow_nonfinite() if args.allow_nonfinite else nullcontext():
        export, calibration = export_adapter(adapter, job)
    if remembered:
        remember(args.adapter, job, calibration)
    if args.json:
        print_json({**export.to_dict(), "calibration": calibration.to_dict() if calibration else None})
    else:
        print_export(export, calibration)
    return 0


COMMAND = Command(
    "export",
    "write an adapter as a plain LoRA or a merged model that servers load",
    _add_arguments,
    _run,
    _EPILOG,
    keys="run",
)
