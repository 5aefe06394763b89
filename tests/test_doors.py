"""The doors that PEFT and transformers have already: converting, adding up, merging, native adapters, hot-swapping."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import conversion
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import helpers as h
import loraplex
from helpers import ARCHS, HIDDEN, INNER, MERGEABLE, METHODS, PLAIN, adapted, config, fill, output, ready
from loraplex.methods.multilora import MultiLoraFactors
from loraplex.tuner.bank import BANK

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()
THEIRS = conversion.convert_to_lora.__wrapped__
"""PEFT's own `convert_to_lora`, which those keep who import it before loraplex."""

RANK = {"multilora": 8, "multilora-module": 12, "aslora": 4, "masa-sum": 4, "masa-concat": 8}
"""Method with an exact LoRA form → its rank, with the settings of `helpers.config`."""
every_exact = pytest.mark.parametrize("method", RANK)

Part = tuple[str, dict[str, Any]]
"""A method and what its settings change."""
NAMES = ["one", "two", "three"]


def host(*parts: Part, arch: str = "llama", dtype: torch.dtype = torch.float64, **base: Any) -> PeftModel:
    """A model with the adapters "one", "two", … of these methods and settings; "one" is active."""
    model: Any = ARCHS[arch].build(**base).to(dtype)
    for seed, (name, (method, settings)) in enumerate(zip(NAMES, parts, strict=False)):
        made = config(method, **{"target_modules": ARCHS[arch].targets, **settings})
        if seed:
            loraplex.add_adapter(model, name, made)
        else:
            model = get_peft_model(model, made, adapter_name=name)
        ready(model, name, seed)
    return model.eval()


def naive(model: nn.Module, adapter: str, arch: str = "llama") -> dict[str, Tensor]:
    """Module → ΔW of one adapter, one scalar at a time, from its tensors."""
    alone = get_peft_model(ARCHS[arch].build().double(), copy.deepcopy(model.peft_config[adapter]))
    state = model.state_dict()
    for kind in ("factors", "shared"):
        state = {key.replace(f"_{kind}.{adapter}.", f"_{kind}.default."): tensor for key, tensor in state.items()}
    missing = alone.load_state_dict(state, strict=False).missing_keys
    assert not [key for key in missing if "_factors." in key or "_shared." in key]
    return h.naive_updates(alone)


def naive_sum(model: nn.Module, weights: dict[str, float], arch: str = "llama") -> dict[str, Tensor]:
    """Module → Σ wₖ ΔWₖ over the named adapters."""
    total: dict[str, Any] = {}
    for adapter, weight in weights.items():
        for name, update in naive(model, adapter, arch).items():
            total[name] = total.get(name, 0) + weight * update
    return total


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module → B A of a LoRA's tensors in memory, in float64."""
    return {
        key.removeprefix(h.ROOT).removesuffix(".lora_A.weight"): state[key.replace("lora_A", "lora_B")].double()
        @ tensor.double()
        for key, tensor in state.items()
        if key.endswith("lora_A.weight")
    }


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """The same modules and updates, none of which is zero."""
    assert sorted(actual) == sorted(expected)
    for name, update in expected.items():
        assert update.norm() > 0.01, name
        assert h.relative(actual[name], update) <= tolerance, name


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to rounding, measured at the largest element."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a saved adapter."""
    tensors = h.file_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


# 1. convert_to_lora and save_as_lora


def test_every_name_of_the_function_is_ours() -> None:
    doors = [peft, peft.tuners, peft.tuners.lora, conversion]
    assert len({id(door.convert_to_lora) for door in doors}) == 1
    assert conversion.convert_to_lora is not THEIRS


@every_exact
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_convert_is_exact(method: str, arch: str) -> None:
    model = adapted(method, arch, torch.float64)
    expected = h.naive_updates(model)
    assert model.supports_lora_conversion()
    for rank, width in ((RANK[method], RANK[method]), (RANK[method] + 3, RANK[method] + 3), (1.0, RANK[method])):
        settings, state = peft.convert_to_lora(model, rank)
        assert type(settings) is LoraConfig
        assert (settings.r, settings.lora_alpha, settings.use_rslora) == (width, width, False)
        assert settings.target_modules == set(ARCHS[arch].targets), "a set, as PEFT's own configs have it"
        assert not settings.rank_pattern
        assert not settings.alpha_pattern
        assert {len(tensor) for key, tensor in state.items() if "lora_A" in key} == {width}
        assert len(state) == 2 * len(expected)
        assert_near(products(state), expected)


@every_exact
@pytest.mark.parametrize("rank", [12, 2, 1.0, 0.9])
def test_no_matrix_of_the_weight_s_size_is_made(method: str, rank: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors are at hand: no ΔW, no decomposition of it, and nothing of PEFT's function."""
    model = get_peft_model(h.Mlp(), config(method, target_modules=["up", "down"]))
    ready(model)
    monkeypatch.setattr(conversion, "_convert_module_to_lora", None)
    with h.Watch() as watch:
        peft.convert_to_lora(model, rank)
    assert watch.largest() < HIDDEN * INNER


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_saved_lora_in_stock_peft(method: str, arch: str, tmp_path: Path) -> None:
    """It loads without a warning: they are errors here."""
    model, inputs = adapted(method, arch), ARCHS[arch].inputs()
    peft.save_as_lora(tmp_path, model, RANK.get(method, HIDDEN))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written = h.lora_config(tmp_path)
    assert written["peft_type"] == "LORA"
    assert set(written["target_modules"]) == set(ARCHS[arch].targets)
    loaded = h.stock(tmp_path, arch)
    assert_close(output(loaded, inputs), output(model, inputs))
    with loaded.disable_adapter():
        assert (output(loaded, inputs) - output(model, inputs)).abs().max() > 0.1


IMPORTED_BEFORE = """
import sys
from peft import convert_to_lora, save_as_lora
assert not any(name.partition(".")[0] == "loraplex" for name in sys.modules)

import peft
import helpers as h

assert convert_to_lora is not peft.convert_to_lora and save_as_lora is peft.save_as_lora
batch = h.ARCHS["llama"].inputs()
for method in h.METHODS:
    model = h.adapted(method)
    for rank in (8, 0.5):
        try:
            convert_to_lora(model, rank)
        except TypeError as error:
            assert "AdapterLinear" in str(error) or "FactorBank" in str(error), error
        else:
            raise AssertionError(f"PEFT converted {method}")
    if method != "masa-router":
        save_as_lora(f"{sys.argv[1]}/{method}", model, 32)
        loaded = h.stock(f"{sys.argv[1]}/{method}")
        assert (h.output(loaded, batch) - h.output(model, batch)).abs().max() < 1e-5
print("all well")
"""


def test_functions_imported_before_loraplex(tmp_path: Path) -> None:
    """`save_as_lora` works: it looks the conversion up when called. `convert_to_lora` is PEFT's own, and refuses."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", IMPORTED_BEFORE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all well\n")


@pytest.mark.parametrize("method", METHODS)
def test_peft_s_own_function_refuses(method: str) -> None:
    """It asks layers for `get_delta_weight`: if ours had one, it would stop at the bank, or take an SVD of ΔW."""
    with pytest.raises(TypeError, match=r"AdapterLinear|FactorBank"):
        THEIRS(adapted(method), 8)


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("rank", [1, 3])
def test_lower_rank_is_the_best_approximation(method: str, rank: int) -> None:
    """Eckart and Young: the error is that of the singular values left out."""
    model = adapted(method, dtype=torch.float64)
    settings, state = peft.convert_to_lora(model, rank=rank)
    assert (settings.r, settings.lora_alpha) == (rank, rank)
    converted = products(state)
    for name, update in h.naive_updates(model).items():
        S = torch.linalg.svdvals(update)
        best = (S[rank:].square().sum() / S.square().sum()).sqrt().item()
        assert best > 0.05
        assert h.relative(converted[name], update) == pytest.approx(best, rel=1e-6), name


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_share_of_the_energy(method: str, share: float) -> None:
    """A float keeps that share of Σσ² of each ΔW, with the smallest rank that does: error² ≤ 1 − share."""
    model = adapted(method, dtype=torch.float64)
    settings, state = peft.convert_to_lora(model, share)
    converted, ranks = products(state), {}
    for name, update in h.naive_updates(model).items():
        energy = torch.linalg.svdvals(update).square().cumsum(0)
        ranks[name] = int((energy < share * energy[-1]).sum()) + 1
        used = state[f"{h.ROOT}{name}.lora_A.weight"].norm(dim=1) > 0
        assert used.tolist() == [k < ranks[name] for k in range(settings.r)], name
        assert h.relative(converted[name], update) ** 2 <= 1 - share
    assert settings.r == settings.lora_alpha == max(ranks.values())


def test_dual_lora_needs_a_rank() -> None:
    """ΔW is no product of thin factors. Of full rank, the approximation is exact."""
    model = adapted("dual_lora", dtype=torch.float64)
    assert model.supports_lora_conversion()
    with pytest.raises(ValueError, match=r"no exact LoRA form.*Rank\(rank=R\)"):
        peft.convert_to_lora(model, 1.0)
    settings, state = peft.convert_to_lora(model, HIDDEN)
    assert settings.r == HIDDEN
    assert_near(products(state), h.naive_updates(model), 1e-9)


@pytest.mark.parametrize("rank", [8, 1.0, 0.5])
def test_router_is_refused(rank: float, tmp_path: Path) -> None:
    model = adapted("masa-router")
    assert not model.supports_lora_conversion()
    with pytest.raises(ValueError, match=r"gates depend on the input.*calibrate"):
        peft.convert_to_lora(model, rank)
    with pytest.raises(ValueError, match=r"gates depend on the input.*calibrate"):
        peft.save_as_lora(tmp_path, model, rank)
    assert not list(tmp_path.iterdir())


def test_calibrated_router_is_converted() -> None:
    model = adapted("masa-router", dtype=torch.float64)
    loraplex.calibrate(model, [BATCH])
    assert model.supports_lora_conversion()
    layers = {name.removeprefix(h.ROOT): layer for name, layer in h.layers_of(model).items()}
    gates = {name: layer.factors("default").mean_gate.tolist() for name, layer in layers.items()}
    _, state = peft.convert_to_lora(model, 4)
    assert_near(products(state), h.naive_updates(model, gates))


def test_supports_lora_conversion_speaks_of_the_adapter_that_is_asked_for() -> None:
    """PEFT's tuner forgets the name on the way to the layers, and asks for "default"."""
    model = adapted("multilora")
    loraplex.add_adapter(model, "router", config("masa-router"))
    assert model.supports_lora_conversion()
    for layer in h.layers_of(model).values():
        assert layer.supports_lora_conversion()
        assert not layer.supports_lora_conversion("router")
    assert not model.base_model.supports_lora_conversion("router")
    only = get_peft_model(LLAMA.build(), config("masa-router"), adapter_name="router")
    assert not only.supports_lora_conversion("router")


@pytest.mark.parametrize("rank", [0, -1, 0.0, -0.5, 1.5, True])
def test_ranks_that_make_no_sense(rank: float) -> None:
    with pytest.raises(ValueError, match=f"rank={rank}"):
        peft.convert_to_lora(adapted("multilora"), rank)


def test_one_adapter_of_several() -> None:
    model = host(("multilora", {}), ("masa-concat", {}), ("aslora", {"r": 3}))
    for adapter in NAMES:
        _, state = peft.convert_to_lora(model, 8, adapter)
        assert_near(products(state), naive(model, adapter))
    assert model.active_adapters == ["one"]


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_unknown_adapter(kind: str) -> None:
    """PEFT would look for a `get_delta_weight` in vain, and ask to open an issue."""
    model: Any = host(("multilora", {})) if kind == "peft" else LLAMA.build()
    if kind == "transformers":
        model.add_adapter(config("multilora"), "one")
    with pytest.raises(ValueError, match=r"no adapter 'typo'.*'one'"):
        peft.convert_to_lora(model, 4, adapter_name="typo")


def loha(adapter: str = "default") -> PeftModel:
    torch.manual_seed(0)
    settings = LoHaConfig(r=4, alpha=6, target_modules=LLAMA.targets, init_weights=False)
    return get_peft_model(LLAMA.build(), settings, adapter_name=adapter).eval()


@pytest.mark.parametrize("rank", [4, 0.5])
def test_other_methods_go_to_peft(rank: float, tmp_path: Path) -> None:
    model = loha("mine")
    expected, tensors = THEIRS(model, rank, "mine")
    settings, state = peft.convert_to_lora(model, rank, "mine")
    assert settings.to_dict() == expected.to_dict()
    h.assert_same(state, tensors)
    peft.save_as_lora(tmp_path, model, rank, "mine")
    h.assert_same(h.file_tensors(tmp_path), tensors)


def test_options_reach_peft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    peft.convert_to_lora(loha(), 2, progressbar=True, compile_kwargs={"mode": "max-autotune"})
    assert seen == [{"mode": "max-autotune"}]
    assert "Converting to LoRA" in capsys.readouterr().err


def test_options_change_nothing_of_ours() -> None:
    model = adapted("multilora")
    _, plain = peft.convert_to_lora(model, 8)
    _, state = peft.convert_to_lora(model, 8, "default", True, {"mode": "default"})
    h.assert_same(state, plain)


def test_what_peft_says_of_a_plain_lora_stays() -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="already a LoRA"):
        settings, _ = peft.convert_to_lora(model, 2)
    assert settings.r == 2


FULL = {"head": {"modules_to_save": ["classifier"]}, "biases": {"bias": "all"}, "adapted biases": {"bias": "lora_only"}}


@pytest.mark.parametrize("what", FULL)
@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-sum", "dual_lora"])
def test_what_was_trained_in_full_rides_along(what: str, method: str, tmp_path: Path) -> None:
    inputs = ARCHS["roberta"].inputs()
    model = adapted(method, "roberta", **FULL[what])
    before = output(model, inputs)
    mine = {id(parameter) for parameter in h.adapter_parameters(model).values()}
    full = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
    with torch.no_grad():
        for parameter in full:
            parameter.add_(torch.randn_like(parameter))
    expected = output(model, inputs)
    assert (expected - before).abs().max() > 1e-3
    peft.save_as_lora(tmp_path, model, RANK.get(method, HIDDEN))
    assert len([key for key in h.file_tensors(tmp_path) if ".lora_" not in key]) == len(full)
    written = h.lora_config(tmp_path)
    assert (written["bias"], written["modules_to_save"]) == (
        FULL[what].get("bias", "none"),
        FULL[what].get("modules_to_save"),
    )
    assert_close(output(h.stock(tmp_path, "roberta"), inputs), expected)


@pytest.mark.parametrize("method", ["multilora", "aslora", "dual_lora", "masa-concat"])
def test_transformers_own_adapters_are_converted(method: str, tmp_path: Path) -> None:
    model = LLAMA.build()
    model.add_adapter(config(method), "mine")
    ready(model, "mine")
    expected = output(model, BATCH)
    peft.save_as_lora(tmp_path, model, RANK.get(method, HIDDEN), adapter_name="mine")
    assert_close(output(h.stock(tmp_path), BATCH), expected)
    fresh = LLAMA.build()
    fresh.load_adapter(str(tmp_path))
    assert_close(output(fresh, BATCH), expected)
    assert torch.equal(output(model, BATCH), expected)


# 2. add_weighted_adapter

WEIGHTS = {"one": 0.7, "two": -1.3, "three": 2.0}
SUMS: dict[str, tuple[list[Part], int]] = {
    "multilora": (
        [("multilora", {"use_rslora": True}), ("multilora", {"r": 2, "lora_alpha": 5, "num_modules": 3})], 14,
    ),
    "granularities": ([("multilora", {"alpha_pattern": {"v_proj": 2}}), ("multilora-module", {"r": 3})], 17),
    "three": ([("multilora-module", {}), ("multilora", {"r": 2}), ("multilora", {"r": 2, "num_modules": 1})], 18),
    "aslora": ([("aslora", {}), ("aslora", {"r": 2, "lora_alpha": 5}), ("aslora", {"r": 3, "num_merges": 0})], 9),
    "masa-sum": ([("masa-sum", {}), ("masa-sum", {"r": 3, "num_experts": 2, "lora_alpha": 7})], 7),
    "masa-concat": ([("masa-concat", {}), ("masa-concat", {"r": 2, "num_experts": 3, "use_rslora": True})], 14),
    "masa-both": ([("masa-sum", {}), ("masa-concat", {"r": 3}), ("masa-sum", {"r": 2})], 12),
    "rank_patterns": (
        [("multilora", {"rank_pattern": {"v_proj": 2}}), ("multilora", {"r": 2, "rank_pattern": {"v_proj": 4}})], 12,
    ),
    "one": ([("aslora", {})], 4),
}  # fmt: skip
"""What can be added up, and the rank of the sum."""


def updates(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Module → ΔW, as merging sees it."""
    return {name.removeprefix(h.ROOT): m.factors(adapter).delta_weight() for name, m in h.layers_of(model).items()}


@pytest.mark.parametrize(
    ("name", "arch"),
    [*((name, "llama") for name in SUMS), *((name, "gpt2") for name in ("multilora", "aslora", "masa-both"))],
)
def test_cat_is_exact(name: str, arch: str, tmp_path: Path) -> None:
    parts, rank = SUMS[name]
    model, inputs = host(*parts, arch=arch), ARCHS[arch].inputs()
    weights = dict(list(WEIGHTS.items())[: len(parts)])
    model.add_weighted_adapter([*weights], [*weights.values()], "sum", combination_type="cat")
    expected = naive_sum(model, weights, arch)
    assert_near(updates(model, "sum"), expected)
    assert {len(layer.factors("sum").lora_form()[0]) for layer in h.layers_of(model).values()} == {rank}
    # Loaded again, without its parts, it is what the papers say of it.
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(ARCHS[arch].build().double(), tmp_path / "sum").eval()
    assert type(loaded.peft_config["default"]) is type(model.peft_config["one"])
    assert_near(h.naive_updates(loaded), expected)
    model.set_adapter("sum")
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_cat_is_the_default() -> None:
    model = host(("multilora", {}), ("multilora", {"r": 2}))
    model.add_weighted_adapter(["one", "two"], [1.0, -1.0], "sum")
    assert_near(updates(model, "sum"), naive_sum(model, {"one": 1, "two": -1}))


def test_one_adapter_twice_and_a_sum_of_sums() -> None:
    model = host(("aslora", {}), ("aslora", {"r": 2}))
    model.add_weighted_adapter(["one", "one"], [1.0, 1.0], "twice")
    assert_near(updates(model, "twice"), naive_sum(model, {"one": 2}))
    model.add_weighted_adapter(["twice", "two"], [0.5, -3.0], "sum")
    assert_near(updates(model, "sum"), naive_sum(model, {"one": 1, "two": -3}))


@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-sum"])
def test_sum_where_the_first_adapter_is_of_another_method(method: str, tmp_path: Path) -> None:
    model = host(("dual_lora", {}), (method, {}), (method, {"r": 2}))
    model.add_weighted_adapter(["two", "three"], [2.0, -0.5], "sum")
    assert_near(updates(model, "sum"), naive_sum(model, {"two": 2, "three": -0.5}))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    model.set_adapter("sum")
    loaded = PeftModel.from_pretrained(LLAMA.build().double(), tmp_path / "sum").eval()
    assert torch.equal(output(loaded, BATCH), output(model, BATCH))


@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-concat"])
def test_sum_over_a_bfloat16_base_is_not_rounded_to_bfloat16(method: str) -> None:
    """PEFT keeps the adapters in float32 there."""
    model = host((method, {}), (method, {"r": 2}), dtype=torch.bfloat16)
    assert {p.dtype for p in h.adapter_parameters(model, "one").values()} == {torch.float32}
    model.add_weighted_adapter(["one", "two"], [0.7, -1.3], "sum")
    assert {p.dtype for p in h.adapter_parameters(model, "sum").values()} == {torch.float32}
    assert_near(updates(model, "sum"), naive_sum(model, {"one": 0.7, "two": -1.3}), 1e-6)


MAPS = {"one": [1, 1, 2, 4, 4], "two": [1, 1, 3, 3, 4], "three": [2, 2, 2, 4, 4]}
"""Adapter → which layer's B each layer reads. All three share one B between layers 0 and 1."""


def set_maps(model: nn.Module) -> None:
    """Let the three ASLoRA adapters have merged so: "one" at step 1, "two" at 2, "three" at 3."""
    for step, (adapter, mapped) in enumerate(MAPS.items(), 1):
        shared = h.shared_state(model, adapter)
        for family in shared.families:
            steps = [step * (owner != layer) for layer, owner in enumerate(mapped)]
            getattr(shared, f"{family}__merges").copy_(torch.tensor([mapped, steps]))
    model.eval()  # where the maps are read from the tensors


def test_sum_of_aslora_shares_what_all_share(tmp_path: Path) -> None:
    """The common refinement: two layers read one B of the sum if they do in every part."""
    model = host(("aslora", {}), ("aslora", {"r": 2}), ("aslora", {"r": 3, "lora_alpha": 4}))
    set_maps(model)
    model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum")
    shared = h.shared_state(model, "sum")
    assert {tuple(mapped) for mapped in shared.maps.values()} == {(1, 1, 2, 3, 4)}
    assert {merge[::2] + merge[3:] for merge in shared.merge_history()} == {(3, 0, 1)}
    assert shared.finished()
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    kept = sorted(key[-1] for key in h.file_tensors(tmp_path / "sum") if "lora_B_" in key)
    assert kept == ["1", "1", "2", "2", "3", "3", "4", "4"]
    loaded = PeftModel.from_pretrained(LLAMA.build().double(), tmp_path / "sum").eval()
    assert_near(h.naive_updates(loaded), naive_sum(model, WEIGHTS))
    # Two that have more in common.
    model.add_weighted_adapter(["three", "one"], [1.0, 1.0], "pair")
    assert {tuple(mapped) for mapped in h.shared_state(model, "pair").maps.values()} == {(1, 1, 2, 4, 4)}
    assert_near(updates(model, "pair"), naive_sum(model, {"one": 1, "three": 1}))


def test_sum_of_masa_keeps_its_groups() -> None:
    """Three groups of two layers, each with one set of experts: as many layers as "one" has experts."""
    model = host(("masa-sum", {"num_experts": 2, "share_layers": None}), ("masa-concat", {"num_experts": 5}))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert_near(updates(model, "sum"), naive_sum(model, {"one": 1, "two": 1}))
    experts = [name for name, _ in h.shared_state(model, "sum").named_parameters()]
    assert len(experts) == 2 * 3
    assert model.peft_config["sum"].group_size == 2


LINEAR: dict[str, list[Part]] = {
    "multilora": [("multilora", {}), ("multilora-module", {"num_modules": 2, "lora_alpha": 9})],
    "aslora": [("aslora", {}), ("aslora", {"lora_alpha": 9, "num_merges": 1})],
    "masa-sum": [("masa-sum", {}), ("masa-sum", {"use_rslora": True})],
    "masa-concat": [("masa-concat", {}), ("masa-concat", {"lora_alpha": 9})],
}


def with_equal_A(name: str) -> PeftModel:
    model = host(*LINEAR[name])
    ours, theirs = (
        [p for key, p in h.adapter_parameters(model, adapter).items() if "lora_A" in key] for adapter in NAMES[:2]
    )
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    return model


@pytest.mark.parametrize("name", LINEAR)
def test_linear_is_exact_where_A_is_equal(name: str) -> None:
    model = with_equal_A(name)
    model.add_weighted_adapter(["one", "two"], [0.7, -1.3], "sum", combination_type="linear")
    assert_near(updates(model, "sum"), naive_sum(model, {"one": 0.7, "two": -1.3}))
    layers = h.layers_of(model).values()
    assert {len(m.factors("sum").lora_form()[0]) for m in layers} == {
        len(m.factors("one").lora_form()[0]) for m in layers
    }


@pytest.mark.parametrize("name", LINEAR)
def test_linear_is_refused_where_A_is_nearly_equal(name: str) -> None:
    model = with_equal_A(name)
    last = [p for key, p in h.adapter_parameters(model, "two").items() if "lora_A" in key][-1]
    with torch.no_grad():
        last[-1, -1] += 1e-6
    before, state = h.snapshot(model, BATCH), state_of(model)
    with pytest.raises(ValueError, match=r'same A.*"cat"'):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="linear")
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    h.assert_same(state_of(model), state)


TWO: list[Part] = [("multilora", {}), ("multilora", {"r": 2})]
REFUSED: dict[str, tuple[list[Part], dict[str, Any], str]] = {
    "dual_lora": ([("dual_lora", {}), ("dual_lora", {})], {}, r"_proj.*merge_adapter"),
    "dual_lora alone": ([("dual_lora", {})], {"adapters": ["one"], "weights": [1.0]}, r"merge_adapter"),
    "router": ([("masa-router", {}), ("masa-router", {})], {}, "gates depend on the input"),
    "router and sum": ([("masa-sum", {}), ("masa-router", {})], {}, "gates depend on the input"),
    "methods": ([("multilora", {}), ("aslora", {})], {}, r"different methods.*MULTILORA.*ASLORA"),
    "fewer modules": ([("aslora", {}), ("aslora", {"target_modules": ["q_proj"]})], {}, r"v_proj.*same modules"),
    "more modules": ([("masa-sum", {"target_modules": ["v_proj"]}), ("masa-sum", {})], {}, r"q_proj.*same modules"),
    "other modules": (
        [("multilora", {"target_modules": ["q_proj"]}), ("multilora", {"target_modules": ["v_proj"]})], {}, "same mod",
    ),
    "head": ([("multilora", {}), ("multilora", {"modules_to_save": ["lm_head"]})], {}, r"'two' trained modules"),
    "biases": ([("multilora", {"bias": "all"})], {"adapters": ["one"], "weights": [1.0]}, r"'one' trained.* biases"),
    "rank_pattern": ([("aslora", {}), ("aslora", {"rank_pattern": {"v_proj": 2}})], {}, r"\[6, 8\].*rank_pattern"),
    "groups": ([("masa-sum", {}), ("masa-concat", {"share_layers": 3})], {}, r"\[2, 3\] layers.*equal groups"),
    "unknown adapter": (TWO, {"adapters": ["one", "typo"]}, r"typo.*'one', 'two'"),
    "name that is taken": (TWO, {"adapter_name": "two"}, r"'two' already"),
    "too few weights": (TWO, {"weights": [1.0]}, "2 adapters and 1 weights"),
    "too many weights": (TWO, {"weights": [1.0, 2.0, 3.0]}, "2 adapters and 3 weights"),
    "nothing": (TWO, {"adapters": [], "weights": []}, "0 adapters"),
    "kind": (TWO, {"combination_type": "svd"}, r"'svd'.*cat, linear"),
    "LoRA's kind": (TWO, {"combination_type": "ties", "density": 0.5}, r"'ties'.*export_lora"),
    "LoRA's setting": (TWO, {"combination_type": "cat", "density": 0.5}, r"density: .*takes no further"),
    "linear": ([("aslora", {}), ("aslora", {})], {"combination_type": "linear"}, 'same A.*"cat"'),
    "linear of two ranks": (TWO, {"combination_type": "linear"}, 'same A.*"cat"'),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_sums_change_nothing(name: str) -> None:
    parts, settings, message = REFUSED[name]
    model = host(*parts, dtype=torch.float32)
    before, state = h.snapshot(model, BATCH), state_of(model)
    arguments = {"adapters": ["one", "two"], "weights": [1.0, -0.5], "adapter_name": "sum", **settings}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**arguments)
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    h.assert_same(state_of(model), state)


def test_sum_with_a_calibrated_router_is_refused() -> None:
    """Its mean gates are an approximation, and a sum that is not exact must not look so."""
    model = host(("masa-router", {}), ("masa-sum", {}), dtype=torch.float32)
    loraplex.calibrate(model, [BATCH])
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match="merge_adapter"):
        model.add_weighted_adapter(["two", "one"], [1.0, 1.0], "sum")
    h.assert_unchanged(before, h.snapshot(model, BATCH))


def test_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hold, calls = MultiLoraFactors.hold, []

    def third_fails(self: MultiLoraFactors, A: Tensor, B: Tensor) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        hold(self, A, B)

    model = host(*TWO, dtype=torch.float32)
    before, state = h.snapshot(model, BATCH), state_of(model)
    monkeypatch.setattr(MultiLoraFactors, "hold", third_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    h.assert_same(state_of(model), state)
    monkeypatch.undo()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")


class Grid(nn.Module):
    """Three blocks of two parts: its layers can be counted by either number in their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [nn.ModuleList(nn.Linear(6, 6) for _ in range(2)) for _ in range(3)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"parts": part}) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for part in block["parts"]:
                x = x + torch.tanh(part(x))
        return x


@pytest.mark.parametrize("method", ["aslora", "masa-sum"])
def test_adapters_that_share_along_other_layers_do_not_add_up(method: str) -> None:
    """One shares A between blocks, the other between parts; no A of the sum could do both."""
    more = {"num_merges": 0} if method == "aslora" else {}
    targets = ["parts.0", "parts.1"]
    model = get_peft_model(Grid(), config(method, target_modules=targets, **more), adapter_name="one")
    model.add_adapter("two", config(method, target_modules=targets, layers_pattern="parts", **more))
    for seed, adapter in enumerate(NAMES[:2]):
        fill(model, adapter, seed)
    state, trained = state_of(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"share|layers_pattern"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert sorted(model.peft_config) == ["one", "two"]
    h.assert_same(state_of(model), state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-concat"])
def test_sum_is_an_adapter_like_any_other(method: str, tmp_path: Path) -> None:
    model = host((method, {}), (method, {"r": 2}), dtype=torch.float32)
    before, state = h.snapshot(model, BATCH), state_of(model)
    model.base_model.set_adapter(["one", "two"])
    both = output(model, BATCH)
    model.base_model.set_adapter("one")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    # Inactive and frozen, and nothing else has changed.
    assert model.active_adapters == ["one"]
    assert torch.equal(output(model, BATCH), before["output"])
    assert not any(p.requires_grad for p in h.adapter_parameters(model, "sum").values())
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before["requires_grad"]} == before["requires_grad"]
    h.assert_same({key: tensor for key, tensor in state_of(model).items() if key in state}, state)
    # Exported.
    export = loraplex.export_lora(model, tmp_path / "out", "sum")
    assert export.exact
    assert_close(output(h.stock(tmp_path / "out"), BATCH), both)
    # Active, and trained for a step.
    model.set_adapter("sum")
    assert_close(output(model, BATCH), both)
    trained = h.adapter_parameters(model, "sum")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    start = state_of(model)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    loss = model(**BATCH).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(**BATCH).loss < loss
    changed = {key for key, tensor in state_of(model).items() if not torch.equal(tensor, start[key])}
    # ASLoRA's layers share a B: one that no layer reads any more stays as it is.
    assert changed == {name for name, parameter in trained.items() if parameter.grad.any()}
    assert len(changed) >= len(h.adapter_parameters(model, "one")) - 2 * 2
    # Deleted.
    model.set_adapter("one")
    model.delete_adapter("sum")
    h.assert_unchanged(before, h.snapshot(model, BATCH))


@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-sum"])
def test_sum_outlives_its_parts(method: str) -> None:
    """It owns copies: neither training a part nor deleting it reaches the sum."""
    model = host((method, {}), (method, {"r": 2}))
    expected = naive_sum(model, {"one": 1, "two": -2})
    model.add_weighted_adapter(["one", "two"], [1.0, -2.0], "sum")
    fill(model, "one", seed=7)
    model.set_adapter("sum")
    for part in ("one", "two"):
        model.delete_adapter(part)
    assert_near(updates(model, "sum"), expected)
    assert output(model, BATCH).isfinite().all()


def test_sum_of_loaded_adapters_leaves_the_trained_one_trainable(tmp_path: Path) -> None:
    """A loaded adapter's config says that it is for inference; the sum takes that over, and no other adapter may."""
    adapted("multilora").save_pretrained(tmp_path)
    model = adapted("multilora")
    model.load_adapter(tmp_path, "loaded")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_weighted_adapter(["loaded", "default"], [1.0, 1.0], "sum")
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    model.set_adapter("sum")
    assert all(p.requires_grad for p in h.adapter_parameters(model, "sum").values())


# 3. Merging

TOGETHER: dict[str, list[Part]] = {
    "one method": [("aslora", {}), ("aslora", {"r": 2, "lora_alpha": 5})],
    "two methods": [("masa-concat", {}), ("dual_lora", {})],
    "three": [("multilora", {}), ("masa-sum", {}), ("multilora", {"r": 2})],
}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Module → its weight `(out, in)` in float64."""
    return {
        name.removeprefix(h.ROOT): (layer.get_base_layer().weight.detach().double().T if layer.fan_in_fan_out else
        layer.get_base_layer().weight.detach().double()).clone()
        for name, layer in h.layers_of(model).items()
    }  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TOGETHER)
def test_several_active_adapters_merge_and_unmerge(name: str, arch: str) -> None:
    parts = TOGETHER[name]
    model, inputs, adapters = host(*parts, arch=arch), ARCHS[arch].inputs(), NAMES[: len(parts)]
    model.base_model.set_adapter(adapters)
    base, weights, expected = h.base_weights(model), weights_of(model), output(model, inputs)
    total = naive_sum(model, dict.fromkeys(adapters, 1.0), arch)
    model.merge_adapter()
    for module, weight in weights_of(model).items():
        assert h.relative(weight - weights[module], total[module]) < 1e-12, module
    assert {tuple(layer.merged_adapters) for layer in h.layers_of(model).values()} == {tuple(adapters)}
    assert_close(output(model, inputs), expected, 1e-12)
    assert max(model.base_model.merge_errors.values()) < 1e-14
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), base)
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters_are_rounded_once(dtype: torch.dtype) -> None:
    """W + ΔW₁ + ΔW₂ is rounded to the base's dtype, not W + ΔW₁ first; and W comes back bit for bit."""
    model = host(("multilora", {}), ("masa-sum", {}), dtype=dtype)
    model.base_model.set_adapter(["one", "two"])
    base, weights = h.base_weights(model), weights_of(model)
    total = naive_sum(model, {"one": 1, "two": 1})
    model.merge_adapter()
    for name, weight in weights_of(model).items():
        expected = weights[name] + total[name]
        assert h.relative(weight, expected) < 1.2 * h.relative(expected.to(dtype), expected) + 1e-7
        # Products are summed in float32, so that a few values may fall on the other side of a bfloat16 midpoint.
        assert dtype == torch.float32 or (weight == expected.to(dtype)).double().mean() > 0.995
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), base)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merging_one_after_the_other_rounds_once_too(arch: str) -> None:
    model = host(("multilora", {}), ("masa-sum", {}), arch=arch, dtype=torch.bfloat16)
    base = h.base_weights(model)
    model.merge_adapter(["one", "two"])
    together, errors = h.base_weights(model), model.base_model.merge_errors
    model.unmerge_adapter()
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["two"])
    h.assert_same(h.base_weights(model), together)
    assert model.base_model.merge_errors == errors
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), base)


@pytest.mark.parametrize("safe", [False, True])
def test_unloading_keeps_what_was_merged_before(safe: bool) -> None:
    """ "one" is merged already when "two" is asked for; both are in the weights that come out."""
    model = host(("multilora", {}), ("dual_lora", {}))
    weights, total = weights_of(model), naive_sum(model, {"one": 1, "two": 1})
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        merged = model.merge_and_unload(safe_merge=safe, adapter_names=["two"])
    for module, update in total.items():
        assert h.relative(merged.get_submodule(module).weight.detach() - weights[module], update) < 1e-12


@pytest.mark.parametrize("names", [["two"], ["one", "three"], ["three", "two"], []], ids="+".join)
def test_partial_merge(names: list[str]) -> None:
    """Only what is named is merged, whatever is active; "two" adapts half of the modules."""
    model = host(("aslora", {}), ("multilora", {"target_modules": ["q_proj"]}), ("dual_lora", {}))
    base, weights = h.base_weights(model), weights_of(model)
    total = naive_sum(model, dict.fromkeys(names, 1.0))
    model.merge_adapter(adapter_names=names)
    for module, weight in weights_of(model).items():
        if module in total:
            assert h.relative(weight - weights[module], total[module]) < 1e-12
        else:
            assert torch.equal(weight, weights[module])
    assert set(model.base_model.merge_errors) == set(total)
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), base)


@pytest.mark.parametrize("how", ["active", "named", "merged before"])
@pytest.mark.parametrize("name", TOGETHER)
def test_merge_and_unload_several(name: str, how: str) -> None:
    parts = TOGETHER[name]
    model, adapters = host(*parts), NAMES[: len(parts)]
    weights, total = weights_of(model), naive_sum(model, dict.fromkeys(adapters, 1.0))
    model.base_model.set_adapter(adapters)
    expected = output(model, BATCH)
    if how == "named":
        model.base_model.set_adapter("one")
        merged = model.merge_and_unload(adapter_names=adapters)
    elif how == "active":
        merged = model.merge_and_unload(safe_merge=True)
    else:
        model.merge_adapter()
        with pytest.warns(UserWarning, match="already merged"):
            merged = model.merge_and_unload()
    for module, update in total.items():
        assert h.relative(merged.get_submodule(module).weight.detach() - weights[module], update) < 1e-12
    assert type(merged) is type(LLAMA.build())
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert BANK not in dict(merged.named_children())
    assert_close(output(merged, BATCH), expected, 1e-12)


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("std", [0.3, 0.003])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merge_errors(arch: str, std: float, unload: bool) -> None:
    """‖round(W + ΔW) − W − ΔW‖ / ‖ΔW‖ of each module on a bfloat16 base."""
    model = host(("multilora", {}), ("aslora", {}), arch=arch, dtype=torch.bfloat16)
    for seed, adapter in enumerate(NAMES[:2]):
        fill(model, adapter, seed, std)
    model.base_model.set_adapter(["one", "two"])
    total, expected = naive_sum(model, {"one": 1, "two": 1}, arch), {}
    for name, weight in weights_of(model).items():
        rounded = (weight + total[name]).to(torch.bfloat16).double()
        expected[name] = ((rounded - weight - total[name]).norm() / total[name].norm()).item()
    if unload:
        model.merge_and_unload()
    else:
        model.merge_adapter()
    assert all((error > 0.5) == (std < 0.01) for error in expected.values())
    assert model.base_model.merge_errors == pytest.approx(expected, rel=1e-2)


def test_merge_errors_of_nothing() -> None:
    """An adapter whose ΔW is zero loses nothing, and unloading without merging says nothing."""
    model = get_peft_model(LLAMA.build().to(torch.bfloat16), config("multilora"))
    model.merge_adapter()
    assert set(model.base_model.merge_errors.values()) == {0.0}
    model.unmerge_adapter()
    model.unload()
    assert model.base_model.merge_errors == {}


@pytest.mark.parametrize("how", ["merge", "unload", "unload safely"])
def test_warning_that_most_of_an_update_is_lost(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with the worst module's name; one of ten modules has an update that bfloat16 can't see."""
    model = host(("multilora", {}), dtype=torch.bfloat16)
    small = "model.layers.3.self_attn.v_proj"
    with torch.no_grad():
        h.layers_of(model, small)[h.ROOT + small].factors("one").lora_B.mul_(1e-4)
    with caplog.at_level(logging.INFO, logger="loraplex"):
        if how == "merge":
            model.merge_adapter()
        else:
            model.merge_and_unload(safe_merge=how == "unload safely")
    assert [(record.name, record.levelname) for record in caplog.records] == [
        ("loraplex.tuner.model_merging", "WARNING")
    ]
    message = caplog.records[0].getMessage()
    assert "most of the update of 1 of 10 modules" in message
    assert f"{small}, relative error {model.base_model.merge_errors[small]:.2f}" in message
    assert "float32 base" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_warning_where_updates_survive(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = host(("multilora", {}), ("dual_lora", {}), dtype=dtype)
    model.merge_adapter(["one", "two"])
    model.unmerge_adapter()
    model.merge_and_unload()
    assert not caplog.records
    worst = max(model.base_model.merge_errors.values())
    assert worst < (1e-6 if dtype == torch.float32 else 1e-2)


# 4. Tied embeddings

# PEFT says so of an adapter on a tied head. Ours gets a weight of its own when it is merged.
on_a_tied_head = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter:UserWarning"
)
UNTIED = "Input and output embeddings are no longer tied after merging"
TIED = [("llama", method) for method in ("multilora", "aslora", "masa-sum", "dual_lora")]
TIED += [("gpt2", "multilora"), ("t5", "aslora")]
every_tied = pytest.mark.parametrize(("arch", "method"), TIED)


def with_tied_head(arch: str, method: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The adapter is on the head too, whose weight is the embedding's."""
    targets = [*ARCHS[arch].targets, "lm_head"]
    model = host((method, {"target_modules": targets}), arch=arch, dtype=dtype, tie_word_embeddings=True)
    assert head(model).base_layer.weight is embedding(model)
    return model


def head(model: nn.Module) -> Any:
    return model.get_output_embeddings()


def embedding(model: nn.Module) -> nn.Parameter:
    return model.get_input_embeddings().weight


@on_a_tied_head
@every_tied
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_a_tied_head(arch: str, method: str, dtype: torch.dtype) -> None:
    model, inputs = with_tied_head(arch, method, dtype), ARCHS[arch].inputs()
    kept, state, expected = embedding(model), embedding(model).detach().clone(), output(model, inputs)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.merge_adapter()
    assert embedding(model) is kept
    assert torch.equal(kept, state)
    own = head(model).base_layer.weight
    assert own.requires_grad is kept.requires_grad is False
    assert not torch.equal(own, kept)
    assert_close(output(model, inputs), expected, 1e-5 if dtype == torch.float32 else 0.1)
    model.unmerge_adapter()
    assert embedding(model) is head(model).base_layer.weight is kept
    assert torch.equal(kept, state)
    assert torch.equal(output(model, inputs), expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    # Once more: the head's own weight is a fresh copy each time.
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), expected)


@on_a_tied_head
@every_tied
def test_disabling_unmerges_a_tied_head(arch: str, method: str) -> None:
    model, inputs = with_tied_head(arch, method), ARCHS[arch].inputs()
    kept, expected = embedding(model), output(model, inputs)
    base = output(ARCHS[arch].build(tie_word_embeddings=True), inputs)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), base)
    assert torch.equal(output(model, inputs), expected)
    assert head(model).base_layer.weight is embedding(model) is kept


@on_a_tied_head
@every_tied
@pytest.mark.parametrize("safe", [False, True])
def test_unloading_a_tied_head(arch: str, method: str, safe: bool, tmp_path: Path) -> None:
    """The model that comes out has two weights, says so in its config, and is saved and loaded as such."""
    model, inputs = with_tied_head(arch, method), ARCHS[arch].inputs()
    state, expected = embedding(model).detach().clone(), output(model, inputs)
    with pytest.warns(UserWarning, match=UNTIED):
        merged = model.merge_and_unload(safe_merge=safe)
    assert torch.equal(embedding(merged), state)
    assert merged.config.tie_word_embeddings is False
    assert_close(output(merged, inputs), expected)
    merged.save_pretrained(tmp_path)
    loaded = ARCHS[arch].auto.from_pretrained(tmp_path).eval()
    assert head(loaded).weight is not embedding(loaded)
    assert torch.equal(output(loaded, inputs), output(merged, inputs))


@on_a_tied_head
def test_unloading_what_is_merged_already() -> None:
    model = with_tied_head("llama", "multilora")
    state, expected = embedding(model).detach().clone(), output(model, BATCH)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=UNTIED), pytest.warns(UserWarning, match="already merged"):
        merged = model.merge_and_unload()
    assert torch.equal(embedding(merged), state)
    assert_close(output(merged, BATCH), expected)


@on_a_tied_head
def test_unloading_an_adapter_that_is_not_on_the_head_keeps_the_tie() -> None:
    model = with_tied_head("llama", "multilora")
    model.add_adapter("two", config("multilora", target_modules=["q_proj"]))
    ready(model, "two", seed=1)
    model.base_model.set_adapter("two")
    expected = output(model, BATCH)
    merged = model.merge_and_unload(adapter_names=["two"])
    assert head(merged).weight is embedding(merged)
    assert merged.config.tie_word_embeddings is True
    assert_close(output(merged, BATCH), expected)


@on_a_tied_head
@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("fault", ["NaN", "a string for a list"])
def test_failed_merge_keeps_the_tie(fault: str, unload: bool) -> None:
    model = with_tied_head("llama", "multilora")
    kept, state = embedding(model), embedding(model).detach().clone()
    if fault == "NaN":
        with torch.no_grad():
            head(model).factors("one").lora_B[0, 0] = torch.nan
    settings = {"safe_merge": True} if fault == "NaN" else {"adapter_names": "one"}
    with pytest.raises((ValueError, TypeError), match=r"NaN|list of strings"):
        (model.merge_and_unload if unload else model.merge_adapter)(**settings)
    assert head(model).base_layer.weight is embedding(model) is kept
    assert torch.equal(kept, state)
    assert not any(layer.merged for layer in h.layers_of(model).values())


class TiedPair(nn.Module):
    """Two linear layers with one weight, in a model without a config."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("targets", [["second"], ["first", "second"]], ids="+".join)
@pytest.mark.parametrize("how", ["merge", "unload", "unload safely"])
def test_tied_layers_of_any_model(how: str, targets: list[str]) -> None:
    model = get_peft_model(TiedPair().double(), config("multilora", target_modules=targets)).eval()
    ready(model)
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    kept, expected = TiedPair().double().first.weight, model(x)
    if how == "merge":
        model.merge_adapter()
        assert_close(model(x), expected, 1e-12)
        model.unmerge_adapter()
        weights = [m.weight for name, m in model.named_modules() if name.endswith(("first", "second", "base_layer"))]
        assert all(weight is weights[0] for weight in weights)
        assert torch.equal(weights[0], kept)
        assert torch.equal(model(x), expected)
        return
    merged = model.merge_and_unload(safe_merge=how == "unload safely")
    assert_close(merged(x), expected, 1e-12)
    assert merged.first.weight is not merged.second.weight
    assert torch.equal(merged.first.weight, kept) is (targets == ["second"])


# 5. transformers' own adapters

# PEFT tells so of every second adapter that transformers adds.
several_native = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


@several_native
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_native_round_trip(method: str, arch: str, tmp_path: Path) -> None:
    """add_adapter, save_pretrained, load_adapter beside another method's, set_adapter, delete_adapter."""
    inputs, settings = ARCHS[arch].inputs(), config(method, target_modules=ARCHS[arch].targets)
    model = ARCHS[arch].build()
    base = output(model, inputs)
    model.add_adapter(settings, "mine")
    ready(model, "mine")
    expected = output(model, inputs)
    assert torch.equal(expected, output(adapted(method, arch), inputs))
    model.save_pretrained(tmp_path)
    for load in (PreTrainedModel.load_adapter, loraplex.load_adapter):
        fresh = ARCHS[arch].build()
        fresh.add_adapter(config("masa-sum", target_modules=ARCHS[arch].targets), "other")
        ready(fresh, "other", seed=5)
        others = output(fresh, inputs)
        load(fresh, str(tmp_path), "mine")
        fresh.set_adapter("mine")
        assert torch.equal(output(fresh, inputs), expected)
        fresh.set_adapter("other")
        assert torch.equal(output(fresh, inputs), others)
        fresh.set_adapter("mine")
        fresh.delete_adapter("other")
        assert torch.equal(output(fresh, inputs), expected)
        fresh.delete_adapter("mine")
        assert torch.equal(output(fresh, inputs), base)
        assert not h.adapter_parameters(fresh, "mine")
        fresh.add_adapter(settings, "mine")
        assert torch.equal(output(fresh, inputs), base)


@pytest.mark.parametrize("method", PLAIN)
def test_native_adapters_are_loaded_for_training(method: str, tmp_path: Path) -> None:
    adapted(method).save_pretrained(tmp_path)
    for trainable in (True, False):
        model = LLAMA.build()
        loraplex.load_adapter(model, str(tmp_path), "mine", is_trainable=trainable)
        mine = set(h.adapter_parameters(model, "mine"))
        assert mine
        assert {name for name, p in model.named_parameters() if p.requires_grad} == (mine if trainable else set())


def truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def lose_one(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(next(key for key in tensors if "lora_B" in key)))


def one_too_many(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if "lora_B" in key)
        tensors[key.replace("q_proj", "k_proj")] = tensors[key].clone()

    rewrite(folder, add)


MISFITS: dict[str, tuple[dict[str, int], Callable[[Path], None], str]] = {
    "wider": ({"hidden_size": 64}, lambda _: None, r"\(\d+, 32\).*\(\d+, 64\).*base model"),
    "deeper": ({"num_hidden_layers": 7}, lambda _: None, r"lack.*another model|\(2, 5\).*\(2, 7\)"),
    "shallower": ({"num_hidden_layers": 3}, lambda _: None, r"no place for|\(2, 5\).*\(2, 3\)"),
    "missing tensor": ({}, lose_one, r"lack .*lora_B.*incomplete"),
    "surplus tensor": ({}, one_too_many, r"k_proj.*no place for"),
    "truncated file": ({}, truncate, r"not a whole safetensors file.*again"),
    "no weights": ({}, lambda folder: (folder / "adapter_model.safetensors").unlink(), r"no weights"),
    "no config": ({}, lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config.json is missing"),
}


def assert_no_adapter(model: Any) -> None:
    """Nothing of an adapter is left, and transformers thinks so too."""
    assert not hasattr(model, "peft_config")
    assert not model._hf_peft_config_loaded
    assert not any(isinstance(m, BaseTunerLayer) or "ModulesToSave" in type(m).__name__ for m in model.modules())


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("method", PLAIN)
def test_misfit_leaves_a_native_model_alone(method: str, misfit: str, tmp_path: Path) -> None:
    base, spoil, message = MISFITS[misfit]
    adapted(method).save_pretrained(tmp_path)
    spoil(tmp_path)
    model = LLAMA.build(**base)
    before, state = h.snapshot(model, BATCH), state_of(model)
    with pytest.raises(ValueError, match=message):
        loraplex.load_adapter(model, str(tmp_path), "mine")
    assert_no_adapter(model)
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    h.assert_same(state_of(model), state)
    model.add_adapter(config(method), "mine")
    assert torch.equal(output(model, BATCH), before["output"])
    ready(model, "mine")
    assert not torch.equal(output(model, BATCH), before["output"])


@several_native
@pytest.mark.parametrize("active", [["one"], ["two"], ["one", "two"]], ids="+".join)
@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_misfit_leaves_a_native_model_s_other_adapters_alone(method: str, active: list[str], tmp_path: Path) -> None:
    """Whichever of them are active, they stay so; the name is free again."""
    adapted(method).save_pretrained(tmp_path)
    lose_one(tmp_path)
    model = LLAMA.build()
    for seed, (name, other) in enumerate({"one": "aslora", "two": "multilora"}.items()):
        model.add_adapter(config(other), name)
        ready(model, name, seed)
    model.set_adapter(active)
    before, state = h.snapshot(model, BATCH), state_of(model)
    with pytest.raises(ValueError, match=r"lack .*lora_B"):
        loraplex.load_adapter(model, str(tmp_path), "mine")
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            assert layer.active_adapters == active
    h.assert_same(state_of(model), state)
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    model.add_adapter(config(method), "mine")
    model.set_adapter(active)
    assert torch.equal(output(model, BATCH), before["output"])


HEAD_MISFITS: dict[str, tuple[dict[str, int], str, str]] = {
    "other number of classes": ({"num_labels": 5}, "", r"out_proj\.\w+ is \(3,.*\(5,"),
    "half of the head is missing": ({}, "out_proj.weight", r"lack.*out_proj\.weight"),
    "a factor is missing": ({}, "lora_B", r"lack.*lora_B"),
}


@pytest.mark.parametrize(
    ("kind", "misfit"),
    [
        *(("transformers", misfit) for misfit in HEAD_MISFITS),
        # PEFT itself refuses half a head, with a KeyError.
        *(("peft", misfit) for misfit in HEAD_MISFITS if not misfit.startswith("half")),
    ],
)
def test_misfit_with_a_trained_head(kind: str, misfit: str, tmp_path: Path) -> None:
    """The head of a classifier comes with the adapter, and must fit and be whole too."""
    base, lost, message = HEAD_MISFITS[misfit]
    inputs = ARCHS["roberta"].inputs()
    adapted("masa-sum", "roberta", modules_to_save=["classifier"]).save_pretrained(tmp_path)
    if lost:
        rewrite(tmp_path, lambda tensors: tensors.pop(next(key for key in tensors if lost in key)))
    model = ARCHS["roberta"].build(**base)
    before, state = h.snapshot(model, inputs), state_of(model)
    load = PeftModel.from_pretrained if kind == "peft" else loraplex.load_adapter
    with pytest.raises(ValueError, match=message):
        load(model, str(tmp_path), "mine")
    assert_no_adapter(model)
    h.assert_unchanged(before, h.snapshot(model, inputs))
    h.assert_same(state_of(model), state)
    if kind == "transformers":
        model.add_adapter(config("masa-sum", target_modules=["query"]), "mine")


@several_native
@pytest.mark.parametrize("misfit", ["half of the head is missing", "a factor is missing"])
@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_misfit_beside_an_adapter_with_a_head(kind: str, misfit: str, tmp_path: Path) -> None:
    """Two adapters with heads of their own; the third, which does not fit, takes neither out of use."""
    _, lost, message = HEAD_MISFITS[misfit]
    inputs = ARCHS["roberta"].inputs()
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    adapted("masa-sum", "roberta", **settings).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(next(key for key in tensors if lost in key)))
    model: Any = ARCHS["roberta"].build() if kind == "transformers" else host(("masa-sum", settings), arch="roberta")
    for seed, name in enumerate(NAMES[:2]):
        if kind == "transformers":
            model.add_adapter(config("masa-sum", **settings), name)
        elif seed:
            model.add_adapter(name, config("masa-sum", **settings))
        ready(model, name, seed)
        with torch.no_grad():
            model.get_parameter(next(n for n, _ in model.named_parameters() if f"{name}.out_proj.w" in n)).add_(
                seed + 1
            )
    model.eval().set_adapter("two")
    before, state = h.snapshot(model, inputs), state_of(model)
    with pytest.raises((ValueError, KeyError), match=message if kind == "transformers" else "out_proj|lora_B"):
        loraplex.load_adapter(model, str(tmp_path), "mine")
    h.assert_same(state_of(model), state)
    h.assert_unchanged(before, h.snapshot(model, inputs))
    model.set_adapter("one")
    assert (output(model, inputs) - before["output"]).abs().max() > 0.01


def test_native_model_refuses_another_kind_of_adapter(tmp_path: Path) -> None:
    get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = LLAMA.build()
    with pytest.raises(ValueError, match=r"LORA adapter.*PeftModel\.from_pretrained"):
        loraplex.load_adapter(model, str(tmp_path), "mine")
    assert_no_adapter(model)


# 6. Hot-swapping

EXPORTS: dict[str, tuple[str, int]] = {
    "wide": ("multilora", 8),
    "as wide": ("masa-concat", 8),
    "narrow": ("aslora", 4),
    "widest": ("dual_lora", 12),
}
"""Adapters of different methods, and the rank of their exports."""


def exported(folder: Path, rank: int | None = None) -> dict[str, Tensor]:
    """Write the exports, and tell the output that each of them is to give."""
    expected = {}
    for seed, (name, (method, own)) in enumerate(EXPORTS.items()):
        model = adapted(method)
        fill(model, seed=seed)
        loraplex.export_lora(model, folder / name, rank=rank or own)
        # Dual LoRA's export is an approximation: what counts is what stock PEFT makes of the file.
        expected[name] = output(h.stock(folder / name), BATCH) if method == "dual_lora" else output(model, BATCH)
    values = list(expected.values())
    assert all((a - b).abs().max() > 0.1 for a in values for b in values if a is not b)
    return expected


def test_hotswap_of_exports_with_one_rank(tmp_path: Path) -> None:
    expected = exported(tmp_path)
    model = h.stock(tmp_path / "wide")
    for name in ("as wide", "wide", "as wide"):
        hotswap_adapter(model, str(tmp_path / name), "default")
        assert_close(output(model, BATCH), expected[name])


def test_hotswap_of_exports_with_several_ranks(tmp_path: Path) -> None:
    """Padded to a target rank: the parameters stay the same objects, as compiled models need it."""
    expected = exported(tmp_path)
    model = h.stock(tmp_path / "narrow")
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    before = dict(model.named_parameters())
    assert {p.shape[0] for name, p in before.items() if "lora_A" in name} == {16}
    for name in ("widest", "narrow", "wide", "as wide", "narrow"):
        hotswap_adapter(model, str(tmp_path / name), "default")
        assert_close(output(model, BATCH), expected[name])
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("hotswap", ["auto", True])
def test_native_hotswap_of_exports(hotswap: Any, tmp_path: Path) -> None:
    """transformers 5.23 does not pad to its target rank: exports of one common rank need no padding."""
    expected = exported(tmp_path, rank=12)
    model = LLAMA.build()
    model.enable_peft_hotswap(target_rank=12)
    model.load_adapter(str(tmp_path / "narrow"), adapter_name="served")
    assert_close(output(model, BATCH), expected["narrow"])
    before = dict(model.named_parameters())
    for name in ("widest", "wide", "as wide", "narrow"):
        model.load_adapter(str(tmp_path / name), adapter_name="served", hotswap=hotswap)
        assert_close(output(model, BATCH), expected[name])
    assert list(model.peft_config) == ["served"]
    assert dict(model.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize("method", PLAIN)
def test_hotswap_of_our_own_types_where_it_is_refused(method: str, tmp_path: Path) -> None:
    """A LoRA that is there is swapped for LoRA only, and transformers' own loading swaps LoRA only
    (`loraplex.hotswap` swaps ours, tests/test_hotswap.py); the adapter that is there stays in use."""
    adapted(method).save_pretrained(tmp_path / "ours")
    loraplex.export_lora(adapted("multilora"), tmp_path / "lora")
    kind = config(method).method
    served = h.stock(tmp_path / "lora")
    before = h.snapshot(served, BATCH)
    with pytest.raises(ValueError, match=f"Incompatible PEFT types found: LORA and {kind}"):
        hotswap_adapter(served, str(tmp_path / "ours"), "default")
    h.assert_unchanged(before, h.snapshot(served, BATCH))
    own = LLAMA.build()
    own.enable_peft_hotswap(target_rank=8)
    loraplex.load_adapter(own, str(tmp_path / "ours"), "served")
    before = h.snapshot(own, BATCH)
    for load in (own.load_adapter, lambda *args, **kwargs: loraplex.load_adapter(own, *args, **kwargs)):
        with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
            load(str(tmp_path / "ours"), adapter_name="served")
    h.assert_unchanged(before, h.snapshot(own, BATCH))
