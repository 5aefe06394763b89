"""Runs the `loraplex` command in each process of a launcher, with CPUs and gloo in place of GPUs and NCCL.

Arguments: a file of jobs, `[{"argv": […], …}]`, that run one after the other, and a folder for their exit codes and for
the environment that the launcher gave.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType
from environment import leave_environment

import loraplex.recipes.training.run
from loraplex.commands.cli import main
from loraplex.recipes.training.trainers import AnswerTrainer


def use_cpus() -> None:
    """Let accelerate and transformers take CPUs for the devices that their engines ask for."""
    zero, fsdp = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP"))
    kind = DistributedType.MULTI_GPU if fsdp else DistributedType.MULTI_CPU
    kind = DistributedType.DEEPSPEED if zero else kind
    PartialState._prepare_backend = lambda *_: ("gloo", kind)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if zero:
        import deepspeed.comm  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles C++


def die_while_saving(rank: int) -> None:
    """Kill this process, if it has `rank`, in the middle of its second checkpoint."""
    saves, save = [], AnswerTrainer._save_rng_state

    def save_or_die(trainer: AnswerTrainer, output_dir: str) -> None:
        saves.append(output_dir)
        if len(saves) == 2 and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        save(trainer, output_dir)

    AnswerTrainer._save_rng_state = save_or_die


def die_after(rank: int, seconds: float) -> None:
    """Kill this process, if it has `rank`, at whatever it does then."""
    if int(os.environ["RANK"]) == rank:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


def run(job: dict) -> int:
    if job.get("reentrant"):
        loraplex.recipes.training.run.checkpoint_without_reentry = lambda arguments: None
    if (rank := job.get("dies")) is not None:
        die_while_saving(rank)
    if "dies_after" in job:
        die_after(*job["dies_after"])
    return main(job["argv"])


def run_all(jobs: Path, folder: Path) -> int:
    """Run the jobs of a file as one rank; the exit codes go to a file of the rank's name."""
    rank = os.environ["RANK"]
    leave_environment(folder)
    use_cpus()
    gc.freeze()  # what was imported is no garbage, and every run searches for some
    codes = [run(job) for job in json.loads(jobs.read_text())]
    (folder / f"{rank}.json").write_text(json.dumps(codes))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_all(*map(Path, sys.argv[1:])))
