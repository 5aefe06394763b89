"""How many of Dual LoRA's signs and gates flip with each optimizer step, in the study's own runs.

    python configs/studies/signs.py configs/studies/dual_lora.yaml --rate 5e-3 -o docs/results/dual_lora

Writes signs.csv and signs.png: per step the share of all entries of ΔW whose Sign(D C), and whose gate B A > 0, is
another than the step before, and the share of closed gates; mean over modules.
"""

from __future__ import annotations

import argparse
import csv
import gc
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from loraplex.methods.dual_lora.factors import DualLoraFactors
from loraplex.recipes.prepare import PreparedRun
from loraplex.recipes.training.run import train
from loraplex.study.config import load_study
from loraplex.study.run import prepare
from loraplex.study.trials import Trial, run_config

LABELS = {"signs": "signs that flip", "gates": "gates that flip", "closed": "closed gates"}


class Watch:
    """Compares each module's signs and gates with those of the step before."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._factors: list[DualLoraFactors] = []

    @torch.no_grad()
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """After an optimizer's step."""
        if not self._factors:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            known = [found for found in gc.get_objects() if isinstance(found, DualLoraFactors)]
            self._factors = [factors for factors in known if id(factors.lora_B) in held]
        signs, gates, closed = [], [], []
        for number, f in enumerate(self._factors):
            now = f.lora_D @ f.lora_C > 0, f.lora_B @ f.lora_A > 0
            if number in self._before:
                before = self._before[number]
                signs.append((now[0] != before[0]).float().mean().item())
                gates.append((now[1] != before[1]).float().mean().item())
            closed.append(1 - now[1].float().mean().item())
            self._before[number] = now
        if signs:
            self.rows.append({"signs": fmean(signs), "gates": fmean(gates), "closed": fmean(closed)})


def main() -> None:
    """Train each seed and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--method", default="dual_lora", help="entry of the study")
    parser.add_argument("--rate", type=float, required=True, help="learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the study's")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        study = load_study(args.study, [("output_dir", folder)])
        sizes = prepare(study).sizes
        task = next(iter(study.tasks))
        for seed in args.seeds or study.seeds:
            gc.collect()
            watch = Watch()
            handle = register_optimizer_step_post_hook(watch)
            trial = Trial(task, args.method, args.rate, seed)
            train(PreparedRun(run_config(study, trial, sizes[task][args.method])))
            handle.remove()
            found[seed] = watch.rows
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "signs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "step", *LABELS])
        for seed, rows in found.items():
            # The first comparison is between the first step and the second.
            writer.writerows([seed, step, *(f"{row[key]:.6f}" for key in LABELS)] for step, row in enumerate(rows, 2))
    _draw(list(found.values()), args.out / "signs.png")


def _draw(runs: list[list[dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 3), dpi=130, layout="constrained")
    flips, closed = figure.subplots(1, 2)
    steps = range(2, len(runs[0]) + 2)
    for key, axes, dash in (("signs", flips, "-"), ("gates", flips, "--"), ("closed", closed, "-")):
        means = [fmean(rows[i][key] for rows in runs) for i in range(len(steps))]
        axes.plot(steps, means, color="black", linestyle=dash, label=LABELS[key])
    flips.set(xlabel="optimizer step", ylabel="share of entries per step", ylim=(0, None))
    closed.set(xlabel="optimizer step", ylabel="share of closed gates", ylim=(0, 1))
    flips.legend(frameon=False)
    for axes in (flips, closed):
        axes.grid(color="0.92")
    FigureCanvasAgg(figure)
    figure.savefig(path)


if __name__ == "__main__":
    main()
