"""What ASLoRA's running averages and distances cost, as a share of a training step.

    python benchmarks/aslora_averages.py [MODEL] [--length 256] [--batch 4]

The averages are updated after every optimizer step; distances are computed at merges only, a few times per run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import get_peft_model

from loraplex import AsLoraConfig
from loraplex.recipes.models.loading import load_model
from loraplex.tuner.schedules import schedules

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="package:smollm2-135m")
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = AsLoraConfig(
    r=16,
    lora_alpha=32,
    target_modules="all-linear",
    merge_start_step=10**6,
    merge_interval=10**6,
    task_type="CAUSAL_LM",
)
model = get_peft_model(load_model(args.model, "sft", dtype="bfloat16" if device == "cuda" else "float32"), config)
model.to(device).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
(_, shared), *_ = schedules(model)
tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.length), device=device)


def timed(work):
    """Seconds, on the device too."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step():
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def averages():
    with torch.no_grad():
        for family in shared.families:
            shared._update_averages(family, shared._optimizer_state)


def merge():
    with torch.no_grad():
        for family in shared.families:
            found, t = shared._update_averages(family, shared._optimizer_state)
            shared._merge(family, found, t, shared._optimizer_state)


step()
step_times, average_times = [], []
for _ in range(args.steps):
    step_times.append(timed(step))
    average_times.append(timed(averages))
merge_time = timed(merge)
whole, part = statistics.median(step_times), statistics.median(average_times)
name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
spread = f"({min(average_times) * 1e3:.2f}–{max(average_times) * 1e3:.2f})"
print(f"{args.model} on {name}, {args.batch} × {args.length} tokens")
print(f"{len(shared.families)} families, {sum(p.numel() for p in shared.parameters()):,} parameters")
print(f"step {whole * 1e3:.1f} ms ({min(step_times) * 1e3:.1f}–{max(step_times) * 1e3:.1f})")
print(f"averages {part * 1e3:.2f} ms {spread}: {part / whole:.2%}")
print(f"a merge in every family, once: {merge_time * 1e3:.1f} ms")
