"""Every method × every promise. The equations themselves are in tests/methods."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import helpers as h
import loraplex
from helpers import ARCHS, LAYERS, MERGEABLE, METHODS, PLAIN, adapted, config, fill, output, ready
from loraplex.methods.dual_lora.factors import DualLoraFactors
from loraplex.tuner.bank import BANK
from loraplex.tuner.families import layer_depth

LLAMA = ARCHS["llama"]
BATCH = LLAMA.inputs()

every_method = pytest.mark.parametrize("method", METHODS)
every_plain = pytest.mark.parametrize("method", PLAIN)
every_mergeable = pytest.mark.parametrize("method", MERGEABLE)


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    with loraplex.loss_scale(1.0):  # which Dual LoRA asks for in float16
        model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int = 10, lr: float = 2e-2) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


# 1. The start


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@every_method
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_starts_at_the_base_model(method: str, arch: str) -> None:
    base, inputs = ARCHS[arch].build(), ARCHS[arch].inputs()
    expected = output(base, inputs)
    model = get_peft_model(base, config(method, target_modules=ARCHS[arch].targets))
    assert torch.equal(output(model.train(), inputs), expected)
    assert torch.equal(output(model.eval(), inputs), expected)


@every_method
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_starts_at_the_base_model_in_every_dtype(method: str, arch: str, dtype: torch.dtype) -> None:
    """Bit for bit, in both modes, with gradients and without, under autocast too."""
    base, inputs = ARCHS[arch].build().to(dtype), ARCHS[arch].inputs()
    half = [torch.bfloat16, torch.float16]

    def outputs(model: nn.Module) -> dict[Any, Tensor]:
        found = {}
        for mode in (True, False):
            # GPT-2's LayerNorm takes no half precision but its own.
            for autocast in (None, *(d for d in half if arch == "llama" or dtype not in half or d == dtype)):
                for gradient in (True, False):
                    # A block for each: before torch 2.13 it keeps the casts that were made without gradients.
                    half_precision = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
                    with half_precision, torch.set_grad_enabled(gradient):
                        found[mode, autocast, gradient] = model.train(mode)(**inputs).logits.detach()
        return found

    expected = outputs(base)
    found = outputs(get_peft_model(base, config(method, target_modules=ARCHS[arch].targets)))
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not different


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_training_without_dropout_repeats(method: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Two forwards of the same input are equal: a policy and its reference, a step and its checkpointed second one."""
    base = LLAMA.build().to(dtype)
    model = get_peft_model(base, config(method))
    ready(model)
    model.train()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        first = model(**BATCH).logits
        torch.manual_seed(5)
        assert torch.equal(model(**BATCH).logits, first)


@every_method
def test_init_weights_false_starts_elsewhere(method: str) -> None:
    base = LLAMA.build()
    expected = output(base, BATCH)
    model = get_peft_model(base, config(method, init_weights=False))
    assert not torch.allclose(output(model, BATCH), expected, atol=1e-3)


# 3. Merging


@every_mergeable
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_merge_equals_forward(method: str, arch: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = ARCHS[arch].inputs()
    model = adapted(method, arch, dtype)
    weights, expected = h.base_weights(model), output(model, inputs)
    with model.disable_adapter():
        base = output(model, inputs)
    scale = expected.abs().max().item()
    assert (base - expected).abs().max() > 0.1 * scale
    model.merge_adapter()
    assert all(layer.merged for layer in h.layers_of(model).values())
    assert (output(model, inputs) - expected).abs().max().item() <= tolerance * scale
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), weights)
    assert torch.equal(output(model, inputs), expected)


@every_mergeable
def test_merge_uses_the_scaling_once(method: str) -> None:
    """Doubling lora_alpha doubles ΔW, in forward and in the merged weight alike."""
    deltas = []
    for alpha in (6, 12):
        model = adapted(method, dtype=torch.float64, lora_alpha=alpha)
        before = h.base_weights(model)
        model.merge_adapter()
        after = h.base_weights(model)
        name = next(name for name in before if name.endswith("v_proj.base_layer.weight"))
        deltas.append(after[name] - before[name])
    assert deltas[0].abs().max() > 0.01
    torch.testing.assert_close(deltas[1], 2 * deltas[0])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@every_mergeable
def test_broken_factors_are_not_merged(method: str, bad: float) -> None:
    """Unless asked for: by no way to merge, whichever factor it is, and the model stays as it was."""
    model = adapted(method)
    weights = h.base_weights(model)
    parameters = h.adapter_parameters(model)
    # One of each kind. A gradient tells which are read: ASLoRA has merged some B's away.
    found = gradients(model, BATCH)
    kinds = {name.rpartition(".")[2]: name for name in parameters if name in found and found[name].any()}
    assert kinds
    ways: list[Callable[[], Any]] = [
        lambda: model.merge_adapter(),
        lambda: model.merge_adapter(safe_merge=True),
        lambda: model.merge_and_unload(),
        lambda: model.merge_and_unload(safe_merge=True),
        lambda: [layer.check_mergeable(["default"]) for layer in h.layers_of(model).values()],
    ]
    for name in kinds.values():
        kept = parameters[name].detach().clone()
        parameters[name].data[-1, -1] = bad
        for merge in ways:
            with pytest.raises(ValueError, match=r"holds NaN or Inf on model\.layers.*allow_nonfinite"):
                merge()
            h.assert_same(h.base_weights(model), weights)
            assert h.layers_of(model)
            assert not any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer))
        parameters[name].data.copy_(kept)
    expected = output(model, BATCH)
    torch.testing.assert_close(output(copy.deepcopy(model).merge_and_unload(), BATCH), expected, atol=1e-5, rtol=1e-4)
    parameters[next(iter(kinds.values()))].data[-1, -1] = bad
    with loraplex.allow_nonfinite():
        model.merge_adapter()
    assert not all(weight.isfinite().all() for weight in h.base_weights(model).values())
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), weights)
    with pytest.raises(ValueError, match="allow_nonfinite"):
        model.merge_and_unload()


@every_mergeable
def test_safe_merge_refuses_what_is_not_finite_in_the_sum(method: str) -> None:
    model = adapted(method)
    *_, last = h.layers_of(model).values()
    last.get_base_layer().weight.data[0, 0] = math.inf
    weights = h.base_weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"NaN or Inf into the weight of {last.module_name}"):
            merge(safe_merge=True)
        h.assert_same(h.base_weights(model), weights)
        assert h.layers_of(model)
        assert not any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer))
    model.merge_and_unload()


@every_mergeable
def test_merge_and_unload_leaves_a_plain_model(method: str) -> None:
    model = adapted(method)
    expected = output(model, BATCH)
    merged = model.merge_and_unload()
    assert type(merged) is type(LLAMA.build())
    assert not any("loraplex" in type(m).__module__ for m in merged.modules())
    assert sorted(merged.state_dict()) == sorted(LLAMA.build().state_dict())
    torch.testing.assert_close(output(merged, BATCH), expected, atol=1e-5, rtol=1e-4)


@every_method
def test_unload_returns_the_base_model(method: str) -> None:
    expected = LLAMA.build().state_dict()
    h.assert_same(adapted(method).unload().state_dict(), expected)


def test_router_refuses_to_merge() -> None:
    model = adapted("masa-router")
    before = h.snapshot(model, BATCH)
    for refuse in (
        model.merge_adapter,
        model.merge_and_unload,
        next(iter(h.layers_of(model).values())).merge,
    ):
        with pytest.raises(ValueError, match=r"gates depend on the input.*calibrate"):
            refuse()
        h.assert_unchanged(before, h.snapshot(model, BATCH))
    assert not any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer))


def test_router_beside_a_mergeable_adapter_merges_nothing() -> None:
    model = adapted("masa-sum")
    loraplex.add_adapter(model, "router", config("masa-router"))
    ready(model, "router", seed=1)
    model.base_model.set_adapter(["default", "router"])
    weights = h.base_weights(model)
    with pytest.raises(ValueError, match="gates depend on the input"):
        model.merge_adapter()
    h.assert_same(h.base_weights(model), weights)
    model.merge_adapter(adapter_names=["default"])
    assert next(iter(h.layers_of(model).values())).merged_adapters == ["default"]


@every_mergeable
def test_disable_adapter_while_merged(method: str) -> None:
    model = adapted(method)
    expected = output(model, BATCH)
    with model.disable_adapter():
        base = output(model, BATCH)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, BATCH), base)
    torch.testing.assert_close(output(model, BATCH), expected, atol=1e-5, rtol=1e-4)
    assert {m.merged for m in model.modules() if isinstance(m, BaseTunerLayer)} == {False}


def test_merge_of_two_adapters_is_their_sum_and_unmerges_bitwise() -> None:
    model = adapted("multilora", dtype=torch.float64)
    loraplex.add_adapter(model, "other", config("dual_lora"))
    ready(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    weights, expected = h.base_weights(model), output(model, BATCH)
    model.merge_adapter()
    torch.testing.assert_close(output(model, BATCH), expected)
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), weights)


@every_mergeable
def test_merging_further_adapters_one_by_one(method: str) -> None:
    model = adapted(method, dtype=torch.float64)
    model.add_adapter("other", config(method))
    ready(model, "other", seed=1)
    weights = h.base_weights(model)
    model.base_model.set_adapter(["default", "other"])
    expected = output(model, BATCH)
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(adapter_names=["other"])
    torch.testing.assert_close(output(model, BATCH), expected)
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), weights)


@every_mergeable
@pytest.mark.parametrize("further", [False, True])
def test_a_change_of_the_base_while_merged_is_kept(method: str, further: bool, caplog: Any) -> None:
    """Unmerging, or merging another adapter, must not put back weights from before a user's change."""
    model = adapted(method, dtype=torch.float64)
    model.add_adapter("other", config(method))
    ready(model, "other", seed=1)
    weights = h.base_weights(model)
    model.merge_adapter(adapter_names=["default"])
    changed = next(iter(h.layers_of(model)))
    with torch.no_grad():
        model.get_submodule(changed).get_base_layer().weight[1, 2] += 5
    if further:
        with pytest.warns(UserWarning, match="additionally merging"):
            model.merge_adapter(adapter_names=["other"])
    model.unmerge_adapter()
    assert [record.message for record in caplog.records if "was changed while" in record.message]
    found = h.base_weights(model)
    name = f"{changed}.base_layer.weight"
    weights[name][1, 2] += 5
    torch.testing.assert_close(found.pop(name), weights.pop(name))
    h.assert_same(found, weights)


@every_mergeable
def test_a_cast_while_merged(method: str) -> None:
    model = adapted(method)
    expected = h.base_weights(copy.deepcopy(model).to(torch.bfloat16))
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    h.assert_same(h.base_weights(model), expected)


@every_mergeable
def test_merging_in_inference_mode_leaves_a_model_that_trains(method: str) -> None:
    model = adapted(method)
    weights = h.base_weights(model)
    with torch.inference_mode():
        model.merge_adapter()
        model.unmerge_adapter()
    h.assert_same(h.base_weights(model), weights)
    model.train()(**BATCH).loss.backward()


@every_plain
def test_transforms_of_functions(method: str) -> None:
    """torch.func works as over a plain LoRA."""
    if method == "dual_lora":
        pytest.skip("torch has no transforms of custom operators with a gradient of their own")
    model = adapted(method).train()
    expected = gradients(model, BATCH)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = torch.func.grad(lambda v: torch.func.functional_call(model, v, (), dict(BATCH)).loss)(values)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    layer = next(iter(h.layers_of(model).values()))
    x = torch.randn(3, 2, h.HIDDEN)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    tangent = torch.func.jvp(layer, (x,), (x,))[1]  # without a bias it is linear, but for the router's gates
    if method != "masa-router":
        torch.testing.assert_close(tangent, layer(x))


# 4. Saving and loading


def expected_parameters(method: str, settings: Any, shapes: dict[str, list[tuple[int, int]]]) -> int:
    """Trainable parameters by the formulas of the methods' pages; `shapes`: family → (out, in) per layer."""
    r, total = settings.r, 0
    for family in shapes.values():
        layers, (o, i) = len(family), family[0]
        if method.startswith("multilora"):
            n = settings.num_modules
            total += layers * (n * r * (i + o) + n * (o if settings.scaling_granularity == "channel" else 1))
        elif method == "aslora":
            total += r * i + layers * r * o
        elif method == "dual_lora":
            total += layers * (settings.r_magnitude + settings.r_direction) * (i + o)
        else:
            n, mixing = settings.num_experts, settings.expert_mixing
            total += math.ceil(layers / settings.share_layers) * n * r * i
            total += layers * r * o * (n if mixing == "concat" else 1)
            total += layers * n * i if mixing == "router" else 0
    return total


LLAMA_SHAPES = {"q": [(h.HIDDEN, h.HIDDEN)] * LAYERS, "v": [(h.HIDDEN // 2, h.HIDDEN)] * LAYERS}
SCHEDULE_BYTES = {"aslora": 2 * 2 * LAYERS * 8, "dual_lora": 2 * 8}
"""State of the schedules: a map and merge steps per family; two counters."""


def saved_bytes(path: Any) -> int:
    return sum(t.numel() * t.element_size() for t in h.file_tensors(path).values())


@every_method
def test_round_trip(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    expected = output(model, BATCH)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))

    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert torch.equal(output(loaded, BATCH), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, layer in h.layers_of(model).items():
        torch.testing.assert_close(
            h.layers_of(loaded)[name].factors("default").scaling, layer.factors("default").scaling
        )

    renamed = PeftModel.from_pretrained(LLAMA.build(), tmp_path, adapter_name="other", is_trainable=True)
    assert torch.equal(output(renamed, BATCH), expected)
    assert {n for n, p in renamed.named_parameters() if p.requires_grad} == set(h.adapter_parameters(renamed, "other"))

    host = get_peft_model(LLAMA.build(), config("multilora"))
    loraplex.load_adapter(host, tmp_path, "second")
    host.set_adapter("second")
    assert torch.equal(output(host, BATCH), expected)

    # Saved again, nothing changes.
    loaded.save_pretrained(tmp_path / "again")
    h.assert_same(h.file_tensors(tmp_path / "again"), h.file_tensors(tmp_path))


@every_method
def test_file_holds_each_factor_once(method: str, tmp_path: Path) -> None:
    settings = config(method)
    model = get_peft_model(LLAMA.build(), settings)
    fill(model)
    model.save_pretrained(tmp_path)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected_parameters(method, settings, LLAMA_SHAPES)
    assert saved_bytes(tmp_path) == 4 * trainable + SCHEDULE_BYTES.get(method, 0)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    names = sum(len(name) + 120 for name in h.file_tensors(tmp_path))
    assert size <= saved_bytes(tmp_path) + names + 200


def test_merged_factors_leave_the_file(tmp_path: Path) -> None:
    model = adapted("aslora")
    model.save_pretrained(tmp_path)
    trainable = expected_parameters("aslora", config("aslora"), LLAMA_SHAPES)
    gone = 2 * 4 * (h.HIDDEN + h.HIDDEN // 2)
    assert saved_bytes(tmp_path) == 4 * (trainable - gone) + SCHEDULE_BYTES["aslora"]
    assert shared_maps(PeftModel.from_pretrained(LLAMA.build(), tmp_path)) == shared_maps(model)


def shared_maps(model: nn.Module, adapter: str = "default") -> dict[str, list[int]]:
    maps = h.shared_state(model, adapter).maps
    assert any(mapped != list(range(len(mapped))) for mapped in maps.values())
    return maps


@every_method
def test_model_card_says_what_to_import(method: str, tmp_path: Path) -> None:
    adapted(method).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import loraplex" in card
    assert "pip install loraplex" in card
    assert "tags:" in card.split("---")[1]


def test_loading_without_the_import_fails_and_the_card_tells(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")
    adapted("masa-sum").save_pretrained(tmp_path / "adapter")
    code = (
        "from transformers import AutoModelForCausalLM; from peft import PeftModel;"
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r});"
        f"PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "MASA" in run.stderr
    assert "import loraplex" in (tmp_path / "adapter" / "README.md").read_text()


@every_plain
def test_auto_peft_model(method: str, tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")
    base = LLAMA.auto.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(method, task_type="CAUSAL_LM"))
    ready(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, BATCH), output(model, BATCH))


@every_plain
def test_load_over_an_adapter_in_place(method: str, tmp_path: Path) -> None:
    """What a trainer does on resume: `load_adapter` under a name that is on the model already."""
    model = adapted(method)
    expected = output(model, BATCH)
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(LLAMA.build(), config(method))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(output(fresh.eval(), BATCH), expected)
    assert all(p.requires_grad for p in h.adapter_parameters(fresh).values())


# 5. Several adapters


def in_place(model: PeftModel, name: str) -> Tensor:
    model.set_adapter(name)
    return output(model, BATCH)


@every_plain
@pytest.mark.parametrize("second", PLAIN)
def test_add_switch_disable_delete(method: str, second: str) -> None:
    model = adapted(method)
    first_alone = output(model, BATCH)
    loraplex.add_adapter(model, "second", config(second, r=2))
    assert torch.equal(output(model, BATCH), first_alone)
    ready(model, "second", seed=1)
    assert torch.equal(output(model, BATCH), first_alone)

    second_alone = in_place(model, "second")
    # Alone on a model it gives the same output: nothing of the first adapter leaks in.
    expected = get_peft_model(LLAMA.build(), config(second, r=2))
    ready(expected, seed=1)
    assert torch.equal(second_alone, output(expected, BATCH))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(h.adapter_parameters(model, "second"))
    assert torch.equal(in_place(model, "default"), first_alone)

    base = output(LLAMA.build(), BATCH)
    with model.disable_adapter():
        assert torch.equal(output(model, BATCH), base)
    assert torch.equal(output(model, BATCH), first_alone)

    model.delete_adapter("second")
    assert torch.equal(output(model, BATCH), first_alone)
    assert not h.adapter_parameters(model, "second")
    assert not any(".second." in key for key in model.state_dict())
    loraplex.add_adapter(model, "second", config(second, r=2))
    assert torch.equal(in_place(model, "second"), base)


@every_plain
def test_deleting_the_active_adapter_activates_the_other(method: str) -> None:
    model = adapted(method)
    loraplex.add_adapter(model, "second", config("masa-sum"))
    ready(model, "second", seed=1)
    expected = in_place(model, "second")
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(output(model, BATCH), expected)
    assert {tuple(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)} == {("second",)}


@every_method
def test_second_adapter_shares_too(method: str, tmp_path: Path) -> None:
    model = adapted("multilora")
    settings = config(method)
    loraplex.add_adapter(model, "second", settings)
    ready(model, "second")
    model.set_adapter("second")
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == expected_parameters(method, settings, LLAMA_SHAPES)
    if not settings.shares_across_layers:
        return
    assert_shared(model, method, "second")
    alone = adapted(method)
    alone.save_pretrained(tmp_path / "alone")
    model.save_pretrained(tmp_path / "pair")
    assert saved_bytes(tmp_path / "pair" / "second") == saved_bytes(tmp_path / "alone")


def assert_shared(model: nn.Module, method: str, adapter: str = "default") -> None:
    """Layers of one group read the very same factor, and it is a parameter of the model."""
    mine = {id(p) for p in h.adapter_parameters(model, adapter).values()}
    for ending in ("q_proj", "v_proj"):
        factors = [layer.factors(adapter) for layer in h.layers_of(model, ending).values()]
        assert len(factors) == LAYERS
        owners = [id(f.lora_A) for f in factors]
        assert set(owners) <= mine
        if method == "aslora":
            assert len(set(owners)) == 1
        else:
            assert [owners.index(owner) for owner in owners] == [0, 0, 2, 2, 4]
        pointers = [f.lora_B.data_ptr() for f in factors]
        own = LAYERS - 2 if method == "aslora" and shared_maps(model, adapter) else LAYERS
        assert len(set(pointers)) == own


@pytest.mark.parametrize("arch", ["llama", "gpt2", "roberta", "t5", "vit"])
def test_mixed_batch(arch: str) -> None:
    inputs = {**ARCHS[arch].inputs(batch=5)}
    targets = ARCHS[arch].targets
    model = adapted("aslora", arch)
    for name, method in {"one": "masa-router", "two": "dual_lora", "three": "multilora"}.items():
        loraplex.add_adapter(model, name, config(method, target_modules=targets))
        ready(model, name, seed=ord(name[0]))
    model.eval()
    names = ["one", "__base__", "default", "two", "three"]
    mixed = output(model, inputs, adapter_names=names)
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(output(model, inputs)[row])
        else:
            model.set_adapter(name)
            rows.append(output(model, inputs)[row])
    torch.testing.assert_close(mixed, torch.stack(rows), atol=1e-5, rtol=1e-4)
    assert len({tuple(row.flatten()[:3].tolist()) for row in mixed}) == len(names)


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_batch_generates(arch: str, beams: int) -> None:
    model = adapted("masa-concat", arch, task_type="CAUSAL_LM" if arch == "llama" else "SEQ_2_SEQ_LM")
    loraplex.add_adapter(model, "other", config("aslora", target_modules=ARCHS[arch].targets))
    ready(model, "other", seed=1)
    model.eval()
    ids = ARCHS[arch].inputs()["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    mask = torch.ones_like(ids)
    names = ["other", "__base__", "default"]
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**one, **options)
        else:
            model.set_adapter(name)
            alone = model.generate(**one, **options)
        assert torch.equal(mixed[row], alone[0]), name
    assert len({tuple(row.tolist()) for row in mixed[:, -5:]}) > 1


def test_mixed_batch_refuses_what_it_cannot_do() -> None:
    model = adapted("multilora")
    names = ["default"] * 3
    with pytest.raises(ValueError, match=r"absent.*default"):
        output(model, BATCH, adapter_names=["default", "absent", "__base__"])
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        output(model, BATCH, adapter_names=names[:2])
    with pytest.raises(ValueError, match="eval"):
        output(model.train(), BATCH, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        output(model, BATCH, adapter_names=names)
    model.unmerge_adapter()
    # No hook is left behind.
    assert torch.equal(output(model, BATCH), output(adapted("multilora"), BATCH))


@every_plain
@pytest.mark.parametrize("second", ["aslora", "dual_lora"])
def test_two_active_adapters_add_up(method: str, second: str) -> None:
    """On one linear layer, where the sum is exact: both updates are added to the base output."""
    base = h.Mlp(2).double()
    x = torch.randn(3, 4, h.HIDDEN, dtype=torch.float64)
    settings = {"target_modules": ["layers.0.down"]}
    model = get_peft_model(base, config(method, **settings, **no_merges(method)))
    fill(model)
    loraplex.add_adapter(model, "second", config(second, **settings, **no_merges(second)))
    fill(model, "second", seed=1)
    for name in ("default", "second"):
        if isinstance(h.shared_state(model, name), loraplex.tuner.schedule.Scheduled):
            h.advance(model, name, steps=2)
    layer = next(iter(h.layers_of(model).values())).eval()
    inner = torch.randn(3, h.INNER, dtype=torch.float64)
    outputs = {}
    with torch.no_grad():
        for names in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(names)
            outputs[tuple(names)] = layer(inner) - layer.base_layer(inner)
        assert all(o.abs().max() > 1e-3 for o in outputs.values())
        both = outputs["default", "second"]
        torch.testing.assert_close(both, outputs["default",] + outputs["second",])
        assert model(x).isfinite().all()


def no_merges(method: str) -> dict[str, Any]:
    return {"num_merges": 0} if method == "aslora" else {}


# 6. Layers, dtypes, copies, checkpointing, compilation


@every_method
def test_conv1d_equals_linear(method: str) -> None:
    """GPT-2's Conv1D stores (in, out); an adapter on it gives what it gives on the same nn.Linear."""
    model = adapted(method, "gpt2", torch.float64)
    updates = h.naive_updates(model) if method in MERGEABLE else {}
    for name, layer in h.layers_of(model).items():
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        with torch.no_grad():
            update = layer.factors("default")(x)
            base = x @ layer.base_layer.weight + layer.base_layer.bias
            torch.testing.assert_close(layer(x), base + update)
            if updates:
                torch.testing.assert_close(update, x @ updates[name.removeprefix(h.ROOT)].T)
            assert update.abs().max() > 0.1
    assert (layer.in_features, layer.out_features) == (h.HIDDEN, 3 * h.HIDDEN)


@every_method
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (2, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inputs_of_any_shape(method: str, shape: tuple[int, ...], dropout: float) -> None:
    """One vector, no tokens, or several dimensions: output, gradients of the factors and of x; merged too."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5))
    alone = {"num_merges": 0} if method == "aslora" else {}  # one layer has nothing to merge with
    model = get_peft_model(base, config(method, target_modules=["0"], lora_dropout=dropout, **alone))
    ready(model)
    x = torch.randn(*shape, 7, requires_grad=True)
    rows = x.detach().reshape(-1, 7)
    for mode in (True, False):
        torch.manual_seed(1)
        y = model.train(mode)(x)
        assert y.shape == (*shape, 5)
        factors = list(h.adapter_parameters(model).values())
        found = torch.autograd.grad(y.sum(), [x, *factors])
        assert [g.shape for g in found] == [t.shape for t in (x, *factors)]
        assert all(g.isfinite().all() for g in found)
        if 0 in shape:
            assert not any(g.any() for g in found)
        torch.manual_seed(1)
        torch.testing.assert_close(model(rows).view(*shape, 5), y.detach())
    if method in MERGEABLE:
        expected = model(x).detach()
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


@every_method
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_base(method: str, autocast: bool) -> None:
    base = LLAMA.build().to(torch.bfloat16)
    model = get_peft_model(base, config(method), autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for p in h.adapter_parameters(model).values()} == {expected}
    ready(model)
    assert output(model, BATCH).dtype == torch.bfloat16
    full = adapted(method)
    # With the same factors: Sign(DC) of rounded factors is another function.
    full.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(output(model, BATCH).float(), output(full, BATCH), atol=0.03, rtol=0.05)
    grads = gradients(model.train(), BATCH)
    assert set(grads) == set(h.adapter_parameters(model))
    assert all(g.isfinite().all() for g in grads.values())


@every_method
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["no autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_precision(method: str, dtype: torch.dtype, autocast: torch.dtype | None, training: bool) -> None:
    """Outputs and gradients are those of the same numbers in float64, within the rounding of the dtypes in use."""
    model = adapted(method, dtype=dtype).train(training)
    exact = adapted(method, dtype=torch.float64).train(training)
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    with exact.disable_adapter():
        base = output(exact, BATCH).double()
    eps = max(torch.finfo(kind).eps for kind in (dtype, autocast or dtype))
    expected, expected_grads = output(exact, BATCH), gradients(exact, BATCH)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found = output(model, BATCH)
    # A block of its own: torch before 2.13 keeps the casts made without gradients for the rest of a block.
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        grads = gradients(model, BATCH)
    assert h.relative(base, expected) > 0.3
    # Rounding errors of five layers and a softmax: at most 4.7 % of outputs and 16 % of gradients in bfloat16. A
    # missing or doubled scaling of 1.5 would be 33 % and more.
    assert h.relative(found, expected) < 6 * eps
    assert grads.keys() == expected_grads.keys() == h.adapter_parameters(model).keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        if expected_grads[name].norm() == 0:
            assert grad.norm() == 0, name
        else:
            assert h.relative(grad, expected_grads[name]) < (20 if eps > 1e-6 else 40) * eps, name


@every_method
def test_deepcopy_is_independent(method: str) -> None:
    model = adapted(method)
    expected = output(model, BATCH)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, BATCH), expected)
    ours, theirs = h.adapter_parameters(model), h.adapter_parameters(twin)
    assert {p.data_ptr() for p in ours.values()}.isdisjoint(p.data_ptr() for p in theirs.values())
    fill(model, seed=7)
    assert torch.equal(output(twin, BATCH), expected)
    assert not torch.equal(output(model, BATCH), expected)
    if config(method).shares_across_layers:
        assert_shared(twin, method)
    grads = gradients(twin.train(), BATCH)
    assert set(grads) == set(theirs)
    assert all(p.grad is None for p in ours.values())


@every_plain
def test_pickle(method: str) -> None:
    model = adapted(method)
    expected = output(model, BATCH)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(output(twin, BATCH), expected)
    fill(twin, seed=7)
    assert not torch.equal(output(twin, BATCH), expected)
    assert torch.equal(output(model, BATCH), expected)


def test_deepcopy_has_a_schedule_of_its_own() -> None:
    model = get_peft_model(LLAMA.build(), config("dual_lora"))
    twin = copy.deepcopy(model)
    train(twin, BATCH, steps=2)
    assert h.shared_state(twin).warmup.tolist()[0] == 2
    assert h.shared_state(model).warmup.tolist()[0] == 0


# transformers renames the call; the old name works in all versions that we support.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@every_method
def test_gradient_checkpointing_changes_nothing(method: str) -> None:
    model = adapted(method).train()
    expected = gradients(model, BATCH)
    assert set(expected) == set(h.adapter_parameters(model))
    for reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        calls = count_calls(next(iter(h.layers_of(model, "v_proj").values())))
        h.assert_same(gradients(model, BATCH), expected)
        assert len(calls) == 2
        model.gradient_checkpointing_disable()


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def stack(method: str, layers: int = 3) -> PeftModel:
    """An adapted `Mlp`, quick to compile."""
    more = {"num_merges": 1} if method == "aslora" else {}
    model = get_peft_model(h.Mlp(layers), config(method, target_modules=["up", "down"], **more))
    ready(model)
    return model


# torch's own code instantiates an autograd.Function while tracing one.
in_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# It also asks every input for its gradient.
in_dynamo_of_layers = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")


@in_dynamo
@every_method
def test_compile(method: str) -> None:
    torch._dynamo.reset()
    model, x = stack(method).train(), torch.randn(2, 3, h.HIDDEN)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in h.adapter_parameters(model).items()}
    value = model(x)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), value)
    compiled(x).square().sum().backward()
    for name, p in h.adapter_parameters(model).items():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4)


DEEP = 10
"""Layers, and one merge fewer: more than torch.compile's limit of eight compilations of one function."""


@in_dynamo
@in_dynamo_of_layers
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize(("method", "by_layer"), [*((m, True) for m in METHODS), *((m, False) for m in PLAIN)])
def test_compilations_stay_few(method: str, by_layer: bool, training: bool) -> None:
    """However many layers and merges there are; and every merge shows in the compiled outputs and gradients."""
    torch._dynamo.reset()
    more = {"aslora": {"num_merges": DEEP - 1}, "dual_lora": {"warmup_steps": DEEP}}.get(method, {})
    model = get_peft_model(h.Mlp(DEEP), config(method, target_modules=["up", "down"], **more))
    fill(model, std=0.1)
    counter, x = CompileCounterWithBackend("aot_eager" if training else "eager"), torch.randn(2, h.HIDDEN)
    if by_layer:
        for block in model.get_base_model().layers:
            block.compile(fullgraph=True, backend=counter)
    run = model if by_layer else torch.compile(model, fullgraph=True, backend=counter)

    def outcome(compiled: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            y = (run if compiled else model)(x)
            if training:
                y.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in h.adapter_parameters(model).items()} if training else {}
        return {"output": y.detach(), **grads}

    outputs = []
    optimizer = torch.optim.SGD(h.adapter_parameters(model).values(), lr=0.0)
    for _ in range(DEEP + 1):
        model.train(training)
        with torch.set_grad_enabled(training):
            found, expected = outcome(True), outcome(False)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        outputs.append(found["output"])
        for parameter in h.adapter_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    # The first layer's input needs no gradient, the others' do.
    assert counter.frame_count <= (2 if by_layer else 1)
    if method in ("aslora", "dual_lora"):
        assert h.shared_state(model).finished()
        assert not any(torch.equal(*two) for two in pairwise(outputs[1:] if method == "aslora" else outputs))
    if method == "aslora":
        assert set(shared_maps(model)["layers__N__up"]) == {DEEP - 1}


# Evaluation follows the weights, whoever writes them


def evaluated(method: str) -> PeftModel:
    """A `ready` model, "dual_lora-cached" with the cache of ΔW, that has been evaluated."""
    model = adapted(method.removesuffix("-cached"), **{"cache_delta": True} if method in CACHED else {})
    output(model, BATCH)
    return model


def twin_of(model: PeftModel) -> PeftModel:
    """A fresh model with the same weights, which has not computed anything."""
    twin = get_peft_model(LLAMA.build(), copy.deepcopy(model.peft_config["default"]))
    twin.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():  # a rotary embedding's is in no state dict
        twin.get_buffer(name).copy_(buffer)
    return twin.eval()


def other_state(method: str) -> dict[str, Tensor]:
    """All tensors of another adapter on the same base, whose schedule is elsewhere."""
    model = get_peft_model(LLAMA.build(), config(method.removesuffix("-cached")))
    fill(model, seed=5)
    h.advance(model, steps=2)
    state = {name: tensor for name, tensor in model.state_dict().items() if "_factors." in name or BANK in name}
    assert any("lora_A" in name for name in state)
    return state


Written = list[tuple[Tensor, Tensor]]
"""(a tensor of the model's adapter, parameter or buffer; what to write into it)"""


def _foreach_copy(pairs: Written) -> None:
    with torch.no_grad():
        torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])


def _each(write: Callable[[Tensor, Tensor], Any], off: Callable[[], Any] = torch.no_grad) -> Callable[[Written], None]:
    def write_all(pairs: Written) -> None:
        with off():
            for old, new in pairs:
                write(old, new)

    return write_all


def _set_data(old: Tensor, new: Tensor) -> None:
    # As MeZO and engines do; the version counter does not see it.
    old.data = new


def _swap(old: Tensor, new: Tensor) -> None:
    torch.utils.swap_tensors(old, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


WRITES: dict[str, Callable[[Written], None]] = {
    "copy_": _each(lambda old, new: old.copy_(new)),
    "copy_ in inference mode": _each(lambda old, new: old.copy_(new), torch.inference_mode),
    # As EMA callbacks swap weights.
    "data.copy_": _each(lambda old, new: old.data.copy_(new)),
    "data": _each(_set_data),
    "detach().copy_": _each(lambda old, new: old.detach().copy_(new)),
    "_foreach_copy_": _foreach_copy,
    "set_": _each(lambda old, new: old.set_(new)),
    "swap_tensors": _each(_swap),
}
UNSEEN = ("data.copy_",)
"""Writes that need `loraplex.clear_cache` where the user asked for a cache."""
CACHED = ("dual_lora-cached",)


@pytest.mark.parametrize("method", [*METHODS, *CACHED])
@pytest.mark.parametrize("write", WRITES)
def test_evaluation_follows_every_write(method: str, write: str) -> None:
    """Factors and schedule, in evaluation mode and with nothing that tells the model of it."""
    model, state = evaluated(method), other_state(method)
    before = output(model, BATCH)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    pairs = [(tensors[name], new.clone()) for name, new in state.items()]
    if method in CACHED and write == "swap_tensors":
        # torch refuses it for a tensor that others refer to weakly, as the cache does: an error, not silence.
        with pytest.raises(RuntimeError, match="weakref"):
            WRITES[write](pairs)
        loraplex.clear_cache(model)
    WRITES[write](pairs)
    if method in CACHED and write in UNSEEN:
        assert torch.equal(output(model, BATCH), before)
        loraplex.clear_cache(model)
    found = output(model, BATCH)
    assert not torch.allclose(found, before, atol=1e-3)
    assert torch.equal(found, output(twin_of(model), BATCH))
    h.assert_same({name: tensor for name, tensor in model.state_dict().items() if name in state}, state)


def _step(model: nn.Module, _: Any, training: bool, **settings: Any) -> None:
    if training:
        model.train()
    optimizer = torch.optim.AdamW(h.adapter_parameters(model).values(), lr=0.1, **settings)
    model(**BATCH).loss.backward()
    optimizer.step()
    if training:
        model.eval()


CHANGES: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "optimizer": partial(_step, training=True, foreach=False),
    "foreach": partial(_step, training=True, foreach=True),
    "fused": partial(_step, training=True, fused=True),
    "optimizer in eval mode": partial(_step, training=False, foreach=False),
    "fused in eval mode": partial(_step, training=False, fused=True),
    "load_state_dict": lambda model, state: model.load_state_dict(state, strict=False),
    "assign": lambda model, state: model.load_state_dict(state, strict=False, assign=True),
    "rounding": lambda model, _: model.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("method", [*METHODS, *CACHED])
@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_follows_every_change(method: str, change: str) -> None:
    model = evaluated(method)
    before = output(model, BATCH)
    CHANGES[change](model, other_state(method))
    found = output(model, BATCH)
    assert not torch.equal(found, before)
    assert torch.equal(found, output(twin_of(model), BATCH))


@pytest.mark.parametrize("method", [*METHODS, *CACHED])
def test_evaluation_follows_the_scaling_and_the_active_adapter(method: str) -> None:
    model = evaluated(method)
    loraplex.add_adapter(model, "second", config("masa-sum"))
    ready(model, "second", seed=1)
    before = output(model, BATCH)
    model.set_adapter("second")
    alone = adapted("masa-sum")
    ready(alone, seed=1)
    assert torch.equal(output(model, BATCH), output(alone, BATCH))
    model.set_adapter("default")
    assert torch.equal(output(model, BATCH), before)
    with model.disable_adapter():
        base = output(model, BATCH)
    assert not torch.equal(before, base)
    for layer in h.layers_of(model).values():
        layer.factors("default").scaling = 0.0
    assert torch.equal(output(model, BATCH), base)


@every_method
def test_an_average_of_weights_is_evaluated(method: str) -> None:
    """torch.optim.swa_utils writes the average into a copy of the model, which is evaluated between updates."""
    model = adapted(method)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    values = []
    for seed in (3, 4, 5):
        fill(model, seed=seed)
        averaged.update_parameters(model)
        values.append(output(averaged, BATCH))
        assert torch.equal(values[-1], output(twin_of(averaged.module), BATCH))
    assert not any(torch.allclose(*two, atol=1e-3) for two in pairwise(values))


def cached_deltas(model: nn.Module) -> list[Tensor]:
    """The ΔW that layers have cached."""
    found = [m._cache._entry for m in model.modules() if isinstance(m, DualLoraFactors)]
    return [entry[0] for entry in found if entry is not None]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_cached_deltas_are_of_use(off: Callable[[], Any]) -> None:
    """They are made once, give the same outputs, are in no state dict and gone when training begins."""
    model = adapted("dual_lora", cache_delta=True)
    keys, expected = sorted(model.state_dict()), output(adapted("dual_lora"), BATCH)
    with off():
        torch.testing.assert_close(model(**BATCH).logits, expected)
    first = cached_deltas(model)
    assert len(first) == len(h.layers_of(model)) == 2 * LAYERS
    # What inference mode has cached is of use without it.
    torch.testing.assert_close(output(model, BATCH), expected)
    assert all(one is other for one, other in zip(cached_deltas(model), first, strict=True))
    assert sorted(model.state_dict()) == keys
    loraplex.clear_cache(model)
    assert not cached_deltas(model)
    output(model, BATCH)
    train(model, BATCH, steps=1)
    assert not cached_deltas(model)


def test_nothing_is_cached_unless_asked_for() -> None:
    model = adapted("dual_lora")
    output(model, BATCH)
    assert not cached_deltas(model)


def test_factors_made_in_inference_mode_are_not_cached() -> None:
    """They have no version counter."""
    model = adapted("dual_lora", cache_delta=True)
    with torch.inference_mode():
        twin = copy.deepcopy(model)
        assert all(p.is_inference() for p in h.adapter_parameters(twin).values())
        for seed in (3, 4):
            fill(model, seed=seed)
            fill(twin, seed=seed)
            assert torch.equal(output(twin, BATCH), output(model, BATCH))
    assert not cached_deltas(twin)


def test_nothing_is_cached_among_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 gathers new values into the same memory, and preserves the version counter."""
    model = adapted("dual_lora", cache_delta=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    before = output(model, BATCH)
    for p in h.adapter_parameters(model).values():
        p.data.mul_(2)
    after = output(model, BATCH)
    assert not torch.equal(after, before)
    assert torch.equal(after, output(twin_of(model), BATCH))


def test_a_cached_delta_goes_with_its_device() -> None:
    model = adapted("dual_lora", cache_delta=True)
    output(model, BATCH)
    cached = [weakref.ref(delta) for delta in cached_deltas(model)]
    assert cached
    model.to("meta")
    assert all(delta() is None for delta in cached)


@in_dynamo
@every_method
def test_compiled_evaluation_follows_every_write(method: str) -> None:
    torch._dynamo.reset()
    model, x = stack(method).eval(), torch.randn(2, 3, h.HIDDEN)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed, write in enumerate(WRITES, start=1):
            before = compiled(x)
            tensors = {**h.adapter_parameters(model), **{k: b for k, b in model.named_buffers() if BANK in k}}
            pairs = [(t, torch.randn_like(t) if t.is_floating_point() else t.clone()) for t in tensors.values()]
            if method == "aslora":  # the lowest layer of three reads the B of another in turn
                for old, new in pairs:
                    new.copy_(new if old.is_floating_point() else torch.tensor([[seed % 2 + 1, 1, 2], [1, 0, 0]]))
            WRITES[write](pairs)
            found = compiled(x)
            torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-4)
            assert not torch.allclose(found, before, atol=1e-3)


@in_dynamo
def test_no_recompilation_while_warming_up() -> None:
    torch._dynamo.reset()
    model = get_peft_model(h.Mlp(), config("dual_lora", target_modules=["up"], warmup_steps=6)).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, h.HIDDEN)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    outputs = []
    for step in range(8):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            out = compiled(x)
        outputs.append(out.detach())
        out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert h.shared_state(model).finished()
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(outputs[0], outputs[-1])


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_cpu_mem_usage(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(method, dtype=dtype)
    model.save_pretrained(tmp_path)
    expected = output(model, BATCH)
    loaded = PeftModel.from_pretrained(LLAMA.build().to(dtype), tmp_path, low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(output(loaded, BATCH), expected)
    if config(method).shares_across_layers:
        assert_shared(loaded, method)
    host = get_peft_model(LLAMA.build().to(dtype), config("multilora"))
    loraplex.load_adapter(host, tmp_path, "second", low_cpu_mem_usage=True)
    host.set_adapter("second")
    assert torch.equal(output(host, BATCH), expected)


@pytest.mark.parametrize("method", ["aslora", "masa-router", "masa-sum", "masa-concat"])
def test_moves_and_casts_keep_sharing(method: str) -> None:
    model = adapted(method)
    expected = output(model, BATCH)
    moves: dict[str, Callable[[nn.Module], nn.Module]] = {
        "double": lambda m: m.double(),
        "float": lambda m: m.float(),
        "bfloat16": lambda m: m.to(torch.bfloat16),
        "share_memory": lambda m: m.share_memory(),
        "empty": lambda m: m.to("meta").to_empty(device="cpu"),
    }
    for name, move in moves.items():
        moved = move(model)
        assert_shared(moved, method)
        if name == "float":
            assert torch.equal(output(moved, BATCH), expected)
    # Trained after the move, all layers of a group follow.
    with torch.no_grad():
        for parameter in h.adapter_parameters(model).values():
            parameter.fill_(0.5)
    assert all((layer.factors("default").lora_A == 0.5).all() for layer in h.layers_of(model).values())


@every_method
def test_trainable_parameters_follow_the_formula(method: str) -> None:
    settings = config(method, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(LLAMA.build(), settings)
    shapes = {**LLAMA_SHAPES, "down": [(h.HIDDEN, h.INNER)] * LAYERS}
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == expected_parameters(method, settings, shapes)
    assert everything == trainable + LLAMA.build().num_parameters()


def test_equal_budgets() -> None:
    """MASA "sum" with as many layers as experts, and Dual LoRA, have a rank-r LoRA's parameter count."""
    lora = sum(4 * (o + i) for family in LLAMA_SHAPES.values() for o, i in family)
    dual = get_peft_model(LLAMA.build(), loraplex.DualLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert dual.get_nb_trainable_parameters()[0] == lora
    masa = loraplex.MasaConfig(r=4, num_experts=LAYERS, expert_mixing="sum", target_modules=["q_proj", "v_proj"])
    assert get_peft_model(LLAMA.build(), masa).get_nb_trainable_parameters()[0] == lora


# 7. Architectures


@every_plain
@pytest.mark.parametrize("arch", ARCHS)
def test_ten_steps_lower_the_loss(method: str, arch: str) -> None:
    more = {"warmup_steps": 2, "init_std": 0.3} if method == "dual_lora" else {}
    model = get_peft_model(ARCHS[arch].build(), config(method, target_modules=ARCHS[arch].targets, **more))
    base = h.base_weights(model)
    losses = train(model, ARCHS[arch].inputs())
    assert losses[-1] < losses[0], losses
    h.assert_same(h.base_weights(model), base)


HEADS = {"roberta": "classifier", "deberta": "classifier", "vit": "classifier"}


@every_plain
@pytest.mark.parametrize("arch", HEADS)
def test_trained_head_round_trips(method: str, arch: str, tmp_path: Path) -> None:
    inputs, more = ARCHS[arch].inputs(), {}
    if arch != "vit":
        more = {"task_type": "SEQ_CLS"}
    settings = config(method, target_modules=ARCHS[arch].targets, modules_to_save=[HEADS[arch]], **more)
    model = get_peft_model(ARCHS[arch].build(), settings)
    losses = train(model, inputs)
    assert losses[-1] < losses[0], losses
    model.eval()
    h.advance(model)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    base = ARCHS[arch].build()
    assert not torch.allclose(output(base, inputs), expected, atol=1e-3)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(output(loaded, inputs), expected)
    # A second adapter has a head of its own, and switching switches it.
    loraplex.add_adapter(
        loaded, "second", config("multilora", target_modules=ARCHS[arch].targets, modules_to_save=[HEADS[arch]])
    )
    loaded.set_adapter("second")
    assert torch.equal(output(loaded, inputs), output(ARCHS[arch].build(), inputs))
    # PEFT mixes a batch over heads that are one linear layer; RoBERTa's and DeBERTa's are more.
    mixed = output(loaded, inputs, adapter_names=["default", "second", "default"]) if arch == "vit" else None
    loaded.set_adapter("default")
    assert torch.equal(output(loaded, inputs), expected)
    if mixed is not None:
        torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-4)
    merged = loaded.merge_and_unload() if method != "masa-router" else None
    if merged is not None:
        torch.testing.assert_close(output(merged, inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["aslora", "masa-sum"])
def test_families_of_t5(method: str) -> None:
    model = adapted(method, "t5", target_modules=["q", "wo"])
    families = {name: len(family) for name, family in h.shared_state(model)._factors.items()}
    assert sorted(families.values()) == [3, 3, 3, LAYERS, LAYERS]
    assert len({name for name in families if name.startswith("encoder")}) == 2
    for name, layer in h.layers_of(model, ".q").items():
        factors = layer.factors("default")
        block = int(name.split(".block.")[1].split(".")[0])
        assert factors.index == block
        assert layer_depth(name.removeprefix("base_model.model.")) == block
    decoder = [layer for name, layer in h.layers_of(model, "SelfAttention.q").items() if "decoder" in name]
    cross = list(h.layers_of(model, "EncDecAttention.q").values())
    assert decoder[0].factors("default").lora_A is not cross[0].factors("default").lora_A


def test_depth_orders_families_as_numbers() -> None:
    """Layer 10 comes after layer 2, not after layer 1."""
    model = get_peft_model(
        h.Mlp(11), loraplex.AsLoraConfig(r=2, target_modules=["up"], num_merges=0, merge_start_step=1)
    )
    for name, layer in h.layers_of(model).items():
        assert f".{layer.factors('default').index}.up" in name


# Settings


@every_plain
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias(method: str, bias: str, tmp_path: Path) -> None:
    inputs = ARCHS["roberta"].inputs()
    model = get_peft_model(ARCHS["roberta"].build(), config(method, target_modules=["query"], bias=bias))
    biases = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    if bias == "lora_only":
        assert len(biases) == LAYERS
        assert all("query.base_layer" in name for name in biases)
    else:
        assert biases == {n for n, _ in model.named_parameters() if n.endswith("bias")}
    train(model, inputs, steps=2)
    h.advance(model)
    expected = output(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(ARCHS["roberta"].build(), tmp_path)
    assert torch.equal(output(loaded, inputs), expected)


@every_method
def test_rank_and_alpha_patterns(method: str, tmp_path: Path) -> None:
    more = {"r_magnitude": None, "r_direction": None} if method == "dual_lora" else {}
    settings = config(method, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3, r".*\.1\..*q_proj": 9}, **more)
    model = get_peft_model(LLAMA.build(), settings)
    ready(model)
    for name, layer in h.layers_of(model).items():
        factors = layer.factors("default")
        r = 2 if name.endswith("v_proj") else 4
        alpha = 3 if name.endswith("v_proj") else 9 if ".1." in name else 6
        assert (factors.r, factors.lora_alpha) == (r, alpha), name
        divisor = r / 2 if method == "dual_lora" else r
        assert factors.scaling == pytest.approx(alpha / divisor)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert torch.equal(output(loaded, BATCH), output(model, BATCH))


@every_method
def test_rslora(method: str) -> None:
    plain, stabilised = adapted(method, dtype=torch.float64), adapted(method, dtype=torch.float64, use_rslora=True)
    rank = math.sqrt(1 * 3) if method == "dual_lora" else 4
    x = torch.randn(2, h.HIDDEN, dtype=torch.float64)
    for ours, theirs in zip(h.layers_of(plain).values(), h.layers_of(stabilised).values(), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(theirs.factors("default")(x), ours.factors("default")(x) * math.sqrt(rank))


@every_method
def test_dropout(method: str) -> None:
    model, without = adapted(method, lora_dropout=0.5), adapted(method)
    assert torch.equal(output(model, BATCH), output(without, BATCH))
    model.train()
    first, second = output(model, BATCH), output(model, BATCH)
    assert not torch.allclose(first, second, atol=1e-3)
    # On average, dropout changes nothing.
    factors = next(iter(h.layers_of(model).values())).factors("default").train()
    x = torch.randn(1, h.HIDDEN).expand(4000, -1)
    with torch.no_grad():
        mean = factors(x).mean(0)
        factors.eval()
        expected = factors(x[0])
    assert (mean - expected).norm() < 0.15 * expected.norm()


@every_plain
def test_layers_to_transform(method: str, tmp_path: Path) -> None:
    model = adapted(method, layers_to_transform=[0, 2, 4])
    assert {layer_depth(name.removeprefix("base_model.model.")) for name in h.layers_of(model)} == {0, 2, 4}
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(LLAMA.build(), tmp_path), BATCH), output(model, BATCH))


@every_plain
def test_target_selection(method: str, tmp_path: Path) -> None:
    def names(**settings: Any) -> set[str]:
        model = adapted(method, **settings)
        return {name.removeprefix("base_model.model.model.") for name in h.layers_of(model)}

    every = range(LAYERS)
    listed = {f"layers.{i}.self_attn.{p}" for i in every for p in ("q_proj", "v_proj")}
    assert names() == listed
    assert names(target_modules=None) == listed
    assert names(target_modules=r".*self_attn\.(q|v)_proj") == listed
    assert names(exclude_modules=["layers.0.self_attn.q_proj"]) == listed - {"layers.0.self_attn.q_proj"}
    assert names(target_modules=["q_proj"], layers_to_transform=3, layers_pattern="layers", **no_merges(method)) == {
        "layers.3.self_attn.q_proj"
    }
    linear = {f"layers.{i}.self_attn.{p}_proj" for i in every for p in "qkvo"}
    linear |= {f"layers.{i}.mlp.{p}_proj" for i in every for p in ("gate", "up", "down")}
    assert names(target_modules="all-linear") == linear


@every_plain
def test_all_linear_as_second_adapter(method: str, tmp_path: Path) -> None:
    model = adapted("masa-router")
    loraplex.add_adapter(model, "second", config(method, target_modules="all-linear"))
    ready(model, "second")
    model.set_adapter("second")
    expected = adapted(method, target_modules="all-linear")
    assert torch.equal(output(model, BATCH), output(expected, BATCH))
    assert len(h.adapter_parameters(model, "second")) == len(h.adapter_parameters(expected))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "second")
    assert torch.equal(output(loaded, BATCH), output(model, BATCH))


@every_method
def test_config_round_trip(method: str, tmp_path: Path) -> None:
    settings = config(method, lora_dropout=0.1, use_rslora=True, alpha_pattern={"q_proj": 3})
    settings.save_pretrained(tmp_path)
    read = type(settings).from_pretrained(tmp_path)
    assert read.to_dict() == settings.to_dict()
    assert read.target_modules == {"q_proj", "v_proj"}
    first = (tmp_path / "adapter_config.json").read_bytes()
    read.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == first


# Schedules


@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_explicit_step_advances_a_hidden_optimizer(method: str) -> None:
    """`loraplex.step(model)` is for engines that hide optimizer and gradients; it must advance all the same."""
    model = get_peft_model(LLAMA.build(), config(method))
    fill(model)
    for _ in range(4):
        loraplex.step(model)
    assert h.shared_state(model).finished()


@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
def test_only_the_trained_adapter_advances(method: str) -> None:
    model = get_peft_model(LLAMA.build(), config(method))
    model.add_adapter("second", config(method))
    model.set_adapter("second")
    before = {k: v.clone() for k, v in model.state_dict().items() if ".default." in k}
    train(model, BATCH, steps=4)
    h.assert_same({k: v for k, v in model.state_dict().items() if ".default." in k}, before)
    assert h.shared_state(model, "second").finished()


# transformers' own adapter calls


# PEFT tells so of every second adapter that transformers adds.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@every_plain
def test_transformers_native(method: str, tmp_path: Path) -> None:
    model = LLAMA.build()
    base = output(model, BATCH)
    model.add_adapter(config(method), adapter_name="mine")
    assert torch.equal(output(model, BATCH), base)
    ready(model, "mine")
    expected = output(model, BATCH)
    assert torch.equal(expected, output(adapted(method), BATCH))
    model.add_adapter(config(method), adapter_name="other")
    ready(model, "other", seed=1)
    model.set_adapter("other")
    assert not torch.equal(output(model, BATCH), expected)
    model.set_adapter("mine")
    assert torch.equal(output(model, BATCH), expected)
    model.disable_adapters()
    assert torch.equal(output(model, BATCH), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    fresh = LLAMA.build()
    fresh.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(output(fresh, BATCH), expected)
    # The same file loads through PEFT.
    assert torch.equal(output(PeftModel.from_pretrained(LLAMA.build(), tmp_path), BATCH), expected)
    model.delete_adapter("other")
    assert torch.equal(output(model, BATCH), expected)
    assert not h.adapter_parameters(model, "other")


@every_plain
def test_bank_is_at_the_root_and_only_there(method: str) -> None:
    model = adapted(method)
    banks = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == BANK]
    assert banks == ([] if method == "multilora" else [f"base_model.model.{BANK}"])
