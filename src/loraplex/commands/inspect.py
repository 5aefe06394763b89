"""`loraplex inspect`: what a saved adapter consists of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from loraplex.commands.command import Command, CommandParser, add_trust
from loraplex.commands.output import print_json


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of a saved adapter")
    parser.add_argument(
        "--against",
        metavar="SOURCE",
        type=Path,
        help="ADAPTER is an exported LoRA: print its error against the adapter SOURCE that it came from",
    )
    parser.add_argument(
        "--plots", metavar="DIR", type=Path, help="draw spectra of the updates and what is particular to the method"
    )
    parser.add_argument(
        "--with-data",
        action="store_true",
        help="with --plots: draw which experts a router uses on the run's held-out data",
    )
    parser.add_argument(
        "--method", metavar="M", help="the adapter's method, where it is a class of your own: module:Class"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_trust(parser, folder=True)


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.commands.report import print_description
    from loraplex.inspection.describe import describe
    from loraplex.io.files import recover

    recover(args.adapter)
    if not args.adapter.is_dir():
        raise FileNotFoundError(f"adapter {args.adapter} is not a folder: give the folder of a saved adapter.")
    if args.plots is None and args.with_data:
        raise ValueError("--with-data is for plots: give --plots DIR.")
    typed: list[tuple[str, Any]] = [("trust_remote_code", True)] if args.trust_remote_code else []
    if args.method is not None:
        from loraplex.recipes.config.arguments import config_class

        config_class(args.method)
    if args.allow_code:
        from loraplex.recipes.adapters.saved import import_allowed

        import_allowed(args.allow_code)
    description = describe(args.adapter)
    if args.against is not None:
        description.against = _error_against(args, typed)
    if args.plots is not None:
        return _draw(args, typed, description)
    if args.json:
        print_json(description.to_dict())
    else:
        print_description(description, args.adapter)
    return 0


def _draw(args: argparse.Namespace, typed: list[tuple[str, Any]], description: Any) -> int:
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.commands.report import print_analysis, print_description
    from loraplex.inspection.plots import draw
    from loraplex.recipes.adapters.analysis import analyse_folder

    typed += [] if args.method is None else [("method", args.method)]
    analysis = analyse_folder(args.adapter, args.with_data, typed, args.allow_code)
    written = draw(analysis, args.plots)
    if args.json:
        print_json({**description.to_dict(), "analysis": analysis.to_dict(), "plots": [str(path) for path in written]})
    else:
        print_description(description, args.adapter)
        print_analysis(analysis, written)
    return 0


def _error_against(args: argparse.Namespace, typed: list[tuple[str, Any]]) -> dict[str, float]:
    """The relative error of each module's update in the exported LoRA, against the adapter it came from."""
    from loraplex.recipes.console import quiet

    quiet()
    from loraplex.export.lora_format import export_errors
    from loraplex.recipes.adapters.saved import open_adapter

    adapter = open_adapter(args.against, None, [], typed, data_option=None, allow_code=args.allow_code)
    return export_errors(args.adapter, adapter.load_on_skeleton())


COMMAND = Command("inspect", "show an adapter's parameters, sharing map and merge history", _add_arguments, _run)
