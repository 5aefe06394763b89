"""`loraplex cache`: the adapters that were converted for servers."""

from __future__ import annotations

import argparse
import sys

from loraplex.commands.command import Command, CommandParser
from loraplex.commands.output import print_json

_EPILOG = """\
Servers that load our folders through loraplex.to_plain find the plain LoRA in
$LORAPLEX_CACHE/plain. That folder holds at most $LORAPLEX_CACHE_GIB (20) GiB.
The least recently used adapters are removed first, and never those that a
running server holds.

examples:
  loraplex cache
  loraplex cache clear"""


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "clear"), default="list", help="default: list")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    from loraplex.export.plain_cache import PlainCache, print_entries

    cache = PlainCache()
    held = cache.clear() if args.action == "clear" else []
    if held:
        print(f"{len(held)} stay: running servers hold them", file=sys.stderr)
    entries = held if args.action == "clear" else cache.entries()
    if args.json:
        print_json({"folder": str(cache.root), "entries": [entry.to_dict() for entry in entries]})
    else:
        print_entries(cache, entries)
    return 0


COMMAND = Command("cache", "list or clear the adapters that were converted for servers", _add_arguments, _run, _EPILOG)
