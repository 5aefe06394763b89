"""Does adding ΔW to a half-precision W before the product cost accuracy? Losses of one task, four ways of adding.

    python benchmarks/rounding.py --dtype bfloat16

A student with frozen weights W learns a teacher whose weights are W + Δ, with ‖Δ‖/‖W‖ from 1e-3 to 1e-1, by Dual LoRA
with float32 factors. "nearest" is the added form with its stochastic rounding switched off.
"""

from __future__ import annotations

import argparse
from statistics import mean
from unittest import mock

import torch
from peft import get_peft_model
from torch import Tensor, nn

from common import dtype_name, options, parse
from loraplex import DualLoraConfig, loss_scale
from loraplex.numerics import rounding as at_random
from report import Report

FORMS = {"float32": "apart", "reference": "reference", "apart": "apart", "added": "added", "nearest": "added"}


class Stack(nn.Module):
    """Residual tanh layers."""

    def __init__(self, size: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def main(argv: list[str] | None = None) -> None:
    """Train each form on each task with each seed."""
    parser = options(__doc__)
    parser.prog = "rounding.py"
    add = parser.add_argument
    add("--changes", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1], help="‖Δ‖/‖W‖ of the teacher")
    add("--size", type=int, default=64)
    add("--depth", type=int, default=3)
    add("--steps", type=int, default=400)
    add("--seeds", type=int, default=3)
    args = parse(parser, argv, {"changes": [1e-2], "size": 16, "depth": 1, "steps": 3, "seeds": 1})
    half = torch.bfloat16 if args.dtype == torch.float32 else args.dtype
    report = Report("rounding", args)
    for change in args.changes:
        for form in FORMS:
            first, last = zip(*(_train(form, change, half, seed, args) for seed in range(args.seeds)), strict=True)
            report.add(
                change=change,
                form=form,
                dtype="float32" if form == "float32" else dtype_name(half),
                first_loss=f"{mean(first):.4g}",
                last_loss=f"{mean(last):.4g}",
                share_left=round(mean(last) / mean(first), 4),
                seeds=args.seeds,
                steps=args.steps,
            )
    report.show("change", "form", "dtype", "first_loss", "last_loss", "share_left")


def _train(form: str, change: float, half: torch.dtype, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Loss on held-out inputs before and after, in evaluation mode; the teacher is in float32."""
    torch.manual_seed(seed)
    base = Stack(args.size, args.depth).to(half).to(args.device)
    teacher = Stack(args.size, args.depth).to(args.device)
    for layer, frozen in zip(teacher.layers, base.layers, strict=True):
        noise = torch.randn_like(layer.weight)
        weight = frozen.weight.detach().float()
        layer.weight.data = weight + change * weight.norm() / noise.norm() * noise
    targets = [f"layers.{number}" for number in range(args.depth)]
    config = DualLoraConfig(r=16, target_modules=targets, warmup_steps=10, compute=FORMS[form])
    dtype = torch.float32 if form == "float32" else half
    model = get_peft_model(base.to(dtype), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    held_out = torch.randn(1024, args.size, device=args.device)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = teacher(x)
        return nn.functional.mse_loss(model(x.to(dtype)).float(), y)

    def evaluate() -> float:
        with torch.no_grad():
            return loss(held_out).item()

    model.eval()
    before = evaluate()
    model.train()
    # The types that are rounded stochastically.
    rounded = {} if form == "nearest" else at_random.DROPPED
    with mock.patch.object(at_random, "DROPPED", rounded), loss_scale(1.0):
        for _ in range(args.steps):
            loss(torch.randn(256, args.size, device=args.device)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    return before, evaluate()


if __name__ == "__main__":
    main()
