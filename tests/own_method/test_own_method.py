"""A method that the package does not have, in a file of its own, through the public API and the command line.

Nothing in the package knows `tied_lora.py` beside this file. CONTRIBUTING.md walks through it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from runs import entry, rows, without_times, write_run

from helpers import ARCHS, layers_of, output, products, relative, stock
from loraplex import export_lora
from loraplex.commands.cli import main
from loraplex.inspection.budget import match, plan
from loraplex.inspection.describe import describe
from loraplex.inspection.spectra import analyse

HERE = Path(__file__).parent
METHOD = "tied_lora:TiedLoraConfig"
LLAMA = ARCHS["llama"]
R, ALPHA = 3, 5


@pytest.fixture(autouse=True, scope="module")
def _in_its_folder():
    """`module:Class` is looked for in the working directory; the class registers itself when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)
        patch.syspath_prepend(str(HERE))
        yield


def test_the_walk_through_quotes_the_file():
    """CONTRIBUTING.md shows what is in the file, line for line."""
    text = (HERE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add a method")[2]
    quotes = re.findall(r"```python\n(.*?)```", text.partition("## Style")[0], re.DOTALL)
    assert len(quotes) == 3
    for quote in quotes:
        assert quote in (HERE / "tied_lora.py").read_text(encoding="utf-8")


def settings(**more):
    from tied_lora import TiedLoraConfig

    return TiedLoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], **more)


def adapted():
    """A Llama with an adapter whose factors are all non-zero."""
    return get_peft_model(LLAMA.build(), settings(init_weights=False)).eval()


def expected(model):
    """Module → (α/r) B diag(d) A in float64, written out again from the equation."""
    state = {key: value.double() for key, value in model.state_dict().items() if "tiedlora" in key}
    found = {}
    for name in layers_of(model):
        module = name.removeprefix("base_model.model.")
        role = module.replace(f"layers.{module.split('.')[2]}", "layers.N").replace(".", "__")
        A, B = (next(v for k, v in state.items() if k.endswith(f"{role}__lora_{f}")) for f in "AB")
        d = next(v for k, v in state.items() if k.startswith(f"{name}.") and k.endswith("lora_d"))
        found[module] = ALPHA / R * B @ torch.diag(d) @ A
    return found


def test_equation_merge_and_start():
    inputs = LLAMA.inputs()
    assert torch.equal(output(get_peft_model(LLAMA.build(), settings()), inputs), output(LLAMA.build(), inputs))
    model = adapted()
    before, base = output(model, inputs), LLAMA.build()
    for name, delta in expected(model).items():
        base.get_submodule(name).weight.data += delta.float()
    torch.testing.assert_close(before, output(base, inputs), rtol=1e-4, atol=1e-5)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(before, output(model, inputs), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(before, output(model, inputs))


def test_file_and_export(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "own").eval()
    assert torch.equal(output(model, LLAMA.inputs()), output(again, LLAMA.inputs()))
    export_lora(model, tmp_path / "plain")
    for name, product in products(tmp_path / "plain").items():
        assert relative(product, expected(model)[name]) < 1e-6
    torch.testing.assert_close(
        output(stock(tmp_path / "plain"), LLAMA.inputs()), output(model, LLAMA.inputs()), rtol=1e-4, atol=1e-5
    )


def test_description_and_spectra():
    model = adapted()
    about = describe(model)
    assert {(row.factor, tuple(row.layers)) for row in about.shared} == {
        ("lora_A", (0, 1, 2, 3, 4)),
        ("lora_B", (0, 1, 2, 3, 4)),
    }
    assert all(row.factors == {"lora_d": [R]} for row in about.modules)
    assert about.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for spectrum in analyse(model).spectra:
        S = torch.linalg.svdvals(expected(model)[spectrum.module])
        torch.testing.assert_close(torch.tensor(spectrum.values).double(), S[:R], rtol=1e-4, atol=1e-6)


def test_budget():
    base, budget = LLAMA.build(), plan(LLAMA.build(), settings(), tokens=21)
    model = get_peft_model(base, settings()).train()
    assert budget.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layer = next(iter(layers_of(model).values()))
    factors, saved = layer.factors("default"), {}
    x = torch.randn(21, layer.in_features, requires_grad=True)
    owned = {p.data_ptr() for p in (*model.parameters(), x)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        factors(x)
    assert sum(t.nbytes for pointer, t in saved.items() if pointer not in owned) == factors.saved_bytes(21, 4, 0)
    assert match(LLAMA.build(), settings(), 2 * budget.parameters).excess == 0


def test_command_line(room, tmp_path, capsys):
    """train, kill and resume, eval, inspect, export, merge, budget."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = {"max_steps": 12, "save_steps": 4, "eval_steps": 6, "learning_rate": 5e-2, "weight_decay": 0.1,
             "per_device_train_batch_size": 4}  # fmt: skip
    adapter = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    for out in (whole, parts):
        run = yaml.safe_load(write_run(room, out, "lora").read_text()) | {
            "method": METHOD, "adapter": adapter, "train": train
        }  # fmt: skip
        out.with_suffix(".yaml").write_text(yaml.safe_dump(run))
    assert main(["train", str(whole.with_suffix(".yaml"))]) == 0
    assert "# Tied LoRA adapter" in (whole / "README.md").read_text()
    assert "import tied_lora" in (whole / "README.md").read_text()
    assert rows(whole)[-1]["trainable_parameters"] == 2 * R * (32 + 4) + R * (32 + 16)
    assert main(["train", str(parts.with_suffix(".yaml"))]) == 0
    shutil.rmtree(parts / "checkpoint-12")
    (parts / "adapter_model.safetensors").unlink()
    assert main(["train", str(parts.with_suffix(".yaml")), "--resume"]) == 0
    assert without_times(rows(whole)) == without_times(rows(parts))
    assert (whole / "adapter_model.safetensors").read_bytes() == (parts / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()

    allow = ["--allow-code", METHOD]
    assert main(["eval", str(whole), "--json", *allow]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["reviews"]["adapted"]["examples"] == 16
    assert main(["inspect", str(whole), "--json", "--plots", str(tmp_path / "plots"), *allow]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["factor"] for row in report["shared"]} == {"lora_A", "lora_B"}
    assert len(report["analysis"]["spectra"]) == 8
    for command in ("export", "merge"):
        assert main([command, str(whole), "-o", str(tmp_path / command), "--json", *allow]) == 0
    capsys.readouterr()
    assert main(["budget", str(room / "llama"), "--methods", f"{METHOD},lora", "--match", "lora:r=2", "--json"]) == 0
    budgets = json.loads(capsys.readouterr().out)["budgets"]
    assert set(budgets) == {METHOD, "lora"}
    assert budgets[METHOD]["method"] == "TIEDLORA"


def test_a_new_process_is_told_what_to_import(tmp_path):
    """Nothing has imported the class there: without a word from the user it can't be said who shares what."""
    adapted().save_pretrained(tmp_path / "own")
    command = [sys.executable, "-m", "loraplex", "inspect", str(tmp_path / "own"), "--json"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
    assert refused.returncode == 2
    assert "--allow-code module:Class" in refused.stderr
    allowed = subprocess.run([*command, "--allow-code", METHOD], capture_output=True, text=True, cwd=HERE, check=True)
    assert {row["factor"] for row in json.loads(allowed.stdout)["shared"]} == {"lora_A", "lora_B"}


def test_study(room, tmp_path, capsys):
    tree = {
        "model": str(room / "llama"),
        "tasks": {"reviews": {"data": [entry(room, test_size=20)]}},
        "methods": {"lora": None, "tied": {"method": METHOD}},
        "budget": "lora:r=2",
        "adapter": {"target_modules": ["q_proj", "v_proj"]},
        "learning_rates": [1e-2],
        "seeds": [0],
        "train": {"max_steps": 2, "per_device_train_batch_size": 4},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    assert main(["compare", str(tmp_path / "study.yaml")]) == 0
    (task,) = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    assert {line["method"] for line in task["lines"]} == {"base", "lora", "tied"}
    assert task["failures"] == task["missing"] == []
    assert task["insides"]["tied"][0]["notes"] == []
    assert "tied_lora" in sys.modules
