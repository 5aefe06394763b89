"""Adapters as plain LoRA: exact, compressed, approximate; whole or not at all; loaded where loraplex is not installed.

Expected updates come from `helpers.naive_updates`: the papers' equations, one scalar at a time.
"""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import helpers as h
import loraplex
from helpers import ARCHS, HIDDEN, LAYERS, adapted, config, fill, naive_updates, output, products, ready, relative
from loraplex import DualLoraConfig, MultiLoraConfig, Rank, export_lora
from loraplex.export.lora_format import export_errors
from loraplex.export.servers import ENGINES
from loraplex.inspection.describe import describe
from loraplex.numerics import lowrank

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()
F64 = torch.float64
EXACT = ("multilora", "multilora-module", "aslora", "masa-sum", "masa-concat")
"""Methods whose ΔW is a product of two factors."""
WIDTHS = {"multilora": 8, "multilora-module": 12, "aslora": 4, "masa-sum": 4, "masa-concat": 8}
"""Rank of the exact form: n·r, r, r, n·r with the settings of `helpers.METHODS` and r = 4."""

every_exact = pytest.mark.parametrize("method", EXACT)


def assert_portable(folder: Path, rank: int) -> None:
    """What stock PEFT, vLLM, SGLang and llama.cpp's converter ask of an adapter.

    llama.cpp takes the rank from the tensors and alpha from the config, and knows no pattern, no rsLoRA and no tensor
    that is not a lora_A or lora_B of a linear layer; vLLM refuses DoRA, biases and modules_to_save.
    """
    settings = h.lora_config(folder)
    assert settings["peft_type"] == "LORA"
    assert settings["r"] == settings["lora_alpha"] == rank
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert settings["bias"] == "none"
    assert settings["modules_to_save"] is None
    assert not settings["use_rslora"]
    assert not settings["use_dora"]
    assert settings["inference_mode"]
    assert "loraplex" not in json.dumps(settings)
    tensors = h.file_tensors(folder)
    updates = {key.rpartition(".lora_")[0] for key in tensors}
    assert set(tensors) == {f"{name}.lora_{side}.weight" for name in updates for side in "AB"}
    for name in updates:
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert name.startswith("base_model.model.")
        assert A.dim() == B.dim() == 2
        assert A.shape[0] == B.shape[1] == rank
        assert A.isfinite().all()
        assert B.isfinite().all()


def assert_exact(model: PeftModel, folder: Path, tolerance: float = 1e-12, **naive: Any) -> None:
    """The file's products equal ΔW of every adapted module, and are zero where a server wants further modules."""
    actual, expected = products(folder), naive_updates(model, **naive)
    for name, delta in expected.items():
        assert delta.abs().max() > 0.01
        assert relative(actual.pop(name), delta) < tolerance, name
    assert not any(product.any() for product in actual.values())


def used_rank(factor: Tensor, dim: int) -> int:
    """1 + index of the last row (dim 0) or column (dim 1) that is not zero."""
    return int(factor.abs().sum(1 - dim).nonzero().max()) + 1


# 1. Exact


@every_exact
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "roberta"])
def test_exact(method: str, arch: str, tmp_path: Path) -> None:
    model = adapted(method, arch, F64)
    expected, inputs = output(model, ARCHS[arch].inputs()), ARCHS[arch].inputs()
    with model.disable_adapter():
        assert (output(model, inputs) - expected).abs().max() > 1e-3 * expected.abs().max()
    export = export_lora(model, tmp_path / "out", dtype=F64)
    assert_exact(model, tmp_path / "out")
    assert_portable(tmp_path / "out", WIDTHS[method])
    assert sorted(h.lora_config(tmp_path / "out")["target_modules"]) == sorted(ARCHS[arch].targets)
    assert h.lora_config(tmp_path / "out")["layers_to_transform"] is None
    assert h.lora_config(tmp_path / "out")["fan_in_fan_out"] == (arch == "gpt2")
    assert (export.rank, export.exact, export.engine) == (WIDTHS[method], True, "portable")
    assert export.error < 1e-12
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    stock = output(h.stock(tmp_path / "out", arch, F64), inputs)
    torch.testing.assert_close(stock, expected, rtol=1e-12, atol=1e-12)
    # The adapter is as it was.
    assert torch.equal(output(model, inputs), expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 3, r".*\.1\..*q_proj": 9},
    },
    "patterns and rslora": {
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {r"layers\.[24]\..*": 5},
        "use_rslora": True,
    },
    "some layers": {"layers_to_transform": [0, 2, 4]},
    "regex": {"target_modules": r".*layers\.[134]\.(self_attn\.q_proj|mlp\.down_proj)"},
    "all but one": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["v_proj", "lm_head"]},
}


@every_exact
@pytest.mark.parametrize("name", SETTINGS)
def test_exact_with(method: str, name: str, tmp_path: Path) -> None:
    model = adapted(method, dtype=F64, **SETTINGS[name])
    export = export_lora(model, tmp_path / "out")
    assert_exact(model, tmp_path / "out")
    assert_portable(tmp_path / "out", WIDTHS[method])
    torch.testing.assert_close(
        output(h.stock(tmp_path / "out", dtype=F64), BATCH), output(model, BATCH), rtol=1e-12, atol=1e-12
    )
    # Where a module's rank is lower, the rest is zeros.
    tensors = h.file_tensors(tmp_path / "out")
    for module in export.modules:
        key = f"base_model.model.{module.module}."
        assert used_rank(tensors[f"{key}lora_A.weight"], 0) == module.rank
        assert used_rank(tensors[f"{key}lora_B.weight"], 1) == module.rank
    if "rank_pattern" in SETTINGS[name]:
        assert len({module.rank for module in export.modules}) == 2


TARGETS = {
    "some layers": (["q_proj", "v_proj"], [0, 2, 4]),
    "regex": (["down_proj", "q_proj"], [1, 3, 4]),
    "all linear": (["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], None),
    "head": (["lm_head", "v_proj"], None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_names_are_as_short_as_can_be(name: str, tmp_path: Path) -> None:
    """Servers know modules by the ends of their names."""
    export_lora(adapted("multilora", **SETTINGS[name]), tmp_path / "out", engine="peft")
    settings = h.lora_config(tmp_path / "out")
    assert (sorted(settings["target_modules"]), settings["layers_to_transform"]) == TARGETS[name]


def test_equal_adapters_give_equal_files(tmp_path: Path) -> None:
    """A set's order changes from process to process: names are written in order, as loraplex's own configs do it."""
    export_lora(adapted("multilora", target_modules="all-linear"), tmp_path / "out")
    assert h.lora_config(tmp_path / "out")["target_modules"] == TARGETS["all linear"][0]


def test_whole_names_where_endings_say_too_much(tmp_path: Path) -> None:
    model = adapted("multilora", exclude_modules=["layers.0.self_attn.q_proj"])
    export_lora(model, tmp_path / "out", engine="peft")
    expected = sorted(name.removeprefix("base_model.model.") for name in h.layers_of(model))
    assert len(expected) == 2 * LAYERS - 1
    assert sorted(h.lora_config(tmp_path / "out")["target_modules"]) == expected


def test_encoder_alone(tmp_path: Path) -> None:
    """T5's decoder has modules of the same endings at the same depths."""
    model = adapted("aslora", "t5", F64, target_modules=r"encoder.*\.q")
    export_lora(model, tmp_path / "out")
    assert_exact(model, tmp_path / "out")
    loaded = h.stock(tmp_path / "out", "t5", F64)
    assert not any("decoder" in name for name, p in loaded.named_parameters() if "lora_" in name)
    inputs = ARCHS["t5"].inputs()
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=1e-12, atol=1e-12)


def test_in_the_middle_of_merging(tmp_path: Path) -> None:
    """An ASLoRA checkpoint with one merge of three done."""
    settings = config("aslora", num_merges=3)
    model = get_peft_model(LLAMA.build().double(), settings).eval()
    fill(model)
    h.advance(model, steps=2)
    model.save_pretrained(tmp_path / "checkpoint")
    merged = {name: len(mapped) - len(set(mapped)) for name, mapped in h.shared_state(model).maps.items()}
    assert set(merged.values()) == {1}
    loaded = PeftModel.from_pretrained(h.skeleton().double(), tmp_path / "checkpoint", low_cpu_mem_usage=True)
    export_lora(loaded, tmp_path / "out")
    assert_exact(model, tmp_path / "out")
    torch.testing.assert_close(
        output(h.stock(tmp_path / "out", dtype=F64), BATCH), output(model, BATCH), rtol=1e-12, atol=1e-12
    )


@every_exact
def test_float32_and_bfloat16_adapters(method: str, tmp_path: Path) -> None:
    """The file is float32 at least unless told otherwise: scaling is multiplied in, which bfloat16 would round."""
    for dtype in (torch.float32, torch.bfloat16):
        base = LLAMA.build().to(dtype)
        model = get_peft_model(base, config(method, lora_alpha=7), autocast_adapter_dtype=False)
        ready(model)
        assert next(iter(h.adapter_parameters(model).values())).dtype == dtype
        export = export_lora(model, tmp_path / str(dtype))
        assert {t.dtype for t in h.file_tensors(tmp_path / str(dtype)).values()} == {torch.float32}
        assert_exact(model, tmp_path / str(dtype), 3e-7)
        assert export.error < 3e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted("masa-concat", dtype=F64)
    export = export_lora(model, tmp_path / "out", dtype=dtype)
    assert {t.dtype for t in h.file_tensors(tmp_path / "out").values()} == {dtype}
    # The errors are those of what the file holds.
    actual, expected = products(tmp_path / "out"), naive_updates(model)
    for module in export.modules:
        assert module.error == pytest.approx(relative(actual[module.module], expected[module.module]), rel=1e-6)
        assert module.norm == pytest.approx(expected[module.module].norm().item(), rel=1e-12)
    assert 0.01 * torch.finfo(dtype).eps < export.error < torch.finfo(dtype).eps


def test_values_that_the_file_s_dtype_can_not_hold(tmp_path: Path) -> None:
    """float16 ends at 65504: an Inf in the file would be silent garbage at the server."""
    model = adapted("multilora", lora_alpha=10**7)
    with pytest.raises(ValueError, match=r"layers\.\d\.self_attn"):
        export_lora(model, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@every_exact
def test_an_adapter_that_was_never_trained(method: str, tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build(), config(method))
    for rank in (Rank(), Rank(exact=True), Rank(max_error=0.1), Rank(rank=3)):
        export = export_lora(model, tmp_path / "out", rank=rank, force=True)
        assert export.error == 0
        assert all(product.abs().max() == 0 for product in products(tmp_path / "out").values())


def test_one_adapter_of_several(tmp_path: Path) -> None:
    model = adapted("multilora", dtype=F64)
    loraplex.add_adapter(model, "other", config("aslora", r=2, target_modules=["o_proj", "q_proj"]))
    ready(model, "other", seed=3)
    export = export_lora(model, tmp_path / "other", "other", engine="peft")
    assert (export.rank, export.method) == (2, "ASLORA")
    assert sorted(h.lora_config(tmp_path / "other")["target_modules"]) == ["o_proj", "q_proj"]
    model.set_adapter("other")
    torch.testing.assert_close(
        output(h.stock(tmp_path / "other", dtype=F64), BATCH), output(model, BATCH), rtol=1e-12, atol=1e-12
    )
    export_lora(model, tmp_path / "default")
    assert_exact(model, tmp_path / "default")


def test_transformers_own_adapters(tmp_path: Path) -> None:
    model = LLAMA.build()
    model.add_adapter(config("masa-sum"), adapter_name="mine")
    ready(model, "mine")
    export_lora(model, tmp_path / "out", "mine")
    assert_portable(tmp_path / "out", 4)
    assert sorted(h.lora_config(tmp_path / "out")["target_modules"]) == ["q_proj", "v_proj"]
    torch.testing.assert_close(output(h.stock(tmp_path / "out"), BATCH), output(model, BATCH), rtol=1e-4, atol=1e-5)


def test_unknown_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'absent'.*default"):
        export_lora(adapted("aslora"), tmp_path / "out", "absent")
    other = get_peft_model(LLAMA.build(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="IA3"):
        export_lora(other, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# What it takes: factors only


class Wide(nn.Module):
    """Weights of 200 × 150, far larger than factors of rank 12."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(150, 200, bias=False)}) for _ in range(4))


def on_meta(method: str) -> PeftModel:
    with torch.device("meta"):
        base = Wide()
    model = get_peft_model(base, config(method, target_modules=["up"]))
    ready(model)
    assert all(layer.get_base_layer().weight.is_meta for layer in h.layers_of(model).values())
    return model


@every_exact
@pytest.mark.parametrize(
    "rank",
    [Rank(), Rank(exact=True), Rank(rank=2), Rank(rank=40), Rank(max_error=0.3)],
    ids=lambda rank: str(rank)[5:-1],
)
def test_no_matrix_of_the_weight_s_size_is_made(method: str, rank: Rank, tmp_path: Path) -> None:
    """Nor an SVD of one; and the base's weights are not even there."""
    model = on_meta(method)
    with h.Watch() as watch:
        export_lora(model, tmp_path / "out", rank=rank)
    assert watch.meta == set()
    assert (200, 150) not in watch.sizes
    assert (150, 200) not in watch.sizes
    assert watch.largest() <= 200 * 40
    if rank in (Rank(), Rank(exact=True)):
        assert_exact(model, tmp_path / "out", 1e-6)


def test_dual_lora_takes_one_tile_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta("dual_lora")
    monkeypatch.setattr(lowrank, "_TILE_ELEMENTS", 3000)
    with h.Watch() as watch:
        export = export_lora(model, tmp_path / "out", rank=3)
    assert watch.meta == set()
    # 3 + 16 directions for a rank of 3, and tiles of 20 rows.
    assert watch.largest() <= 200 * 20
    actual, expected = products(tmp_path / "out"), naive_updates(model)
    for module in export.modules:
        assert module.error == pytest.approx(relative(actual[module.module], expected[module.module]), rel=1e-4)


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    """safetensors by itself closes its files to everybody else, and a server runs as another user."""
    export_lora(adapted("aslora"), tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]


def test_dual_lora_of_a_given_error_takes_no_larger_svd_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are doubled until one is enough, from 16 on."""
    model = on_meta("dual_lora")
    monkeypatch.setattr(lowrank, "_TILE_ELEMENTS", 3000)
    with h.Watch() as watch:
        export = export_lora(model, tmp_path / "out", rank=Rank(max_error=0.9))
    assert export.rank <= 16
    assert watch.largest() <= 200 * (16 + 16)


# 2. Smaller exact form, best approximation


def lower(model: PeftModel, rank: int) -> None:
    """Make every ΔW of rank `rank`, while the factors stay as wide as they are."""
    with torch.no_grad():
        for name, parameter in h.adapter_parameters(model).items():
            if "lora_B" in name:
                parameter[:, rank:] = parameter[:, :rank] @ torch.randn(rank, parameter.shape[1] - rank, dtype=F64)


@pytest.mark.parametrize(
    ("method", "rank"),
    [("multilora-module", 1), ("multilora-module", 5), ("aslora", 2), ("masa-sum", 3), ("masa-concat", 5)],
)
def test_true_rank_is_found(method: str, rank: int, tmp_path: Path) -> None:
    model = adapted(method, dtype=F64)
    if method == "multilora-module":
        with torch.no_grad():
            for name, parameter in h.adapter_parameters(model).items():
                if "lora_scaling" in name:
                    parameter.fill_(0.7)
    lower(model, rank)
    for delta in naive_updates(model).values():
        assert torch.linalg.matrix_rank(delta, rtol=1e-10) == rank
    export = export_lora(model, tmp_path / "out", rank=Rank(exact=True))
    assert export.exact
    assert export.rank == rank < WIDTHS[method]
    assert {module.rank for module in export.modules} == {rank}
    assert_exact(model, tmp_path / "out")
    assert_portable(tmp_path / "out", rank)
    torch.testing.assert_close(
        output(h.stock(tmp_path / "out", dtype=F64), BATCH), output(model, BATCH), rtol=1e-11, atol=1e-11
    )
    description = describe(tmp_path / "out")
    assert {row.rank for row in description.modules} == {rank}


def test_true_ranks_that_differ(tmp_path: Path) -> None:
    """One module of rank 1 beside others of rank 4: each keeps its own, the file pads."""
    model = adapted("aslora", dtype=F64)
    h.fill(model)
    shared = h.shared_state(model)
    with torch.no_grad():
        B = shared.B("model__layers__N__self_attn__v_proj", 4)
        B.copy_(B[:, :1] @ torch.ones(1, 4, dtype=F64))
    readers = [i for i, owner in enumerate(shared.maps["model__layers__N__self_attn__v_proj"]) if owner == 4]
    export = export_lora(model, tmp_path / "out", rank=Rank(exact=True))
    low = {f"model.layers.{i}.self_attn.v_proj" for i in readers}
    assert {module.module for module in export.modules if module.rank == 1} == low
    assert export.rank == 4
    assert_exact(model, tmp_path / "out")
    # inspect tells the true ranks from the file alone, without the padding.
    rows = {row.module: row for row in describe(tmp_path / "out").modules}
    for name, delta in naive_updates(model).items():
        assert rows[name].rank == (1 if name in low else 4)
        assert rows[name].norm == pytest.approx(delta.norm().item(), rel=1e-12)
    width = {f: tuple(shape) for f, shape in rows["model.layers.0.self_attn.v_proj"].factors.items()}
    assert width == {"lora_A": (4, HIDDEN), "lora_B": (HIDDEN // 2, 4)}


def test_more_columns_than_the_weight_has(tmp_path: Path) -> None:
    """Two experts of rank 12 side by side, on a weight of 16 × 32."""
    model = adapted("masa-concat", dtype=F64, r=12)
    whole = export_lora(model, tmp_path / "whole")
    assert {module.rank for module in whole.modules} == {24}
    export = export_lora(model, tmp_path / "out", rank=Rank(exact=True))
    assert {module.module[-6:]: module.rank for module in export.modules} == {"q_proj": 24, "v_proj": HIDDEN // 2}
    assert_exact(model, tmp_path / "out")
    assert_portable(tmp_path / "out", 24)


def truncated(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@every_exact
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_gives_the_best_approximation(method: str, rank: int, tmp_path: Path) -> None:
    model = adapted(method, dtype=F64)
    export = export_lora(model, tmp_path / "out", rank=rank)
    assert_portable(tmp_path / "out", rank)
    assert not export.exact
    actual, missed, whole = products(tmp_path / "out"), 0.0, 0.0
    errors = {module.module: module.error for module in export.modules}
    for name, delta in naive_updates(model).items():
        best = truncated(delta, rank)
        assert relative(actual[name], best) < 1e-10
        assert errors[name] == pytest.approx(relative(best, delta), rel=1e-9)
        assert 0.05 < errors[name] < 1
        missed, whole = missed + (delta - best).norm().item() ** 2, whole + delta.norm().item() ** 2
    assert export.error == pytest.approx(math.sqrt(missed / whole), rel=1e-9)
    assert export.to_dict()["error"] == export.error


def test_more_rank_than_there_is(tmp_path: Path) -> None:
    model = adapted("aslora", dtype=F64)
    export = export_lora(model, tmp_path / "out", rank=20)
    assert_portable(tmp_path / "out", 20)
    assert {module.rank for module in export.modules} == {4}
    assert_exact(model, tmp_path / "out")
    assert export.error < 1e-12


def tail(delta: Tensor, rank: int) -> float:
    """Relative error of the best approximation of this rank."""
    return relative(truncated(delta, rank), delta)


@pytest.mark.parametrize("method", ["multilora-module", "masa-concat", "aslora"])
@pytest.mark.parametrize("max_error", [0.02, 0.2, 0.5, 0.9])
def test_max_error_gives_the_smallest_rank(method: str, max_error: float, tmp_path: Path) -> None:
    model = adapted(method, dtype=F64)
    deltas = naive_updates(model).values()
    worst = [max(tail(delta, rank) for delta in deltas) for rank in range(WIDTHS[method] + 1)]
    smallest = next(rank for rank in range(1, WIDTHS[method] + 1) if worst[rank] <= max_error or rank == WIDTHS[method])
    export = export_lora(model, tmp_path / "out", rank=Rank(max_error=max_error))
    assert export.rank == smallest
    assert smallest == 1 or worst[smallest - 1] > max_error
    assert all(module.error <= max_error for module in export.modules)
    assert_portable(tmp_path / "out", smallest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank=0 must be an integer of at least 1"),
        ({"rank": 2.5}, r"rank=2\.5"),
        ({"max_error": 0.0}, r"max_error=0\.0 must lie between 0 and 1"),
        ({"max_error": 1.5}, r"max_error=1\.5"),
        ({"rank": 2, "max_error": 0.1}, "exclude each other"),
        ({"rank": 2, "exact": True}, "exclude each other"),
        ({"exact": True, "max_error": 0.1}, "exclude each other"),
    ],
)
def test_ranks_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rank(**settings)


# 3. Dual LoRA as LoRA


def dual(r: int = 6, dtype: torch.dtype = F64) -> PeftModel:
    """Two Dual LoRAs of 60 × 72, whose ΔW is of full rank."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(72, 60), nn.Tanh(), nn.Linear(60, 72)).to(dtype)
    model = get_peft_model(base, DualLoraConfig(r=r, lora_alpha=5, target_modules=["0", "2"], warmup_steps=4))
    ready(model)
    return model.eval()


@pytest.mark.parametrize("rank", [None, Rank(), Rank(exact=True)])
def test_dual_lora_has_no_exact_form(rank: Rank | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q_proj.*--format merged.*--rank R.*--max-error"):
        export_lora(adapted("dual_lora"), tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [1, 8, 25, 50])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_dual_lora_of_a_given_rank(rank: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = dual(dtype=dtype)
    export = export_lora(model, tmp_path / "out", rank=rank)
    assert_portable(tmp_path / "out", rank)
    assert not export.exact
    actual, missed, whole = products(tmp_path / "out"), 0.0, 0.0
    for module in export.modules:
        delta = naive_updates(model)[module.module]
        best = tail(delta, rank)
        assert best <= module.error * (1 + 1e-4)
        assert module.error <= 1.01 * best
        assert module.error == pytest.approx(relative(actual[module.module], delta), rel=1e-4)
        assert module.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        missed, whole = missed + (delta - actual[module.module]).norm().item() ** 2, whole + delta.norm().item() ** 2
    assert export.error == pytest.approx(math.sqrt(missed / whole), rel=1e-4)
    assert f"relative error of {export.error:.3g}" in (tmp_path / "out" / "README.md").read_text()


def test_dual_lora_of_full_rank_gives_equal_outputs(tmp_path: Path) -> None:
    model = adapted("dual_lora", dtype=F64)
    export = export_lora(model, tmp_path / "out", rank=HIDDEN)
    assert export.error < 1e-12
    assert_exact(model, tmp_path / "out")
    torch.testing.assert_close(
        output(h.stock(tmp_path / "out", dtype=F64), BATCH), output(model, BATCH), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("rank", [3, 15, 17, 33, 47])
def test_dual_lora_of_a_given_error(rank: int, tmp_path: Path) -> None:
    """Half-way between the best errors of two ranks: the larger one is needed, and enough."""
    model = dual()
    deltas = naive_updates(model).values()
    worst = [max(tail(delta, r) for delta in deltas) for r in (rank - 1, rank)]
    export = export_lora(model, tmp_path / "out", rank=Rank(max_error=sum(worst) / 2))
    assert export.rank == rank
    assert all(module.error <= sum(worst) / 2 for module in export.modules)


def test_dual_lora_is_exported_the_same_way_each_time(tmp_path: Path) -> None:
    model = dual(dtype=torch.float32)
    for name in ("one", "two"):
        torch.manual_seed(len(name) * 7 + ord(name[0]))
        export_lora(model, tmp_path / name, rank=7)
    h.assert_same(h.file_tensors(tmp_path / "one"), h.file_tensors(tmp_path / "two"))


def test_dual_lora_in_its_warm_up_says_so(tmp_path: Path) -> None:
    model = adapted("dual_lora", dtype=F64)
    export = export_lora(model, tmp_path / "out", rank=HIDDEN)
    assert any("step 3 of 4" in note for note in export.notes)
    assert "step 3 of 4" in (tmp_path / "out" / "README.md").read_text()
    h.advance(model, steps=1)
    assert export_lora(model, tmp_path / "done", rank=HIDDEN).notes == []
    for name, delta in products(tmp_path / "done").items():
        torch.testing.assert_close(delta, products(tmp_path / "out")[name] * 4 / 3)


# 4. MASA's router


def gated(model: PeftModel) -> dict[str, list[float]]:
    """Give every module mean gates of its own."""
    gates = {}
    for index, layer in enumerate(h.layers_of(model).values()):
        factors = layer.factors("default")
        gates[factors.module_name] = [0.2 + 0.05 * index, 0.5, 0.3 - 0.05 * index]
        factors.mean_gate = torch.tensor(gates[factors.module_name], dtype=F64)
    return gates


@pytest.mark.parametrize("rank", [Rank(), Rank(exact=True), Rank(rank=2), Rank(max_error=0.5)], ids=str)
def test_router_is_refused_without_calibration(rank: Rank, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gates depend on the input.*calibrate"):
        export_lora(adapted("masa-router"), tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())


def test_router_with_mean_gates(tmp_path: Path) -> None:
    model = adapted("masa-router", dtype=F64)
    gates = gated(model)
    export = export_lora(model, tmp_path / "out")
    assert_exact(model, tmp_path / "out", gates=gates)
    assert_portable(tmp_path / "out", 4)
    assert any("approximation" in note for note in export.notes)
    # Something parts it from the adapter: the gates.
    assert not export.exact
    card = (tmp_path / "out" / "README.md").read_text()
    assert "approximation" in card
    assert "exactly" not in card


# Engines


@pytest.mark.parametrize(
    ("engine", "needed", "expected"),
    [
        ("vllm", 1, 1), ("vllm", 8, 8), ("vllm", 9, 16), ("vllm", 33, 64), ("vllm", 129, 256),
        ("vllm", 257, 320), ("vllm", 321, 512), ("vllm", 512, 512), ("portable", 9, 9), ("sglang", 600, 600),
        ("llama.cpp", 5, 5), ("peft", 513, 513),
    ],
)  # fmt: skip
def test_ranks_that_engines_take(engine: str, needed: int, expected: int) -> None:
    assert ENGINES[engine].rank(needed) == expected


def test_vllm_s_rank_is_padded(tmp_path: Path) -> None:
    model = adapted("multilora-module", dtype=F64)
    export = export_lora(model, tmp_path / "out", engine="vllm")
    assert export.rank == 16
    assert {module.rank for module in export.modules} == {12}
    assert_portable(tmp_path / "out", 16)
    assert_exact(model, tmp_path / "out")
    torch.testing.assert_close(
        output(h.stock(tmp_path / "out", dtype=F64), BATCH), output(model, BATCH), rtol=1e-12, atol=1e-12
    )
    assert export_lora(model, tmp_path / "low", engine="vllm", rank=3).rank == 8
    assert {module.rank for module in export_lora(model, tmp_path / "lower", engine="vllm", rank=3).modules} == {3}


def test_too_much_rank_for_vllm(tmp_path: Path) -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(600, 600))
    model = get_peft_model(base, MultiLoraConfig(r=260, lora_alpha=5, num_modules=2, target_modules=["0"]))
    ready(model)
    with pytest.raises(ValueError, match=r"rank 520.*vllm.*512.*--compress exact.*--rank 512"):
        export_lora(model, tmp_path / "out", engine="vllm")
    assert not list(tmp_path.iterdir())
    # The remedy helps.
    assert export_lora(model, tmp_path / "out", engine="vllm", rank=512).rank == 512


def test_unknown_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'tgi'.*portable, peft, vllm, sglang, llama\.cpp"):
        export_lora(adapted("aslora"), tmp_path / "out", engine="tgi")
    assert not list(tmp_path.iterdir())


def move(model: PeftModel, *marks: str) -> list[str]:
    """Change the trained tensors whose names hold one of `marks`; returns their names in the plain model."""
    names = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(mark in name for mark in marks):
                parameter.add_(torch.randn_like(parameter) * 0.3)
                names.append(name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""))
    assert names
    return names


def with_head(method: str) -> tuple[PeftModel, list[str]]:
    model = get_peft_model(ARCHS["roberta"].build(), config(method, target_modules=["query"], task_type="SEQ_CLS"))
    ready(model)
    return model.eval(), move(model, "modules_to_save.default")


def with_bias(bias: str) -> Callable[[str], tuple[PeftModel, list[str]]]:
    def build(method: str) -> tuple[PeftModel, list[str]]:
        model = get_peft_model(ARCHS["roberta"].build(), config(method, target_modules=["query"], bias=bias))
        ready(model)
        return model.eval(), move(model, "bias")

    return build


FULL = {"head": with_head, "all biases": with_bias("all"), "adapted biases": with_bias("lora_only")}


@pytest.mark.parametrize("what", FULL)
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "peft"])
def test_what_was_trained_in_full_is_refused_with_the_list(what: str, engine: str, tmp_path: Path) -> None:
    model, names = FULL[what]("masa-sum")
    with pytest.raises(ValueError, match=rf"{engine}.*--engine peft.*--format merged") as refusal:
        export_lora(model, tmp_path / "out", engine=engine)
    for name in names:
        assert name.replace(".base_layer", "") in str(refusal.value).replace(".base_layer", "")
    assert "lora_" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", FULL)
@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-concat", "dual_lora"])
def test_what_was_trained_in_full_round_trips_with_peft(what: str, method: str, tmp_path: Path) -> None:
    model, names = FULL[what](method)
    inputs = ARCHS["roberta"].inputs()
    export_lora(model, tmp_path / "out", engine="peft", rank=HIDDEN if method == "dual_lora" else None)
    extra = {key for key in h.file_tensors(tmp_path / "out") if "lora_" not in key}
    assert len(extra) == len(names)
    loaded = h.stock(tmp_path / "out", "roberta")
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=1e-5, atol=1e-6)


def test_module_that_is_trained_in_full(tmp_path: Path) -> None:
    """modules_to_save on a causal model, beside the adapter's second set of it."""
    model = get_peft_model(LLAMA.build(), config("aslora", modules_to_save=["lm_head"]))
    ready(model)
    move(model.eval(), "modules_to_save.default")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        export_lora(model, tmp_path / "out")
    export_lora(model, tmp_path / "out", engine="peft")
    torch.testing.assert_close(output(h.stock(tmp_path / "out"), BATCH), output(model, BATCH), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("method", ["multilora", "aslora"])
def test_tied_head(method: str, tmp_path: Path) -> None:
    settings = config(method, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(LLAMA.build(tie_word_embeddings=True), settings).eval()
    ready(model)
    for engine in ("portable", "llama.cpp"):
        with pytest.raises(ValueError, match=r"lm_head.*input embedding.*--engine peft.*--format merged"):
            export_lora(model, tmp_path / "out", engine=engine)
    assert not list(tmp_path.iterdir())
    for engine in set(ENGINES) - {"portable", "llama.cpp"}:
        export_lora(model, tmp_path / engine, engine=engine)
        loaded = h.stock(tmp_path / engine, tie_word_embeddings=True)
        assert loaded.base_model.model.lm_head.weight is loaded.base_model.model.model.embed_tokens.weight
        torch.testing.assert_close(output(loaded, BATCH), output(model, BATCH), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_that_no_adapter_touches(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build(tie_word_embeddings=True), config("aslora")).eval()
    ready(model)
    export_lora(model, tmp_path / "out")
    assert_portable(tmp_path / "out", 4)


FUSED = [
    (["q_proj"], {"v_proj"}),
    (["v_proj", "o_proj"], {"q_proj"}),
    (["k_proj"], {"q_proj", "v_proj"}),
    (["q_proj", "v_proj"], set()),
    (["up_proj", "q_proj"], {"gate_proj", "v_proj"}),
    (["gate_proj", "down_proj"], set()),
]
"""Adapted modules, and those that SGLang wants beside them: it computes q, k and v in one product, and gate and up."""


@pytest.mark.parametrize(("targets", "beside"), FUSED)
@pytest.mark.parametrize("engine", ENGINES)
def test_modules_that_sglang_fuses(engine: str, targets: list[str], beside: set[str], tmp_path: Path) -> None:
    model = adapted("multilora", dtype=F64, target_modules=targets, layers_to_transform=[1, 3])
    export = export_lora(model, tmp_path / "out", engine=engine)
    wanted = {*targets, *(beside if engine in ("sglang", "portable") else ())}
    names = {name.removeprefix("model.layers.") for name in products(tmp_path / "out")}
    assert names == {f"{layer}.{part(name)}.{name}" for layer in (1, 3) for name in wanted}
    assert {module.module.rpartition(".")[2] for module in export.modules} == set(targets)
    assert_exact(model, tmp_path / "out")
    assert_portable(tmp_path / "out", 8)
    torch.testing.assert_close(
        output(h.stock(tmp_path / "out", dtype=F64), BATCH), output(model, BATCH), rtol=1e-12, atol=1e-12
    )
    # What is there for SGLang's sake does not make it another adapter.
    assert max(export_errors(tmp_path / "out", model).values()) < 1e-12


def part(name: str) -> str:
    return "mlp" if name in ("up_proj", "gate_proj", "down_proj") else "self_attn"


def test_modules_that_sglang_fuses_beside_another_adapter(tmp_path: Path) -> None:
    """v_proj is an adapted layer here, but not by the adapter that is exported."""
    model = adapted("multilora", dtype=F64, target_modules=["q_proj"])
    loraplex.add_adapter(model, "other", config("aslora", target_modules=["v_proj"]))
    ready(model, "other")
    export_lora(model, tmp_path / "out", engine="sglang")
    assert {name.rpartition(".")[2] for name in products(tmp_path / "out")} == {"q_proj", "v_proj"}
    assert_exact(model, tmp_path / "out")


def test_llama_cpp_does_not_take_conv1d(tmp_path: Path) -> None:
    model = adapted("multilora", "gpt2")
    with pytest.raises(ValueError, match=r"Conv1D.*--format merged"):
        export_lora(model, tmp_path / "out", engine="llama.cpp")
    assert not list(tmp_path.iterdir())


def test_biases_that_are_not_there(tmp_path: Path) -> None:
    """Llama has none: servers refuse the mere setting."""
    model = adapted("multilora", bias="all")
    export_lora(model, tmp_path / "out")
    assert_portable(tmp_path / "out", 8)


def test_plain_lora_becomes_portable_too(tmp_path: Path) -> None:
    """PEFT's own LoRA with patterns and rsLoRA, which servers ignore."""
    settings = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True, init_lora_weights=False,
        rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 9},
    )  # fmt: skip
    model = get_peft_model(LLAMA.build(), settings).eval()
    export = export_lora(model, tmp_path / "out")
    assert_portable(tmp_path / "out", 4)
    assert {module.rank for module in export.modules} == {2, 4}
    torch.testing.assert_close(output(h.stock(tmp_path / "out"), BATCH), output(model, BATCH), rtol=1e-4, atol=1e-5)


# Broken adapters


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", [*EXACT, "dual_lora", "masa-router"])
def test_nan_and_inf_are_refused(method: str, bad: float, tmp_path: Path) -> None:
    model = adapted(method)
    ranks: list[Rank] = [Rank(rank=2), Rank(max_error=0.5)]
    if method != "dual_lora":
        ranks += [Rank(), Rank(exact=True)]
    name = next(name for name in h.adapter_parameters(model) if "v_proj" in name and "lora_A" in name)
    with torch.no_grad():
        h.adapter_parameters(model)[name][-1, -1] = bad
    if method == "masa-router":
        gated(model)
    for rank in ranks:
        with pytest.raises(ValueError, match=r"NaN or Inf.*layers\.\d\.self_attn\.v_proj.*earlier checkpoint"):
            export_lora(model, tmp_path / "out", rank=rank)
        if rank != Rank():
            with loraplex.allow_nonfinite(), pytest.raises(ValueError, match=r"NaN or Inf.*earlier checkpoint"):
                export_lora(model, tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())
    if method != "dual_lora":
        with loraplex.allow_nonfinite():
            export_lora(model, tmp_path / "out")
        broken = {key for key, tensor in h.file_tensors(tmp_path / "out").items() if not tensor.isfinite().all()}
        assert broken
        assert all("v_proj.lora_A" in key for key in broken)


def test_an_update_that_is_not_finite_though_its_factors_are(tmp_path: Path) -> None:
    model = adapted("dual_lora")
    with torch.no_grad():
        for name, parameter in h.adapter_parameters(model).items():
            if "layers.3.self_attn.v_proj" in name:
                parameter.mul_(1e25)
    for rank in (Rank(rank=2), Rank(max_error=0.5)):
        with pytest.raises(ValueError, match=r"layers\.3\.self_attn\.v_proj"):
            export_lora(model, tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())


# Whole or not at all


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_in_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: Any, path: Any, *args: Any) -> None:
        Path(path).write_bytes(b"\x10\0\0\0")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save)


def fail_in_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Any, folder: str, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoraConfig, "save_pretrained", save)


def fail_in_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", write)


def fail_in_the_last_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new folder can't take its place, after the old one has been moved away."""
    rename = os.rename

    def fail(source: Any, target: Any, **kwargs: Any) -> None:
        if Path(source).name.endswith(".tmp"):
            raise OSError("Input/output error")
        rename(source, target, **kwargs)

    monkeypatch.setattr("os.rename", fail)
    monkeypatch.setattr("os.replace", fail)
    monkeypatch.setattr("loraplex.io.files.exchange", lambda one, other: False)


FAILURES = [fail_in_tensors, fail_in_config, fail_in_card, fail_in_the_last_rename]


@pytest.mark.parametrize("fail", FAILURES)
def test_an_interrupted_export_leaves_nothing(
    fail: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("multilora")
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises((OSError, KeyboardInterrupt)):
            export_lora(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_lora(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_export_keeps_what_it_was_to_replace(
    fail: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lora(adapted("aslora"), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises((OSError, KeyboardInterrupt)):
            export_lora(adapted("multilora"), tmp_path / "out", force=True)
    assert contents(tmp_path) == before


def test_force_replaces_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    export_lora(adapted("aslora"), target)
    (target / "sub").mkdir()
    (target / "sub" / "notes.txt").write_text("mine")
    before = contents(target)
    with pytest.raises(ValueError, match=r"out is not empty.*--force"):
        export_lora(adapted("multilora"), target)
    assert contents(target) == before
    export_lora(adapted("multilora"), target, force=True)
    assert sorted(contents(target)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert_portable(target, 8)
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--force"):
        export_lora(adapted("multilora"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_empty_and_new_folders_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    export_lora(adapted("aslora"), tmp_path / "empty")
    export_lora(adapted("aslora"), str(tmp_path / "new" / "deep"))
    monkeypatch.chdir(tmp_path)
    export_lora(adapted("aslora"), "relative")
    for name in ("empty", "new/deep", "relative"):
        assert_portable(tmp_path / name, 4)
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "relative"]


@pytest.mark.parametrize("ending", ["tmp", "old"])
def test_what_a_killed_export_left_is_in_nobody_s_way(ending: str, tmp_path: Path) -> None:
    """In a container the next process often has the same id."""
    export_lora(adapted("aslora"), tmp_path / "out")
    left = tmp_path / f".out.{os.getpid()}.{ending}"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"half")
    export_lora(adapted("multilora"), tmp_path / "out", force=True)
    assert_portable(tmp_path / "out", 8)
    assert "half.safetensors" not in os.listdir(tmp_path / "out")


# Each child process is killed while it writes, at a later moment than the one before.
KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
import loraplex, safetensors.torch

folder, moment = Path(sys.argv[1]), None
model = get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(8, 8)), loraplex.MultiLoraConfig(r=2, target_modules=["0"], init_weights=False)
)

def die_at(name, function, after=False):
    def wrapped(*args, **kwargs):
        if moment == name:
            if after:
                function(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

safetensors.torch.save_file = die_at("tensors", die_at("half", safetensors.torch.save_file, after=True))
LoraConfig.save_pretrained = die_at("config", LoraConfig.save_pretrained, after=True)
Path.write_text = die_at("card", Path.write_text, after=True)
for moment in ("tensors", "half", "config", "card"):
    for name, force in ((f"new-{moment}", False), ("old", True)):
        child = os.fork()
        if child == 0:
            loraplex.export_lora(model, folder / name, force=force)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
moment = None
loraplex.export_lora(model, folder / "new-half")
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    export_lora(adapted("aslora"), tmp_path / "old")
    before = contents(tmp_path / "old")
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], check=True)
    # Only the one that was started again is there; what was to be replaced is as it was.
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["new-half", "old"]
    assert contents(tmp_path / "old") == before
    assert_portable(tmp_path / "new-half", 6)


def test_no_pickle_in_the_project() -> None:
    """Only safetensors is read or written."""
    package = Path(loraplex.__file__).parent
    sources = sorted(package.rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            where = f"{source.relative_to(package)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
                assert not forbidden & {part for module in modules for part in module.split(".")}, where
                if getattr(node, "module", None) == "torch":
                    assert not {"load", "save"} & {alias.name for alias in node.names}, where
            if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
                assert not (isinstance(node.value, ast.Name) and node.value.id in ("torch", "np", "numpy")), where
            if isinstance(node, ast.keyword) and node.arg in ("safe_serialization", "use_safetensors"):
                assert not (isinstance(node.value, ast.Constant) and node.value.value is False), where


# Inspecting what was exported


@every_exact
def test_compare_is_zero_for_an_exact_export(method: str, tmp_path: Path) -> None:
    model = adapted(method, dtype=F64)
    export_lora(model, tmp_path / "out")
    errors = export_errors(tmp_path / "out", model)
    assert sorted(errors) == sorted(naive_updates(model))
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize(("method", "rank"), [("multilora", 3), ("dual_lora", 2)])
def test_compare_finds_the_error_that_the_export_reported(method: str, rank: int, tmp_path: Path) -> None:
    model = adapted(method)
    export = export_lora(model, tmp_path / "out", rank=rank)
    errors = export_errors(tmp_path / "out", model)
    for module in export.modules:
        assert module.error > 0.1
        assert errors[module.module] == pytest.approx(module.error, rel=1e-5)


def test_compare_sees_what_was_changed(tmp_path: Path) -> None:
    model = adapted("aslora", dtype=F64)
    export_lora(model, tmp_path / "out")
    state = {key: t.clone() for key, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    key = "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"
    state[key] = 1.25 * state[key]
    save_file(state, tmp_path / "out" / "adapter_model.safetensors")
    errors = export_errors(tmp_path / "out", model)
    assert errors.pop("model.layers.2.self_attn.v_proj") == pytest.approx(0.25, rel=1e-9)
    assert max(errors.values()) < 1e-12


def test_compare_with_another_adapter(tmp_path: Path) -> None:
    export_lora(adapted("aslora"), tmp_path / "out")
    for targets, apart in (
        (["q_proj", "k_proj"], "k_proj"),
        (["q_proj"], "v_proj"),
        (["q_proj", "v_proj", "o_proj"], "o_"),
    ):
        with pytest.raises(ValueError, match=rf"out is no export of this adapter.*{apart}"):
            export_errors(tmp_path / "out", adapted("aslora", target_modules=targets))
    # The same modules with other numbers: not an error, but not near either.
    assert min(export_errors(tmp_path / "out", adapted("multilora")).values()) > 0.5


def test_compare_with_a_model_of_another_size(tmp_path: Path) -> None:
    export_lora(adapted("aslora"), tmp_path / "out")
    other = get_peft_model(LLAMA.build(hidden_size=16, num_attention_heads=2), config("aslora"))
    ready(other)
    with pytest.raises(ValueError, match="q_proj"):
        export_errors(tmp_path / "out", other)


def test_compare_needs_a_plain_lora(tmp_path: Path) -> None:
    model = adapted("aslora")
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"own is a ASLORA adapter, not a plain LoRA"):
        export_errors(tmp_path / "own", model)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(LLAMA.build(), settings).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        export_errors(tmp_path / "dora", model)
    with pytest.raises(ValueError, match="holds no adapter"):
        export_errors(tmp_path, model)
    assert {row.rank for row in describe(tmp_path / "dora").modules} == {None}


@pytest.mark.parametrize("rslora", [False, True])
def test_inspect_stock_lora_with_patterns(rslora: bool, tmp_path: Path) -> None:
    """A LoRA that loraplex did not write: scaling from alpha, rank, patterns and rsLoRA."""
    settings = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora, init_lora_weights=False,
        rank_pattern={"v_proj": 2}, alpha_pattern={r".*\.1\..*q_proj": 9},
    )  # fmt: skip
    model = get_peft_model(LLAMA.build(), settings)
    model.save_pretrained(tmp_path)
    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    rows = {row.module: row for row in describe(tmp_path).modules}
    assert sorted(rows) == sorted(expected)
    for name, delta in expected.items():
        assert rows[name].rank == (2 if name.endswith("v_proj") else 4)
        assert rows[name].norm == pytest.approx(delta.norm().item(), rel=1e-5)


def test_inspect_stock_lora_of_an_embedding(tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    get_peft_model(LLAMA.build(), settings).save_pretrained(tmp_path, save_embedding_layers=False)
    names = {row.module for row in describe(tmp_path).modules}
    assert "model.layers.0.self_attn.q_proj" in names
    assert "model.embed_tokens" in names


def test_inspect_stock_lora_of_a_convolution(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    settings = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path)
    assert {row.module: row.rank for row in describe(tmp_path).modules} == {"0": None, "2": 2}


# In a process without loraplex

LOADER = """
import json, sys
try:
    import loraplex
except ImportError:
    pass
else:
    sys.exit(f"loraplex can be imported from {loraplex.__path__}")
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

for case in json.loads(sys.argv[1]):
    auto = AutoModelForSequenceClassification if case["classify"] else AutoModelForCausalLM
    base = auto.from_pretrained(case["base"])
    model = PeftModel.from_pretrained(base, case["adapter"]).eval()
    assert any(isinstance(module, LoraLayer) for module in model.modules())
    with torch.no_grad():
        logits = model(**load_file(case["inputs"])).logits
    save_file({"logits": logits}, case["outputs"])
    if not case["classify"]:
        AutoPeftModelForCausalLM.from_pretrained(case["adapter"])
assert not any(name.split(".")[0] == "loraplex" for name in sys.modules)
"""


@pytest.fixture
def stock_python(tmp_path: Path) -> Path:
    """A Python with all that this one has installed, but for loraplex.

    Links rather than a path to site-packages: a regular install would lie there. Nested .pth files, which editable
    installs use, are not followed.
    """
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if "loraplex" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    (site,) = (tmp_path / "venv").rglob("site-packages")
    (site / "stock.pth").write_text(f"{packages}\n")
    return python


CASES = [
    *((method, "llama") for method in (*EXACT, "dual_lora")),
    ("aslora", "gpt2"),
    ("multilora", "qwen2"),
    ("masa-concat", "roberta"),
]


def export_case(room: Path, method: str, arch: str) -> tuple[dict[str, Any], Tensor]:
    """A base model, an exported adapter and inputs in `room`, and the outputs that they must give."""
    classify, inputs = ARCHS[arch].kind == "classify", ARCHS[arch].inputs()
    base = ARCHS[arch].build()
    base.save_pretrained(room / "base")
    task = "SEQ_CLS" if classify else "CAUSAL_LM"
    model = get_peft_model(base, config(method, target_modules=ARCHS[arch].targets, task_type=task)).eval()
    model.peft_config["default"].base_model_name_or_path = str(room / "base")
    ready(model)
    if classify:
        move(model, "modules_to_save.default")
    rank = HIDDEN if method == "dual_lora" else None
    export_lora(model, room / "adapter", engine="peft" if classify else "portable", rank=rank)
    save_file(inputs, room / "inputs")
    expected = output(model, inputs)
    with model.disable_adapter():
        assert (output(model, inputs) - expected).abs().max() > 1e-2
    names = ("base", "adapter", "inputs", "outputs")
    return {**{name: str(room / name) for name in names}, "classify": classify}, expected


def run_stock(python: Path, folder: Path, cases: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    (folder / "load.py").write_text(LOADER)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(python), "-W", "ignore", "load.py", json.dumps(cases)]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)


def test_loads_in_stock_peft_where_loraplex_is_not_installed(stock_python: Path, tmp_path: Path) -> None:
    cases = [export_case(tmp_path / f"{method}-{arch}", method, arch) for method, arch in CASES]
    run = run_stock(stock_python, tmp_path, [case for case, _ in cases])
    assert run.returncode == 0, run.stderr
    for case, expected in cases:
        torch.testing.assert_close(load_file(case["outputs"])["logits"], expected, rtol=1e-4, atol=1e-5)


def test_that_process_would_find_loraplex(stock_python: Path, tmp_path: Path) -> None:
    """The check above can fail: it does where loraplex lies among the packages."""
    (tmp_path / "packages" / "loraplex").mkdir()
    run = run_stock(stock_python, tmp_path, [])
    assert run.returncode == 1
    assert "loraplex can be imported" in run.stderr
