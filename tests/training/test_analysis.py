"""What `inspect --plots` computes, against dense matrices and cases worked out by hand; the figures are drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import METHODS, entry, write_run

from helpers import MERGEABLE, adapted, layers_of, naive_updates
from loraplex.commands.cli import main
from loraplex.inspection import spectra as analysis
from loraplex.inspection.plots import draw
from loraplex.inspection.spectra import Analysis, Spectrum, analyse
from loraplex.methods.masa.experts import cka


def spectrum(*values: float) -> Spectrum:
    return Spectrum("m", "m", 0, list(values), math.sqrt(sum(v * v for v in values)))


def test_effective_rank_and_share():
    assert spectrum(3.0).effective_rank == pytest.approx(1)
    assert spectrum(2.0, 2.0, 2.0).effective_rank == pytest.approx(3)
    p, q = 0.75, 0.25
    assert spectrum(3.0, 1.0).effective_rank == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)))
    assert spectrum(3.0, 1.0).share(1) == 0.75
    assert spectrum().effective_rank == spectrum().share(1) == 0.0


@pytest.mark.parametrize("method", MERGEABLE)
def test_spectra_are_those_of_the_dense_updates(method, monkeypatch):
    """From the factors, or of the whole matrix; and the leading ones where that is too large."""
    model = adapted(method)
    dense = {name: torch.linalg.svdvals(delta.double()) for name, delta in naive_updates(model).items()}
    for limit in (2048, 8):
        monkeypatch.setattr(analysis, "EXACT_SIZE", limit)
        monkeypatch.setattr(analysis, "LEADING", 6)
        found = {s.module: s for s in analyse(model).spectra}
        assert found.keys() == dense.keys()
        for name, s in found.items():
            S = dense[name]
            torch.testing.assert_close(torch.tensor(s.values).double(), S[: len(s.values)], rtol=1e-4, atol=1e-6)
            assert s.norm == pytest.approx(S.norm().item(), rel=1e-5)
            cut = method == "dual_lora" and limit == 8
            assert (s.note == f"the first 6 of {len(S)}") == cut
            assert cut or S[len(s.values) :].sum() < 1e-5 * S.sum()


def test_a_router_without_mean_gates():
    """Its updates depend on the input: the spectrum is that of equal gates, and says so."""
    model = adapted("masa-router")
    spectra = analyse(model).spectra
    assert len(spectra) == len(layers_of(model)) > 0
    for s in spectra:
        factors = layers_of(model)["base_model.model." + s.module].factors("default")
        delta = factors.scaling * factors.lora_B @ factors.experts().mean(0)
        assert s.values[0] == pytest.approx(torch.linalg.matrix_norm(delta, 2).item(), rel=1e-5)
        assert s.note == "all gates equal"


def test_gates_and_signs():
    """Counted element by element."""
    model = adapted("dual_lora")
    found = analyse(model)
    (closed, negative) = found.finding("gates").panels
    assert closed.values.keys() == negative.values.keys() == {s.module for s in found.spectra}
    for name, share in closed.values.items():
        f = layers_of(model)["base_model.model." + name].factors("default")
        is_open = f.lora_B @ f.lora_A > 0
        assert share == pytest.approx((~is_open).double().mean().item())
        assert negative.values[name] == pytest.approx((f.lora_D @ f.lora_C <= 0)[is_open].double().mean().item())


def test_similarity_of_experts():
    """1 with itself at any size, 0 where orthogonal; symmetric; unchanged by a rotation of the rank."""
    A = torch.randn(3, 4, 10)
    A[1] = 5 * torch.linalg.qr(torch.randn(4, 4)).Q @ A[0]
    A[2] = 0
    A[2, 0] = torch.linalg.svd(A[0]).Vh[-1]
    found = cka(A)
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.double).index_put(
        (torch.tensor([0, 1]), torch.tensor([1, 0])), torch.tensor(1.0).double()
    ), rtol=1e-5, atol=1e-8)  # fmt: skip
    model = adapted("masa-router")
    assert set(analyse(model).finding("expert_similarity").matrices) == {
        layer.factors("default").experts_name for layer in layers_of(model).values()
    }


def test_scaling_factors():
    model = adapted("multilora")
    scaling = analyse(model).to_dict()["scaling"]
    assert len(scaling) == len(layers_of(model)) > 0
    for name, sizes in scaling.items():
        c = layers_of(model)["base_model.model." + name].factors("default").lora_scaling
        assert sizes == pytest.approx(c.abs().mean(1).tolist())


def test_what_is_no_plain_update():
    model = get_peft_model(adapted("masa-router").unload(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="no plain LoRA"):
        analyse(model)


@pytest.fixture(scope="module")
def trained(room, tmp_path_factory):
    """Folders of adapters, one per method."""
    made = {}
    for method in METHODS:
        out = tmp_path_factory.mktemp("adapters") / method
        tasks = [entry(room), entry(room, "more")]
        train = {"max_steps": 12, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "eval_steps": None}
        assert main(["train", str(write_run(room, out, method, data=tasks, train=train))]) == 0
        made[method] = out
    return made


FIGURES = {
    "masa": {"expert_similarity.png", "expert_use.png"},
    "aslora": {"merges.png"},
    "dual_lora": {"gates.png"},
    "multilora": {"scaling.png"},
    "lora": set(),
}


@pytest.mark.parametrize("method", METHODS)
def test_inspect_plots(trained, tmp_path, method, capsys):
    """Every method gets its own figures beside the two that all have."""
    capsys.readouterr()
    options = ["--with-data"] if method == "masa" else []
    assert main(["inspect", str(trained[method]), "--plots", str(tmp_path / "plots"), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"spectra.png", "rank_by_depth.png"} | FIGURES[method]
    assert {Path(path).name for path in report["plots"]} == names
    assert len(report["analysis"]["spectra"]) == 8
    if method == "masa":
        assert report["analysis"]["expert_use"].keys() == {"reviews", "more"}
        for gates in report["analysis"]["expert_use"]["more"].values():
            assert sum(gates) == pytest.approx(1, abs=1e-6)
    assert main(["inspect", str(trained[method]), "--plots", str(tmp_path / "plots")]) == 0
    assert "effective rank" in capsys.readouterr().out


def test_updates_that_are_zero_have_figures(tmp_path):
    """An adapter at the start of its training, or of Dual LoRA's warm-up."""
    draw(Analysis("DUALLORA", [spectrum(0.0, 0.0), spectrum()]), tmp_path / "plots")
    assert (tmp_path / "plots" / "spectra.png").is_file()


def test_figures_show_what_they_say(trained, tmp_path):
    """ASLoRA's merges end where the map says; a share is drawn as it is."""
    from loraplex.inspection import plots as figures
    from loraplex.recipes.adapters.analysis import analyse_folder

    found = analyse_folder(trained["aslora"], with_data=False)
    merges = found.finding("merges")
    figure = figures._handovers(merges, found)
    assert merges.rows
    for merge in merges.rows:
        panel = next(a for a in figure.axes if a.get_title() == figures.short(merge.family))
        assert any(
            list(line.get_xdata()) == [0, merge.step] and list(line.get_ydata()) == [merge.layer] * 2
            for line in panel.lines
        )
        assert any(text.xy == (merge.step, merge.reads) for text in panel.texts)
    figure = figures._rank_by_depth(found)
    first = next(line for line in figure.axes[1].lines)
    assert sorted(first.get_ydata()) == sorted(
        s.share(1) for s in found.spectra if figures.short(s.role) == first.get_label()
    )
    assert draw(analysis.Analysis("LORA"), tmp_path) == []


def test_options_that_do_not_fit(trained, capsys):
    assert main(["inspect", str(trained["lora"]), "--with-data"]) == 2
    assert "give --plots DIR" in capsys.readouterr().err
    assert main(["inspect", str(trained["lora"]), "--with-data", "--plots", "x"]) == 2
    assert "has no gates" in capsys.readouterr().err
