"""Only what belongs to an adapter is loaded, and only in a state that the method can be in, by every way of loading."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

import helpers as h
import loraplex
from helpers import ARCHS, PLAIN, adapted, config, output, ready
from loraplex.inspection.describe import describe

# PEFT warns of every second adapter on a transformers model.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()
every_plain = pytest.mark.parametrize("method", PLAIN)


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def edited(method: str, folder: Path, change: Callable[[dict[str, Tensor]], Any], **settings: Any) -> Path:
    """A saved adapter whose tensors were changed."""
    adapted(method, **settings).save_pretrained(folder)
    tensors = h.file_tensors(folder)
    change(tensors)
    write(tensors, folder)
    return folder


def native_host() -> Any:
    model: Any = LLAMA.build()
    model.add_adapter(config("multilora"), "one")
    ready(model, "one")
    return model.train()


Way = tuple[Callable[[], Any], Callable[[Any, Path], Any]]
WAYS: dict[str, Way] = {
    "from_pretrained": (LLAMA.build, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "PeftModel.load_adapter": (lambda: adapted("multilora").train(), lambda m, folder: of_its_kind(m, folder)),
    "loraplex.load_adapter": (
        lambda: adapted("masa-router").train(),
        lambda model, folder: loraplex.load_adapter(model, folder, "second"),
    ),
    "native": (LLAMA.build, lambda model, folder: model.load_adapter(str(folder), "mine")),
    "native second": (native_host, lambda model, folder: model.load_adapter(str(folder), "second")),
    "native, tensors": (
        LLAMA.build,
        lambda model, folder: model.load_adapter(
            adapter_name="mine", peft_config=settings_of(folder), adapter_state_dict=h.file_tensors(folder)
        ),
    ),
}
every_way = pytest.mark.parametrize("way", WAYS)


def settings_of(folder: Path) -> Any:
    from peft import PeftConfig

    return PeftConfig.from_pretrained(folder)


def of_its_kind(model: PeftModel, folder: Path) -> Any:
    """PeftModel's own method, which wants the type of the first adapter."""
    model.peft_type = settings_of(folder).peft_type
    try:
        return model.load_adapter(folder, "second")
    finally:
        model.peft_type = model.peft_config["default"].peft_type


def refused(way: str, folder: Path, message: str) -> None:
    """The load ends in this error, and the model is as it was: outputs, keys, types, modes."""
    make, load = WAYS[way]
    model = make()
    before = h.snapshot(model, BATCH)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load(model, folder)
    h.assert_same(dict(model.state_dict()), state)
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    assert not any(name.endswith("_factors") and len(m) == 0 for name, m in model.named_modules() if m._modules == {})


# Schedules

MAPS: dict[str, tuple[list[list[int]], str]] = {
    "negative": ([[-1, 1, 2, 3, 4], [1, 0, 0, 0, 0]], "layer 0 reads the B of layer -1"),
    "out of range": ([[0, 1, 2, 3, 5], [0, 0, 0, 0, 0]], "layer 4 reads the B of layer 5"),
    "huge": ([[2**62, 1, 2, 3, 4], [1, 0, 0, 0, 0]], "layer 0 reads"),
    "chained": ([[1, 2, 2, 3, 4], [1, 2, 0, 0, 0]], "layer 0 reads the B of layer 1"),
    "cyclic": ([[1, 0, 2, 3, 4], [1, 1, 0, 0, 0]], "layer 0 reads the B of layer 1"),
    "downwards": ([[0, 0, 2, 3, 4], [0, 1, 0, 0, 0]], "layer 1 reads the B of layer 0"),
    "no step": ([[1, 1, 2, 3, 4], [0, 0, 0, 0, 0]], "since step 0"),
    "a step too many": ([[0, 1, 2, 3, 4], [3, 0, 0, 0, 0]], "layer 0 reads the B of layer 0 since step 3"),
    "negative step": ([[1, 1, 2, 3, 4], [-3, 0, 0, 0, 0]], "since step -3"),
    "negative count": ([[0, 1, 2, 3, 4], [0, 0, 0, 0, -1]], "since step -1"),
}
WARMUPS: dict[str, tuple[list[int], str]] = {
    "negative": ([-5, 10], "-5 of 10 steps are done"),
    "past the end": ([11, 10], "11 of 10 steps are done"),
    "negative length": ([0, -1], "0 of -1 steps"),
    "of an unknown length": ([3, 0], "3 of 0 steps are done"),
}
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda t: t.float(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "a scalar": lambda t: t.flatten()[0],
    "flat": lambda t: t.flatten().repeat(2),
    "one more dimension": lambda t: t.unsqueeze(0),
    "empty": lambda t: t[..., :0],
    "longer": lambda t: torch.cat([t, t], -1),
}
STATES = {"aslora": "merges", "dual_lora": "warmup"}


def set_state(method: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if key.endswith(STATES[method]))
        tensors[key] = value(tensors[key]).contiguous()

    return change


@every_way
@pytest.mark.parametrize("name", MAPS)
def test_merge_maps(name: str, way: str, tmp_path: Path) -> None:
    value, message = MAPS[name]
    refused(way, edited("aslora", tmp_path, set_state("aslora", lambda _: torch.tensor(value))), message)


@every_way
@pytest.mark.parametrize("name", WARMUPS)
def test_warmups(name: str, way: str, tmp_path: Path) -> None:
    value, message = WARMUPS[name]
    refused(way, edited("dual_lora", tmp_path, set_state("dual_lora", lambda _: torch.tensor(value))), message)


@every_way
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", STATES)
def test_states_of_another_shape_or_dtype(method: str, kind: str, way: str, tmp_path: Path) -> None:
    refused(way, edited(method, tmp_path, set_state(method, SHAPES[kind])), rf"{STATES[method]} is .*(here|model)")


BROKEN = {"aslora": torch.tensor(MAPS["cyclic"][0]), "dual_lora": torch.tensor(WARMUPS["negative"][0])}


@pytest.mark.parametrize("method", STATES)
def test_states_set_without_a_file(method: str) -> None:
    """A checkpoint's state dict, and PEFT's own function: nothing of it is taken."""
    model, other = adapted(method), adapted(method)
    h.fill(other, seed=5)
    for key, tensor in h.shared_state(other).named_buffers():
        tensor.copy_(BROKEN[method])
        assert key.endswith(STATES[method])
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match="the file is broken"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="the file is broken"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    h.assert_unchanged(before, h.snapshot(model, BATCH))
    h.shared_state(other).load_state_dict(h.shared_state(model).state_dict())
    assert torch.equal(output(model.train(), BATCH), output(model.eval(), BATCH))


def test_resume_with_a_broken_state(tmp_path: Path) -> None:
    """A trainer loads a checkpoint over the adapter in place."""
    model = adapted("aslora").train()
    folder = edited("aslora", tmp_path, set_state("aslora", lambda _: BROKEN["aslora"]))
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match="the file is broken"):
        model.load_adapter(folder, "default", is_trainable=True)
    h.assert_unchanged(before, h.snapshot(model, BATCH))


@pytest.mark.parametrize("method", STATES)
def test_inspecting_a_broken_state(method: str, tmp_path: Path) -> None:
    folder = edited(method, tmp_path, set_state(method, lambda _: BROKEN[method]))
    with pytest.raises(ValueError, match="the file is broken"):
        describe(folder)


def test_states_of_today_load(tmp_path: Path) -> None:
    """Fresh, in the middle, at the end, and of a weighted sum."""
    model = get_peft_model(LLAMA.build(), config("aslora"))
    for steps in range(4):
        model.save_pretrained(tmp_path / str(steps))
        again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / str(steps))
        h.assert_same(dict(h.shared_state(again).named_buffers()), dict(h.shared_state(model).named_buffers()))
        h.advance(model, steps=1)
    model.add_adapter("other", config("aslora", r=2))
    ready(model, "other", seed=3)
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    model.save_pretrained(tmp_path / "sum", selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "sum" / "sum")
    model.set_adapter("sum")
    assert torch.equal(output(loaded, BATCH), output(model.eval(), BATCH))
    dual = get_peft_model(LLAMA.build(), config("dual_lora", warmup_steps=0.5))
    dual.save_pretrained(tmp_path / "dual")
    PeftModel.from_pretrained(LLAMA.build(), tmp_path / "dual")


def test_warmup_of_a_run_that_became_shorter(tmp_path: Path) -> None:
    """It is at its end then, and can be loaded."""
    model = get_peft_model(LLAMA.build(), config("dual_lora", warmup_steps=0.5)).train()
    loraplex.set_total_steps(model, 20)
    h.advance(model, steps=7)
    loraplex.set_total_steps(model, 10)
    h.advance(model, steps=1)
    assert h.shared_state(model).warmup.tolist() == [8, 8]
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(LLAMA.build(), tmp_path)


# Tensors that belong to something else

EXTRA = {
    "head": ("base_model.model.lm_head.weight", "lm_head.weight.*belong to the base model.*modules_to_save.*'lm_head'"),
    "embedding": ("base_model.model.model.embed_tokens.weight", "embed_tokens.weight.*belong to the base model"),
    "norm": ("base_model.model.model.norm.weight", "norm.weight.*belong to the base model"),
    "adapted weight": (
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        r"q_proj\.base_layer\.weight.*belong to the base model",
    ),
    "other weight": ("base_model.model.model.layers.0.mlp.up_proj.weight", r"up_proj\.weight.*belong to the base"),
    "unknown": ("base_model.model.nowhere", "nowhere, which this model has no place for"),
    "no name": ("base_model.model.", "no place for"),
    "bias": ("base_model.model.model.layers.0.self_attn.q_proj.bias", "no place for"),
    "another bank": ("base_model.model.loraplex_bank.extra", "no place for"),
}
SHAPE_OF = {"head": (h.VOCAB, h.HIDDEN), "embedding": (h.VOCAB, h.HIDDEN), "norm": (h.HIDDEN,)}


@every_way
@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_extra_tensors(method: str, kind: str, way: str, tmp_path: Path) -> None:
    key, message = EXTRA[kind]
    shape = {"adapted weight": (h.HIDDEN, h.HIDDEN), "other weight": (h.INNER, h.HIDDEN), **SHAPE_OF}.get(kind, (3,))
    refused(way, edited(method, tmp_path, lambda tensors: tensors.update({key: torch.full(shape, 2.0)})), message)


@every_plain
def test_another_adapter_s_tensors(method: str, tmp_path: Path) -> None:
    """A key with an adapter's name in it would go to that adapter."""
    model = adapted(method)

    def twist(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if "_factors." in key or "_shared." in key)
        for mark in ("_factors.", "_shared."):
            twin = key.replace(mark, f"{mark}default.")
        tensors[twin if twin != key else key.replace("_factors.", "_factors.default.")] = tensors[key] * 100

    edited(method, tmp_path, twist)
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match=r"belong to the base model or to another adapter|twice"):
        loraplex.load_adapter(model, tmp_path, "second")
    h.assert_unchanged(before, h.snapshot(model, BATCH))


def test_a_tensor_twice(tmp_path: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key.replace("_factors.", "_factors.default.")] = tensors[key] * 2

    folder = edited("multilora", tmp_path, twice)
    with pytest.raises(ValueError, match="twice"):
        PeftModel.from_pretrained(LLAMA.build(), folder)


@pytest.mark.parametrize("same", [True, False])
def test_a_module_in_full_twice(same: bool, tmp_path: Path) -> None:
    """PEFT saves some of them a second time, under the name that they have in the model."""
    key = "base_model.model.lm_head.weight"

    def twice(tensors: dict[str, Tensor]) -> None:
        tensors[key.replace("weight", "modules_to_save.default.weight")] = tensors[key] + (0 if same else 1)

    folder = edited("multilora", tmp_path, twice, modules_to_save=["lm_head"])
    if same:
        PeftModel.from_pretrained(LLAMA.build(), folder)
    else:
        refused("from_pretrained", folder, r"lm_head\.weight twice, with different values")


def test_set_peft_model_state_dict_takes_no_other_tensors() -> None:
    model = adapted("multilora")
    state = {**get_peft_model_state_dict(model), "base_model.model.lm_head.weight": torch.zeros(h.VOCAB, h.HIDDEN)}
    before = h.snapshot(model, BATCH)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*belong to the base model"):
        set_peft_model_state_dict(model, state)
    h.assert_unchanged(before, h.snapshot(model, BATCH))


FULL = {
    "head": {"modules_to_save": ["classifier"]},
    "biases": {"bias": "all"},
    "adapted biases": {"bias": "lora_only"},
    "head and biases": {"modules_to_save": ["classifier"], "bias": "all"},
    "classifier": {"task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("what", FULL)
@every_plain
def test_what_was_trained_in_full_loads(method: str, what: str, tmp_path: Path) -> None:
    arch = ARCHS["roberta"]
    settings = config(method, target_modules=arch.targets, **FULL[what])
    model = get_peft_model(arch.build(), settings)
    ready(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    expected = output(model.eval(), arch.inputs())
    assert torch.equal(output(PeftModel.from_pretrained(arch.build(), tmp_path), arch.inputs()), expected)
    native: Any = arch.build()
    native.load_adapter(str(tmp_path))
    torch.testing.assert_close(output(native.eval(), arch.inputs()), expected)


@pytest.mark.parametrize("what", ["biases", "adapted biases"])
def test_a_trained_bias_that_is_missing(what: str, tmp_path: Path) -> None:
    arch = ARCHS["roberta"]
    model = get_peft_model(arch.build(), config("multilora", target_modules=arch.targets, **FULL[what]))
    model.save_pretrained(tmp_path)
    tensors = h.file_tensors(tmp_path)
    del tensors[next(key for key in sorted(tensors) if "query" in key and key.endswith(".bias"))]
    write(tensors, tmp_path)
    with pytest.raises(ValueError, match=r"lack .*query.*\.bias.*incomplete"):
        PeftModel.from_pretrained(arch.build(), tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapted_head_s_base_weight_loads(tmp_path: Path) -> None:
    """PEFT saves the base weight of a head that is a target."""
    model = adapted("multilora", target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in h.file_tensors(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert torch.equal(output(loaded, BATCH), output(model, BATCH))


def resized(folder: Path) -> Any:
    """A model from a checkpoint, with a larger vocabulary."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(h.VOCAB + 3, mean_resizing=False)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("in_full", [None, ["embed_tokens", "lm_head"]])
def test_embeddings_of_a_resized_vocabulary_load(in_full: list[str] | None, tmp_path: Path) -> None:
    """PEFT saves them without being asked; the same model, resized the same, takes them."""
    LLAMA.build().save_pretrained(tmp_path / "base")
    model = get_peft_model(resized(tmp_path / "base"), config("multilora", modules_to_save=in_full))
    ready(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    assert any("embed_tokens" in key for key in h.file_tensors(tmp_path / "adapter"))
    expected = output(model.eval(), BATCH)
    loaded = PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(output(loaded, BATCH), expected)
    # On a model that was not resized they have no business.
    with pytest.raises(ValueError, match=r"embed_tokens|lm_head"):
        PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter")


def test_embeddings_that_change_nothing_load(tmp_path: Path) -> None:
    model = adapted("multilora")
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in h.file_tensors(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert torch.equal(output(loaded, BATCH), output(model, BATCH))


def test_the_remedy_for_foreign_tensors_helps(tmp_path: Path) -> None:
    """Named in modules_to_save, a head is loaded as the adapter's own copy; the base keeps its own."""
    import json

    edited(
        "multilora", tmp_path, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(h.VOCAB, h.HIDDEN)})
    )
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": ["lm_head"]}))
    model = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    own = output(model, BATCH)
    assert not torch.equal(own, output(adapted("multilora"), BATCH))
    with model.disable_adapter():
        assert torch.equal(output(model, BATCH), output(LLAMA.build(), BATCH))


# Kinds and values


@every_way
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.complex64])
@every_plain
def test_factors_that_are_not_floating_point(method: str, dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if "lora_" in key and "warmup" not in key)
        tensors[key] = tensors[key].to(dtype)

    refused(way, edited(method, tmp_path, cast), rf"lora_.* is {dtype} in the adapter's weights")


@every_way
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_plain
def test_nonfinite_factors_are_announced(
    method: str, bad: float, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in sorted(tensors) if "lora_" in key and "warmup" not in key][:2]:
            tensors[key].view(-1)[0] = bad

    folder = edited(method, tmp_path, spoil)
    make, load = WAYS[way]
    with caplog.at_level(logging.WARNING, "loraplex"):
        load(make(), folder)
    (line,) = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert "q_proj" in line
    assert "\n" not in line
    caplog.clear()
    adapted(method).save_pretrained(tmp_path / "good")
    with caplog.at_level(logging.WARNING, "loraplex"):
        load(make(), tmp_path / "good")
    assert not [record for record in caplog.records if "NaN" in record.getMessage()]


# What a config asks for is checked before it is allocated


@pytest.mark.parametrize("way", ["from_pretrained", "loraplex.load_adapter", "native"])
@every_plain
def test_nothing_of_the_config_s_size_is_made(method: str, way: str, tmp_path: Path) -> None:
    """A file of a few kilobytes whose config asks for more than it holds."""
    adapted(method).save_pretrained(tmp_path)
    changed = {"r": 30, "r_magnitude": None, "r_direction": None} if method == "dual_lora" else {"r": 30}
    edit_settings(tmp_path, **changed)
    make, load = WAYS[way]
    model = make()
    with h.Watch() as watch, pytest.raises(ValueError, match=r"\(.*\) in the adapter's weights and \("):
        load(model, tmp_path)
    real = [shape for shape, name in watch.sizes.items() if 30 in shape and "empty" not in name and "meta" not in name]
    assert watch.meta or not real
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize("way", ["from_pretrained", "native", "native, tensors"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@every_plain
def test_nonfinite_biases_are_announced(
    method: str, bias: str, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained biases are the base model's own parameters: their names say nothing of an adapter."""
    arch = ARCHS["roberta"]
    get_peft_model(arch.build(), config(method, target_modules=arch.targets, bias=bias)).save_pretrained(tmp_path)
    tensors = h.file_tensors(tmp_path)
    tensors[next(key for key in sorted(tensors) if "query" in key and key.endswith(".bias"))][0] = math.nan
    write(tensors, tmp_path)
    with caplog.at_level(logging.WARNING, "loraplex"):
        WAYS[way][1](arch.build(), tmp_path)
    assert [record for record in caplog.records if "NaN" in record.getMessage()]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_plain
def test_what_was_trained_in_full_takes_the_model_s_dtype(method: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    arch = ARCHS["roberta"]
    settings = config(method, target_modules=arch.targets, bias="lora_only", modules_to_save=["classifier"])
    get_peft_model(arch.build(), settings).save_pretrained(tmp_path)
    tensors = h.file_tensors(tmp_path)
    full = [key for key in tensors if key.endswith(".bias") or "classifier" in key]
    write({**tensors, **{key: tensors[key].bfloat16() for key in full}}, tmp_path)
    model = PeftModel.from_pretrained(arch.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert output(model.eval(), arch.inputs()).isfinite().all()


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
@every_plain
def test_a_file_that_lacks_what_was_trained_in_full(method: str, way: str, tmp_path: Path) -> None:
    """Under another name, so that PEFT is the first to miss it."""
    arch = ARCHS["llama"]
    settings = config(method, target_modules=arch.targets, modules_to_save=["lm_head"])
    host = get_peft_model(arch.build(), settings)
    host.save_pretrained(tmp_path)
    tensors = h.file_tensors(tmp_path)
    key = "base_model.model.lm_head.weight"
    write({k if k != key else "lm_head.weight": tensor for k, tensor in tensors.items()}, tmp_path)
    load = {
        "from_pretrained": lambda: PeftModel.from_pretrained(arch.build(), tmp_path),
        "load_adapter": lambda: host.load_adapter(tmp_path, "second"),
    }[way]
    with pytest.raises(ValueError, match=f"lacks '{key}', which was trained in full"):
        load()
    assert list(host.peft_config) == ["default"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_plain
def test_factors_of_several_dtypes(method: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    arch = ARCHS["llama"]
    model = get_peft_model(arch.build(), config(method, target_modules=arch.targets))
    ready(model)
    model.save_pretrained(tmp_path)
    tensors = h.file_tensors(tmp_path)
    first = next(key for key in tensors if "lora_A" in key)
    write({**tensors, first: tensors[first].double()}, tmp_path)
    loaded = PeftModel.from_pretrained(arch.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert len({p.dtype for p in h.adapter_parameters(loaded).values()}) == 1
    expected = output(model.eval(), arch.inputs())
    torch.testing.assert_close(output(loaded.eval(), arch.inputs()), expected, atol=1e-5, rtol=1e-4)


# Messages, and modules that can't be trained in full


@every_way
@pytest.mark.parametrize("what", ["tensors", "targets", "base model"])
def test_messages_are_short(what: str, way: str, tmp_path: Path) -> None:
    """A file chooses its names; a message lists a few, and of each the beginning."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"base_model.model.{n}{'x' * 5000}": torch.ones(2) for n in range(9)})

    folder = edited("aslora", tmp_path, add if what != "targets" else lambda tensors: None)
    if what != "tensors":
        changed = {"target_modules": "x" * 5000} if what == "targets" else {"base_model_name_or_path": "x" * 5000}
        edit_settings(folder, **changed)
    make, load = WAYS[way]
    with pytest.raises(ValueError, match=r"and 4 more" if what == "tensors" else "xxx") as caught:
        load(make(), folder)
    assert len(str(caught.value)) <= 3000


@every_way
@pytest.mark.parametrize("name", ["ayers", "s", "_factors"])
def test_lists_of_modules_can_t_be_trained_in_full(name: str, way: str, tmp_path: Path) -> None:
    """PEFT takes a name for the end of others: "ayers" is the end of "layers", and "_factors" of what we add."""
    folder = edit_settings(edited("multilora", tmp_path, lambda tensors: None), modules_to_save=[name])
    tensors = h.file_tensors(folder)
    write({**tensors, "base_model.model.in_full": torch.ones(1)}, folder)
    refused(way, folder, rf"modules_to_save=\['{name}'\] names more than modules that can be trained in full")


def edit_settings(folder: Path, **changed: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return folder


def test_a_byte_order_mark(tmp_path: Path) -> None:
    """PEFT reads the settings a second time, and does not take one."""
    folder = edited("masa-concat", tmp_path, lambda tensors: None)
    file = folder / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    refused("loraplex.load_adapter", folder, "begins with a byte order mark")


@every_plain
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=str)
def test_factors_of_eight_bits(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """torch copies them, but can't tell whether they are finite, and transformers would load them unseen."""

    def narrow(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[key] = tensor.to(dtype)

    folder = edited(method, tmp_path, narrow)
    for load in (lambda model: PeftModel.from_pretrained(model, folder), lambda model: model.load_adapter(str(folder))):
        with pytest.raises(ValueError, match="which are read in F64, F32, F16, BF16"):
            load(LLAMA.build())
