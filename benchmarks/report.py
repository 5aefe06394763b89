"""Results: a CSV whose rows say where they come from, and a table."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import Row
from loraplex.version import __version__

HERE = Path(__file__).resolve().parent


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and its vector unit."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def environment(args: argparse.Namespace) -> Row:
    """Columns that say where a row comes from. No path, no host name."""
    row = {"hardware": hardware(args.device), "threads": torch.get_num_threads(), "python": platform.python_version()}
    for package in ("torch", "peft", "transformers", "triton"):
        try:
            row[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            row[package] = ""
    row["loraplex"] = __version__  # also where it is not installed but on the path
    return row | {"commit": _commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "command": args.command}


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()

    # Results of this very run don't make the code another one.
    changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


class Report:
    """Rows of one run: written to the CSV as they come, shown as a table at the end."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        kind = "cpu" if args.device.type == "cpu" else hardware(args.device)
        slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
        default = None if args.quick else HERE / "results" / f"{name}-{slug}.csv"
        self.name, self.path, self.rows = name, args.out or default, list[Row]()
        self.fixed, self.append = environment(args), args.append

    def add(self, **row: Any) -> None:
        """One more row; all have the same columns."""
        row["load"] = round(os.getloadavg()[0], 1)
        self.rows.append(row)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        more = len(self.rows) > 1 or (self.append and self.path.exists())
        with self.path.open("a" if more else "w", newline="") as file:
            writer = csv.DictWriter(file, [*row, *self.fixed])
            if not more:
                writer.writeheader()
            writer.writerow(row | self.fixed)

    def show(self, *columns: str, title: str = "") -> None:
        """Print these columns of all rows, a ratio with its quartiles; a column may carry a heading: "name=heading"."""
        pairs = [column.partition("=")[::2] for column in columns]
        where = f"{self.name}: {self.fixed['hardware']}, {self.fixed['threads']} threads"
        table = Table(*(heading or name for name, heading in pairs), title=title or where)
        for row in self.rows:
            table.add_row(*(_text(name, row) for name, _ in pairs))
        Console(width=None if sys.stdout.isatty() else 150).print(table)
        if self.path is not None:
            print(f"{len(self.rows)} rows in {self.path.name}")


def _text(column: str, row: Row) -> str:
    value = row[column]
    if value == "":
        return ""
    if f"{column}_q1" in row:
        return f"{value:.3g} ({row[f'{column}_q1']:.3g}–{row[f'{column}_q3']:.3g})"
    if column.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
