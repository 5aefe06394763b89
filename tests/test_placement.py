"""Every method × every way in which accelerate places a model: offloaded to the CPU or the disk, over several devices.

What is expected comes from the same model on one device. Devices beside the CPU are simulated (`devices.py`): values
are real, and an operation on tensors of two devices fails as it would on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import AlignDevicesHook, SequentialHook, attach_align_device_hook
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import helpers as h
import loraplex
from devices import several_devices
from helpers import ARCHS, LAYERS, METHODS, PLAIN, config, output
from loraplex.inspection.spectra import analyse
from loraplex.runtime import parallel
from loraplex.runtime.placement import device_of, input_device
from loraplex.tuner.bank import find_bank

FIRST, SECOND = "cpu:1", "cpu:2"


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with several_devices():
        yield


# Arrangements


def device_map(model: nn.Module, layers: list[str], head: str) -> dict[str, str]:
    """Layers on the devices `layers`, embeddings on the first of them, the head on `head`, the bank beside it."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    places = {f"{prefix}model.layers.{i}": place for i, place in enumerate(layers)}
    places |= {f"{prefix}model.embed_tokens": layers[0], f"{prefix}model.rotary_emb": layers[0]}
    places |= {f"{prefix}model.norm": head, f"{prefix}lm_head": head}
    return places if find_bank(model) is None else places | {f"{prefix}loraplex_bank": head}


def over_devices(model: nn.Module, folder: Path) -> None:
    dispatch_model(model, device_map(model, [FIRST, FIRST, SECOND, SECOND, FIRST], SECOND), main_device=FIRST)


def over_all(model: nn.Module, folder: Path) -> None:
    """Two devices, the CPU and the disk; what is offloaded runs on the first device."""
    places = device_map(model, [FIRST, "cpu", "disk", SECOND, "disk"], "cpu")
    dispatch_model(model, places, main_device=FIRST, offload_dir=folder)


@dataclass(frozen=True)
class Arrangement:
    """How a model is placed."""

    place: Callable[[nn.Module, Path], Any]
    whole: bool = True
    """Whether all of the base is offloaded."""


ARRANGEMENTS = {
    "cpu_offload": Arrangement(lambda model, folder: cpu_offload(model, execution_device=torch.device(FIRST))),
    "cpu_offload-cpu": Arrangement(lambda model, folder: cpu_offload(model)),
    "disk_offload": Arrangement(
        lambda model, folder: disk_offload(model, folder, execution_device=torch.device(FIRST))
    ),
    "devices": Arrangement(over_devices, whole=False),
    "all": Arrangement(over_all, whole=False),
}
ROWS = [f"{name}, {first} first" for name in ARRANGEMENTS for first in ("adapter", "base")]
"""Arrangements of a model that has its adapter already, and of a base that gets it afterwards."""
adapter_first = pytest.mark.parametrize("row", [row for row in ROWS if row.endswith("adapter first")])
ALL = ("all, adapter first", "all, base first")
"""The rows that mix everything, for promises that depend little on the arrangement."""


def build(method: str, **settings: Any) -> PeftModel:
    return get_peft_model(ARCHS["llama"].build(), config(method, **settings))


def placed(method: str, row: str, folder: Path, **settings: Any) -> PeftModel:
    """A model with a `ready` adapter, put on before it was placed or after."""
    arrangement, _, first = row.partition(", ")
    place = ARRANGEMENTS[arrangement].place
    if first == "base first":
        base = ARCHS["llama"].build()
        place(base, folder)
        model = get_peft_model(base, config(method, **settings))
    else:
        model = build(method, **settings)
        place(model, folder)
    h.ready(model)
    return model.eval()


def batch(model: nn.Module, **settings: Any) -> dict[str, Tensor]:
    """Inputs on the device where the model wants them."""
    return {name: tensor.to(input_device(model)) for name, tensor in ARCHS["llama"].inputs(**settings).items()}


def close(left: Tensor, right: Tensor, tolerance: float = 2e-6) -> bool:
    left, right = left.detach().cpu().double(), right.detach().cpu().double()
    return bool((left - right).norm() <= tolerance * right.norm())


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """What the base layers of the adapted layers hold, read where accelerate keeps it."""
    bits = {}
    for name, layer in h.layers_of(model).items():
        inner = layer.get_base_layer()
        hook = inner.__dict__.get("_hf_hook")
        hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
        maps = [one.weights_map for one in hooks if isinstance(one, AlignDevicesHook) and one.offload]
        bits[name] = (maps[0]["weight"] if maps else inner.weight).detach().cpu().clone()
    return bits


# Training, evaluation, generation


def trained(model: PeftModel) -> dict[str, Any]:
    """What four steps of an optimizer do to a model, with what it gives before and after."""
    inputs = batch(model)
    found = {"logits": output(model, inputs)}
    parameters = h.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    model.train()
    for step in range(4):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        if step == 0:
            found |= {f"gradient of {name}": p.grad.clone() for name, p in parameters.items()}
        optimizer.step()
    bank = find_bank(model)
    found |= dict(parameters) | ({} if bank is None else dict(bank.named_buffers()))
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()} | {
        "trained logits": output(model.eval(), inputs).cpu()
    }


@cache
def trained_on_one_device(method: str) -> dict[str, Any]:
    return trained(h.adapted(method))


@pytest.mark.parametrize(("method", "row"), [(m, r) for m in METHODS for r in ROWS if m in PLAIN or r in ALL])
def test_trains_as_on_one_device(method: str, row: str, tmp_path: Path) -> None:
    """Outputs, gradients and four steps of an optimizer that was made after placing, schedules included."""
    expected, model = trained_on_one_device(method), placed(method, row, tmp_path)
    found = trained(model)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert close(found[name], tensor, 2e-5), name
        assert tensor.any() or method == "aslora", name
    assert not any(parameter.is_meta for parameter in h.adapter_parameters(model).values())


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("method", PLAIN)
def test_factors_stay_with_their_layer(method: str, arrangement: str, tmp_path: Path) -> None:
    """They are where it runs, and the very parameters that an optimizer may know, if only the base was offloaded."""
    model = build(method)
    before = h.adapter_parameters(model)
    ARRANGEMENTS[arrangement].place(model, tmp_path)
    after = h.adapter_parameters(model)
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in after.values())
    if ARRANGEMENTS[arrangement].whole:
        assert all(after[name] is parameter for name, parameter in before.items())
        assert all(parameter.is_meta for name, parameter in model.named_parameters() if name not in after)
    for layer in h.layers_of(model).values():
        for parameter in layer.factors("default").parameters():
            assert parameter.device == device_of(layer.get_base_layer())


NAMES = ["default", "__base__", "default"]


def generated(model: PeftModel) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits of a mixed batch."""
    inputs = batch(model)
    tokens = model.generate(
        input_ids=inputs["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
    )
    return tokens.cpu(), output(model, inputs, adapter_names=NAMES)


@cache
def generated_on_one_device(method: str) -> tuple[Tensor, Tensor]:
    return generated(h.adapted(method))


@adapter_first
@pytest.mark.parametrize("method", PLAIN)
def test_generates_and_mixes(method: str, row: str, tmp_path: Path) -> None:
    tokens, mixed = generated(placed(method, row, tmp_path))
    expected = generated_on_one_device(method)
    assert tokens.shape[1] == 10
    assert torch.equal(tokens, expected[0])
    assert close(mixed, expected[1])


# Merging and combining


@pytest.mark.parametrize("row", [*ALL, "cpu_offload, adapter first", "cpu_offload-cpu, adapter first"])
@pytest.mark.parametrize("method", ["multilora", "aslora", "dual_lora", "masa-sum"])
def test_merges(method: str, row: str, tmp_path: Path) -> None:
    model = placed(method, row, tmp_path)
    inputs = batch(model)
    expected, bits = output(model, inputs), base_bits(model)
    with model.disable_adapter():
        plain = output(model, inputs)
    deltas = {name: layer.factors("default").delta_weight() for name, layer in h.layers_of(model).items()}
    model.merge_adapter()
    for name, weight in base_bits(model).items():
        assert close(weight, bits[name] + deltas[name].detach().cpu())
    assert close(output(model, inputs), expected)
    with model.disable_adapter():  # unmerges
        assert torch.equal(output(model, inputs), plain)
    h.assert_same(base_bits(model), bits)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), expected)
    name, layer = next(iter(h.layers_of(model).items()))
    layer.merge()
    assert not torch.equal(base_bits(model)[name], bits[name])
    layer.unmerge()
    h.assert_same(base_bits(model), bits)
    merged = model.merge_and_unload()
    assert not any("loraplex" in type(m).__module__ for m in merged.modules())
    assert close(output(merged, inputs), expected)


@pytest.mark.parametrize("row", [*ALL, "disk_offload, adapter first", "devices, adapter first"])
def test_a_router_refuses_to_merge_until_it_is_calibrated(row: str, tmp_path: Path) -> None:
    reference, model = h.adapted("masa-router"), placed("masa-router", row, tmp_path)
    with pytest.raises(ValueError, match="calibrate"):
        model.merge_adapter()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    results = [
        loraplex.calibrate(m, [batch(m) | {"attention_mask": mask.to(input_device(m))}], [batch(m, seed=2)])
        for m in (reference, model)
    ]
    assert results[1].output_error == pytest.approx(results[0].output_error, rel=1e-4)
    assert results[1].errors == pytest.approx(results[0].errors, rel=1e-4)
    for name, gates in results[0].gates.items():
        assert results[1].gates[name] == pytest.approx(gates, rel=1e-4)
    for m in (reference, model):
        m.merge_adapter()
    assert close(output(model, batch(model)), output(reference, batch(reference)))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_refusal_to_merge_leaves_all_as_it_was(arrangement: str, tmp_path: Path) -> None:
    """The last layer's update is NaN: none before it stays merged."""
    model = placed("multilora", f"{arrangement}, adapter first", tmp_path)
    with torch.no_grad():
        list(h.adapter_parameters(model).values())[-1].fill_(torch.nan)
    bits = base_bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        h.assert_same(base_bits(model), bits)
        assert not any(layer.merged for layer in h.layers_of(model).values())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings:UserWarning")
@pytest.mark.parametrize("arrangement", ["cpu_offload", "cpu_offload-cpu", "disk_offload"])
def test_merging_into_a_tied_head_leaves_the_embedding(arrangement: str, tmp_path: Path) -> None:
    base = ARCHS["llama"].build(tie_word_embeddings=True)
    model = get_peft_model(base, config("multilora", target_modules=["lm_head"]))
    ARRANGEMENTS[arrangement].place(model, tmp_path)
    h.ready(model)
    inputs = batch(model.eval())
    expected = output(model, inputs)
    model.merge_adapter()
    assert close(output(model, inputs), expected)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("row", [*ALL, "cpu_offload, adapter first", "devices, adapter first"])
@pytest.mark.parametrize("method", ["multilora", "aslora", "masa-sum"])
def test_a_weighted_adapter_is_the_sum(method: str, row: str, tmp_path: Path) -> None:
    model = placed(method, row, tmp_path)
    model.add_adapter("other", config(method))
    h.ready(model, "other", seed=1)
    deltas = {
        name: [layer.factors(adapter).delta_weight().detach().cpu() for adapter in ("default", "other")]
        for name, layer in h.layers_of(model).items()
    }
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    for name, layer in h.layers_of(model).items():
        assert close(layer.factors("sum").delta_weight(), 0.5 * deltas[name][0] - 2 * deltas[name][1], 1e-5), name
    model.set_adapter("sum")
    assert close(output(model.eval(), batch(model)), summed_on_one_device(method), 1e-5)


@cache
def summed_on_one_device(method: str) -> Tensor:
    model = h.adapted(method)
    model.add_adapter("other", config(method))
    h.ready(model, "other", seed=1)
    with torch.no_grad():
        for layer in h.layers_of(model).values():
            first, second = (layer.factors(adapter).delta_weight() for adapter in ("default", "other"))
            layer.get_base_layer().weight += 0.5 * first - 2 * second
    return output(model.unload().eval(), batch(model))


# Saving, loading, reading


@adapter_first
@pytest.mark.parametrize("method", PLAIN)
def test_saves_loads_and_exports(method: str, row: str, tmp_path: Path) -> None:
    """Files and figures are those of the model on one device, and an adapter loads onto a placed base."""
    reference, model = h.adapted(method), placed(method, row, tmp_path / "one")
    expected, inputs = output(model, batch(model)), batch(model)
    for name, one in (("reference", reference), ("saved", model)):
        one.save_pretrained(tmp_path / name)
        if method in ("multilora", "aslora"):
            loraplex.export_lora(one, tmp_path / f"{name}-lora")
    h.assert_same(h.file_tensors(tmp_path / "saved"), h.file_tensors(tmp_path / "reference"))
    if method in ("multilora", "aslora"):
        h.assert_same(h.file_tensors(tmp_path / "saved-lora"), h.file_tensors(tmp_path / "reference-lora"))
    figures = [analyse(one) for one in (reference, model)]
    assert [s.norm for s in figures[1].spectra] == pytest.approx([s.norm for s in figures[0].spectra], rel=1e-5)

    base = ARCHS["llama"].build()
    ARRANGEMENTS[row.partition(", ")[0]].place(base, tmp_path / "two")
    # With it, PEFT places the model anew: see the next test.
    base.__dict__.pop("hf_device_map", None)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(output(loaded, inputs), expected)
        loaded.load_adapter(tmp_path / "saved", "again")
        loaded.set_adapter("again")
        assert torch.equal(output(loaded, inputs), expected)
        base = loaded.unload()


@pytest.mark.parametrize("method", PLAIN)
def test_peft_places_an_offloaded_base_anew(method: str, tmp_path: Path) -> None:
    """As after `from_pretrained(device_map=…)` with a part on the CPU: PEFT takes the hooks off and puts others on."""
    reference = h.adapted(method)
    reference.save_pretrained(tmp_path / "saved")
    base = ARCHS["llama"].build()
    dispatch_model(base, device_map(base, [FIRST, "cpu", "cpu", SECOND, SECOND], "cpu"), main_device=FIRST)
    places = device_map(reference, ["cpu", FIRST, "cpu", SECOND, SECOND], "cpu")
    model = PeftModel.from_pretrained(base, tmp_path / "saved", device_map=places, is_trainable=True)
    inputs = {name: tensor.to(FIRST) for name, tensor in batch(reference).items()}
    assert close(output(model.eval(), inputs), output(reference, batch(reference)))
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None and not p.is_meta for p in h.adapter_parameters(model).values())


@pytest.mark.parametrize("method", PLAIN)
def test_a_base_on_the_disk_from_its_checkpoint(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own disk offload, whose files PEFT rewrites when it loads an adapter: in the current folder."""
    monkeypatch.chdir(tmp_path)
    ARCHS["llama"].build().save_pretrained(tmp_path / "models--base")
    reference = h.adapted(method)
    reference.save_pretrained(tmp_path / "saved")
    layers = {f"model.layers.{i}": "disk" if i in (1, 2, 4) else "cpu" for i in range(LAYERS)}
    rest = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "models--base", device_map=layers | rest, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert any(p.is_meta for p in base.parameters())
    places = device_map(reference, [layers[f"model.layers.{i}"] for i in range(LAYERS)], "cpu")
    model = PeftModel.from_pretrained(
        base, tmp_path / "saved", device_map=places, offload_folder=tmp_path / "again", is_trainable=True
    )
    inputs, expected = batch(reference), output(reference, batch(reference))
    assert close(output(model.eval(), inputs), expected)
    model.train()(**inputs).loss.backward()
    reference.train()(**inputs).loss.backward()
    gradients = {name: p.grad for name, p in h.adapter_parameters(reference).items()}
    for name, parameter in h.adapter_parameters(model).items():
        assert close(parameter.grad, gradients[name], 2e-5), name


@pytest.mark.parametrize("bank", ["cpu", "disk"])
@pytest.mark.parametrize("method", PLAIN)
def test_load_checkpoint_and_dispatch(method: str, bank: str, tmp_path: Path) -> None:
    """The adapted model's own weights, read straight to where they belong; of the disk, accelerate reads no buffer."""
    reference = h.adapted(method)
    save_file({name: t.clone() for name, t in reference.state_dict().items()}, tmp_path / "model.safetensors")

    def load(**settings: Any) -> PeftModel:
        with init_empty_weights():
            model = build(method)
        places = device_map(model, ["cpu", "disk", "cpu", "disk", "cpu"], bank)
        folder = tmp_path / str(len(settings))
        return load_checkpoint_and_dispatch(
            model, str(tmp_path / "model.safetensors"), device_map=places, offload_folder=folder, **settings
        )

    if bank == "disk" and any(True for _ in (find_bank(reference) or nn.Module()).buffers()):
        with pytest.raises(ValueError, match=r"loraplex_bank.*offload_buffers=True"):
            load()
        model = load(offload_buffers=True)
    else:
        model = load()
    inputs = batch(reference)
    assert close(output(model, inputs), output(reference, inputs))
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None and not p.is_meta for p in h.adapter_parameters(model).values())


def test_evaluator_reads_the_device_from_the_hooks(tmp_path: Path) -> None:
    """The first parameter of an offloaded model is nowhere."""
    model = placed("masa-sum", "cpu_offload, adapter first", tmp_path)
    assert input_device(model) == torch.device(FIRST)
    assert input_device(h.adapted("masa-sum")) == torch.device("cpu")


# ZeRO-3 with offload_param


def zero3(shard: Tensor, location: str | None = None) -> Tensor:
    """A parameter (2, 3) as ZeRO-3 leaves it on the first of two ranks."""
    parameter = torch.empty(0)
    shard.final_location = location
    parameter.ds_tensor, parameter.ds_process_group = shard, None
    parameter.ds_numel, parameter.ds_shape = 6, torch.Size([2, 3])
    return parameter


def test_offloaded_shards_are_gathered_where_the_ranks_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses tensors on the CPU, where offload_param leaves the shards."""
    accelerator = pytest.importorskip("deepspeed").accelerator.get_accelerator()
    monkeypatch.setattr(accelerator, "current_device_name", lambda: SECOND)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda group: 2)

    def gather(output: Tensor, shard: Tensor, group: Any) -> None:
        assert output.device == shard.device == torch.device(SECOND)
        output.copy_(torch.cat([shard, shard + 4]))

    monkeypatch.setattr(parallel.dist, "all_gather_into_tensor", gather)
    like = zero3(torch.arange(4.0))
    result = parallel.full_tensor(parallel.to_local(like), like)
    assert torch.equal(result.cpu(), torch.arange(6.0).view(2, 3))


def test_shards_on_the_disk_are_refused() -> None:
    enum = pytest.importorskip("deepspeed.runtime.zero.offload_config").OffloadDeviceEnum
    with pytest.raises(ValueError, match=r"nvme.*\"cpu\""):
        parallel.to_local(zero3(torch.empty(0), enum.nvme))


# Refusals and seams


def test_a_layer_that_is_loaded_as_a_whole_is_not_trained(tmp_path: Path) -> None:
    """preload_module_classes loads the adapters as new parameters, which no optimizer has."""
    model = build("multilora")
    cpu_offload(model, preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer.*preload_module_classes"):
        model.train()
    assert close(output(model.eval(), batch(model)), output(build("multilora").eval(), ARCHS["llama"].inputs()))


def test_what_accelerate_sets_when_it_hooks_a_module() -> None:
    """The seam of placement.NeverOffloaded: `_old_forward`, then init_hook takes the tensors, then `_hf_hook`."""
    seen = []

    class Watched(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("_old_forward", "_hf_hook"):
                seen.append((name, self.weight.is_meta))
            super().__setattr__(name, value)

    layer = Watched(2, 2)
    attach_align_device_hook(layer, execution_device=torch.device("cpu"), offload=True)
    assert seen == [("_old_forward", False), ("_hf_hook", True)]
    hook = layer._hf_hook
    assert isinstance(hook, AlignDevicesHook)
    assert hook.offload
    assert not hook.place_submodules
    assert set(hook.weights_map) == {"weight", "bias"}
