"""Adapters on the experts and routers of mixtures, which are bare parameters: every method, every way to compute."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

import loraplex
from helpers import METHODS, PLAIN, config, ready
from loraplex.inspection.budget import plan
from loraplex.inspection.describe import describe
from loraplex.inspection.spectra import analyse
from loraplex.tuner.experts import AdapterParameters
from loraplex.tuner.layer import AdapterLinear

EXPERTS, LAYERS = 4, 3
SIZE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SIZE |= {"num_key_value_heads": 1, "intermediate_size": 24, "pad_token_id": 0}
MODELS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZE, moe_intermediate_size=8, num_experts=EXPERTS, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**SIZE, num_local_experts=EXPERTS),
    "gpt_oss": lambda: GptOssConfig(**SIZE, num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=8),
    "llama4": lambda: Llama4TextConfig(
        **SIZE, intermediate_size_mlp=24, num_local_experts=EXPERTS, head_dim=8, interleave_moe_layer_step=1
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SIZE, "num_key_value_heads": 2}, n_routed_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=8,
        first_k_dense_replace=0, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip
WAYS = ("eager", "grouped_mm", "batched_mm")
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 32, (3, 7), generator=torch.Generator().manual_seed(1))

every_plain = pytest.mark.parametrize("method", PLAIN)


def build(name: str, way: str = "eager", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model_config = MODELS[name]()
    model = AutoModelForCausalLM.from_config(model_config).eval().to(dtype)
    model.config._experts_implementation = way
    return model


def settings(method: str, **more):
    return config(method, **{"target_modules": ["o_proj"], "target_parameters": STACKS, **more})


def adapted(method: str, name: str = "qwen3_moe", way: str = "eager", **more) -> PeftModel:
    model = get_peft_model(build(name, way), settings(method, **more)).eval()
    ready(model)
    return model


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def dense(method: str, name: str, way: str = "eager", **more) -> nn.Module:
    """The base model with each expert's matrix plus its ΔW, put there one by one in float64."""
    model, base = adapted(method, name, way, **more), build(name, way)
    for holder in (m for m in model.modules() if isinstance(m, AdapterParameters)):
        for parameter, layers in holder.adapted():
            stack = base.get_submodule(holder.module_name)._parameters[parameter].data
            for index, layer in enumerate(layers):
                delta = layer.factors("default").delta_weight().double()
                target = stack if stack.ndim == 2 else stack[index]
                transposed = layer.get_base_layer().transposed
                target.copy_((target.double() + (delta.T if transposed else delta)).float())
    for name_, layer in model.named_modules():
        if name_.endswith("o_proj"):
            weight = base.get_submodule(name_.removeprefix("base_model.model.")).weight.data
            weight.copy_((weight.double() + layer.factors("default").delta_weight().double()).float())
    return base


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_starts_at_the_base_model(name: str, way: str) -> None:
    """Bit for bit, in every way to compute with experts."""
    for method in PLAIN:
        model = get_peft_model(build(name, way), settings(method)).eval()
        assert sum(isinstance(m, AdapterParameters) for m in model.modules()) == LAYERS
        assert torch.equal(output(model), output(build(name, way)))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "masa-router"])
@pytest.mark.parametrize("name", MODELS)
def test_computes_with_w_plus_delta(name: str, method: str) -> None:
    """The same as dense matrices in the base model, in every way to compute; merging and unmerging too."""
    expected = output(dense(method, name))
    for way in WAYS:
        model = adapted(method, name, way)
        assert not torch.allclose(expected, output(build(name, way)), atol=1e-4)
        torch.testing.assert_close(output(model), expected, rtol=1e-3, atol=2e-5)
    before, base = output(model), {k: v.clone() for k, v in build(name).state_dict().items()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(model), expected, rtol=1e-3, atol=2e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), output(build(name, way)))
    plain = model.unload()
    assert plain.state_dict().keys() == base.keys()
    assert all(torch.equal(value, base[key]) for key, value in plain.state_dict().items())
    torch.testing.assert_close(output(adapted(method, name).merge_and_unload()), expected, rtol=1e-3, atol=2e-5)


@every_plain
@pytest.mark.parametrize("way", WAYS)
def test_gradients(method: str, way: str) -> None:
    """Those of the loop over experts, in every way to compute, and with activation checkpointing."""
    found = []
    for this, checkpointing in (("eager", False), (way, False), (way, True)):
        model = adapted(method, way=this).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        for key, gradient in found[0].items():
            if gradient is None:  # of an expert that no token chose
                assert other[key] is None or not other[key].any()
            else:
                torch.testing.assert_close(other[key], gradient, rtol=1e-3, atol=1e-6)
    assert sum(g is not None and g.any().item() for g in found[0].values()) > len(found[0]) // 3


@every_plain
def test_trains(method: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("qwen3_moe", "grouped_mm"), settings(method, lora_dropout=0.1)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low", [False, True])
def test_save_and_load(method: str, low: bool, tmp_path) -> None:
    model = adapted(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path, low_cpu_mem_usage=low).eval()
    # Memory that a file is mapped to is aligned in another way, and sums may be rounded in another order.
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-6 if low else 0)
    about = describe(str(tmp_path))
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert about.parameters == sum(t.numel() for t in file.values() if t.is_floating_point())
    assert "model.layers.1.mlp.experts.down_proj.3" in {row.module for row in about.modules} or not about.modules


@every_plain
def test_second_adapter_and_switching(method: str) -> None:
    model = adapted(method)
    first = output(model)
    loraplex.add_adapter(model, "second", settings("multilora", target_parameters=["experts.down_proj"]))
    assert torch.equal(output(model), first)
    model.set_adapter("second")
    assert torch.equal(output(model), output(build("qwen3_moe")))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(output(model), first)


def test_layers_share_by_expert() -> None:
    """ASLoRA has one A per role and expert, MASA one group of A's per role, expert and group of layers."""
    for method, owned in (("aslora", 1), ("masa-router", 2 * 3)):
        model = get_peft_model(build("qwen3_moe"), settings(method, target_modules=[]))
        shared = next(s for _, s in model.base_model.model.loraplex_bank.named_shared())
        assert len(shared.families) == 2 * EXPERTS
        A = [p for n, p in shared.named_parameters() if "lora_A" in n and "gate_up_proj" in n]
        assert sum(p.numel() for p in A) == EXPERTS * owned * 4 * 16


@every_plain
def test_autocast_and_a_bfloat16_base(method: str) -> None:
    expected = output(adapted(method))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (output(adapted(method)) - expected).abs().max() < 0.1
    base = build("qwen3_moe", "grouped_mm", torch.bfloat16)
    model = get_peft_model(base, settings(method)).eval()
    assert torch.equal(output(model), output(build("qwen3_moe", "grouped_mm", torch.bfloat16)))
    ready(model)
    assert (output(model).float() - expected).abs().max() < 0.2


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@every_plain
def test_all_linear_is_what_lora_takes(name: str, method: str) -> None:
    """Experts and routers included, as PEFT's LoRA has it for these models."""
    model = get_peft_model(build(name), config(method, target_modules="all-linear"))
    lora = get_peft_model(build(name), LoraConfig(target_modules="all-linear"))
    theirs = {
        f"{n}.{m.parameter_name}".replace(".base_layer", "").removeprefix("base_model.model.")
        for n, m in lora.named_modules()
        if isinstance(m, ParamWrapper)
    }
    ours = {
        f"{holder.module_name}.{parameter}"
        for holder in model.modules()
        if isinstance(holder, AdapterParameters)
        for parameter, _ in holder.adapted()
    }
    assert ours == theirs
    assert len(ours) == 3 * LAYERS
    assert torch.equal(output(model.eval()), output(build(name)))
    ready(model)
    assert not torch.allclose(output(model), output(build(name)), atol=1e-4)


@every_plain
def test_settings(method: str) -> None:
    """Layers and names to leave out hold for parameters too."""
    more = {"num_merges": 1} if method == "aslora" else {}
    left_out = {"layers_to_transform": [1, 2], "exclude_modules": ["down_proj", "k_proj"]}
    model = get_peft_model(build("qwen3_moe"), settings(method, **left_out, **more))
    names = {
        f"{holder.module_name}.{parameter}"
        for holder in model.modules()
        if isinstance(holder, AdapterParameters)
        for parameter, _ in holder.adapted()
    }
    assert names == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (1, 2)}


def test_parameters_and_activations_are_counted() -> None:
    """An expert keeps what its share of the tokens makes: here two of four experts see each token."""
    budget = plan(build("qwen3_moe"), settings("multilora", target_modules=[]), tokens=64)
    model = get_peft_model(build("qwen3_moe"), settings("multilora", target_modules=[]))
    assert budget.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = 0
    for layer in (m for m in model.modules() if isinstance(m, AdapterLinear)):
        expected += layer.factors("default").saved_bytes(32, 4, 0) + 4 * 32 * layer.in_features
    assert budget.activation_bytes == expected


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_lora_beside_them_is_counted() -> None:
    """PEFT keeps W + ΔW of every stack from forward to backward."""
    budget = plan(build("qwen3_moe"), LoraConfig(r=4, target_modules="all-linear"), tokens=64)
    lora = get_peft_model(build("qwen3_moe"), LoraConfig(r=4, target_modules="all-linear"))
    assert budget.parameters == lora.get_nb_trainable_parameters()[0]
    stacks = sum(p.numel() for n, p in build("qwen3_moe").named_parameters() if "experts" in n or "mlp.gate" in n)
    assert budget.activation_bytes > 4 * stacks


@every_plain
def test_the_same_settings_twice(method: str, tmp_path) -> None:
    """Names that are those of stacks and of linear layers, as in models with shared experts."""
    both = {"target_modules": ["o_proj", "down_proj"]}
    model = get_peft_model(build("deepseek_v3"), settings(method, **both)).eval()
    loraplex.add_adapter(model, "second", settings(method, **both))
    model.save_pretrained(tmp_path)
    loraplex.load_adapter(model, str(tmp_path), "third")
    adapted_by = {
        name: [m.module_name for m in model.modules() if isinstance(m, AdapterLinear) and m.factors(name) is not None]
        for name in ("default", "second", "third")
    }
    assert adapted_by["default"] == adapted_by["second"] == adapted_by["third"]


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_a_second_adapter_on_all_linear_layers(name: str, tmp_path) -> None:
    """It adapts what it would adapt on a fresh base, and its file loads there."""
    model = get_peft_model(build(name), settings("multilora"))
    loraplex.add_adapter(model, "second", config("aslora", target_modules="all-linear"))
    alone = get_peft_model(build(name), config("aslora", target_modules="all-linear"))
    found, expected = model.peft_config["second"], alone.peft_config["default"]
    assert (found.target_modules, found.target_parameters) == (expected.target_modules, expected.target_parameters)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    PeftModel.from_pretrained(build(name), tmp_path / "second")


def test_threads() -> None:
    model = adapted("multilora", way="grouped_mm")
    expected, wrong = output(model), []

    def compute() -> None:
        for _ in range(40):
            try:
                if not torch.allclose(output(model), expected, atol=1e-5):
                    wrong.append("another output")
            except Exception as error:  # whatever a race ends in
                wrong.append(repr(error))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=compute) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    assert not any("gate_up_proj" in module.__dict__ for module in model.modules())


def test_ranks_and_names_to_leave_out() -> None:
    """Of a whole stack, and of one expert."""
    patterns = {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"experts.down_proj.1": 12}}
    model = get_peft_model(build("qwen3_moe"), settings("multilora", **patterns))
    layers = {m.module_name: m.factors("default") for m in model.modules() if isinstance(m, AdapterLinear)}
    assert {f.r for name, f in layers.items() if "gate_up_proj" in name} == {2}
    assert {f.r for name, f in layers.items() if "down_proj" in name} == {4}
    assert {name.rpartition(".")[2] for name, f in layers.items() if f.lora_alpha == 12} == {"1"}
    with pytest.warns(RuntimeWarning, match=r"did not match anything: \['up_proj'\]"):
        get_peft_model(build("qwen3_moe"), settings("multilora", rank_pattern={"up_proj": 2}))
    for excluded, count in ((["mlp.experts", "k_proj"], 0), (["experts.gate_up_proj.3", "k_proj"], 2 * EXPERTS - 1)):
        named = {"target_parameters": [*STACKS, "mlp.gate.weight"], "exclude_modules": excluded}
        model = get_peft_model(build("qwen3_moe"), settings("multilora", **named)).eval()
        found = [m for m in model.modules() if isinstance(m, AdapterLinear) and ".experts." in m.module_name]
        assert sum(m.factors("default") is not None for m in found) == LAYERS * count
        assert torch.equal(output(model), output(build("qwen3_moe")))


@pytest.mark.parametrize("way", WAYS)
def test_compiled(way: str) -> None:
    """With breaks of the graph; the same outputs."""
    model = adapted("multilora", way=way)
    expected = output(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_averages_of_experts_that_saw_no_token(tmp_path) -> None:
    """What an optimizer's state leaves out is missed by name, and loaded from the schedules' file."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        steps = {"merge_start_step": 20, "merge_interval": 20, "num_merges": 1}
        model = get_peft_model(build("qwen3_moe"), settings("aslora", target_modules=[], **steps)).train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, count: int) -> None:
        for _ in range(count):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    few, many = IDS[:1, :2], IDS
    model, optimizer = make()
    run(model, optimizer, few, 3)
    again, other = make()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"some are of step 3 and some of step 0.*load_schedules"):
        run(again, other, many, 1)
    loraplex.save_schedules(model, tmp_path)
    again, other = make()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loraplex.load_schedules(again, tmp_path)
    for this, its in ((model, optimizer), (again, other)):
        run(this, its, many, 40)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    merged = [key for key, value in again.state_dict().items() if key.endswith("__merges") and value[1, :-1].any()]
    assert len(merged) == 2 * EXPERTS


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="adapter_names can't be used where bare parameters"):
        adapted("multilora")(input_ids=IDS, adapter_names=["default", "__base__", "default"])
    for function in (lambda m: loraplex.calibrate(m, [{"input_ids": IDS}]), lambda m: m.merge_adapter()):
        with pytest.raises(ValueError, match=r"mean gates of experts|gates depend on the input"):
            function(adapted("masa-router"))
    with pytest.raises(ValueError, match=r"target_parameters names experts.typo"):
        get_peft_model(build("qwen3_moe"), settings("multilora", target_parameters=[*STACKS, "experts.typo"]))
    with pytest.raises(ValueError, match="neither looked into nor exported"):
        analyse(get_peft_model(build("qwen3_moe"), LoraConfig(target_modules=[], target_parameters=STACKS)))
    with pytest.raises(ValueError, match="merge it"):
        loraplex.export_lora(adapted("multilora"), "nowhere")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(2, 3, 4))

        def forward(self, x):
            return torch.einsum("eoi,bi->bo", self.stack, x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.layer = Odd(), nn.Linear(4, 4)

        def forward(self, x):
            return self.odd(self.layer(x))

    before = Net()
    with pytest.raises(ValueError, match=r"odd.stack is a parameter .* layout is known"):
        get_peft_model(before, config("multilora", target_modules=["layer"], target_parameters=["odd.stack"]))
    assert not any("lora" in name for name, _ in before.named_parameters())
    Odd.is_transposed = False
    model = get_peft_model(Net(), config("multilora", target_modules=["layer"], target_parameters=["odd.stack"]))
    with pytest.raises(NotImplementedError, match="einsum is called with an adapted parameter"):
        model(torch.randn(2, 4))
