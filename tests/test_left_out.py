"""What "all-linear" does not reach is said, and is what PEFT's LoRA leaves out too."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from helpers import ARCHS, PLAIN, config
from loraplex.tuner.bank import FactorBank
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
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZE, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**SIZE, num_local_experts=4),
}


def build(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]())


def adapted(model) -> set[str]:
    """Names of the weights in the base model that an adapter changes."""
    names = set()
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, FactorBank):
            parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            names.add(f"{name}.{parameter}".replace(".base_layer", "").removeprefix("base_model.model."))
    return names


# PEFT gives experts another rank, and looks for them among the linear layers only.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", PLAIN)
def test_experts_and_routers_are_named(method, name, caplog):
    """What PEFT's LoRA adapts is either adapted or named, with its share of the parameters."""
    with caplog.at_level(logging.WARNING, "loraplex"):
        model = get_peft_model(build(name), config(method, target_modules="all-linear"))
    lora = adapted(get_peft_model(build(name), LoraConfig(target_modules="all-linear")))
    base, left_out = build(name), dict(bare_weights(build(name)))
    assert left_out.keys() == lora - adapted(model)
    assert len(left_out) == 9
    (record,) = [r for r in caplog.records if "all-linear" in r.message]
    assert "leaves out 9 weights" in record.message
    for weight in ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert weight in record.message
    share = sum(p.numel() for n, p in base.named_parameters() if ".experts." in n or ".gate." in n)
    assert f"{100 * share / sum(p.numel() for p in model.parameters()):.0f} % of the model's" in record.message


@pytest.mark.parametrize("arch", ["llama", "gpt2", "vit", "t5", "deberta"])
def test_nothing_is_said_where_nothing_is_left_out(arch, caplog):
    get_peft_model(ARCHS[arch].build(), config("multilora", target_modules="all-linear"))
    assert not [r for r in caplog.records if "all-linear" in r.message]


def test_chosen_targets_are_the_users_choice(caplog):
    get_peft_model(build("mixtral"), config("multilora"))
    assert not [r for r in caplog.records if "all-linear" in r.message]
