"""What all benchmarks share: options, and timing in interleaved rounds."""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory would write lines of its own
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row = dict[str, Any]
"""Columns and their values."""


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every command."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help='"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", …')
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="of the base; auto: bfloat16 on GPUs"
    )
    parser.add_argument(
        "--adapter-dtype", default="peft", choices=["peft", "base"],
        help='of the adapters; "peft": PEFT\'s default, float32 over a base of half precision',
    )  # fmt: skip
    parser.add_argument("--autocast", action="store_true", help="forward passes under bfloat16 autocast")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smallest shapes, to see that it runs; no file by default")
    parser.add_argument("--out", type=Path, help="CSV; default: benchmarks/results/NAME-DEVICE.csv")
    parser.add_argument("--append", action="store_true", help="add to the CSV instead of replacing it")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, quick: Row) -> argparse.Namespace:
    """Read options; with --quick, those in `quick` take the place of defaults. Sets device, dtype, threads, seed."""
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(rounds=2, warmup=1, **quick)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", f"benchmarks/{Path(parser.prog).name}", *_public(argv)])
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device)
    name = args.dtype if args.dtype != "auto" else "bfloat16" if args.device.type == "cuda" else "float32"
    args.dtype = DTYPES[name]
    if args.device.index is not None and args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # transformers renamed it in 5.23; earlier versions know only this name.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    gc.collect()
    gc.freeze()  # what imports have made need not be searched again at each collection
    return args


def _public(argv: list[str] | None) -> list[str]:
    """The arguments without --out, which may hold a path of this machine."""
    rest = list(sys.argv[1:] if argv is None else argv)
    while any(found := [i for i, word in enumerate(rest) if word.split("=")[0] == "--out"]):
        del rest[found[0] : found[0] + (1 if "=" in rest[found[0]] else 2)]
    return rest


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """bfloat16 autocast if asked for."""
    return torch.autocast(args.device.type, torch.bfloat16) if args.autocast else nullcontext()


def dtype_name(dtype: torch.dtype) -> str:
    """As in the options."""
    return str(dtype).removeprefix("torch.")


# Time


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds per call, by CUDA events on a GPU; the garbage collector waits."""
    gc.disable()
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize(device)
        elapsed = begin.elapsed_time(end) / 1e3
    else:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed / repeats


def interleaved(works: dict[Any, Callable[[], Any]], args: argparse.Namespace, least: float = 0.02) -> dict[Any, list]:
    """Work → seconds per call, one number for each counted round.

    In a round every work runs once, in an order drawn anew; works shorter than `least` seconds are repeated within
    their turn, so that the clock and a GPU's queue do not matter.
    """
    repeats, order = {}, list(works)
    for name, work in works.items():
        work()  # the first call compiles and allocates
        repeats[name] = 1 if args.quick else min(200, math.ceil(least / seconds(work, args.device)))
    draw, times = random.Random(args.seed), {name: [] for name in works}
    for number in range(args.warmup + args.rounds):
        draw.shuffle(order)
        for name in order:
            taken = seconds(works[name], args.device, repeats[name])
            if number >= args.warmup:
                times[name].append(taken)
    return times


def ratio(label: str, over: list[float], under: list[float] | None) -> Row:
    """Median and quartiles of the rounds' ratios, as columns; empty without a baseline."""
    columns = (label, f"{label}_q1", f"{label}_q3")
    if not under:
        return dict.fromkeys(columns, "")
    values = [a / b for a, b in zip(over, under, strict=True)]
    quarters = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {name: round(value, 4) for name, value in zip(columns, (quarters[1], quarters[0], quarters[2]), strict=True)}


def tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, shared ones once."""
    return [*module.parameters(), *module.buffers()]
