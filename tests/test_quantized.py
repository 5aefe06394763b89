"""Every method × every quantised base that runs on a CPU; a backend that is not installed is skipped.

Expected values come from the dequantised weights, in float64; the dequantising is done here, from what is stored.
On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights when they are evaluated: backends called "-packed" do so
whatever the test is about, and are skipped on other CPUs; those of the plain name never do.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    ForwardOnlyQuantizationBackend,
    HqqBackend,
    TorchaoBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

import helpers as h
import loraplex
from helpers import ARCHS, MERGEABLE, METHODS, PLAIN, config, output
from loraplex.runtime.packing import unpacked
from loraplex.tuner import base_weight
from loraplex.tuner.layer import AdapterLinear

LAYERS = 3
"""MASA's groups of two do not divide them."""
GROUP = 32
BATCH = ARCHS["llama"].inputs()

every_plain = pytest.mark.parametrize("method", PLAIN)

paged = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
further = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")


# Backends


@dataclass(frozen=True)
class Backend:
    """How to quantise a model, and how its stored weights read."""

    package: str
    load: Callable[[str, torch.dtype], nn.Module]
    dequantise: Callable[[nn.Module], Tensor]
    rounds_inputs: bool = False
    """Whether inputs are quantised too, in evaluation mode."""
    packs: bool = False
    """Whether 4-bit weights are repacked in evaluation mode, and read in bfloat16."""

    def build(self, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in `folder`, quantised."""
        with self.on_its_cpu():
            return self.load(str(folder), dtype).eval()

    @contextmanager
    def on_its_cpu(self) -> Iterator[None]:
        """Layers made inside pack their weights or not as this backend wants it."""
        pytest.importorskip(self.package)
        if self.package != "bitsandbytes":
            yield
            return
        from bitsandbytes.nn import modules

        if self.packs and not modules.has_avx512bf16():
            pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs 4-bit weights")
        with mock.patch.object(modules, "has_avx512bf16", return_value=self.packs):
            yield


def from_pretrained(folder: str, dtype: torch.dtype, settings: Any = None) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=settings)


def bnb_4bit(quant_type: str, double: bool) -> Callable[[str, torch.dtype], nn.Module]:
    def load(folder: str, dtype: torch.dtype) -> nn.Module:
        return from_pretrained(folder, dtype, BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        ))  # fmt: skip

    return load


def bnb_8bit(folder: str, dtype: torch.dtype) -> nn.Module:
    return from_pretrained(folder, dtype, BitsAndBytesConfig(load_in_8bit=True))


def torchao(name: str, **settings: Any) -> Callable[[str, torch.dtype], nn.Module]:
    def load(folder: str, dtype: torch.dtype) -> nn.Module:
        from torchao import quantization

        more = {"granularity": quantization.PerGroup(GROUP)} if "weight_dtype" in settings else {}
        return from_pretrained(folder, dtype, TorchAoConfig(getattr(quantization, name)(**settings, **more)))

    return load


def hqq(folder: str, dtype: torch.dtype) -> nn.Module:
    # transformers 5.23 does not load HQQ ("not available yet"): the layers are put in as HQQ's own loader does it.
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = from_pretrained(folder, dtype).requires_grad_(False)
    settings = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            new = HQQLinear(layer, settings, compute_dtype=dtype, device="cpu")
            setattr(model.model.get_submodule(parent), child, new)
    model.hqq_quantized = True
    return model


def read_4bit(layer: nn.Module) -> Tensor:
    state, packed = layer.weight.quant_state, layer.weight.data.view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    absmax = state.absmax.double()
    if state.nested:
        second = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: len(absmax)]
        absmax = state.state2.code.double()[state.absmax.long()] * second + state.offset.double()
    return (state.code.double()[codes].view(-1, state.blocksize) * absmax[:, None]).view(state.shape)


def read_8bit(layer: nn.Module) -> Tensor:
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.double() * scale.double()[:, None] / 127


def read_hqq(layer: nn.Module) -> Tensor:
    high_low = torch.cat([layer.W_q >> 4, layer.W_q & 15]).double()
    meta = layer.meta
    return ((high_low - meta["zero"].double()) * meta["scale"].double()).view(meta["shape"])


def read_torchao(layer: nn.Module) -> Tensor:
    q, scale = layer.weight.qdata.double(), layer.weight.scale.double()
    groups = q.unflatten(1, (scale.shape[1], -1))
    return (groups * scale[:, :, None]).flatten(1)


BACKENDS = {
    "nf4": Backend("bitsandbytes", bnb_4bit("nf4", False), read_4bit),
    "nf4-double": Backend("bitsandbytes", bnb_4bit("nf4", True), read_4bit),
    "fp4": Backend("bitsandbytes", bnb_4bit("fp4", False), read_4bit),
    "nf4-packed": Backend("bitsandbytes", bnb_4bit("nf4", False), read_4bit, packs=True),
    "nf4-double-packed": Backend("bitsandbytes", bnb_4bit("nf4", True), read_4bit, packs=True),
    "fp4-packed": Backend("bitsandbytes", bnb_4bit("fp4", False), read_4bit, packs=True),
    "int8": Backend("bitsandbytes", bnb_8bit, read_8bit, rounds_inputs=True),
    "hqq": Backend("hqq", hqq, read_hqq),
    "torchao-int8": Backend("torchao", torchao("Int8WeightOnlyConfig"), read_torchao),
    "torchao-int4": Backend("torchao", torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), read_torchao),
    "torchao-float8": Backend("torchao", torchao("Float8WeightOnlyConfig"), read_torchao),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
FIVE = ("nf4-double", "nf4-double-packed", "int8", "hqq", "torchao-int8")
"""One of each package and kind, for promises that do not depend on more."""
one_of_each = pytest.mark.parametrize("backend", FIVE)


def method_by_backend(methods: Iterable[str]) -> pytest.MarkDecorator:
    """Every method over each of `FIVE`, and one method over the other backends."""
    pairs = [(m, b) for m in methods for b in BACKENDS if b in FIVE or m == "masa-concat"]
    return pytest.mark.parametrize(("method", "backend"), pairs)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Path]:
    """A saved Llama with biases, whose sizes suit every backend's groups and blocks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=h.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, attention_bias=True,
    ))  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def add_adapter(base: nn.Module, method: str, seed: int = 0, **settings: Any) -> PeftModel:
    """`base` with a filled adapter, in evaluation mode."""
    model = get_peft_model(base, config(method, **settings))
    h.ready(model, seed=seed)
    # ‖ΔW‖ is some tenths of ‖W‖: enough to survive four bits, and to show.
    h.fill(model, seed=seed, std=0.1)
    return model.eval()


def weights_of(model: nn.Module, backend: str) -> dict[str, Tensor]:
    """The dequantised weights of the adapted layers."""
    return {n: BACKENDS[backend].dequantise(layer.get_base_layer()) for n, layer in h.layers_of(model).items()}


def deltas_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {n: layer.factors(adapter).delta_weight().detach().double() for n, layer in h.layers_of(model).items()}


def stored(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the state dict, bit for bit, down to the parts of quantised weights."""
    parts = {}
    for key, tensor in model.state_dict().items():
        names = getattr(tensor, "tensor_data_names", None)
        for name, part in {n: getattr(tensor, n) for n in names}.items() if names else [("", tensor)]:
            parts[key + name] = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return parts


def changed(model: nn.Module, bits: dict[str, bytes]) -> list[str]:
    """Names in which what `model` stores differs from `bits`."""
    now = stored(model)
    return sorted(name for name in {*bits, *now} if bits.get(name) != now.get(name))


def dense(model: nn.Module, folder: Path, backend: str) -> nn.Module:
    """The plain model in float64 whose weights are the dequantised ones of `model`, a base without adapters."""
    plain = from_pretrained(str(folder), torch.float64)
    for name, layer in model.named_modules():
        if resolve_quantization_backend(layer, get_apply_tensor_subclass=lambda: None) is not None:
            plain.get_submodule(name).weight.data = BACKENDS[backend].dequantise(layer)
    return plain.eval()


def relative(difference: Tensor, whole: Tensor) -> float:
    return (difference.double().norm() / whole.double().norm()).item()


# Forward and backward


@method_by_backend(METHODS)
def test_equals_the_dequantised_model(method: str, backend: str, tiny: Path) -> None:
    """Start, output and gradients, prepared for training and with gradient checkpointing as in QLoRA."""
    # Not by the base itself: bitsandbytes rounds the scales of a weight that it packs for good.
    before = output(BACKENDS[backend].build(tiny), BATCH)
    base = BACKENDS[backend].build(tiny)
    reference = dense(base, tiny, backend)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    start = get_peft_model(base, config(method)).eval()
    assert torch.equal(output(start, BATCH), before)
    layers = h.layers_of(start)
    assert len(layers) == 2 * LAYERS
    kinds = (Bnb4bitBackend, Bnb8bitBackend, HqqBackend, TorchaoBackend)
    assert all(isinstance(layer.quantization_backend, kinds) for layer in layers.values())
    assert {p.dtype for p in h.adapter_parameters(start).values()} == {torch.float32}

    model, reference = add_adapter(start.unload(), method), add_adapter(reference, method)
    # In training mode no backend rounds its inputs on a CPU.
    results = {m: m.train()(**BATCH) for m in (model, reference)}
    for result in results.values():
        result.loss.backward()
    expected = results[reference].logits
    assert relative(results[model].logits - expected, expected) < 1e-5
    assert relative(expected.detach() - before, before) > 0.01
    wanted = {n: p.grad for n, p in h.adapter_parameters(reference).items()}
    for name, parameter in h.adapter_parameters(model).items():
        if wanted[name].norm() == 0:
            assert parameter.grad.norm() == 0, name
        else:
            assert relative(parameter.grad - wanted[name], wanted[name]) < 1e-4, name


@method_by_backend(MERGEABLE)
def test_layers_add_delta_weight(method: str, backend: str, tiny: Path) -> None:
    """Whatever the base's kernel does to its inputs, ΔW x is added in full precision."""
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    deltas, x = deltas_of(model), torch.randn(3, 7, 64)
    for name, layer in h.layers_of(model).items():
        with torch.no_grad():
            added = layer(x).double() - layer.base_layer(x).double()
        assert relative(added - x.double() @ deltas[name].T, added) < 1e-5, name


@every_plain
@one_of_each
def test_training_lowers_the_loss_and_leaves_the_base(method: str, backend: str, tiny: Path) -> None:
    """A bfloat16 model, prepared by PEFT; factors stay in float32."""
    base = BACKENDS[backend].build(tiny, torch.bfloat16)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": True})
    before = stored(base)
    model = get_peft_model(base, config(method)).train()
    parameters = h.adapter_parameters(model)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-2)
    losses = []
    for _ in range(10):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    # bitsandbytes casts biases to its inputs' dtype for good, whoever calls it.
    assert all(name.endswith("bias") for name in changed(model.unload(), before))


@paged
@pytest.mark.parametrize("method", ["aslora", "dual_lora"])
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_bitsandbytes_optimizers_keep_the_schedule(method: str, optimizer: str, tiny: Path, tmp_path: Path) -> None:
    """Six steps are two steps, a restart from files, and four steps: averages survive beside 8-bit states."""
    optim = pytest.importorskip("bitsandbytes").optim
    settings = {"merge_start_step": 3} if method == "aslora" else {}

    def make(model: nn.Module) -> torch.optim.Optimizer:
        # By default, tensors of fewer than 4096 elements keep 32-bit states.
        return getattr(optim, optimizer)(h.adapter_parameters(model).values(), lr=2e-2, min_8bit_size=64)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(**BATCH).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = get_peft_model(BACKENDS["nf4"].build(tiny), config(method, **settings)).train()
    h.fill(straight, std=0.1)
    first = copy.deepcopy(straight)
    train(straight, make(straight), 6)
    first_optimizer = make(first)
    train(first, first_optimizer, 2)
    assert (torch.uint8 in {s["state1"].dtype for s in first_optimizer.state.values()}) == ("8bit" in optimizer)
    first.save_pretrained(tmp_path)
    torch.save(first_optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = PeftModel.from_pretrained(BACKENDS["nf4"].build(tiny), tmp_path, is_trainable=True).train()
    resumed_optimizer = make(resumed)
    resumed_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(resumed, resumed_optimizer, 4)
    assert h.shared_state(straight).finished()
    assert h.shared_state(resumed).finished()
    h.assert_same(dict(h.adapter_parameters(resumed)), dict(h.adapter_parameters(straight)))


@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_a_base_that_passes_no_gradient_is_refused(name: str, tiny: Path) -> None:
    """torchao's dynamic activations cut the graph without a word: with checkpointing nothing would be trained."""
    backend = Backend("torchao", torchao(name), read_torchao)
    base = backend.build(tiny)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = add_adapter(base, "multilora")
    expected = output(model, BATCH)
    with pytest.raises(ValueError, match=r"q_proj.*gradient"):
        model.train()(**BATCH).loss.backward()
    assert torch.equal(output(model.eval(), BATCH), expected)


# Around the forward


@every_plain
@one_of_each
def test_round_trip(method: str, backend: str, tiny: Path, tmp_path: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    expected = output(model, BATCH)
    model.save_pretrained(tmp_path)
    assert all("_factors." in key or "_shared." in key for key in h.file_tensors(tmp_path))
    for low_cpu_mem_usage in (False, True):
        base = BACKENDS[backend].build(tiny)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(output(loaded, BATCH), expected)
        assert {p.dtype for p in h.adapter_parameters(loaded).values()} == {torch.float32}


@every_plain
@one_of_each
def test_mixed_batches_and_disabling(method: str, backend: str, tiny: Path) -> None:
    base = BACKENDS[backend].build(tiny)
    plain = output(base, BATCH)
    model = add_adapter(base, method)
    alone = output(model, BATCH)
    with model.disable_adapter():
        assert torch.equal(output(model, BATCH), plain)
    # bitsandbytes looks for outlier columns over all rows of a batch, so with it rows depend on each other.
    tolerance = 2e-2 if BACKENDS[backend].rounds_inputs else 1e-6
    names = ["default", "__base__", "default"]
    # With gradients too: bitsandbytes returns views, which refuse to be written to.
    for mixed in (output(model, BATCH, adapter_names=names), model(**BATCH, adapter_names=names).logits):
        if mixed.requires_grad and BACKENDS[backend].packs:
            tolerance = 1e-2  # packed weights compute in bfloat16, those that pass a gradient in float32
        for row, name in enumerate(names):
            expected = plain[row] if name == "__base__" else alone[row]
            assert relative(mixed.detach()[row] - expected, expected) < tolerance


@every_plain
@one_of_each
def test_autocast(method: str, backend: str, tiny: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    expected = output(model, BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = output(model, BATCH)
    assert result.dtype == torch.bfloat16
    assert relative(result - expected, expected) < 5e-2


@one_of_each
def test_transformers_native(backend: str, tiny: Path) -> None:
    model = BACKENDS[backend].build(tiny)
    model.add_adapter(config("masa-sum"))
    assert len(h.layers_of(model)) == 2 * LAYERS


@pytest.mark.parametrize("backend", ["nf4", "nf4-packed", "int8"])
def test_quantised_conv1d(backend: str, tmp_path: Path) -> None:
    """transformers turns GPT-2's (in, out) weights round when it quantises them."""
    ARCHS["gpt2"].build(hidden_size=64).save_pretrained(tmp_path)
    model = add_adapter(BACKENDS[backend].build(tmp_path), "multilora", target_modules=["c_attn"])
    before, deltas = weights_of(model, backend), deltas_of(model)
    x = torch.randn(5, 64)
    for name, layer in h.layers_of(model).items():
        added = (layer(x) - layer.base_layer(x)).double()
        assert relative(added - x.double() @ deltas[name].T, added) < 1e-5
    model.merge_adapter()
    for name, weight in weights_of(model, backend).items():
        assert relative(weight - before[name] - deltas[name], deltas[name]) < 0.6


def test_every_module_can_be_asked_for_its_weight(tiny: Path) -> None:
    """PEFT, torchao and accelerate do that to every module, the bank of shared factors too."""
    model = add_adapter(BACKENDS["nf4"].build(tiny), "masa-sum")
    weights = [getattr(module, "weight", None) for module in model.modules()]
    assert any(weight is not None for weight in weights)


# Merging


def requantised(model: PeftModel, backend: str, folder: Path, weights: dict[str, Tensor], to: Path) -> nn.Module:
    """The model that its package makes of the plain model with these `weights` in place of its own."""
    plain = from_pretrained(str(folder), torch.float32)
    for name, weight in weights.items():
        plain.get_submodule(name.removeprefix("base_model.model.")).weight.data = weight.float()
    plain.save_pretrained(to)
    return BACKENDS[backend].build(to)


@method_by_backend(MERGEABLE)
def test_merging_quantises_the_sum(method: str, backend: str, tiny: Path, tmp_path: Path) -> None:
    """W′ is what the package makes of W + ΔW; the error is told; unmerging puts back the very same bits."""
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    expected, bits, weights, deltas = output(model, BATCH), stored(model), weights_of(model, backend), deltas_of(model)
    kinds = {name: type(layer.get_base_layer()) for name, layer in h.layers_of(model).items()}
    biases = {name: layer.get_base_layer().bias.clone() for name, layer in h.layers_of(model).items()}
    sums = {name: weights[name] + deltas[name] for name in weights}
    reference = requantised(model, backend, tiny, sums, tmp_path)

    model.merge_adapter()
    after = weights_of(model, backend)
    for name, layer in h.layers_of(model).items():
        inner = layer.get_base_layer()
        assert layer.merged
        assert type(inner) is kinds[name]
        assert torch.equal(inner.bias, biases[name])
        wanted = BACKENDS[backend].dequantise(reference.get_submodule(name.removeprefix("base_model.model.")))
        # A weight at the border of two codes may fall to either side: a group's largest one always is, with torchao.
        assert (after[name] - wanted).abs().gt(1e-4 * wanted.abs().max()).double().mean() < 0.01
        assert layer.merge_error == pytest.approx(relative(after[name] - sums[name], deltas[name]), rel=1e-3)
        assert 0 < layer.merge_error < 0.7
    merged = output(model, BATCH)
    assert relative(merged - output(reference, BATCH), merged) < 2e-2
    assert sorted(stored(model)) == sorted(bits)

    model.unmerge_adapter()
    assert not changed(model, bits)
    assert torch.equal(output(model, BATCH), expected)
    # What was put back is whole: it moves, and merges again.
    model.to("cpu")
    assert torch.equal(output(model, BATCH), expected)
    model.merge_adapter()
    assert torch.equal(output(model, BATCH), merged)
    with model.disable_adapter():
        assert torch.equal(output(model, BATCH), output(BACKENDS[backend].build(tiny), BATCH))
    assert torch.equal(output(model, BATCH), expected)
    assert not changed(model, bits)


@further
@every_backend
def test_one_by_one_is_as_good_as_together(backend: str, tiny: Path) -> None:
    """A second merge starts from the weights that training saw: it does not quantise the first update again."""
    model = add_adapter(BACKENDS[backend].build(tiny), "masa-sum")
    model.add_adapter("other", config("masa-sum"))
    h.ready(model, "other", seed=1)
    h.fill(model, "other", seed=1, std=0.1)
    model.eval().base_model.set_adapter(["default", "other"])
    expected, bits, weights = output(model, BATCH), stored(model), weights_of(model, backend)
    total = {name: delta + deltas_of(model, "other")[name] for name, delta in deltas_of(model).items()}

    model.merge_adapter()
    after, together = weights_of(model, backend), output(model, BATCH)
    errors = {name: layer.merge_error for name, layer in h.layers_of(model).items()}
    for name, error in errors.items():
        assert error == pytest.approx(relative(after[name] - weights[name] - total[name], total[name]), rel=1e-3)
    model.unmerge_adapter()
    assert not changed(model, bits)

    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert torch.equal(output(model, BATCH), together)
    for name, layer in h.layers_of(model).items():
        assert layer.merged_adapters == ["default", "other"]
        assert layer.merge_error == pytest.approx(errors[name], rel=1e-6)
    model.unmerge_adapter()
    assert not changed(model, bits)
    assert torch.equal(output(model, BATCH), expected)


@pytest.mark.parametrize("method", ["dual_lora", "masa-concat"])
@every_backend
def test_merged_model_saves_and_loads(method: str, backend: str, tiny: Path, tmp_path: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    model.merge_adapter()
    expected = output(model, BATCH)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert type(merged) is type(BACKENDS[backend].build(tiny))
    assert not any("loraplex" in type(m).__module__ for m in merged.modules())
    assert torch.equal(output(merged, BATCH), expected)
    if backend == "hqq":
        # transformers saves HQQ models but can't load them; HQQ's own files are state dicts.
        torch.save(merged.state_dict(), tmp_path / "model.pt")
        loaded = BACKENDS[backend].build(tiny)
        loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    else:
        merged.save_pretrained(tmp_path)
        loaded = reloaded(backend, tmp_path)
    assert not changed(loaded, stored(merged))
    assert torch.equal(output(loaded, BATCH), expected)


@one_of_each
@pytest.mark.parametrize("method", ["multilora", "aslora"])
def test_deepcopy_of_a_merged_model_is_independent(method: str, backend: str, tiny: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    expected, bits = output(model, BATCH), stored(model)
    model.merge_adapter()
    merged = output(model, BATCH)
    other = copy.deepcopy(model)
    assert torch.equal(output(other, BATCH), merged)
    other.unmerge_adapter()
    assert torch.equal(output(other, BATCH), expected)
    assert torch.equal(output(model, BATCH), merged)
    other.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(output(other, BATCH), merged)
    assert torch.equal(output(model, BATCH), expected)
    assert not changed(model, bits)


@pytest.mark.parametrize("double", [False, True])
def test_weights_packed_for_the_cpu_merge(double: bool, tiny: Path) -> None:
    """In evaluation mode on CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights, and dequantises them wrongly."""
    functional = pytest.importorskip("bitsandbytes").functional
    backend = "nf4-double" if double else "nf4"
    model = add_adapter(BACKENDS[backend].build(tiny), "masa-sum")
    weights, deltas = weights_of(model, backend), deltas_of(model)
    for layer in h.layers_of(model).values():
        weight = layer.get_base_layer().weight
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    packed = {name: layer.get_base_layer().weight.data.clone() for name, layer in h.layers_of(model).items()}
    scales = {
        name: layer.get_base_layer().weight.quant_state.absmax.clone() for name, layer in h.layers_of(model).items()
    }
    model.merge_adapter()
    for name, weight in weights_of(model, backend).items():
        assert relative(weight - weights[name] - deltas[name], deltas[name]) < 0.3
    model.unmerge_adapter()
    for name, layer in h.layers_of(model).items():
        weight = layer.get_base_layer().weight
        assert weight.quant_state.packing_format_for_cpu
        assert torch.equal(weight.data, packed[name])
        assert torch.equal(weight.quant_state.absmax, scales[name])


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(**BATCH).loss.backward()
    return {name: p.grad.clone() for name, p in h.adapter_parameters(model).items()}


packed = pytest.mark.parametrize("backend", ["nf4-packed", "nf4-double-packed"])


@packed
@pytest.mark.parametrize("method", PLAIN)
def test_evaluating_a_packed_model_leaves_no_trace(method: str, backend: str, tiny: Path, tmp_path: Path) -> None:
    """Gradients, what is saved, and the base that is given back are those of a model that was never evaluated.

    Layers that are not adapted count too: bitsandbytes lets no gradient through a packed weight, without a word where
    it has no bias, and its state_dict writes other scales back.
    """
    bits = stored(BACKENDS[backend].build(tiny))
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    before, all_bits = gradients(model), stored(model)
    weights = [weight for weight in model.parameters() if isinstance(weight, bnb_weight())]
    first = output(model.eval(), BATCH)
    assert len(weights) == 7 * LAYERS
    assert all(weight.quant_state.packing_format_for_cpu for weight in weights)
    h.assert_same(gradients(model), before)
    for use in (gradients, copy.deepcopy, stored, lambda model: model.save_pretrained(tmp_path)):
        assert torch.equal(output(model.eval(), BATCH), first)
        use(model)
    assert not changed(model, all_bits)
    other = copy.deepcopy(model)
    h.assert_same(gradients(other), before)
    output(model.eval(), BATCH)
    base = model.unload()
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in base.modules())
    assert not changed(base, bits)
    assert not changed(other.unload(), bits)


@packed
@pytest.mark.parametrize("method", MERGEABLE)
def test_packed_weights_merge_as_others_do(method: str, backend: str, tiny: Path, tmp_path: Path) -> None:
    """Evaluated before or not, the same bits are written; and they are what is saved, evaluated since or not."""
    merged = []
    for evaluate in (False, True):
        model = add_adapter(BACKENDS[backend].build(tiny), method)
        if evaluate:
            output(model, BATCH)
        model.merge_adapter()
        errors = {name: layer.merge_error for name, layer in h.layers_of(model).items()}
        if evaluate:
            output(model, BATCH)
        merged.append((stored(model), errors))
    assert merged[0] == merged[1]
    model.unmerge_adapter()
    whole = model.merge_and_unload()
    expected = output(whole, BATCH)
    whole.save_pretrained(tmp_path)
    assert torch.equal(output(reloaded(backend, tmp_path), BATCH), expected)


@packed
def test_reading_a_packed_weight_leaves_it_packed(backend: str, tiny: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), "multilora")
    weights = weights_of(model, backend)
    output(model, BATCH)
    for name, layer in h.layers_of(model).items():
        weight = layer.get_base_layer().weight
        data, scales = weight.data.clone(), weight.quant_state.absmax.clone()
        assert relative(base_weight.read(layer).double() - weights[name], weights[name]) < 1e-6
        assert layer.get_base_layer().weight is weight
        assert weight.quant_state.packing_format_for_cpu
        assert torch.equal(weight.data, data)
        assert torch.equal(weight.quant_state.absmax, scales)


@packed
def test_a_base_evaluated_before_it_is_adapted(backend: str, tiny: Path, tmp_path: Path) -> None:
    """bitsandbytes has rounded its scales to bfloat16 by then; it trains, merges and saves with those."""
    never = gradients(add_adapter(BACKENDS[backend].build(tiny), "masa-concat"))
    base = BACKENDS[backend].build(tiny)
    before = output(base, BATCH)
    model = add_adapter(base, "masa-concat")
    with model.disable_adapter():
        assert torch.equal(output(model, BATCH), before)
    for name, gradient in gradients(model).items():
        assert relative(gradient - never[name], never[name]) < 0.02
    bits, expected = stored(model), output(model.eval(), BATCH)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not changed(model, bits)
    assert torch.equal(output(model, BATCH), expected)
    with model.disable_adapter():
        assert torch.equal(output(model, BATCH), before)
    base = model.unload()
    base.save_pretrained(tmp_path)
    assert torch.equal(output(reloaded(backend, tmp_path), BATCH), before)


@pytest.mark.parametrize("backend", ["nf4", "nf4-packed"])
def test_only_layers_that_would_be_packed_are_guarded(backend: str, tiny: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), "multilora")
    model.add_adapter("other", config("multilora"))
    hooks = [len(m._forward_pre_hooks) for m in model.modules() if isinstance(m, nn.Linear)]
    assert sum(hooks) == (7 * LAYERS if BACKENDS[backend].packs else 0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_when_bitsandbytes_packs(training: bool, gradient: bool, tiny: Path) -> None:
    """The seam that loraplex.runtime.packing stands on: when a weight is packed, and by which names that is told."""
    layer = BACKENDS["nf4-double-packed"].build(tiny).model.layers[0].mlp.up_proj.train(training)
    assert layer.support_avx512bf16_for_cpu
    expected = read_4bit(layer)
    layer(torch.randn(2, 64, requires_grad=gradient))
    state = layer.weight.quant_state
    assert getattr(state, "packing_format_for_cpu", False) == (not training and not gradient)
    assert layer.quant_state is state
    if state.nested:
        return
    data, plain = unpacked(layer.weight)
    assert plain.absmax.dtype == torch.float32
    layer.weight.data, layer.weight.quant_state = data, plain
    # Scales in bfloat16 have eight bits.
    assert relative(read_4bit(layer) - expected, expected) < 2**-8


def reloaded(backend: str, folder: Path) -> nn.Module:
    """A saved quantised model."""
    with BACKENDS[backend].on_its_cpu():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def bnb_weight() -> type:
    return pytest.importorskip("bitsandbytes").nn.Params4bit


# Refusals


def assert_refused(model: PeftModel, match: str) -> None:
    """Every way to merge raises a ValueError and leaves the model as it was."""
    before, bits = h.snapshot(model, BATCH), stored(model)
    for merge in (model.merge_adapter, model.merge_and_unload, list(h.layers_of(model).values())[-1].merge):
        with pytest.raises(ValueError, match=match):
            merge()
        h.assert_unchanged(before, h.snapshot(model, BATCH))
        assert not changed(model, bits)
        assert not any(layer.merged for layer in h.layers_of(model).values())


@pytest.mark.parametrize("method", ["dual_lora", "masa-sum"])
@pytest.mark.parametrize("name", ["gptq", "awq", "aqlm", "eetq"])
def test_forward_only_backends_refuse_to_merge(method: str, name: str) -> None:
    """PEFT can't write their weights. The last layer only is such a one: none before it stays merged."""
    model = h.adapted(method)
    list(h.layers_of(model).values())[-1].quantization_backend = ForwardOnlyQuantizationBackend(name)
    assert_refused(model, rf"{name}.*(bfloat16|float32)")


@pytest.mark.parametrize("method", ["masa-sum", "dual_lora"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq(method: str, kind: str, tiny: Path, tmp_path: Path) -> None:
    """Adapted, trained, saved and loaded; not merged."""
    pytest.importorskip("gptqmodel")

    def build() -> nn.Module:
        model = from_pretrained(str(tiny), torch.bfloat16).requires_grad_(False)
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(model.model.get_submodule(parent), child, gptqmodel_layer(layer, kind))
        return model.eval()

    base = build()
    expected = output(base, BATCH)
    model = get_peft_model(base, config(method))
    assert torch.equal(output(model, BATCH), expected)
    assert len(h.layers_of(model)) == 2 * LAYERS
    losses, optimizer = [], torch.optim.AdamW(h.adapter_parameters(model).values(), lr=2e-2)
    model.train()
    for _ in range(10):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    trained = output(model.eval(), BATCH)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(build(), tmp_path).eval(), BATCH), trained)
    assert_refused(model, kind if kind == "gptq" else "(?i)awq")


def gptqmodel_layer(linear: nn.Linear, kind: str) -> nn.Module:
    """`linear` rounded to the nearest of 16 values in each group, stored as GPTQ or AWQ stores it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    cls = TorchLinear if kind == "gptq" else AwqTorchLinear
    layer = cls(
        bits=4, group_size=GROUP, sym=kind == "gptq", desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=linear.bias is not None, register_buffers=kind == "gptq",
    )  # fmt: skip
    groups = linear.weight.data.float().unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1) / 7
    zeros = torch.full_like(scales, 8)
    if kind == "gptq":
        group_of = torch.arange(linear.in_features, dtype=torch.int32) // GROUP
        layer.pack_original(linear, scales, zeros, group_of)
    else:
        layer.pack(linear, scales, zeros)
    return layer


@one_of_each
def test_router_refuses_to_merge(backend: str, tiny: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), "masa-router")
    assert_refused(model, r"gates depend on the input.*calibrate")


@pytest.mark.parametrize("method", ["aslora", "masa-sum"])
@one_of_each
def test_safe_merge_catches_nan(method: str, backend: str, tiny: Path) -> None:
    model = add_adapter(BACKENDS[backend].build(tiny), method)
    parameters = h.adapter_parameters(model)
    last = [name for name in parameters if name.endswith("lora_B") or "lora_B_" in name][-1]
    with torch.no_grad():
        parameters[last][0, 0] = math.nan
    bits = stored(model)
    for merge in (model.merge_adapter, model.merge_and_unload, list(h.layers_of(model).values())[-1].merge):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        assert not changed(model, bits)
        assert not any(layer.merged for layer in h.layers_of(model).values())


def test_nan_that_is_allowed_is_told(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A comparison with NaN is false, whichever way it is asked."""
    model = add_adapter(BACKENDS["nf4"].build(tiny), "multilora")
    with torch.no_grad():
        list(h.adapter_parameters(model).values())[-1].fill_(math.nan)
    with loraplex.allow_nonfinite():
        model.merge_adapter()
    assert "Merging lost" in caplog.text


@pytest.mark.parametrize("backend", ["nf4", "nf4-packed", "int8", "hqq", "torchao-int8"])
@pytest.mark.parametrize("step", ["get_base_weight", "set_base_weight"])
def test_a_failing_backend_leaves_no_layer_half_merged(
    backend: str, step: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao has weights that can't be dequantised, and PEFT drops the old weight before it quantises the new one."""
    model = add_adapter(BACKENDS[backend].build(tiny), "masa-sum")
    last = list(h.layers_of(model).values())[-1]
    name = last.quantization_backend.backend_name
    original = getattr(type(last.quantization_backend), step)

    def fail(self: Any, layer: Any, *args: Any) -> Any:
        if layer in (last, last.get_base_layer()):
            if step == "set_base_weight":
                original(self, layer, *args)
            raise NotImplementedError("Weights of this type do not support it (yet).")
        return original(self, layer, *args)

    monkeypatch.setattr(type(last.quantization_backend), step, fail)
    assert_refused(model, rf"v_proj.*{name}.*(bfloat16|float32)")


def test_torchao_with_a_config_per_module_refuses_to_merge(tiny: Path) -> None:
    """torchao can't quantise one layer again by a table of names; PEFT has dropped its weight by then."""
    pytest.importorskip("torchao")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    table = OrderedDict(
        [
            ("model.layers.0.self_attn.q_proj.weight", Int8WeightOnlyConfig()),
            ("model.layers.0.self_attn.v_proj.weight", IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))),
        ]
    )
    base = from_pretrained(str(tiny), torch.float32, TorchAoConfig(FqnToConfig(table))).eval()
    model = add_adapter(base, "multilora", layers_to_transform=[0])
    assert len({type(layer.base_layer.weight) for layer in h.layers_of(model).values()}) == 2
    assert_refused(model, "torchao")


def test_torchao_without_its_config_is_refused(tiny: Path) -> None:
    """PEFT looks for the settings on the model; a part of it, or one quantised by hand, does not have them."""
    model = BACKENDS["torchao-int8"].build(tiny)
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        get_peft_model(model.model, config("multilora"))
    assert not any(isinstance(module, AdapterLinear) for module in model.modules())
