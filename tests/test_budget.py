"""What is planned is what comes: parameters and file sizes exactly, memory as autograd and AdamW keep it."""

from __future__ import annotations

import json
import os
from itertools import chain
from math import ceil

import pytest
import torch
import yaml
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import ARCHS, HIDDEN, LAYERS, METHODS, VOCAB, Mlp, base_weights, skeleton
from helpers import config as method_config
from loraplex.commands.cli import main
from loraplex.inspection.budget import match, plan
from loraplex.recipes.config.run_config import ConfigError
from loraplex.recipes.models.budgeting import parse_parameters

ALL = (*METHODS, "lora")
KV = HIDDEN // 2  # two of four heads
SHAPES = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (KV, HIDDEN)}
"""Family → (out, in)."""


def config(method: str, **settings):
    if method == "lora":
        return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})
    return method_config(method, **settings)


def by_hand(method: str, r: int) -> int:
    """Parameters on q_proj and v_proj of the tiny Llama, by the formulas of the papers; settings as in helpers.py."""
    total, L = 0, LAYERS
    for o, i in SHAPES.values():
        match method:
            case "multilora":
                total += L * (2 * r * (i + o) + 2 * o)
            case "multilora-module":
                total += L * (3 * r * (i + o) + 3)
            case "aslora":
                total += r * i + L * r * o
            case "masa-router":
                total += ceil(L / 2) * 3 * r * i + L * r * o + L * 3 * i
            case "masa-sum":
                total += ceil(L / 2) * 3 * r * i + L * r * o
            case "masa-concat":
                total += ceil(L / 2) * 2 * r * i + L * 2 * r * o
            case "lora" | "dual_lora":
                total += L * r * (i + o)
    return total


# Parameters


@pytest.mark.parametrize("method", ALL)
def test_parameters_are_those_of_the_formulas(method):
    base = skeleton()
    planned = plan(base, config(method))
    assert planned.parameters == by_hand(method, 4)
    assert planned.share == planned.parameters / base.num_parameters()
    assert planned.settings["r"] == 4
    assert planned.settings["lora_alpha"] == 6
    assert planned.settings["target_modules"] == ["q_proj", "v_proj"]
    assert planned.excess is None


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT's LoRA on Conv1D
@pytest.mark.parametrize("arch", ["gpt2", "roberta", "deberta", "t5"])
@pytest.mark.parametrize("method", ["lora", "multilora", "aslora", "dual_lora", "masa-router"])
def test_parameters_are_those_of_a_real_adapter(arch, method):
    settings = {"target_modules": ARCHS[arch].targets, "bias": "all"}
    planned = plan(skeleton(arch), config(method, **settings))
    model = get_peft_model(ARCHS[arch].build(), config(method, **settings))
    assert planned.parameters == model.get_nb_trainable_parameters()[0]


def test_the_model_is_left_alone():
    model = ARCHS["llama"].build()
    before = {name: (id(p), p.requires_grad, p.device) for name, p in model.named_parameters()}
    modules = {name: type(m) for name, m in model.named_modules()}
    asked = config("aslora")
    written = asked.to_dict()
    plan(model, asked)
    assert {name: (id(p), p.requires_grad, p.device) for name, p in model.named_parameters()} == before
    assert {name: type(m) for name, m in model.named_modules()} == modules
    assert asked.to_dict() == written
    assert not hasattr(model, "peft_config")


def test_which_adapters():
    assert plan(skeleton(), config("masa-sum", target_modules=None)).settings["target_modules"] == ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="no default target_modules for model_type None: name some of down, up"):
        plan(Mlp(), config("masa-sum", target_modules=None))
    with pytest.raises(ValueError, match="VeraConfig is neither one of loraplex nor a LoraConfig"):
        plan(skeleton(), VeraConfig(target_modules=["q_proj"]))
    # It starts from the weights, which are not there.
    assert plan(skeleton(), config("lora", init_lora_weights="pissa")).parameters == by_hand("lora", 4)


# A parameter budget


def free(method: str, **settings):
    """The config with Dual LoRA's two ranks left to follow r."""
    ranks = {"r_magnitude": None, "r_direction": None} if method == "dual_lora" else {}
    return config(method, **ranks, **settings)


@pytest.mark.parametrize("target", [1, 700, 3001, 12_345])
@pytest.mark.parametrize("method", ALL)
def test_match_finds_the_nearest_rank(method, target):
    found = match(skeleton(), free(method), target)
    ranks = range(2 if method == "dual_lora" else 1, 60)
    nearest = min(ranks, key=lambda r: abs(by_hand(method, r) - target))
    assert found.settings["r"] == nearest
    assert found.parameters == by_hand(method, nearest)
    assert found.excess == found.parameters - target


def test_match_rounds_a_tie_down():
    between = (by_hand("lora", 4) + by_hand("lora", 5)) // 2
    assert by_hand("lora", 5) - between == between - by_hand("lora", 4)
    assert match(skeleton(), config("lora"), between).settings["r"] == 4


def test_match_leaves_the_other_settings():
    settings = {"lora_alpha": 7, "num_experts": 2, "rank_pattern": {"v_proj": 3}, "target_modules": "all-linear"}
    asked = config("masa-sum", **settings)
    found = match(skeleton(), asked, 20_000)
    assert {**found.settings, **settings} == found.settings
    assert found.parameters == plan(skeleton(), config("masa-sum", **settings, r=found.settings["r"])).parameters
    all_ranks = config("masa-sum", rank_pattern={"q_proj": 2, "v_proj": 3})
    for fixed, fields in ((all_ranks, ""), (config("dual_lora"), " and r_magnitude and r_direction")):
        with pytest.raises(ValueError, match=f"no rank follows r: leave rank_pattern{fields} out"):
            match(skeleton(), fixed, 20_000)
    with pytest.raises(ValueError, match="parameters=0 must be an integer of at least 1"):
        match(skeleton(), asked, 0)


# File


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        optimizer.step()
    return optimizer


def saved_bytes(model: nn.Module, folder) -> int:
    model.save_pretrained(folder)
    return os.path.getsize(folder / SAFETENSORS_WEIGHTS_NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_file_of_a_trained_adapter(method, dtype, tmp_path):
    planned = plan(skeleton().to(dtype), config(method))
    model = get_peft_model(ARCHS["llama"].build().to(dtype), config(method))
    if method == "aslora":
        assert saved_bytes(model, tmp_path) == planned.file_bytes
    train(model, ARCHS["llama"].inputs(), 4)  # with ASLoRA's two merges
    # To the byte but after merges: the names and offsets in the header have more or fewer digits then.
    assert saved_bytes(model, tmp_path) == pytest.approx(planned.merged_file_bytes, abs=32 if method == "aslora" else 0)
    assert (planned.merged_file_bytes < planned.file_bytes) == (method == "aslora")


@pytest.mark.parametrize("method", ["lora", "masa-concat", "aslora"])
def test_file_with_modules_trained_in_full(method, tmp_path):
    settings = {"target_modules": ["query", "attention.output.dense"], "modules_to_save": ["classifier"], "bias": "all"}
    model = get_peft_model(ARCHS["roberta"].build(), config(method, **settings))
    assert saved_bytes(model, tmp_path) == plan(skeleton("roberta"), config(method, **settings)).file_bytes


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(("method", "target"), [("lora", "lm_head"), ("lora", "embed_tokens"), ("aslora", "lm_head")])
def test_file_with_an_adapted_head(method, target, tmp_path):
    settings = {"target_modules": ["q_proj", target]}
    model = get_peft_model(ARCHS["llama"].build(), config(method, **settings))
    assert saved_bytes(model, tmp_path) == plan(skeleton(), config(method, **settings)).file_bytes


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_memory_of_weights_gradients_and_optimizer(method, dtype):
    planned = plan(skeleton().to(dtype), config(method))
    model = get_peft_model(ARCHS["llama"].build().to(dtype), config(method))
    base = base_weights(model) if method != "lora" else dict(ARCHS["llama"].build().to(dtype).named_parameters())
    # The rotary embedding's buffers are not parameters.
    assert planned.weight_bytes == pytest.approx(sum(t.nbytes for t in base.values()), rel=1e-2)
    optimizer = train(model, ARCHS["llama"].inputs(), 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Beside the parameters, a schedule's few integers.
    assert planned.adapter_bytes == pytest.approx(sum(p.nbytes for p in trained), abs=200)
    assert planned.gradient_bytes == sum(p.grad.nbytes for p in trained)
    states = [value for state in optimizer.state.values() for value in flat(state) if value.dim()]
    assert planned.optimizer_bytes == sum(value.nbytes for value in states)
    adapter = planned.adapter_bytes + planned.gradient_bytes + planned.optimizer_bytes
    assert planned.step_bytes == planned.weight_bytes + adapter + planned.activation_bytes


def flat(state: dict) -> list[Tensor]:
    values = [value for v in state.values() for value in (v.values() if isinstance(v, dict) else [v])]
    return [value for value in values if isinstance(value, Tensor)]


def test_tied_weights_count_once():
    tied, untied = (plan(skeleton(tie_word_embeddings=tie), config("lora")) for tie in (True, False))
    assert untied.weight_bytes - tied.weight_bytes == 4 * VOCAB * HIDDEN


def saved_for_backward(model: PreTrainedModel, inputs: dict[str, Tensor], autocast: bool) -> int:
    """Bytes that autograd keeps from forward to backward, parameters left out; each storage once."""
    own = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**inputs)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


def measured(method: str, dtype: torch.dtype, autocast: bool, **settings) -> tuple[int, int]:
    """(planned, measured) bytes that the method keeps beyond the frozen model, which passes gradients on."""

    def build() -> PreTrainedModel:
        model = ARCHS["llama"].build().to(dtype).requires_grad_(False).train()
        model.enable_input_require_grads()
        return model

    inputs = {"input_ids": torch.randint(3, VOCAB, (12, 32))}
    with_adapter = get_peft_model(build(), config(method, **settings)).train()
    without = saved_for_backward(build(), inputs, autocast)
    planned = plan(build(), config(method, **settings), inputs["input_ids"].numel(), autocast)
    return planned.activation_bytes, saved_for_backward(with_adapter, inputs, autocast) - without


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_activations_are_what_autograd_keeps(method, dtype, autocast):
    planned, kept = measured(method, dtype, autocast)
    if method == "dual_lora" and autocast and dtype == torch.float32:
        # It needs no copy of W in bfloat16, which the frozen model keeps.
        kept += 2 * LAYERS * sum(o * i for o, i in SHAPES.values())
    # Under autocast, a shared factor's one copy is counted for each layer: r of T + r rows.
    assert planned == pytest.approx(kept, rel=0.02 if autocast else 0.001)


@pytest.mark.parametrize("method", ALL)
def test_activations_of_all_linear_layers(method):
    for dtype in (torch.bfloat16, torch.float32):
        planned, kept = measured(method, dtype, False, target_modules="all-linear")
        # Without a cast o_proj reads what attention keeps anyway: x is counted once too often.
        casts = dtype == torch.bfloat16 and method != "dual_lora"
        twice = 0 if casts else 12 * 32 * HIDDEN * dtype.itemsize * LAYERS
        assert planned - twice == pytest.approx(kept, rel=0.001)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_activations_with_dropout(method, autocast):
    planned, kept = measured(method, torch.bfloat16, autocast, lora_dropout=0.1)
    # Dropout's mask is as wide as its input on a CPU, and one byte per element on a GPU.
    wider = (3 if method == "masa-sum" else 1) * ((2 if method == "dual_lora" else 4) - 1)
    assert planned + wider * (12 * 32) * HIDDEN * 2 * LAYERS == pytest.approx(kept, rel=0.01)


# The command


@pytest.fixture
def folder(tmp_path):
    """A folder with a config and nothing else."""
    ARCHS["llama"].config().save_pretrained(tmp_path)
    return str(tmp_path)


def budgets(capsys, *arguments: str) -> dict:
    assert main(["budget", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def rows(capsys, *arguments: str) -> list[list[str]]:
    """The printed tables, as cells."""
    assert main(["budget", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]


def test_all_methods_from_a_config(folder, capsys):
    options = ("--dtype", "bfloat16", "--tokens", "64", "--adapter.r", "4", "--adapter.num_experts=2")
    report = budgets(capsys, folder, *options)
    assert list(report["budgets"]) == ["masa", "aslora", "dual_lora", "multilora", "lora"]
    assert report["budgets"]["lora"]["parameters"] == by_hand("lora", 4)
    assert "num_experts" not in report["budgets"]["lora"]["settings"]
    assert (report["dtype"], report["base_parameters"]) == ("bfloat16", skeleton().num_parameters())
    again = plan(skeleton().to(torch.bfloat16), config("lora", lora_alpha=8), 64).to_dict()
    assert {**again, "settings": 0} == {**report["budgets"]["lora"], "settings": 0}


def test_what_is_printed(folder, capsys):
    adapters = {row[0]: row[1:] for row in rows(capsys, folder, "--adapter.r", "4", "--adapter.num_experts", "2")[:5]}
    share = by_hand("lora", 4) / skeleton().num_parameters()
    assert adapters["lora"][:3] == ["", f"{by_hand('lora', 4):,}", f"{share:.3%}"]
    assert adapters["masa"][0] == "num_experts 2"
    assert adapters["aslora"][-1] != adapters["aslora"][-2]
    assert adapters["lora"][-1] == adapters["lora"][-2]
    alone = rows(capsys, folder, "--methods", "lora", "--match", "lora:r=5", "--tokens", "1000000000", "--autocast")
    assert alone[0][1] == "r 5, lora_alpha 8, target_modules q_proj v_proj"
    assert (len(alone[0]), alone[0][4], alone[1][-1][-3:]) == (6, "+0", "GiB")
    main(["budget", folder, "--methods", "lora, masa", "--params", "2k", "--tokens", "1000000000", "--autocast"])
    shown = capsys.readouterr().out
    assert "each adapter  lora_alpha 8, target_modules q_proj v_proj" in shown
    assert "to match      2,000 trainable parameters (2k)" in shown
    assert "Memory of a step of 1,000,000,000 tokens under autocast" in shown


@pytest.mark.parametrize("target_modules", ["[q_proj]", "all-linear"])
def test_match_another_method(folder, capsys, target_modules):
    settings = ("--adapter.target_modules", target_modules)
    report = budgets(capsys, folder, "--match", "lora:r=6", *settings)
    reference = plan(skeleton(), config("lora", r=6, target_modules=yaml.safe_load(target_modules)))
    assert report["target"] == reference.parameters
    assert {m: report["budgets"][m]["excess"] for m in ("lora", "dual_lora")} == {"lora": 0, "dual_lora": 0}
    for budget in report["budgets"].values():
        assert budget["excess"] == budget["parameters"] - report["target"]
        assert abs(budget["excess"]) <= report["target"] / 4
    same = budgets(capsys, folder, "--methods", "lora", "--params", str(report["target"]), *settings)
    assert same["budgets"] == {"lora": report["budgets"]["lora"]}


def test_match_with_more_settings(folder, capsys):
    match = ("--match", "masa:r=2, expert_mixing=sum, target_modules=[q_proj]")
    report = budgets(capsys, folder, "--methods", "dual_lora", *match, "--adapter.r_magnitude", "4")
    assert report["target"] == 2 * 4 * 2 * HIDDEN + LAYERS * 2 * HIDDEN
    assert report["budgets"]["dual_lora"]["settings"]["r"] == 5  # the lowest that r_magnitude leaves


def test_classifiers_train_their_head_along(folder, capsys):
    options = ("--methods", "aslora", "--task", "classification", "--adapter.r", "4")
    found = budgets(capsys, folder, *options)["budgets"]["aslora"]["parameters"]
    assert found == by_hand("aslora", 4) + 2 * HIDDEN  # two classes where the config names none


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("2M", 2_000_000), ("2.5m", 2_500_000), ("300k", 300_000), ("1B", 10**9), ("4,194,304", 4_194_304)],
        *[("12_000", 12_000), ("0.5%", 5), (".5%", 5), ("100 %", 1000), ("0.0001%", 1)],
    ],
)
def test_parameter_numbers(text, number):
    assert parse_parameters(text, 1000) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "2MB", "nan", "0%", "1e6x"])
def test_bad_parameter_numbers(text):
    with pytest.raises(ConfigError, match=r"give a number \(2000000, 2M, 300k\) or a share"):
        parse_parameters(text, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods mase", "unknown method 'mase': did you mean 'masa'"),
        ("--match lore:r=8", "unknown method 'lore': did you mean 'lora'"),
        ("--match lora:r", "--match lora:r: write METHOD:FIELD=VALUE"),
        ("--match lora:rank=8", "unknown key 'adapter.rank'"),
        ("--match lora:r=0", "lora: `r` should be a positive integer value but the value passed is 0"),
        ("--match lora:r=8 --params 2M", "--match lora:r=8 and --params 2M exclude each other: keep one"),
        ("--tokens 0", "--tokens 0: give a number from 1 to "),
        ("--adapter.num_expert 4", "did you mean 'adapter.num_experts'"),
        ("--methods lora --adapter.num_experts 4", "unknown key 'adapter.num_experts'"),
        ("--adapter.r eight", "adapter.r is 'eight'"),
        ("--revision main --gguf_file none.gguf", "none.gguf does not exist"),
        ("--learning_rate 1", "the command line: unknown key 'learning_rate'"),
        ("--adapter.target_modules [q_prok]", "masa: target_modules names 'q_prok'"),
        ("--methods aslora --adapter.num_merges 9", "aslora: num_merges=9 is larger than possible"),
    ],
)
def test_errors_name_the_value_and_the_remedy(folder, capsys, options, message):
    assert main(["budget", folder, *options.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1
