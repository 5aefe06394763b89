"""The benchmarks run, write what they promise, and count memory exactly."""

import csv
import gc
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraplex.methods.dual_lora.factors import DualLoraFactors

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ORIGIN = {
    "hardware", "threads", "python", "torch", "peft", "transformers", "triton", "loraplex", "commit", "date", "command",
    "load",
}  # fmt: skip
SPREAD = {f"vs_lora{end}" for end in ("", "_q1", "_q3")}
COLUMNS = {
    "ops": {
        "method", "tokens", "in", "out", "r", "total_rank", "ms", "vs_frozen", "vs_frozen_q1", "vs_frozen_q3",
        "adapter_dtype", "saved_bytes", "saved_weight_sized_bytes", "saved_x_bytes", "saved_parameter_bytes",
        "kept_bytes", "peak_bytes", "cache_bytes", *SPREAD,
    },
    "step": {"size", "batch", "length", "checkpointing", "method", "tokens_per_s", "peak_bytes", *SPREAD},
    "scaling": {"kind", "variable", "method", "time_flops", "flops", "derived_flops", "saved_bytes"},
    "rounding": {"change", "form", "dtype", "first_loss", "last_loss", "share_left", "seeds"},
    "decode": {"kind", "batch", "method", "vs_frozen", "gb_per_s", "vs_copy", *SPREAD},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    gc.unfreeze()
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def run(name: str, folder: Path, *words: str) -> list[dict[str, str]]:
    """Rows that a command writes."""
    out = folder / f"{name}.csv"
    importlib.import_module(name).main(["--quick", "--device", "cpu", *words, "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert COLUMNS[name] | ORIGIN <= rows[0].keys()
    for row in rows:
        assert row["command"] == " ".join(["python", f"benchmarks/{name}.py", "--quick", "--device", "cpu", *words])
        assert not any(str(folder) in value or str(BENCHMARKS) in value for value in row.values())
    return rows


def test_ops(tmp_path: Path) -> None:
    """Every method has a LoRA of its total rank; bytes are the formulas'."""
    rows = run("ops", tmp_path)
    T, k, d, r = 24, 32, 48, 4
    found = {(row["method"], int(row["r"])): row for row in rows}
    assert all(float(row["vs_lora"]) > 0 for row in rows if row["method"] != "frozen")
    for rank in (r, 3 * r, 4 * r):
        assert int(found["lora", rank]["saved_bytes"]) == 4 * T * rank  # A x
    for row in rows:
        if row["method"] not in ("dual_lora", "dual_lora_reference"):
            assert int(row["cache_bytes"]) == 0, row["method"]
    frozen = found["frozen", 0]
    # y, then the gradient of x beside y.
    assert int(frozen["peak_bytes"]) == 4 * T * (d + k)
    assert int(frozen["saved_parameter_bytes"]) == 4 * d * k
    assert int(frozen["kept_bytes"]) == 0
    # ΔW, of W's size, is what its product with x needs for dx.
    assert int(found["loha", r]["saved_weight_sized_bytes"]) >= 4 * d * k
    # The scaling is a number of 8 bytes that autograd keeps without asking the hooks.
    assert int(found["aslora", r]["kept_bytes"]) == int(found["aslora", r]["saved_bytes"]) + 8 == 4 * T * r + 8


def test_buffers_between_steps_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that a method keeps for all layers is in its peak, at every later point of the grid too."""
    buffers: list[Tensor] = []
    forward = DualLoraFactors.forward

    def with_buffer(self: Any, x: Tensor, *base: Any) -> Tensor:
        if not buffers:
            buffers.append(torch.empty(10_000))
        return forward(self, x, *base)

    words = ("--methods", "dual_lora", "aslora", "--tokens", "24", "25")
    before = [int(row["peak_bytes"]) for row in run("ops", tmp_path, *words)]
    monkeypatch.setattr(DualLoraFactors, "forward", with_buffer)
    rows = run("ops", tmp_path, *words)
    extra = [40_000 if row["method"].startswith("dual_lora") else 0 for row in rows]
    assert [int(row["cache_bytes"]) for row in rows] == extra
    assert [int(row["peak_bytes"]) for row in rows] == [a + b for a, b in zip(before, extra, strict=True)]


def test_ops_in_half_precision(tmp_path: Path) -> None:
    """PEFT's default keeps adapters in float32; the option changes it."""
    words = ("--dtype", "bfloat16", "--methods", "masa", "dual_lora")
    assert {row["adapter_dtype"] for row in run("ops", tmp_path, *words) if row["r"] != "0"} == {"float32"}
    rows = run("ops", tmp_path, *words, "--adapter-dtype", "base", "--autocast")
    assert {row["adapter_dtype"] for row in rows if row["r"] != "0"} == {"bfloat16"}


def test_step(tmp_path: Path) -> None:
    """With and without checkpointing, which needs less memory."""
    rows = run("step", tmp_path, "--methods", "dual_lora", "aslora")
    assert {row["status"] for row in rows} == {"ran"}
    extra = {(row["method"], row["checkpointing"]): int(row["extra_bytes"]) for row in rows}
    assert len(extra) == 6
    assert all(extra[method, "True"] < extra[method, "False"] for method in ("lora", "dual_lora", "aslora"))


def test_scaling(tmp_path: Path) -> None:
    """FLOPs that are counted are those derived, and saved bytes the budget's."""
    slopes = [row for row in run("scaling", tmp_path) if row["kind"] == "slope"]
    assert {row["variable"] for row in slopes} == {"r", "n", "layers", "tokens"}
    for row in slopes:
        assert float(row["flops"]) == pytest.approx(float(row["derived_flops"]), rel=1e-3)
        assert float(row["saved_bytes"]) == pytest.approx(float(row["derived_saved_bytes"]))


def test_rounding(tmp_path: Path) -> None:
    """Every form of one dtype starts from the same loss: ΔW = 0."""
    rows = {row["form"]: row for row in run("rounding", tmp_path)}
    assert rows.keys() == {"float32", "reference", "apart", "added", "nearest"}
    assert rows["float32"]["dtype"] == "float32" != rows["added"]["dtype"]
    assert len({row["first_loss"] for row in rows.values() if row["dtype"] == "bfloat16"}) == 1


def test_decode(tmp_path: Path) -> None:
    """Two batches, and merging beside a copy."""
    rows = run("decode", tmp_path)
    assert {(row["kind"], row["batch"]) for row in rows} == {("decode", "1"), ("decode", "2"), ("merge", "")}
    assert all(float(row["gb_per_s"]) > 0 for row in rows if row["kind"] == "merge")


class Busy(torch.autograd.Function):
    """3 MB at most in forward, of which it keeps 1 MB past autograd; 7 MB in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hidden = torch.empty(250_000)
        temporary = torch.empty(500_000)
        del temporary
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        temporary = torch.empty(1_750_000)
        del temporary
        return grad * 2


def test_allocations_sees_temporaries_inside_functions() -> None:
    """Peak and end, counted by hand."""
    memory = importlib.import_module("memory")
    x, dy = torch.ones(10, 10, requires_grad=True), torch.ones(10, 10)
    with memory.allocations(torch.device("cpu")) as forward:
        y = Busy.apply(x)
    assert (forward.peak, forward.end) == (3_000_000, 1_000_000 + 400)
    with memory.allocations(torch.device("cpu")) as backward:
        y.backward(dy)
    # What forward kept stood before; x.grad stays.
    assert (backward.peak, backward.end) == (7_000_000, 400)
    del y, backward
    # An operator that allocates inside itself: this sum makes a float32 copy of 4 MB.
    half = torch.ones(1_000_000, dtype=torch.bfloat16)
    with memory.allocations(torch.device("cpu")) as inside:
        total = torch.ops.aten.to(half, torch.float32).sum()
    assert (inside.peak, inside.end) == (4_000_000 + 4, 4)
    assert total == 1_000_000


def test_memory_of_a_chain() -> None:
    """Peak of y = relu(x Wᵀ) and its backward; what is saved, kept, and held."""
    memory = importlib.import_module("memory")
    cpu, T, k, d = torch.device("cpu"), 64, 32, 16
    W, x, dy = nn.Parameter(torch.randn(d, k)), torch.randn(T, k, requires_grad=True), torch.randn(T, d)

    def forward() -> Tensor:
        return torch.relu(x @ W.T)

    count = memory.saved(forward, x, [W], d * k)
    # relu keeps its result; x and W are kept for each other's gradient.
    assert count == memory.Saved(x=4 * T * k, parameters=4 * d * k, other=4 * T * d, weight_sized=0)
    assert memory.kept_by_forward(forward, cpu) == 0  # the result itself
    with memory.allocations(cpu) as found:
        forward().backward(dy)
    # y, the gradient before relu, and both gradients: y is dropped after relu's backward.
    assert found.end == 4 * (T * k + d * k)
    assert 4 * (T * d + T * k + d * k) <= found.peak <= 4 * (2 * T * d + T * k + d * k)
    before = memory.held(cpu)
    buffers = {"shared": torch.empty(1000)}
    assert memory.held(cpu) - before == buffers["shared"].nbytes


def test_ratios_are_taken_within_rounds() -> None:
    """Rounds of different speed do not blur a ratio."""
    common = importlib.import_module("common")
    assert common.ratio("vs", [2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == {"vs": 2.0, "vs_q1": 2.0, "vs_q3": 2.0}
    assert common.ratio("vs", [1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == {"vs": 3.0, "vs_q1": 2.0, "vs_q3": 4.0}
    assert common.ratio("vs", [1.0], None) == {"vs": "", "vs_q1": "", "vs_q3": ""}
