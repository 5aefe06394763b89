"""Inference: one token through a stack with unmerged adapters, and what merging takes.

    python benchmarks/decode.py --size 1b --layers 8 --batch 1 32

Decoding: eval mode, no gradients, a batch of single tokens through Llama layers without a cache. Merging:
`merge_and_unload` on all linear layers of a Llama; GB/s are their weights, read once and written once, over the time
taken, beside a plain copy of the same weights in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cases import FROZEN, METHODS, Entry, adapt, adapter_dtypes, known, share, side_by_side
from common import autocast, dtype_name, interleaved, options, parse, ratio, seconds
from llamas import SIZES, llama, llama_config, weights_fit
from report import Report

OURS = ["masa", "masa_sum", "masa_concat", "aslora", "dual_lora", "dual_lora_cached", "multilora"]


def main(argv: list[str] | None = None) -> None:
    """Run both parts."""
    parser = options(__doc__)
    parser.prog = "decode.py"
    add = parser.add_argument
    add("--size", default="1b", choices=list(SIZES), help="shape of the layers")
    add("--layers", type=int, default=8)
    add("--batch", type=int, nargs="+", default=[1, 32])
    add("--rank", type=int, default=16)
    add("--methods", nargs="+", default=OURS, help="LoRA is always run")
    add("--merge-size", default="1b", choices=[*SIZES, "none"], help='model that is merged; "none": decoding only')
    add("--merge-rounds", type=int, default=3)
    quick = {"size": "tiny", "layers": 2, "batch": [1, 2], "rank": 4, "merge_size": "tiny", "merge_rounds": 2}
    args = parse(parser, argv, quick)
    report = Report("decode", args)
    _decode(report, args)
    if args.merge_size != "none":
        _merge(report, args)
    report.show(
        "kind", "batch", "method", "r", "total_rank=total r", "ms", "vs_frozen", "vs_lora", "gb_per_s", "vs_copy"
    )


def _add(report: Report, args: argparse.Namespace, entry: Entry, times: list[float], **row: Any) -> None:
    empty = {"batch": "", "adapter_dtype": "", "weight_bytes": "", "gb_per_s": ""}
    blank = {**ratio("vs_frozen", [], None), **ratio("vs_lora", [], None), **ratio("vs_copy", [], None)}
    rest = {**empty, **blank, **row}
    kind, method = rest.pop("kind"), rest.pop("method", entry.name)
    report.add(
        kind=kind,
        method=method,
        r=entry.r,
        total_rank=entry.total,
        dtype=dtype_name(args.dtype),
        autocast=args.autocast,
        rounds=len(times),
        ms=round(median(times) * 1e3, 4),
        **rest,
    )


def _decode(report: Report, args: argparse.Namespace) -> None:
    config = llama_config(args.size, num_hidden_layers=args.layers, vocab_size=128)
    base = llama(config, args.dtype, args.device).model
    models = {}
    for entry in side_by_side(known(args.methods), args.rank):
        model = share(base)
        if entry != FROZEN:
            model = adapt(model, entry.name, entry.r, args.adapter_dtype, target_modules="all-linear")
        models[entry] = model.eval()
    for batch in args.batch:
        token = torch.randn(batch, 1, config.hidden_size, device=args.device, dtype=args.dtype)
        times = interleaved({entry: _forward(model, token, args) for entry, model in models.items()}, args)
        for entry, model in models.items():
            vs_frozen = ratio("vs_frozen", times[entry], times[FROZEN])
            vs_lora = ratio("vs_lora", times[entry], times.get(entry.lora))
            more = {"batch": batch, "adapter_dtype": adapter_dtypes(model), **vs_frozen, **vs_lora}
            _add(report, args, entry, times[entry], kind="decode", **more)


def _forward(model: Any, token: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad(), autocast(args):
            model(inputs_embeds=token)

    return forward


def _merge(report: Report, args: argparse.Namespace) -> None:
    config = llama_config(args.merge_size)
    if not weights_fit(config, args, copies=3):
        return
    base = llama(config, args.dtype, args.device)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    weights = [module.weight for name, module in base.named_modules() if name.endswith(names)]
    copies = [torch.empty_like(weight) for weight in weights]
    moved = 2 * sum(weight.nbytes for weight in weights)

    def copy() -> None:
        for source, target in zip(weights, copies, strict=True):
            target.copy_(source)

    # A router has no constant ΔW, and keeping ΔW between forwards does not matter here.
    methods = [name for name in known(["lora", *args.methods]) if name not in ("masa", "dual_lora_cached")]
    times: dict[str, list[float]] = {name: [] for name in ["copy", *methods]}
    for number in range(1 + args.merge_rounds):
        for name in times:
            taken = seconds(copy, args.device) if name == "copy" else _time_merge(base, name, args)
            if number:  # the first round warms up
                times[name].append(taken)
    for name, taken in times.items():
        entry = Entry(name, args.rank) if name in METHODS else FROZEN
        speed = {"weight_bytes": moved // 2, "gb_per_s": round(moved / median(taken) / 1e9, 3)}
        vs_copy, vs_lora = ratio("vs_copy", taken, times["copy"]), ratio("vs_lora", taken, times["lora"])
        if name == "copy":
            vs_lora = ratio("vs_lora", [], None)
        _add(report, args, entry, taken, kind="merge", method=name, **speed, **vs_copy, **vs_lora)


def _time_merge(base: Any, name: str, args: argparse.Namespace) -> float:
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model: Any = adapt(share(base), name, args.rank, args.adapter_dtype, **settings)
    return seconds(model.merge_and_unload, args.device)


if __name__ == "__main__":
    main()
