"""Fine-tune a real language model with one of the four methods and with LoRA of the same budget, and compare.

    python examples/quickstart.py [masa | aslora | dual_lora | multilora]

Each run is `loraplex train configs/quickstart.yaml` in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
OUT = ROOT / "runs" / "quickstart"

# Short runs need short schedules; steps given as fractions follow the run's length.
ADAPTERS: dict[str, dict[str, Any]] = {
    "masa": {"r": 8, "lora_alpha": 16},
    "aslora": {"r": 16, "lora_alpha": 32, "merge_start_step": 0.2, "merge_interval": 0.04},
    "dual_lora": {"r": 8, "lora_alpha": 16, "warmup_steps": 0.2},
    "multilora": {"r": 4, "lora_alpha": 8, "num_modules": 2},
}


def main() -> None:
    method = sys.argv[1] if len(sys.argv) > 1 else "masa"
    if method not in ADAPTERS:
        sys.exit(f"error: {method!r} is no method: use one of {', '.join(ADAPTERS)}.")
    ours = train(method, ADAPTERS[method])
    rank = equal_rank(ours["end"]["trainable_parameters"])
    lora = train("lora", {"r": rank, "lora_alpha": 2 * rank}, "--train.eval_on_start", "false")
    report(method, ours, lora, rank)


def train(method: str, adapter: dict[str, Any], *more: str) -> dict[str, Any]:
    """Run `loraplex train`; the last metrics of each kind."""
    folder = OUT / method
    shutil.rmtree(folder, ignore_errors=True)
    options = [f"--adapter.{key}={json.dumps(value)}" for key, value in adapter.items()]
    command = [sys.executable, "-m", "loraplex", "train", str(CONFIG), "--method", method, *options, *more]
    Console().rule(f"[bold]{method}")
    done = subprocess.run([*command, "--output_dir", str(folder)], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next((row for row in rows if row["event"] == "eval" and row["step"] == 0), None)
    last = [row for row in rows if row["event"] == "eval"][-1]
    return {"folder": folder, "before": first, "after": last, "end": rows[-1]}


def equal_rank(parameters: int) -> int:
    """The rank at which LoRA has the nearest number of trainable parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from loraplex.recipes.config.run_config import load_run
    from loraplex.recipes.models.loading import resolve_model

    run = load_run(CONFIG)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_model(run.model)))
    one = get_peft_model(model, LoraConfig(r=1, target_modules=run.adapter["target_modules"]))
    return max(1, round(parameters / one.get_nb_trainable_parameters()[0]))


def report(method: str, ours: dict[str, Any], lora: dict[str, Any], rank: int) -> None:
    table = Table(title=f"Film reviews, {ours['after']['examples']} held out", title_justify="left")
    for column in ("", "accuracy", "loss", "trainable", "minutes", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("base model", f"{ours['before']['accuracy']:.3f}", f"{ours['before']['loss']:.3f}", "0", "–", "–")
    for name, run in ((f"LoRA, r={rank}", lora), (method, ours)):
        end = run["end"]
        table.add_row(
            name,
            f"{run['after']['accuracy']:.3f}",
            f"{run['after']['loss']:.3f}",
            f"{end['trainable_parameters']:,}",
            f"{end['seconds'] / 60:.1f}",
            f"{end['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
    console = Console()
    console.print(table)
    console.print(f"Adapter: {ours['folder']}   loss curve: {ours['folder'] / 'loss.png'}")
    console.print(f"Look inside: {Path(sys.executable).parent / 'loraplex'} inspect {ours['folder']}")


if __name__ == "__main__":
    main()
