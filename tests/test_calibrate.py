"""Mean gates of MASA's routers: by hand on gates that are known, and the errors against loops over tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import helpers as h
import loraplex
from helpers import ARCHS, config, naive_updates, output, ready, relative
from loraplex import Calibration, MasaConfig, calibrate
from loraplex.methods.masa.method import MasaFactors

LLAMA = ARCHS["llama"]
F64 = torch.float64
IN, OUT, EXPERTS, R, ALPHA = 4, 6, 3, 2, 5

# Gates of four kinds of tokens, one row each: tokens are unit vectors, so these are the router's outputs.
GATES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25], [0.02, 0.97, 0.01]], dtype=F64)


class One(nn.Module):
    """One layer, which sees the tokens as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.q(x)


class Two(nn.Module):
    """Two layers: what the second one sees depends on the first one's update."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(IN, IN, bias=False)}) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["q"](x))
        return x


def routed(base: Callable[[], nn.Module]) -> PeftModel:
    torch.manual_seed(0)
    settings = MasaConfig(r=R, lora_alpha=ALPHA, num_experts=EXPERTS, target_modules=["q"], init_weights=False)
    return get_peft_model(base().to(F64), settings).eval()


def factors_of(model: nn.Module, adapter: str = "default") -> dict[str, MasaFactors]:
    layers = h.layers_of(model).values()
    return {factors.module_name: factors for layer in layers if (factors := layer.factors(adapter)) is not None}


def one() -> PeftModel:
    """Token e_j has the gates GATES[j]: softmax(log p) = p."""
    model = routed(One)
    with torch.no_grad():
        factors_of(model)["q"].lora_router.copy_(GATES.log().T)
    return model


def tokens(*kinds: list[int]) -> Tensor:
    """A batch of sequences of these kinds of tokens."""
    return torch.eye(IN, dtype=F64)[torch.tensor(kinds)]


def update(factors: MasaFactors, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """Δh of one token, by loops over experts and ranks; `gate` replaces the router's own."""
    A, B = factors.lora_A.detach(), factors.lora_B.detach()
    if gate is None:
        powers = [torch.exp(sum(w * v for w, v in zip(row, x, strict=True))) for row in factors.lora_router.detach()]
        gate = torch.stack([power / sum(powers) for power in powers])
    mixed = [sum(gate[e] * (A[e * R + k] * x).sum() for e in range(EXPERTS)) for k in range(R)]
    return ALPHA / R * sum(B[:, k] * mixed[k] for k in range(R))


def ratio(missed: list[Tensor], whole: list[Tensor]) -> float:
    return (torch.stack(missed).norm() / torch.stack(whole).norm()).item()


# Mean gates


def test_mean_gates_by_hand() -> None:
    """Over all tokens of all batches alike, whatever the batches' sizes."""
    model = one()
    found = calibrate(model, [{"x": tokens([0, 0, 1])}, {"x": tokens([2, 3], [0, 1])}])
    # Three tokens of kind 0, two of kind 1, one each of 2 and 3.
    expected = [(3 * a + 2 * b + c + d) / 7 for a, b, c, d in GATES.T.tolist()]
    assert found.gates == {"q": pytest.approx(expected, rel=1e-12)}
    assert factors_of(model)["q"].mean_gate.tolist() == pytest.approx(expected, rel=1e-12)
    assert json.loads(json.dumps(found.to_dict()))["gates"]["q"] == found.gates["q"]


@pytest.mark.parametrize("kind", [torch.long, torch.bool, F64], ids=str)
def test_padding_does_not_count(kind: torch.dtype) -> None:
    model = one()
    # Kind 3 is padding here, on both sides; kind 3 where it is a token counts.
    x = tokens([0, 1, 3, 3], [3, 3, 2, 3], [3, 0, 0, 1])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).to(kind)
    found = calibrate(model, [{"x": x, "attention_mask": mask}])
    expected = [(3 * a + 2 * b + c + d) / 7 for a, b, c, d in GATES.T.tolist()]
    assert found.gates["q"] == pytest.approx(expected, rel=1e-12)
    # Nor in the errors.
    again = calibrate(model, [{"x": x[mask.bool()][None]}])
    assert found.errors["q"] == pytest.approx(again.errors["q"], rel=1e-6)
    assert found.output_error == pytest.approx(again.output_error, rel=1e-6)


def test_held_out_text_measures_and_does_not_teach() -> None:
    model = one()
    seen, held_out = [{"x": tokens([0, 0, 1])}], [{"x": tokens([2, 3])}, {"x": tokens([3])}]
    found = calibrate(model, seen, held_out)
    gate = (2 * GATES[0] + GATES[1]) / 3
    assert found.gates["q"] == pytest.approx(gate.tolist(), rel=1e-12)
    factors, eye = factors_of(model)["q"], torch.eye(IN, dtype=F64)
    exact = [update(factors, eye[kind]) for kind in (2, 3, 3)]
    missed = [update(factors, eye[kind], gate) - delta for kind, delta in zip((2, 3, 3), exact, strict=True)]
    assert found.errors["q"] == pytest.approx(ratio(missed, exact), rel=1e-6)
    # One linear layer: the model's outputs miss what the layer's update misses.
    assert found.output_error == pytest.approx(ratio(missed, exact), rel=1e-6)
    # Without held-out text the same tokens measure.
    again = calibrate(model, seen)
    assert again.gates == found.gates
    exact = [update(factors, eye[kind]) for kind in (0, 0, 1)]
    missed = [update(factors, eye[kind], gate) - delta for kind, delta in zip((0, 0, 1), exact, strict=True)]
    assert again.errors["q"] == pytest.approx(ratio(missed, exact), rel=1e-6)


def test_constant_gates_miss_nothing() -> None:
    model = one()
    with torch.no_grad():
        factors_of(model)["q"].lora_router.zero_()
    found = calibrate(model, [{"x": torch.randn(3, 5, IN, dtype=F64)}])
    assert found.gates["q"] == pytest.approx([1 / 3] * 3, rel=1e-12)
    assert found.errors["q"] < 1e-7
    assert found.output_error < 1e-7


# Errors of several layers


def run(model: PeftModel, x: Tensor, how: Callable[[int, Tensor], Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    """`Two` for one token, with the update `how(layer, input)`; the output, and each layer's input."""
    inputs = []
    for index, layer in enumerate(model.base_model.model.layers):
        inputs.append(x)
        weight = layer["q"].get_base_layer().weight.detach()
        delta = how(index, x)
        x = torch.tanh(weight @ x + (0 if delta is None else delta))
    return x, inputs


def test_errors_as_defined() -> None:
    """Per layer: on the exact model's inputs. For the outputs: mean gates in all layers at once."""
    model = routed(Two)
    x = torch.randn(2, 3, IN, dtype=F64)
    held_out = torch.randn(2, 4, IN, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = calibrate(model, [{"x": x}], [{"x": held_out, "attention_mask": mask}])
    factors = list(factors_of(model).values())
    gates = [torch.tensor(found.gates[f.module_name], dtype=F64) for f in factors]

    sums = [torch.zeros(EXPERTS, dtype=F64) for _ in factors]
    for token in x.flatten(0, 1):
        _, inputs = run(model, token, lambda index, value: update(factors[index], value))
        for index, value in enumerate(inputs):
            sums[index] += torch.softmax(factors[index].lora_router.detach() @ value, 0)
    for gate, total in zip(gates, sums, strict=True):
        torch.testing.assert_close(gate, total / 6, rtol=1e-10, atol=0)

    missed: list[list[Tensor]] = [[], [], []]
    whole: list[list[Tensor]] = [[], [], []]
    for token in held_out[mask.bool()]:
        exact, inputs = run(model, token, lambda index, value: update(factors[index], value))
        mean, _ = run(model, token, lambda index, value: update(factors[index], value, gates[index]))
        base, _ = run(model, token, lambda index, value: None)
        for index, value in enumerate(inputs):
            delta = update(factors[index], value)
            missed[index].append(update(factors[index], value, gates[index]) - delta)
            whole[index].append(delta)
        missed[2].append(mean - exact)
        whole[2].append(exact - base)
    for index, f in enumerate(factors):
        assert found.errors[f.module_name] == pytest.approx(ratio(missed[index], whole[index]), rel=1e-6)
        assert found.errors[f.module_name] > 0.01
    assert found.output_error == pytest.approx(ratio(missed[2], whole[2]), rel=1e-6)


def test_output_error_is_that_of_the_merged_model() -> None:
    model = h.adapted("masa-router", dtype=F64)
    seen, held_out = LLAMA.inputs(seed=2), LLAMA.inputs(seed=3)
    found = calibrate(model, [seen], [held_out])
    exact = output(model, held_out)
    with model.disable_adapter():
        base = output(model, held_out)
    mean = output(model.merge_and_unload(), held_out)
    expected = ((mean - exact).norm() / (exact - base).norm()).item()
    assert 0.01 < expected < 1
    assert found.output_error == pytest.approx(expected, rel=1e-5)


def test_other_adapters_count_as_base() -> None:
    """Only what the mean gates replace is measured."""
    model = one()
    found = calibrate(model, [{"x": tokens([0, 1, 2])}])
    loraplex.add_adapter(model, "other", MasaConfig(r=R, target_modules=["q"], expert_mixing="sum", init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    together = calibrate(model, [{"x": tokens([0, 1, 2])}])
    assert together.gates == found.gates
    assert together.output_error == pytest.approx(found.output_error, rel=1e-6)


# Use


def test_merging_and_exporting_use_the_mean_gates(tmp_path: Any) -> None:
    model = h.adapted("masa-router", dtype=F64)
    with pytest.raises(ValueError, match=r"gates depend on the input.*calibrate"):
        loraplex.export_lora(model, tmp_path / "out")
    found = calibrate(model, [LLAMA.inputs(seed=2)])
    assert sorted(found.gates) == sorted(naive_updates(model, {name: [1, 0, 0] for name in found.gates}))
    for gate in found.gates.values():
        assert sum(gate) == pytest.approx(1)
    expected = naive_updates(model, found.gates)
    loraplex.export_lora(model, tmp_path / "out")
    for name, product in h.products(tmp_path / "out").items():
        assert relative(product, expected[name]) < 1e-12
    before = h.base_weights(model)
    model.merge_adapter()
    after = h.base_weights(model)
    for name, delta in expected.items():
        key = f"base_model.model.{name}.base_layer.weight"
        assert relative(after[key] - before[key], delta) < 1e-10


def test_forward_keeps_its_gates() -> None:
    """Calibrating changes nothing but what merging and exporting do."""
    model = h.adapted("masa-router").train()
    inputs = LLAMA.inputs()
    model.eval()
    before = output(model, inputs)
    model.train()
    found = calibrate(model, [inputs])
    assert model.training
    model.eval()
    assert torch.equal(output(model, inputs), before)
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, MasaFactors))
    # Again: the same, not an average with the last time.
    assert calibrate(model, [inputs]) == found
    assert not model.training


def _train(model: PeftModel) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**LLAMA.inputs()).loss.backward()
    optimizer.step()
    model.eval()


def _only(name: str) -> Callable[[PeftModel], None]:
    """One number of one factor of one layer, past the version counter."""

    def change(model: PeftModel) -> None:
        parameters = h.adapter_parameters(model)
        found = [parameter for key, parameter in parameters.items() if name in key]
        found[-1].data[-1, -1] += 1e-6

    return change


def _rescale(model: PeftModel) -> None:
    next(iter(h.layers_of(model).values())).factors("default").scaling *= 2


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "training": _train,
    "loading": lambda model: model.load_state_dict(
        {key: 2 * value for key, value in model.state_dict().items() if "_factors." in key}, strict=False
    ),
    "one number of R": _only("lora_router"),
    "one number of A": _only("lora_A"),
    "one number of B": _only("lora_B"),
    "rounding": lambda model: model.to(torch.bfloat16).float(),
    "scaling": _rescale,
}


@pytest.mark.parametrize("change", CHANGES)
def test_gates_of_other_weights_are_refused(change: str, tmp_path: Any) -> None:
    model = h.adapted("masa-router")
    found = calibrate(model, [LLAMA.inputs(seed=2)])
    CHANGES[change](model)
    before = h.snapshot(model, LLAMA.inputs())
    again = r"measured on other weights.*loraplex\.calibrate"
    for refuse in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: loraplex.export_lora(model, tmp_path / "out"),
        lambda: peft.convert_to_lora(model, 4),
    ):
        with pytest.raises(ValueError, match=again):
            refuse()
    assert not model.supports_lora_conversion()
    h.assert_unchanged(before, h.snapshot(model, LLAMA.inputs()))
    assert not list(tmp_path.iterdir())
    anew = calibrate(model, [LLAMA.inputs(seed=2)])
    assert anew.gates.keys() == found.gates.keys()
    loraplex.export_lora(model, tmp_path / "out")
    for name, delta in naive_updates(model, anew.gates).items():
        rescaled = 2 if change == "scaling" and name.endswith("0.self_attn.q_proj") else 1
        assert relative(h.products(tmp_path / "out")[name], rescaled * delta) < 1e-6


def test_gates_last_while_the_weights_do(tmp_path: Any) -> None:
    """Switches of mode, saving, wider dtypes, other adapters and loading the very same weights change nothing."""
    model = h.adapted("masa-router")
    found = calibrate(model, [LLAMA.inputs()])
    model.train()
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    model.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()}, assign=True)
    model.add_adapter("second", config("masa-router"))
    ready(model, "second", seed=1)
    model.double()
    copied = copy.deepcopy(model)
    for one in (model, copied):
        loraplex.export_lora(one, tmp_path / "out", force=True)
        for name, delta in naive_updates(one, found.gates).items():
            assert relative(h.products(tmp_path / "out")[name], delta) < 1e-6
    with pytest.raises(ValueError, match="depend on the input"):
        loraplex.export_lora(model, tmp_path / "second", adapter_name="second")


def test_dropout_takes_no_part() -> None:
    gates = []
    for dropout in (0.0, 0.5):
        model = h.adapted("masa-router", lora_dropout=dropout).train()
        gates.append(calibrate(model, [LLAMA.inputs()]))
    assert gates[0] == gates[1]


def test_classifiers_pool_their_tokens() -> None:
    """Their outputs have no token for each of the mask's: all of them count."""
    roberta = ARCHS["roberta"]
    model = h.adapted("masa-router", "roberta", F64)
    inputs = {"input_ids": roberta.inputs()["input_ids"], "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    inputs["attention_mask"][1, 4:] = 0
    found = calibrate(model, [inputs])
    exact = output(model, inputs)
    with model.disable_adapter():
        base = output(model, inputs)
    mean = output(model.merge_and_unload(), inputs)
    assert found.output_error == pytest.approx(((mean - exact).norm() / (exact - base).norm()).item(), rel=1e-4)


def test_only_active_adapters_are_calibrated() -> None:
    model = h.adapted("masa-router")
    model.add_adapter("second", config("masa-router"))
    ready(model, "second", seed=1)
    calibrate(model, [LLAMA.inputs()])
    assert all(factors.mean_gate is None for factors in factors_of(model, "second").values())
    model.set_adapter("second")
    found = calibrate(model, [LLAMA.inputs()])
    assert {name: f.mean_gate.tolist() for name, f in factors_of(model, "second").items()} == found.gates


# Refused


def test_no_text() -> None:
    for batches, held_out in (([], None), ([{"x": tokens([0])}], []), (iter([]), None)):
        with pytest.raises(ValueError, match="no batch to calibrate on"):
            calibrate(one(), batches, held_out)


def test_batches_from_a_generator() -> None:
    model = one()
    found = calibrate(model, ({"x": tokens([kind])} for kind in (0, 1)), ({"x": tokens([kind])} for kind in (2, 3)))
    assert isinstance(found, Calibration)
    assert found.gates["q"] == pytest.approx(((GATES[0] + GATES[1]) / 2).tolist())


@pytest.mark.parametrize("method", ["masa-sum", "multilora"])
def test_no_router(method: str) -> None:
    with pytest.raises(ValueError, match=r"gates that depend on the input.*set_adapter"):
        calibrate(h.adapted(method), [LLAMA.inputs()])


def test_inactive_router() -> None:
    model = h.adapted("masa-router")
    loraplex.add_adapter(model, "second", config("aslora"))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="set_adapter"):
        calibrate(model, [LLAMA.inputs()])
    assert all(factors.mean_gate is None for factors in factors_of(model).values())


def test_a_failed_forward_leaves_no_hooks() -> None:
    model = h.adapted("masa-router").train()
    with pytest.raises(ValueError, match="input_ids"):
        calibrate(model, [{"attention_mask": torch.ones(1, 1)}])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
