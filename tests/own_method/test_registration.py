"""What is asked of a method of one's own, and what it is told where it does not answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loraplex
from helpers import ARCHS, adapted, config, ready
from loraplex.inspection.budget import plan
from loraplex.inspection.describe import describe
from loraplex.inspection.spectra import Analysis, add_gate_use, analyse
from loraplex.recipes.models.budgeting import parse_match
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors, kaiming_, wide
from loraplex.tuner.findings import Fact, OverLayers, Panel
from loraplex.tuner.gates import GatedFactors
from loraplex.tuner.model import AdapterModel
from loraplex.tuner.registry import METHODS, register
from loraplex.tuner.sharing import SharedFactors

LLAMA = ARCHS["llama"]
HERE = Path(__file__).parent


class PairFactors(GatedFactors):
    """Two LoRA pairs, each with a sigmoid gate, and a factor T that all layers of a family share."""

    def add_parameters(self, config):
        self.lora_A = nn.Parameter(kaiming_(torch.empty(2 * self.r, self.in_features), self.in_features))
        self.lora_B = nn.Parameter(torch.randn(self.out_features, self.r))
        self.lora_R = nn.Parameter(torch.randn(2, self.in_features))

    @property
    def num_gates(self):
        return 2

    def gates(self, x):
        return torch.sigmoid(x @ self.lora_R.T)

    def calibrated_tensors(self):
        return [self.lora_A, self.lora_B, self.lora_R]

    def mean_form(self):
        gate = torch.full((2,), 0.5) if self.mean_gate is None else self.mean_gate
        A = (gate.view(2, 1, 1) * wide(self.lora_A).view(2, self.r, -1)).sum(0)
        return A, self.scaling * wide(self.lora_B)

    def forward(self, x):
        h = (x @ self.lora_A.T).unflatten(-1, (2, self.r))
        return self.scaling * ((self.gates(x).unsqueeze(-1) * h).sum(-2) @ self.lora_B.T)


class PairShared(SharedFactors):
    """T: nothing reads it, so that only its bookkeeping is tested."""

    def add_shared(self, config, families):
        for name in families:
            self.register_parameter(f"{name}__table", nn.Parameter(torch.zeros(3, 2)))


@dataclass
class PairConfig(AdapterConfig):
    """Settings of the method above."""

    method: ClassVar[str] = "PAIRS"
    title: ClassVar[str] = "Pairs"
    factors_cls: ClassVar[type] = PairFactors
    shared_cls: ClassVar[type] = PairShared

    @property
    def depends_on_input(self):
        return True


class PairModel(AdapterModel):
    """PEFT's handle."""

    prefix = "pairs_"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register(PairConfig, PairModel)


def pairs():
    torch.manual_seed(0)
    return get_peft_model(LLAMA.build(), PairConfig(r=3, lora_alpha=5, target_modules=["q_proj"])).eval()


def variant(**attributes):
    return dataclass(type("Variant", (PairConfig,), {"__doc__": "", **attributes}))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"depends_on_input": AdapterConfig.depends_on_input, "method": "OTHER"}, "go together"),
        ({"factors_cls": Factors, "method": "OTHER"}, "go together"),
        ({"method": "LOWER_CASE"}, "capital letters and digits"),
        ({"method": "lower"}, "capital letters and digits"),
        ({}, "another method is called 'pairs' or 'PAIRS'"),
        ({"method": "MASA", "run_name": classmethod(lambda cls: "mine")}, "another method is called 'mine' or 'MASA'"),
        ({"method": "OTHER", "run_name": classmethod(lambda cls: "masa")}, "another method is called 'masa'"),
        ({"method": "LORA"}, "another method is called 'lora'"),
    ],
)
def test_what_register_refuses(attributes, message):
    """Nothing is registered then."""
    before = dict(METHODS)
    with pytest.raises(ValueError, match=message):
        register(variant(**attributes), PairModel)
    assert before == METHODS


def test_a_class_made_from_one_of_ours_has_a_name_of_its_own():
    for cls in (loraplex.DualLoraConfig, loraplex.MasaConfig):
        made = dataclass(type("Made", (cls,), {"__doc__": "", "method": "MADE"}))
        assert made.run_name() == "made"


def test_mean_gates_are_means():
    """Also of gates that do not add up to 1; and of layers in evaluation, on the tokens that are there."""
    model, batch = pairs(), LLAMA.inputs()
    seen: dict[str, torch.Tensor] = {}
    for layer in (m for m in model.modules() if isinstance(m, PairFactors)):
        layer.register_forward_hook(lambda f, args, _, into=seen: into.update({f.module_name: f.gates(args[0])}))
    model(**batch)
    seen = dict(seen)  # calibration computes with mean gates too
    found = loraplex.calibrate(model, [batch])
    assert found.gates.keys() == seen.keys()
    for name, gates in seen.items():
        assert found.gates[name] == pytest.approx(gates.flatten(0, -2).mean(0).tolist(), rel=1e-5)
    before = model(**batch).logits
    model.merge_adapter()
    assert not torch.equal(before, model(**batch).logits)


def test_every_shared_parameter_is_counted(tmp_path):
    """Whatever it is called, and whoever reads it."""
    model = pairs()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    for about in (describe(model), describe(str(tmp_path))):
        assert about.parameters == trained == plan(LLAMA.build(), model.peft_config["default"]).parameters
        assert [row.factor for row in about.shared] == ["table"]
    assert "The method of this adapter is Pairs. " in (tmp_path / "README.md").read_text()


def test_use_of_gates_is_the_analysed_adapters():
    """Another method's gates on the same model are not taken for them."""
    model = adapted("masa-router")
    loraplex.add_adapter(model, "other", PairConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    model.base_model.set_adapter(["other"])
    found = analyse(model, "other")
    add_gate_use(found, model, {"task": [LLAMA.inputs()]}, "other")
    assert found.findings == []  # it has no gate_findings, and MASA's title does not stand over its gates
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Two active adapters have gates"):
        loraplex.calibrate(model, [LLAMA.inputs()])


def test_findings_have_keys_of_their_own():
    for key in ("spectra", "method", "measures"):
        with pytest.raises(ValueError, match=f"a finding is called '{key}'"):
            Analysis("X", findings=[Fact(key, "label", "text", 1)]).to_dict()
    with pytest.raises(ValueError, match="a finding is called 'a'"):
        Analysis("X", findings=[Fact("a", "", "", 1), Fact("a", "", "", 2)]).to_dict()
    panels = [Panel("c", "one", {"q": 1.0}), Panel("c", "two", {"v": 2.0}), Panel("d", "none", {}, "measure")]
    plain = Analysis("X", findings=[OverLayers("f", "F", panels)]).to_dict()
    assert plain["c"] == {"q": [1.0], "v": [2.0]}
    assert plain["measures"] == {}


@pytest.mark.parametrize(
    ("method", "name", "tensor"),
    [
        ("multilora", "multilora_shared.x__lora_A", torch.zeros(2, 2)),
        ("dual_lora", "duallora_shared.x__lora_A", torch.zeros(2, 2)),
        ("dual_lora", "duallora_shared.x__merges", torch.zeros(2, 2).long()),
        ("aslora", "aslora_shared.x__warmup", torch.zeros(2).long()),
        ("masa-sum", "masa_shared.x__merges", torch.zeros(2, 2).long()),
    ],
)
def test_files_with_another_methods_tensors_are_refused(method, name, tensor, tmp_path):
    adapted(method).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.loraplex_bank.{name}": tensor}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the file is broken"):
        describe(str(tmp_path))


def test_a_budget_like_that_of_a_class(monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.syspath_prepend(str(HERE))
    method, settings = parse_match("tied_lora:TiedLoraConfig:r=4,target_modules=[q_proj]", {}, "sft")
    assert (method, settings.r, settings.target_modules) == ("tied_lora:TiedLoraConfig", 4, {"q_proj"})
    assert parse_match("lora:r=4", {}, "sft")[0] == "lora"


def test_a_method_that_shares_nothing_needs_to_say_nothing():
    assert AdapterConfig.shared_cls is None
    model = get_peft_model(LLAMA.build(), config("multilora"))
    ready(model)
    assert describe(model).shared == []
