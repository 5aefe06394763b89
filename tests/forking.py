"""Processes that are forked from one that has imported everything: importing takes longer than what they do.

They are real processes: their exit codes, signals, locks, environment, working directory and output are their own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from tqdm import tqdm

_IMPORTED_ONCE = ["loraplex.recipes.training.run", "loraplex.commands.report", "loraplex.study.worker"]
_IMPORTED_ONCE += [
    "accelerate.utils.fsdp_utils",
    "deepspeed",
    "deepspeed.comm",
    "loraplex.inspection.plots",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft.utils.transformers_weight_conversion",
    *(f"PIL.{kind}ImagePlugin" for kind in ("Bmp", "Gif", "Jpeg", "Png", "Ppm")),
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.serialization",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
]


def context() -> Any:
    """`multiprocessing`'s, with the server that all tests of one worker share."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED_ONCE)  # the last list before the first start counts
    return found


def start(
    function: Callable,
    *given: Any,
    out: Path,
    err: Path | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> BaseProcess:
    """A process that exits with what `function` returns; its errors are written to `err`, or to `out` with the rest."""
    here = Path.cwd() if cwd is None else cwd
    variables = dict(os.environ if env is None else env)
    process = context().Process(target=_begin, args=(function, given, out, err, variables, here))
    process.start()
    return process


def run(function: Callable, *given: Any, folder: Path, **options: Any) -> CompletedProcess[str]:
    """As `subprocess.run` does; the output passes through files in `folder`."""
    out, err = folder / "forked.out", folder / "forked.err"
    process = start(function, *given, out=out, err=err, **options)
    process.join(300)
    assert process.exitcode is not None, "the process hangs"
    return CompletedProcess(given, process.exitcode, out.read_text(), err.read_text())


def join(ranks: Sequence[BaseProcess], seconds: float = 400) -> list[int]:
    """Their exit codes. As under a launcher, all are ended where one fails."""
    running = list(ranks)
    while running:
        assert wait([process.sentinel for process in running], seconds), "the processes hang"
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in ranks):
            for process in running:
                process.kill()
    return [process.exitcode or 0 for process in ranks]


def run_ranks(function: Callable, processes: int, *given: Any, folder: Path) -> None:
    """Run `function(rank, *given)` in so many processes; each must return nothing, or 0."""
    logs = [folder / f"rank-{rank}.log" for rank in range(processes)]
    codes = join([start(function, rank, *given, out=log) for rank, log in enumerate(logs)])
    assert not any(codes), [log.read_text() for log in logs]


def _begin(function: Callable, given: tuple, out: Path, err: Path | None, env: dict[str, str], cwd: Path) -> None:
    for stream, file in ((1, out), (2, err or out)):
        written = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(written, stream)
    # It is ignored where a shell started the tests in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    gc.freeze()  # a search for garbage in what was imported would copy all of it
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which killed processes would leave behind
    sys.exit(function(*given))
