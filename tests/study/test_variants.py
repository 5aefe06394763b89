"""The methods that only the repository's studies use, and methods of a user's own module in a study."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from test_study import TARGETS, study
from torch import nn

import forking
import loraplex
from loraplex.commands.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def variants(monkeypatch):
    """The module, found as `loraplex` finds it when started in the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    from configs.studies import variants

    return variants


class Net(nn.Module):
    """One layer to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W'ᵀ + b."""
        return self.proj(x)


@pytest.mark.parametrize("name", ["WithoutReluConfig", "WithoutSignConfig"])
def test_ablations_of_dual_lora(variants, name):
    """ΔW entry by entry: the gate that is left out is left out, the other is there, and nothing else changes."""
    torch.manual_seed(0)
    config = getattr(variants, name)(r=3, lora_alpha=5, target_modules=["proj"], warmup_steps=2, init_std=0.7)
    net = Net()
    base = net.proj.weight.detach().double().clone()
    model = get_peft_model(net, config)
    x = torch.randn(6, 5)
    with torch.no_grad():
        assert torch.equal(model(x), nn.functional.linear(x, base.float(), net.proj.bias))  # the warm-up's start
    for _ in range(2):
        loraplex.step(model)
    factors = net.proj.factors("default")
    A, B, C, D = (p.detach().double() for p in (factors.lora_A, factors.lora_B, factors.lora_C, factors.lora_D))
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        for j in range(5):
            m = sum(B[i, k] * A[k, j] for k in range(2))
            n = sum(D[i, k] * C[k, j] for k in range(1))
            expected[i, j] = m * (1 if n > 0 else -1) if name == "WithoutReluConfig" else max(m, 0.0) * n
    expected *= 5 / 2**0.5
    torch.testing.assert_close(factors.delta_weight().detach().double(), expected, rtol=1e-5, atol=1e-6)
    out = model(x)
    bias = net.proj.bias.double()
    torch.testing.assert_close(out.detach().double(), x.double() @ (base + expected).T + bias, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in factors.parameters())


def test_full_fine_tuning_is_that(variants):
    """Three steps of AdamW on ΔW from zero are three steps on W itself."""
    torch.manual_seed(0)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    model = get_peft_model(net, variants.FullConfig(target_modules=["proj"], lora_alpha=3))
    x, y = torch.randn(6, 5), torch.randn(6, 4)
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    theirs = torch.optim.AdamW([twin.proj.weight], lr=0.1, weight_decay=0)
    for _ in range(3):
        for call, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            (call(x) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-6)
    model.eval()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.proj.weight, twin.proj.weight, rtol=1e-5, atol=1e-6)


def test_a_module_in_the_working_directory(room, tmp_path):
    """The command finds it, in its own process and in those of the cells."""
    shutil.copy(ROOT / "configs/studies/variants.py", tmp_path / "mine.py")
    methods = {"lora": None, "full": {"method": "mine:FullConfig", "size": None}}
    settings = {"methods": methods, "adapter": TARGETS, "learning_rates": [1e-3], "seeds": [0], "general_text": None}
    path = study(room, tmp_path, **settings)
    done = forking.run(main, ["compare", str(path)], folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"][0]
    assert {line["method"] for line in results["lines"]} == {"base", "lora", "full"}
    card = (tmp_path / "out/cells/reviews/full/lr-0.001/seed-0/README.md").read_text()
    assert "import mine  # registers" in card


def test_in_a_study(variants, room, tmp_path, capsys):
    """A method from a module of the user's: sized, trained, tested, analysed, and loaded again by `eval`."""
    methods = {
        "lora": None,
        "without_relu": {"method": "configs.studies.variants:WithoutReluConfig"},
        "full": {"method": "configs.studies.variants:FullConfig", "size": None},
    }
    path = study(room, tmp_path, methods=methods, learning_rates=[1e-3], seeds=[0], general_text=None)
    assert main(["compare", str(path)]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"][0]
    assert not results["failures"]
    assert results["settings"]["without_relu"]["r"] == 3
    assert results["costs"]["full"]["parameters"] == 4 * (32 * 32 + 16 * 32)
    (full,), (lora,) = (results["insides"][method] for method in ("full", "lora"))
    assert full["effective_rank"] > 3 >= lora["effective_rank"]
    cell = tmp_path / "out/cells/reviews/full/lr-0.001/seed-0"
    capsys.readouterr()
    assert main(["eval", str(cell), "--test", "--json"]) == 2  # what lies beside an adapter is not imported unasked
    assert "names code to import, method: configs.studies.variants:FullConfig" in capsys.readouterr().err
    method = ["--method", "configs.studies.variants:FullConfig"]
    assert main(["inspect", str(cell), "--plots", str(tmp_path / "plots"), *method]) == 0
    capsys.readouterr()
    assert main(["eval", str(cell), "--test", "--json", *method]) == 0
    again = json.loads(capsys.readouterr().out)["tasks"]["reviews"]["adapted"]
    assert again == pytest.approx(json.loads((cell / "test.json").read_text())["tasks"]["reviews"])
