"""One adapted linear layer in training: time against the frozen layer and PEFT's LoRA, bytes kept, peak.

    python benchmarks/ops.py --tokens 2048 --shapes 2048 4096x14336 --ranks 8 64 --methods dual_lora loha

A step is forward and backward of a layer whose input needs a gradient, as within a model. All methods share one frozen
weight; r is each method's own setting, and LoRA is run at every total rank that the others have.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cases import FROZEN, METHODS, Entry, adapter_dtypes, known, layers, linears, side_by_side, step_of
from common import dtype_name, interleaved, options, parse, ratio
from memory import allocations, held, kept_by_forward, saved
from report import Report


def main(argv: list[str] | None = None) -> None:
    """Run the grid."""
    parser = options(__doc__)
    parser.prog = "ops.py"
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[512, 2048, 8192] if gpu else [512, 2048])
    add("--shapes", nargs="+", default=["1024", "2048", "4096"] if gpu else ["1024", "2048"], help="D, or INxOUT")
    add("--ranks", type=int, nargs="+", default=[8, 16, 64])
    add("--methods", nargs="+", default=list(METHODS))
    args = parse(parser, argv, {"tokens": [24], "shapes": ["32x48"], "ranks": [4]})
    names = [name for name in known(args.methods) if name not in ("lora", "dual_lora_cached")]
    report, caches = Report("ops", args), dict[str, int]()
    for shape in args.shapes:
        inputs, outputs = (int(size) for size in (shape.split("x") * 2)[:2])
        for tokens in args.tokens:
            for r in args.ranks:
                _point(report, args, names, tokens, inputs, outputs, r, caches)
    shown = ["tokens=T", "in", "out", "r", "method", "total_rank=total r", "ms", "vs_frozen", "vs_lora"]
    report.show(*shown, "saved_bytes=saved", "saved_weight_sized_bytes=W-sized", "peak_bytes=peak")


def _point(
    report: Report, args: argparse.Namespace, names: list[str], T: int, k: int, d: int, r: int, caches: dict[str, int]
) -> None:
    W = torch.randn(d, k, device=args.device, dtype=args.dtype) / k**0.5
    x = torch.randn(1, T, k, device=args.device, dtype=args.dtype, requires_grad=True)
    entries = side_by_side(names, r)
    works, memory = {}, {}
    for entry in entries:
        memory[entry] = _memory(entry, W, x, args, caches)
        works[entry] = step_of(layers([W], entry, args), x, args)[1]
    times = interleaved(works, args)
    for entry in entries:
        report.add(
            **{"method": entry.name, "tokens": T, "in": k, "out": d, "r": entry.r, "total_rank": entry.total},
            dtype=dtype_name(args.dtype),
            adapter_dtype=memory[entry].pop("adapter_dtype"),
            autocast=args.autocast,
            rounds=args.rounds,
            ms=round(median(times[entry]) * 1e3, 4),
            **ratio("vs_frozen", times[entry], times[FROZEN]),
            **ratio("vs_lora", times[entry], times.get(entry.lora)),
            **memory[entry],
        )


def _memory(entry: Entry, W: Tensor, x: Tensor, args: argparse.Namespace, caches: dict[str, int]) -> dict[str, Any]:
    """Bytes of a step.

    The first step compiles, and makes buffers that a method keeps between steps; it is taken by a model that is
    dropped again. `caches` remembers what each method has left behind so far, and every later peak has it too.
    """
    x.grad = None
    # GPU libraries allocate a workspace at a thread's first product, and backward has a thread of its own.
    step_of(linears([W]), x, args)[1]()
    torch.addmm(W[:, 0], x.detach()[0], W.T)
    x.grad = None
    before = held(args.device)
    step_of(layers([W], entry, args), x, args)[1]()
    x.grad = None
    caches[entry.name] = caches.get(entry.name, 0) + held(args.device) - before
    model = layers([W], entry, args)
    forward, step = step_of(model, x, args)
    with allocations(args.device) as found:
        step()
    model.zero_grad()
    x.grad = None
    kept = kept_by_forward(forward, args.device)
    count = saved(forward, x, [*model.parameters(), *model.buffers()], W.numel())
    ambiguous = x.shape[1] in W.shape  # then activations have the same size
    return {
        "adapter_dtype": adapter_dtypes(model),
        "saved_bytes": count.other,
        "saved_weight_sized_bytes": "" if ambiguous else count.weight_sized,
        "saved_x_bytes": count.x,
        "saved_parameter_bytes": count.parameters,
        "kept_bytes": kept,
        "peak_bytes": found.peak + caches[entry.name],
        "cache_bytes": caches[entry.name],
    }


if __name__ == "__main__":
    main()
