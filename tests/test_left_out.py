"""What "all-linear" does not reach is said, with what would reach it."""

from __future__ import annotations

import ast
import logging

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig

from helpers import ARCHS, PLAIN, config
from loraplex.tuner.experts import AdapterParameters
from loraplex.tuner.left_out import bare_weights

SIZE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "gpt_oss": lambda: GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "llama4": lambda: Llama4TextConfig(
        **SIZE, intermediate_size_mlp=24, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1
    ),
}
"""PEFT's LoRA adapts no bare parameters of these by itself; of others it does, and so do we (test_experts.py)."""


def build(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", PLAIN)
def test_experts_and_routers_are_named(method, name, caplog):
    """With their share of the parameters and what would adapt them, which then does."""
    left_out = dict(bare_weights(build(name)))
    with caplog.at_level(logging.WARNING, "loraplex"):
        model = get_peft_model(build(name), config(method, target_modules="all-linear"))
    assert not any(isinstance(m, AdapterParameters) for m in model.modules())
    (record,) = [r for r in caplog.records if "all-linear" in r.message]
    assert f"leaves out {len(left_out)} weights" in record.message
    share = sum(p.numel() for n, p in build(name).named_parameters() if n in left_out)
    assert f"{100 * share / sum(p.numel() for p in model.parameters()):.0f} % of the model's" in record.message
    found = record.message.rpartition("target_parameters=")[2].removesuffix(".")
    caplog.clear()
    settings = config(method, target_modules="all-linear", target_parameters=ast.literal_eval(found))
    with caplog.at_level(logging.WARNING, "loraplex"):
        model = get_peft_model(build(name), settings)
    adapted = {
        f"{m.module_name}.{p}" for m in model.modules() if isinstance(m, AdapterParameters) for p, _ in m.adapted()
    }
    assert adapted == left_out.keys()
    assert not [r for r in caplog.records if "all-linear" in r.message]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "vit", "t5", "deberta"])
def test_nothing_is_said_where_nothing_is_left_out(arch, caplog):
    get_peft_model(ARCHS[arch].build(), config("multilora", target_modules="all-linear"))
    assert not [r for r in caplog.records if "all-linear" in r.message]


def test_chosen_targets_are_the_users_choice(caplog):
    get_peft_model(build("gpt_oss"), config("multilora"))
    assert not [r for r in caplog.records if "all-linear" in r.message]
