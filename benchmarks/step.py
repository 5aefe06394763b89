"""A whole training step of a Llama with random weights: forward, loss, backward, AdamW on the adapter.

    python benchmarks/step.py --sizes 100m --batch 4 --length 256 --checkpointing off

All methods' models read the same frozen weights, and stand ready side by side; in each round every one takes a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from cases import METHODS, adapt, adapter_dtypes, known, share, trained
from common import autocast, dtype_name, interleaved, options, parse, ratio, tensors
from llamas import SIZES, llama, llama_config, weights_fit
from memory import allocations
from report import Report


def main(argv: list[str] | None = None) -> None:
    """Run the grid."""
    parser = options(__doc__)
    parser.prog = "step.py"
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--sizes", nargs="+", default=["100m", "300m", "1b", "8b"] if gpu else ["100m"], choices=list(SIZES))
    add("--batch", type=int, nargs="+", default=[8] if gpu else [2])
    add("--length", type=int, nargs="+", default=[512, 2048] if gpu else [256])
    add("--rank", type=int, default=16)
    default = ["lora", "dora", "loha", "masa", "aslora", "dual_lora", "multilora"]
    add("--methods", nargs="+", default=default, help="LoRA is always run")
    add("--checkpointing", choices=["on", "off", "both"], default="both", help="gradient checkpointing")
    parser.set_defaults(rounds=9, warmup=1)  # a step is long beside what disturbs it
    args = parse(parser, argv, {"sizes": ["tiny"], "batch": [2], "length": [12]})
    report = Report("step", args)
    for size in args.sizes:
        config = llama_config(size)
        if not weights_fit(config, args, copies=2):
            continue
        base = llama(config, args.dtype, args.device)
        for checkpointing in {"on": [True], "off": [False], "both": [False, True]}[args.checkpointing]:
            adapted = {name: _adapted(base, name, checkpointing, args) for name in known(["lora", *args.methods])}
            for batch in args.batch:
                for length in args.length:
                    _point(report, args, adapted, {"size": size, "checkpointing": checkpointing}, batch, length)
            del adapted
        del base
    report.show(
        "size", "batch", "length", "checkpointing", "method", "parameters", "status", "tokens_per_s=tokens/s",
        "vs_lora", "extra_bytes=step's memory", "peak_bytes=all memory",
    )  # fmt: skip


def _adapted(base: torch.nn.Module, name: str, checkpointing: bool, args: argparse.Namespace) -> Any:
    """(model, optimizer) of one method on the shared weights."""
    model: Any = share(base)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapt(model, name, args.rank, args.adapter_dtype, target_modules="all-linear", task_type="CAUSAL_LM")
    return model.train(), torch.optim.AdamW(trained(model), lr=1e-5)


def _stepper(model: Any, optimizer: torch.optim.Optimizer, tokens: Any, args: argparse.Namespace) -> Callable[[], None]:
    def step() -> None:
        with autocast(args):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _point(
    report: Report, args: argparse.Namespace, adapted: dict[str, Any], where: dict[str, Any], batch: int, length: int
) -> None:
    works, extra, failed = {}, {}, []
    for name, (model, optimizer) in adapted.items():
        tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=args.device)
        step = _stepper(model, optimizer, tokens, args)
        try:
            step()  # makes AdamW's state, which then stands between steps
            with allocations(args.device) as found:
                step()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            failed.append(name)
            continue
        works[name], extra[name] = step, found.peak
    times = interleaved(works, args)
    for name, (model, optimizer) in adapted.items():
        ran = name not in failed
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        standing = sum(tensor.nbytes for tensor in [*tensors(model), *filter(torch.is_tensor, state)])
        middle = median(times[name]) if ran else 0.0
        report.add(
            **where,
            method=name,
            batch=batch,
            length=length,
            r=args.rank,
            total_rank=args.rank * METHODS[name].width,
            parameters=sum(p.numel() for p in trained(model)),
            dtype=dtype_name(args.dtype),
            adapter_dtype=adapter_dtypes(model),
            autocast=args.autocast,
            rounds=args.rounds,
            status="ran" if ran else "out of memory",
            ms=round(middle * 1e3, 3) if ran else "",
            tokens_per_s=round(batch * length / middle, 1) if ran else "",
            **ratio("vs_lora", times.get(name, []), times.get("lora") if ran else None),
            extra_bytes=extra[name] if ran else "",
            standing_bytes=standing,
            peak_bytes=standing + extra[name] if ran else "",
        )


if __name__ == "__main__":
    main()
