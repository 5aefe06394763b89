"""Adapters swapped in place: equal to loading them afresh, whole or not at all, and without a new graph.

Expected outputs are those of a model that loaded the adapter alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap as peft_hotswap
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

import helpers as h
import loraplex
from helpers import ARCHS, METHODS, PLAIN, config, output, ready

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()
TRAINING = {
    "aslora": {"merge_start_step": 2, "merge_interval": 1, "num_merges": 3},
    "dual_lora": {"warmup_steps": 9},
}
"""Settings of the second adapter that say how it is trained."""


def saved(folder: Path, method: str, seed: int, **settings: Any) -> Tensor:
    """Save an adapter; the output of a model that loads it alone."""
    model = get_peft_model(LLAMA.build(), config(method, **settings))
    ready(model, seed=seed)
    model.eval().save_pretrained(folder)
    return alone(folder)


def alone(folder: Path) -> Tensor:
    return output(PeftModel.from_pretrained(LLAMA.build(), folder).eval(), BATCH)


def pair(folder: Path, method: str, **second: Any) -> tuple[Tensor, Tensor]:
    """Two adapters, the folders "one" and "two", and what each computes."""
    key = method.partition("-")[0]
    first = saved(folder / "one", method, 1)
    return first, saved(folder / "two", method, 2, **{**TRAINING.get(key, {}), **second})


def load(folder: Path, name: str = "one") -> PeftModel:
    return PeftModel.from_pretrained(LLAMA.build(), folder / name).eval()


# Swapping


@pytest.mark.parametrize("by", ["loraplex", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_swapped_in_place(method: str, by: str, tmp_path: Path) -> None:
    """Other factors, other merges, another step of the warm-up, and another alpha; the parameters stay the same."""
    swap = {"loraplex": loraplex.hotswap, "peft": peft_hotswap.hotswap_adapter}[by]
    first, second = pair(tmp_path, method, lora_alpha=10)
    assert not torch.equal(first, second)
    model = load(tmp_path)
    before = dict(model.named_parameters())
    for name, expected in (("two", second), ("one", first), ("two", second)):
        swap(model, str(tmp_path / name), "default")
        assert torch.equal(output(model, BATCH), expected)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path / "again")
    h.assert_same(h.file_tensors(tmp_path / "again"), h.file_tensors(tmp_path / "two"))
    assert torch.equal(alone(tmp_path / "again"), second)
    assert model.peft_config["default"].inference_mode is True


@pytest.mark.parametrize("method", PLAIN)
def test_the_other_adapters_and_modules_trained_in_full(method: str, tmp_path: Path) -> None:
    """Trained tokens and heads go along; a second adapter and the base stay as they are."""
    settings = {"trainable_token_indices": [5], "modules_to_save": ["lm_head"]}
    for name, seed in (("one", 1), ("two", 2)):
        model = get_peft_model(LLAMA.build(), config(method, **settings))
        ready(model, seed=seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key or "trainable_tokens_delta" in key:
                    parameter.mul_(seed + 1)
        model.save_pretrained(tmp_path / name)
    batch = {**BATCH, "input_ids": BATCH["input_ids"].clone()}
    batch["input_ids"][:, 2] = 5
    expected = output(load(tmp_path, "two"), batch)
    model = load(tmp_path)
    loraplex.add_adapter(model, "other", config("multilora"))
    ready(model, "other")
    model.set_adapter("other")
    other = output(model, batch)
    loraplex.hotswap(model, tmp_path / "two")
    assert torch.equal(output(model, batch), other)
    model.set_adapter("default")
    assert torch.equal(output(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(output(model, batch), output(LLAMA.build(), batch))


@pytest.mark.parametrize("method", PLAIN)
def test_an_adapter_of_a_transformers_model(method: str, tmp_path: Path) -> None:
    first, second = pair(tmp_path, method)
    model = LLAMA.build()
    model.load_adapter(str(tmp_path / "one"), adapter_name="served")
    model.eval()
    for name, expected in (("two", second), ("one", first)):
        loraplex.hotswap(model, tmp_path / name, "served")
        assert torch.equal(output(model, BATCH), expected)


def test_training_goes_on_with_the_new_adapter_s_schedule(tmp_path: Path) -> None:
    """Its map, its settings, and no averages of the old factors."""
    pair(tmp_path, "aslora")
    model = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "one", is_trainable=True)
    loraplex.hotswap(model, tmp_path / "two")
    assert h.shared_state(model).config is model.peft_config["default"]
    assert model.peft_config["default"].num_merges == TRAINING["aslora"]["num_merges"]
    assert model.peft_config["default"].inference_mode is False
    fresh = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "two", is_trainable=True)
    assert h.shared_state(model).maps == h.shared_state(fresh).maps


# Compiled


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return sum(counters["stats"][key] for key in ("unique_graphs",))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("alpha", [6, 10])
@pytest.mark.parametrize("method", PLAIN)
def test_a_compiled_model_is_not_compiled_anew(method: str, alpha: int, tmp_path: Path) -> None:
    """Where ranks agree; with another alpha after `prepare_model_for_compiled_hotswap`, as for LoRA."""
    first, second = pair(tmp_path, method, lora_alpha=alpha)
    model = load(tmp_path)
    if alpha != 6:
        peft_hotswap.prepare_model_for_compiled_hotswap(model)
        assert torch.allclose(output(model, BATCH), first, rtol=1e-5, atol=1e-6)
    compiled: Any = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(output(compiled, BATCH), first, rtol=1e-5, atol=1e-5)
        before = graphs()
        assert before > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name, expected in (("two", second), ("one", first)):
                loraplex.hotswap(compiled, tmp_path / name)
                torch.testing.assert_close(output(compiled, BATCH), expected, rtol=1e-5, atol=1e-5)
        assert graphs() == before


@pytest.mark.parametrize("method", PLAIN)
def test_prepared_models_merge_save_and_export(method: str, tmp_path: Path) -> None:
    """A scaling that is a tensor is worth the same number everywhere."""
    pair(tmp_path, method, lora_alpha=10)
    model = load(tmp_path)
    peft_hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    loraplex.hotswap(model, tmp_path / "two")
    layer = next(iter(h.layers_of(model).values()))
    expected_scaling = model.peft_config["default"].scaling(layer.module_name)
    assert f"scaling={expected_scaling:g}" in repr(layer)
    if method != "masa-router":
        expected = load(tmp_path, "two").merge_and_unload()
        merged = model.merge_and_unload()
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


# What can't be swapped


def unlike(method: str) -> dict[str, tuple[dict[str, Any], str]]:
    own = {
        "multilora": ({"num_modules": 3}, "num_modules is 2 in the adapter that is there, and 3"),
        "aslora": ({"lora_dropout": 0.5}, "lora_dropout is 0.0"),
        "dual_lora": ({"compute": "apart"}, "compute is 'auto'"),
        "masa-router": ({"share_layers": 3}, "share_layers is 2"),
    }[method]
    return {
        "ranks": ({"r": 6, **({"r_magnitude": None} if method == "dual_lora" else {})}, "r=4 and r=6 on .*set_adapter"),
        "own": own,
        "modules": ({"target_modules": ["q_proj"]}, "lack|place for"),
        "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is None"),
    }


@pytest.mark.parametrize("difference", ["ranks", "own", "modules", "tokens"])
@pytest.mark.parametrize("method", PLAIN)
def test_unlike_adapters_are_refused_and_nothing_changes(method: str, difference: str, tmp_path: Path) -> None:
    settings, message = unlike(method)[difference]
    saved(tmp_path / "one", method, 1)
    saved(tmp_path / "two", method, 2, **settings)
    _refused(load(tmp_path), tmp_path / "two", message)


def _refused(model: nn.Module, folder: Path, message: str) -> None:
    before = h.snapshot(model, BATCH)
    settings = {name: each.to_dict() for name, each in model.peft_config.items()}
    with pytest.raises(ValueError, match=message):
        loraplex.hotswap(model, folder)
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    assert settings == {name: each.to_dict() for name, each in model.peft_config.items()}


@pytest.mark.parametrize("method", PLAIN)
def test_other_methods_merged_adapters_and_broken_files(method: str, tmp_path: Path) -> None:
    pair(tmp_path, method)
    other = PLAIN[(PLAIN.index(method) + 1) % len(PLAIN)]
    saved(tmp_path / "other", other, 3)
    _refused(load(tmp_path), tmp_path / "other", "Incompatible PEFT types found.*loraplex.load_adapter")
    if method != "masa-router":
        merged = load(tmp_path)
        merged.merge_adapter()
        _refused(merged, tmp_path / "two", r"merged into the base weights: call unmerge_adapter\(\)")
    with pytest.raises(ValueError, match="no adapter 'absent' to swap, only"):
        loraplex.hotswap(load(tmp_path), tmp_path / "two", "absent")
    get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    _refused(load(tmp_path), tmp_path / "lora", "'LORA' adapter, none of loraplex")
    tensors = h.file_tensors(tmp_path / "two")
    lost = sorted(tensors)[-1]
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / "two/adapter_model.safetensors"
    )
    _refused(load(tmp_path), tmp_path / "two", "lack")


@pytest.mark.parametrize("method", PLAIN)
def test_a_failure_half_way_is_undone(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it, after the tensors are in place too."""
    pair(tmp_path, method, lora_alpha=10)
    model = load(tmp_path)
    before, state = h.snapshot(model, BATCH), {k: t.clone() for k, t in model.state_dict().items()}
    old = model.peft_config["default"]

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loraplex.tuner.hotswap._set_scaling", stop)
    with pytest.raises(KeyboardInterrupt):
        loraplex.hotswap(model, tmp_path / "two")
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    h.assert_same(state, model.state_dict())
    assert model.peft_config["default"] is old


@pytest.mark.parametrize("method", PLAIN)
def test_preparing_what_can_not_be_prepared(method: str) -> None:
    model = h.adapted(method)
    with pytest.raises(ValueError, match=r"target_rank=16, but r=4 on .*can't be padded"):
        peft_hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)
    with pytest.raises(ValueError, match="before compiling"):
        peft_hotswap.prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"))
    with pytest.raises(ValueError, match=r"loraplex\.hotswap\(model, folder"):
        peft_hotswap.hotswap_adapter_from_state_dict(model, {}, "default", model.peft_config["default"])


def test_lora_is_swapped_as_before(tmp_path: Path) -> None:
    """PEFT's functions pass other adapters on to PEFT's own code."""
    models = []
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        models.append(get_peft_model(LLAMA.build(), settings).eval())
        models[-1].save_pretrained(tmp_path / name)
    model = load(tmp_path)
    peft_hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    peft_hotswap.hotswap_adapter(model, str(tmp_path / "two"), "default")
    torch.testing.assert_close(output(model, BATCH), output(models[1], BATCH))
