"""What PEFT's own introspection finds out about the methods, and what LoRA's users are told."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer

import helpers as h
import loraplex
from helpers import ARCHS, PLAIN, adapted, config
from loraplex.tuner.bank import BANK
from loraplex.tuner.registry import METHODS

LORA_ONLY = sorted({f.name for f in fields(LoraConfig)} - {f.name for f in fields(METHODS["multilora"])})


# PEFT's scripts/generate_method_capabilities.py


@pytest.mark.parametrize("method", METHODS)
def test_peft_s_capabilities_script_finds_what_the_methods_can(method: str) -> None:
    """It looks into the module of the tuner's `tuner_layer_cls`: for `merge`, mixed batches and quantisation."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[METHODS[method].method]
    module = sys.modules[tuner.tuner_layer_cls.__module__]
    layers = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, BaseTunerLayer) and each.__module__ == module.__name__
    ]
    assert any(each.merge is not BaseTunerLayer.merge for each in layers)
    assert any(hasattr(each, "_mixed_batch_forward") for each in layers)
    assert hasattr(tuner, "_enable_peft_forward_hooks")
    assert "resolve_quantization_backend" in inspect.getsource(module)
    assert {"modules_to_save", "trainable_token_indices"} <= {f.name for f in fields(METHODS[method])}


@pytest.mark.parametrize("method", h.METHODS)
def test_tuner_layers_expose_their_sizes(method: str) -> None:
    """PEFT's own test asks every tuner layer of every method, the bank too (test_in_features_out_features_exposed)."""
    for module in adapted(method).modules():
        if isinstance(module, BaseTunerLayer):
            assert hasattr(module, "in_features")
            assert hasattr(module, "out_features")


# Status


@pytest.mark.parametrize("method", PLAIN)
def test_status_names_and_counts_adapted_layers(method: str) -> None:
    """The bank is no layer; the layers that read it tell what it has to tell. LoRA's model has as many rows."""
    model = adapted(method)
    theirs = get_peft_model(ARCHS["llama"].build(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    rows = model.get_layer_status()
    assert [row.name for row in rows] == [row.name for row in theirs.get_layer_status()]
    for row in rows:
        assert row.module_type == "loraplex.AdapterLinear"
        assert (row.requires_grad, row.devices) == ({"default": True}, {"default": ["cpu"]})
    assert model.get_model_status().num_adapter_layers == theirs.get_model_status().num_adapter_layers == 2 * h.LAYERS
    for name, parameter in h.adapter_parameters(model).items():
        parameter.requires_grad_(BANK not in name)
    shared = any(BANK in name for name in h.adapter_parameters(model))
    own = any(BANK not in name for name in h.adapter_parameters(model))
    expected = "irregular" if shared and own else not shared
    assert model.get_model_status().requires_grad == {"default": expected}


# Mixed models


@pytest.mark.parametrize("method", PLAIN)
def test_mixed_models_are_refused_with_a_remedy(method: str) -> None:
    base = ARCHS["llama"].build()
    before = h.snapshot(base, ARCHS["llama"].inputs())
    with pytest.raises(ValueError, match=r"PeftMixedModel \(mixed=True\)\. Leave mixed out: loraplex\.add_adapter"):
        get_peft_model(base, config(method), mixed=True)
    h.assert_unchanged(before, h.snapshot(base, ARCHS["llama"].inputs()))
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    mixed = get_peft_model(base, lora, mixed=True)
    with pytest.raises(ValueError, match=r"loraplex\.add_adapter"):
        mixed.add_adapter("second", config(method))
    mixed.add_adapter("third", lora)
    model = get_peft_model(ARCHS["llama"].build(), config(method))
    loraplex.add_adapter(model, "second", config("multilora"))
    assert set(model.peft_config) == {"default", "second"}


# LoRA's settings


@pytest.mark.parametrize("name", LORA_ONLY)
@pytest.mark.parametrize("method", METHODS)
def test_a_setting_of_lora_alone_is_named_as_such(method: str, name: str) -> None:
    kind = METHODS[method]
    with pytest.raises(
        TypeError, match=rf"^{name} is a setting of peft\.LoraConfig that {kind.__name__} does not have: "
    ):
        kind(target_modules=["q_proj"], **{name: None})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("init_lora_weights", "init_weights=True"),
        ("layer_replication", "adapt the deeper model"),
        ("use_dora", "leave it out"),
        ("loftq_config", "quantization_config"),
        ("lora_bias", 'bias="lora_only"'),
        ("megatron_config", "leave it out"),
    ],
)
def test_the_error_says_what_to_do(name: str, remedy: str) -> None:
    if name not in LORA_ONLY:
        pytest.skip(f"the methods have {name} by now")
    with pytest.raises(TypeError, match=remedy):
        config("multilora", **{name: 1})


@pytest.mark.parametrize("method", PLAIN)
def test_a_misspelt_setting_is_guessed(method: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_alfa': did you mean 'lora_alpha'"):
        config(method, lora_alfa=3)


@pytest.mark.parametrize("method", PLAIN)
def test_common_settings_of_lora_are_taken(method: str) -> None:
    """Every setting that both have is taken with LoRA's default."""
    kind = type(config(method))
    lora = LoraConfig()
    both = {f.name for f in fields(kind)} & {f.name for f in fields(LoraConfig)} - {"peft_type", "auto_mapping"}
    made: Any = kind(**{name: getattr(lora, name) for name in both - {"layers_pattern", "peft_version"}})
    assert made.r == lora.r
    assert torch.tensor(made.lora_dropout).item() == lora.lora_dropout
