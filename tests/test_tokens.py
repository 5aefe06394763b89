"""`trainable_token_indices`: every method trains, saves, loads, merges and exports tokens as PEFT's LoRA does.

LoRA with the same setting on the same base is the reference: it stands beside each method in the same test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

import helpers as h
import loraplex
from helpers import ARCHS, PLAIN, assert_same, config, file_tensors, output, ready, relative, stock
from loraplex.export.merged import merge_checkpoint
from loraplex.inspection.budget import plan
from loraplex.inspection.describe import describe
from loraplex.tuner.tokens import TokenLayer, TokenWrapper, token_wrappers

TOKENS = [5, 7, 60]
MARK = "trainable_tokens_delta"
MERGEABLE = tuple("masa-sum" if method == "masa-router" else method for method in PLAIN)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "t5": ("t5", {"tie_word_embeddings": True}),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})


def pair(method: str, kind: str = "untied", **settings: Any) -> tuple[PeftModel, PeftModel]:
    """The same base with the method's adapter and with LoRA's, which train the same tokens."""
    arch, base = MODELS[kind]
    settings = {"target_modules": ARCHS[arch].targets, "trainable_token_indices": TOKENS, **settings}
    configs = config(method, **settings), lora(**settings)
    ours, theirs = (get_peft_model(ARCHS[arch].build(**base), each).eval() for each in configs)
    return ours, theirs


def tokens(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The trained rows by their names in the model."""
    return {name: p for name, p in model.named_parameters() if name.endswith(f"{MARK}.{adapter}")}


def train(model: nn.Module, adapter: str = "default", seed: int = 3) -> None:
    """Draw the rows afresh, the same for all models with the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in tokens(model, adapter).values():
            rows.copy_(torch.randn(rows.shape, generator=generator) * 0.3)


def inputs(kind: str = "untied") -> dict[str, Tensor]:
    """A batch in which the trained tokens occur."""
    batch = ARCHS[MODELS[kind][0]].inputs()
    batch["input_ids"][:, 1:4] = torch.tensor(TOKENS)
    return batch


# Training


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", PLAIN)
def test_the_same_rows_are_trained_and_give_the_same_outputs_and_gradients(method: str, kind: str) -> None:
    """At the start ΔW = 0, so that LoRA's model computes the same, gradients of the rows included."""
    models = pair(method, kind)
    rows = [tokens(model) for model in models]
    assert sorted(rows[0]) == sorted(rows[1])
    assert len(rows[0]) == 1
    for model in models:
        train(model)
    assert torch.equal(output(models[0], inputs(kind)), output(models[1], inputs(kind)))
    assert not torch.equal(
        output(models[0], inputs(kind)), output(ARCHS[MODELS[kind][0]].build(**MODELS[kind][1]), inputs(kind))
    )
    for model in models:
        model.train()
        model(**inputs(kind)).loss.backward()
    for name, ours in rows[0].items():
        theirs = rows[1][name]
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.requires_grad
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert trained == {*rows[0], *h.adapter_parameters(models[0])}


@pytest.mark.parametrize("method", PLAIN)
def test_a_name_for_each_embedding(method: str) -> None:
    """A mapping from module to tokens, with other rows for the head."""
    indices = {"embed_tokens": [3, 4], "lm_head": [9]}
    models = pair(method, trainable_token_indices=indices)
    for model in models:
        train(model)
    assert {name: tuple(p.shape) for name, p in tokens(models[0]).items()} == {
        f"base_model.model.model.embed_tokens.token_adapter.{MARK}.default": (2, h.HIDDEN),
        f"base_model.model.lm_head.token_adapter.{MARK}.default": (1, h.HIDDEN),
    }
    batch = ARCHS["llama"].inputs()
    batch["input_ids"][:, 2] = 3
    assert torch.equal(output(models[0], batch), output(models[1], batch))


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("method", PLAIN)
def test_other_rows_of_a_tied_head(method: str, ensure: bool) -> None:
    """Tied modules with equal rows stay tied; with other rows that is an error where tying must be ensured."""
    same = pair(
        method, "tied", trainable_token_indices={"embed_tokens": [3], "lm_head": [3]}, ensure_weight_tying=ensure
    )
    for model in same:
        assert len(tokens(model)) == 1
        train(model)
    assert torch.equal(output(same[0], inputs("tied")), output(same[1], inputs("tied")))
    other = {"embed_tokens": [3], "lm_head": [9]}
    if ensure:
        for settings in (config(method), lora()):
            settings.trainable_token_indices, settings.ensure_weight_tying = other, True
            with pytest.raises(ValueError, match="Cannot ensure weight tying when different token indices"):
                get_peft_model(ARCHS["llama"].build(tie_word_embeddings=True), settings)
        return
    models = pair(method, "tied", trainable_token_indices=other)
    for model in models:
        assert len(tokens(model)) == 2
        train(model)
    assert torch.equal(output(models[0], inputs("tied")), output(models[1], inputs("tied")))


@pytest.mark.parametrize("method", PLAIN)
def test_bfloat16_base_trains_float32_rows(method: str) -> None:
    """As LoRA's; a saved file holds them in float32, and loading does not round them."""
    models = []
    for each in (config(method, trainable_token_indices=TOKENS), lora(trainable_token_indices=TOKENS)):
        models.append(get_peft_model(ARCHS["llama"].build(tie_word_embeddings=True).bfloat16(), each).eval())
        train(models[-1])
    for rows in zip(*(tokens(model).values() for model in models), strict=True):
        assert [row.dtype for row in rows] == [torch.float32] * 2
    assert torch.equal(output(models[0], inputs()), output(models[1], inputs()))


# Saving and loading


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", PLAIN)
def test_saved_and_loaded(method: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(method, kind)
    ready(ours)
    for name, model in (("ours", ours), ("theirs", theirs)):
        train(model)
        model.save_pretrained(tmp_path / name)
    rows = [{k: t for k, t in file_tensors(tmp_path / name).items() if MARK in k} for name in ("ours", "theirs")]
    assert_same(*rows)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["trainable_token_indices"] == TOKENS
    arch, base = MODELS[kind]
    for settings in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(ARCHS[arch].build(**base), tmp_path / "ours", **settings).eval()
        assert_same(dict(tokens(loaded)), dict(tokens(ours)))
        assert torch.equal(output(loaded, inputs(kind)), output(ours, inputs(kind)))
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    about = describe(tmp_path / "ours")
    assert sum(about.fully_trained.values()) == len(TOKENS) * h.HIDDEN
    if method != "aslora":  # its merged B's are not in the file
        assert about.parameters == count


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("method", PLAIN)
def test_bfloat16_base_loads_rows_bit_for_bit(method: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return ARCHS["llama"].build().bfloat16()

    model = get_peft_model(base(), config(method, trainable_token_indices=TOKENS))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(dict(tokens(loaded)), dict(tokens(model)))


@pytest.mark.parametrize("method", PLAIN)
def test_a_file_without_the_rows_is_refused(method: str, tmp_path: Path) -> None:
    model = pair(method)[0]
    model.save_pretrained(tmp_path)
    rest = {key: tensor for key, tensor in file_tensors(tmp_path).items() if MARK not in key}
    save_file(rest, tmp_path / "adapter_model.safetensors")
    base = ARCHS["llama"].build()
    before = h.snapshot(base, inputs())
    with pytest.raises(ValueError, match=f"lack .*{MARK}"):
        PeftModel.from_pretrained(base, tmp_path)
    h.assert_unchanged(before, h.snapshot(base, inputs()))


@pytest.mark.parametrize("method", PLAIN)
def test_resized_vocabulary(method: str, tmp_path: Path) -> None:
    """PEFT saves a resized embedding with the adapter: new tokens are there when both are loaded onto the old base."""
    base = ARCHS["llama"].build()
    base.save_pretrained(tmp_path / "base")

    def resized() -> nn.Module:
        torch.manual_seed(0)
        model = ARCHS["llama"].auto.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(h.VOCAB + 3, mean_resizing=False)
        return model.eval()

    new = [h.VOCAB, h.VOCAB + 2]
    outputs, batch = {}, ARCHS["llama"].inputs()
    batch["input_ids"][:, 1:3] = torch.tensor(new)
    for name, each in (("ours", config(method)), ("theirs", lora())):
        each.trainable_token_indices = new
        model = get_peft_model(resized(), each).eval()
        train(model)
        with pytest.warns(UserWarning, match="has been resized"):
            model.save_pretrained(tmp_path / name)
        outputs[name] = output(model, batch)
        loaded = PeftModel.from_pretrained(resized(), tmp_path / name).eval()
        assert torch.equal(output(loaded, batch), outputs[name])
    assert torch.equal(outputs["ours"], outputs["theirs"])


# Merging


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_as_lora_merges(method: str, kind: str, safe_merge: bool) -> None:
    """At the start ΔW = 0: the merged checkpoints are equal bit for bit, names and ties included."""
    models = pair(method, kind)
    for model in models:
        train(model)
    expected = output(models[0], inputs(kind))
    ours, theirs = (model.merge_and_unload(safe_merge=safe_merge) for model in models)
    assert torch.equal(output(ours, inputs(kind)), expected)
    assert_same(ours.state_dict(), theirs.state_dict())
    heads = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (ours, theirs)]
    assert heads[0] == heads[1] == (kind != "untied")


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_and_unmerged(method: str, kind: str) -> None:
    model = pair(method, kind)[0]
    ready(model)
    train(model)
    before, expected = h.base_weights(model), output(model, inputs())
    model.merge_adapter()
    assert relative(output(model, inputs()), expected) < 1e-5
    model.unmerge_adapter()
    assert_same(h.base_weights(model), before)
    assert torch.equal(output(model, inputs()), expected)


@pytest.mark.parametrize("method", MERGEABLE)
def test_rows_with_nan_are_not_merged(method: str) -> None:
    model = pair(method)[0]
    with torch.no_grad():
        next(iter(tokens(model).values()))[0, 0] = torch.nan
    before = h.base_weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaN or Inf on model\.embed_tokens \(trained tokens\)"):
            merge()
        assert not any(m.merged for m in h.layers_of(model).values())
    rows = [name for name in before if MARK in name]
    after = h.base_weights(model)
    assert_same({k: t for k, t in before.items() if k not in rows}, {k: t for k, t in after.items() if k not in rows})


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_file_by_file(method: str, kind: str, tmp_path: Path) -> None:
    """`loraplex export --format merged` writes what merging in memory gives, and keeps tied weights tied."""
    arch, base = MODELS[kind]
    plain = ARCHS[arch].build(**base)
    plain.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    settings = {"target_modules": ARCHS[arch].targets, "trainable_token_indices": TOKENS}
    model = get_peft_model(plain, config(method, **settings)).eval()
    ready(model)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    with torch.device("meta"):
        skeleton = ARCHS[arch].auto.from_config(AutoConfig.from_pretrained(tmp_path / "base"))
    skeleton = PeftModel.from_pretrained(skeleton, tmp_path / "adapter", low_cpu_mem_usage=True)
    merge_checkpoint(skeleton, tmp_path / "base", tmp_path / "out")
    merged, report = ARCHS[arch].auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert merged.config.tie_word_embeddings == (kind != "untied")
    expected = model.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", MERGEABLE)
def test_other_rows_of_a_tied_head_untie_a_merged_checkpoint(method: str, tmp_path: Path) -> None:
    base = ARCHS["llama"].build(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(method, trainable_token_indices={"embed_tokens": [5], "lm_head": [9]})).eval()
    train(model)
    expected = output(model, inputs())
    model.save_pretrained(tmp_path / "adapter")
    with torch.device("meta"):
        skeleton = ARCHS["llama"].auto.from_config(AutoConfig.from_pretrained(tmp_path / "base"))
    skeleton = PeftModel.from_pretrained(skeleton, tmp_path / "adapter", low_cpu_mem_usage=True)
    merge_checkpoint(skeleton, tmp_path / "base", tmp_path / "out")
    merged = ARCHS["llama"].auto.from_pretrained(tmp_path / "out").eval()
    assert merged.config.tie_word_embeddings is False
    assert relative(output(merged, inputs()), expected) < 1e-6


# Export


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["multilora", "aslora", "dual_lora", "masa-sum"])
def test_plain_lora_for_peft_carries_the_rows(method: str, kind: str, tmp_path: Path) -> None:
    arch, base = MODELS[kind]
    model = pair(method, kind)[0]
    if method != "dual_lora":
        ready(model)
    train(model)
    rank = h.HIDDEN if method == "dual_lora" else None
    loraplex.export_lora(model, tmp_path / "peft", engine="peft", rank=rank)
    assert h.lora_config(tmp_path / "peft")["trainable_token_indices"] == TOKENS
    loaded = stock(tmp_path / "peft", arch, **base)
    assert_same(dict(tokens(loaded)), dict(tokens(model)))
    assert relative(output(loaded, inputs(kind)), output(model, inputs(kind))) < 1e-5


@pytest.mark.parametrize("engine", ["portable", "vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-sum"])
def test_servers_refuse_the_rows_by_name(method: str, engine: str, tmp_path: Path) -> None:
    model = pair(method)[0]
    with pytest.raises(ValueError, match=rf"rows of them.*embed_tokens\.token_adapter\.{MARK}.*--engine peft"):
        loraplex.export_lora(model, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


# Several adapters


@pytest.mark.parametrize("second", ["same tokens", "other tokens", "no tokens"])
@pytest.mark.parametrize("method", PLAIN)
def test_a_second_adapter(method: str, second: str, tmp_path: Path) -> None:
    """Of another method too: each adapter is computed, saved and mixed as if it were alone."""
    chosen = {"same tokens": TOKENS, "other tokens": [5, 11], "no tokens": None}[second]
    other = PLAIN[(PLAIN.index(method) + 1) % len(PLAIN)]
    model = pair(method, "tied")[0]
    loraplex.add_adapter(model, "second", config(other, trainable_token_indices=chosen))
    for name, seed in (("default", 3), ("second", 4)):
        ready(model, name, seed)
        train(model, name, seed)
    model.eval()
    batch = inputs("tied")
    alone = {}
    for name, kind in (("default", method), ("second", other)):
        model.set_adapter(name)
        alone[name] = output(model, batch)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        folder = tmp_path if name == "default" else tmp_path / name
        loaded = PeftModel.from_pretrained(ARCHS["llama"].build(tie_word_embeddings=True), folder).eval()
        assert torch.equal(output(loaded, batch), alone[name]), kind
    assert not torch.equal(alone["default"], alone["second"])
    with model.disable_adapter():
        alone["__base__"] = output(model, batch)
    assert torch.equal(alone["__base__"], output(ARCHS["llama"].build(tie_word_embeddings=True), batch))
    names = ["second", "__base__", "default"]
    for active in ("default", "second"):
        model.set_adapter(active)
        mixed = output(model, batch, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-5, atol=1e-5)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(output(model, batch), alone["second"])


@pytest.mark.parametrize("method", MERGEABLE)
def test_an_adapter_without_tokens_is_merged_by_name(method: str) -> None:
    model = pair(method)[0]
    train(model)
    model.add_adapter("second", config(method))
    ready(model, "second")
    model.set_adapter("second")
    expected = output(model, inputs())
    model.merge_adapter(["second"])
    assert relative(output(model, inputs()), expected) < 1e-5
    model.unmerge_adapter()
    model.merge_adapter(["default", "second"])
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(output(model, inputs()), expected)


@pytest.mark.parametrize("method", ["multilora", "aslora"])
def test_sums_of_adapters_with_tokens_are_refused(method: str) -> None:
    model = pair(method)[0]
    model.add_adapter("second", config(method))
    with pytest.raises(ValueError, match="'default' trained modules, tokens or biases in full"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


# Counting


@pytest.mark.parametrize("method", PLAIN)
def test_budget_counts_the_rows(method: str, tmp_path: Path) -> None:
    settings = {"trainable_token_indices": TOKENS}
    with torch.device("meta"):
        base = ARCHS["llama"].auto.from_config(ARCHS["llama"].config())
    rows = len(TOKENS) * h.HIDDEN
    for each, bare in ((config(method, **settings), config(method)), (lora(**settings), lora())):
        assert plan(base, each).parameters - plan(base, bare).parameters == rows
    model = pair(method)[0]
    model.save_pretrained(tmp_path)
    assert plan(base, config(method, **settings)).file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert sum(describe(model).fully_trained.values()) == rows


# Modules trained in full that are tied


@pytest.mark.parametrize("method", PLAIN)
def test_ensured_tying_of_modules_to_save(method: str, tmp_path: Path) -> None:
    """`ensure_weight_tying` trains the embedding and its head as one, as LoRA's does."""
    models = pair(
        method, "tied", trainable_token_indices=None, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    for model in models:
        inner = model.get_base_model()
        copies = [inner.model.embed_tokens.modules_to_save["default"], inner.lm_head.modules_to_save["default"]]
        assert copies[0].weight is copies[1].weight
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            copies[0].weight.copy_(torch.randn(copies[0].weight.shape, generator=generator) * 0.3)
    batch = inputs("tied")
    assert torch.equal(output(models[0], batch), output(models[1], batch))
    models[0].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(ARCHS["llama"].build(tie_word_embeddings=True), tmp_path).eval()
    assert torch.equal(output(loaded, batch), output(models[0], batch))


@pytest.mark.parametrize("method", PLAIN)
def test_adapters_themselves_can_not_be_tied(method: str) -> None:
    base = ARCHS["llama"].build(tie_word_embeddings=True)
    before = h.snapshot(base, inputs())
    with pytest.raises(ValueError, match=r"ensure_weight_tying can't tie adapters.*exclude_modules"):
        get_peft_model(base, config(method, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True))
    h.assert_unchanged(before, h.snapshot(base, inputs()))


# What can't be had


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": []}, "each once, by their indices from 0"),
        ({"trainable_token_indices": [3, 3]}, "each once, by their indices from 0"),
        ({"trainable_token_indices": [-1]}, "each once, by their indices from 0"),
        ({"trainable_token_indices": {"embed_tokens": []}}, "each once, by their indices from 0"),
        ({"trainable_token_indices": {"": [1]}}, "each once, by their indices from 0"),
        ({"trainable_token_indices": "<eos>"}, "trainable_token_indices='<eos>' must be a list of integers"),
        ({"trainable_token_indices": [1.5]}, "must be a list of integers"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying='yes' must be true or false"),
    ],
)
@pytest.mark.parametrize("method", PLAIN)
def test_settings_that_mean_nothing(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(method, **settings)


def _biased(base: nn.Module) -> None:
    base.lm_head = nn.Linear(h.HIDDEN, h.VOCAB)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"trainable_token_indices": [h.VOCAB]}, None, r"\[61\], but model.embed_tokens has 61 rows.*resize_token"),
        ({"trainable_token_indices": {"q_proj": [1]}}, None, "is adapted, and trainable_token_indices"),
        ({"trainable_token_indices": {"norm": [1]}}, None, "a LlamaRMSNorm: rows can be trained of"),
        ({"trainable_token_indices": {"absent": [1]}}, None, "absent.*not found in the base model"),
        ({"trainable_token_indices": {"lm_head": [1]}}, _biased, "a head with a bias.*modules_to_save"),
        (
            {"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]},
            None,
            "in modules_to_save, which trains all of its rows",
        ),
    ],
)
@pytest.mark.parametrize("method", PLAIN)
def test_settings_that_do_not_fit_the_model(
    method: str, settings: dict[str, Any], change: Callable[[nn.Module], None] | None, message: str
) -> None:
    base = ARCHS["llama"].build()
    if change is not None:
        change(base)
    before = h.snapshot(base, inputs())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(method, **settings))
    h.assert_unchanged(before, h.snapshot(base, inputs()))


@pytest.mark.parametrize("method", PLAIN)
def test_an_adapted_head_that_is_tied_is_refused(method: str) -> None:
    """PEFT's LoRA finds out in the forward: "wraps an unknown layer type"."""
    base = ARCHS["llama"].build(tie_word_embeddings=True)
    before = h.snapshot(base, inputs())
    settings = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": TOKENS}
    with (
        pytest.warns(UserWarning, match="tied layer is part of the adapter"),
        pytest.raises(ValueError, match="lm_head is adapted, and trainable_token_indices"),
    ):
        get_peft_model(base, config(method, **settings))
    h.assert_unchanged(before, h.snapshot(base, inputs()))


# Seams


def test_pefts_wrapper_is_what_ours_extends() -> None:
    """`pass_adapters_without_tokens` gives PEFT's objects our classes: both must have the same attributes."""
    assert TokenWrapper.__bases__ == (TrainableTokensWrapper,)
    assert TokenLayer.__bases__ == (TrainableTokensLayer,)
    model = pair("multilora", "tied")[0]
    kinds = {name: (type(w), type(w.token_adapter)) for name, w in token_wrappers(model, "default")}
    assert kinds == dict.fromkeys(
        ["base_model.model.model.embed_tokens", "base_model.model.lm_head"], (TokenWrapper, TokenLayer)
    )


def test_pefts_wrapper_still_looks_up_adapters_without_tokens() -> None:
    """Once PEFT asks first, `TokenWrapper` and `TokenLayer.merge` are not needed any more."""
    model = get_peft_model(ARCHS["llama"].build(), lora(trainable_token_indices=TOKENS))
    model.add_adapter("second", lora())
    with pytest.raises(KeyError, match="second"):
        model.merge_adapter(["second"])
    wrapper = model.get_base_model().model.embed_tokens
    with pytest.raises(KeyError, match="second"):
        wrapper.adapter_state_dict("second", {})
