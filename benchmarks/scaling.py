"""How time, FLOPs and saved bytes grow with rank, number of modules or experts, layers and tokens; beside the derived.

    python benchmarks/scaling.py --size 1024 --tokens 512

Each sweep changes one number and fits a line. FLOPs are counted (torch's FlopCounterMode: matrix products that torch
dispatches, and Dual LoRA's operators by their formulas). "time" is in FLOPs too: seconds × the frozen layer's FLOP/s in
the same rounds, so a slope above the derived one is time that no matrix product accounts for. Derived saved bytes are
`loraplex.inspection.budget`'s.

Derived FLOPs of a step, T tokens, weight d × k: frozen 4Tdk; LoRA + 6Tr(d+k); MultiLoRA and MASA with concatenation
the same with n·r; MASA's router + 6T((nr+n)·in + r·out); Dual LoRA, W + ΔW added first, 6Tdk + 8dk(r1+r2).
"""

from __future__ import annotations

import argparse
from statistics import linear_regression, median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cases import EXPERTS, FROZEN, METHODS, Entry, known, layers, linears, step_of
from common import dtype_name, interleaved, options, parse
from loraplex.inspection.budget import plan
from memory import saved
from report import Report

VARIABLES = {"r": "rank", "n": "modules", "layers": "layers", "tokens": "tokens"}
COUNTS = {"masa": "num_experts", "masa_sum": "num_experts", "masa_concat": "num_experts", "multilora": "num_modules"}
COMPARED = ["lora", "masa", "masa_sum", "masa_concat", "aslora", "dual_lora", "multilora"]


def main(argv: list[str] | None = None) -> None:
    """Run the sweeps."""
    parser = options(__doc__)
    parser.prog = "scaling.py"
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--size", type=int, default=4096 if gpu else 1024, help="d of the square layers")
    add("--rank", type=int, default=16, help="where r is not what changes; likewise:")
    add("--tokens", type=int, default=4096 if gpu else 512)
    add("--variables", nargs="+", default=list(VARIABLES), choices=list(VARIABLES))
    add("--methods", nargs="+", default=COMPARED, choices=COMPARED)
    args = parse(parser, argv, {"size": 32, "rank": 4, "tokens": 16})
    # Factors of the default; r grows from its half, so that its slope is not all in one step.
    growth = {"r": (0.5, 1, 2, 4), "n": (0.25, 0.5, 1, 2), "layers": (1, 2, 4, 8), "tokens": (0.5, 1, 2, 4)}
    start = {"r": args.rank, "n": EXPERTS, "layers": 1, "tokens": args.tokens}
    report = Report("scaling", args)
    for variable in args.variables:
        values = [max(1, int(start[variable] * factor)) for factor in growth[variable][: 2 if args.quick else 4]]
        _sweep(report, args, variable, values, start)
    report.rows = [row for row in report.rows if row["kind"] == "slope"]
    report.show(
        "variable=per", "method", "ms", "time_flops=time", "flops=FLOPs", "derived_flops=derived",
        "saved_bytes=saved", "derived_saved_bytes=derived",
    )  # fmt: skip


def _sweep(report: Report, args: argparse.Namespace, variable: str, values: list[int], start: dict[str, int]) -> None:
    names = [name for name in known(args.methods) if variable != "n" or name in COUNTS]
    shapes = {value: start | {variable: value} for value in values}
    deepest = max(shape["layers"] for shape in shapes.values())
    weights = [
        torch.randn(args.size, args.size, device=args.device, dtype=args.dtype) / args.size**0.5 for _ in range(deepest)
    ]
    works: dict[Any, Any] = {}
    points: dict[Any, dict[str, Any]] = {}
    for value, shape in shapes.items():
        x = torch.randn(1, shape["tokens"], args.size, device=args.device, dtype=args.dtype, requires_grad=True)
        for name in ["frozen", *names]:
            works[name, value], points[name, value] = _case(name, shape, weights[: shape["layers"]], x, args)
    times = interleaved(works, args)
    for name in names:
        for value in values:
            point, frozen = points[name, value], ("frozen", value)
            time = median(times[name, value])
            point["ms"] = time * 1e3
            point["saved_bytes"] -= points[frozen]["saved_bytes"]  # under autocast, copies of the base's weights
            point["time_flops"] = time * points[frozen]["flops"] / median(times[frozen])
            _add(report, args, start | {variable: value}, kind="point", variable=variable, method=name, **point)
        slopes = {key: _slope(values, [points[name, value][key] for value in values]) for key in point}
        _add(report, args, start | {variable: ""}, kind="slope", variable=variable, method=name, **slopes)


def _add(report: Report, args: argparse.Namespace, shape: dict[str, Any], **row: Any) -> None:
    numbers = ("ms", "time_flops", "flops", "derived_flops", "saved_bytes", "derived_saved_bytes")
    report.add(
        **{key: row[key] for key in ("kind", "variable", "method")},
        **{key: value if row["method"] in COUNTS or key != "n" else "" for key, value in shape.items()},
        size=args.size,
        dtype=dtype_name(args.dtype),
        adapter_dtype=args.adapter_dtype,
        autocast=args.autocast,
        rounds=args.rounds,
        **{key: row[key] if row[key] == "" else float(f"{row[key]:.6g}") for key in numbers},
    )


def _slope(values: list[int], found: list[Any]) -> Any:
    return "" if "" in found else linear_regression(values, found).slope


def _case(
    name: str, shape: dict[str, int], weights: list[Tensor], x: Tensor, args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """(step, what is known of it before it is timed)."""
    settings = {COUNTS[name]: shape["n"]} if name in COUNTS else {}
    entry = FROZEN if name == "frozen" else Entry(name, shape["r"])
    model = layers(weights, entry, args, **settings)
    forward, step = step_of(model, x, args)
    with FlopCounterMode(display=False) as counter:
        step()
    count = saved(forward, x, model.parameters(), weights[0].numel())
    planned: Any = ""
    # The budget knows PEFT's default: float32 adapters over a base of half precision.
    if name != "frozen" and (args.adapter_dtype == "peft" or args.dtype == torch.float32):
        targets = [str(number) for number in range(len(weights))]
        config = METHODS[name].config(shape["r"], target_modules=targets, **settings)
        planned = plan(linears(weights), config, shape["tokens"], args.autocast).activation_bytes
    return step, {
        "flops": counter.get_total_flops(),
        "derived_flops": shape["layers"] * _derived(name, shape, args.size, args.size),
        "saved_bytes": count.other + count.x,
        "derived_saved_bytes": planned,
    }


def _derived(name: str, shape: dict[str, int], d: int, k: int) -> int:
    """FLOPs of one layer's step, of a weight d × k."""
    T, r, n = shape["tokens"], shape["r"], shape["n"]
    if name == "frozen":
        return 4 * T * d * k
    if name == "dual_lora":
        return 6 * T * d * k + 8 * d * k * r
    if name == "masa":
        return 4 * T * d * k + 6 * T * ((n * r + n) * k + r * d)
    width = n * r if name in ("multilora", "masa_concat") else r
    return 4 * T * d * k + 6 * T * width * (d + k)


if __name__ == "__main__":
    main()
