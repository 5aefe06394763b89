"""Whole runs of the command on tiny models: train, evaluate, merge, inspect."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import METHODS, entry, rows, write_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loraplex.commands.cli import main
from loraplex.recipes.config.arguments import training_arguments
from loraplex.recipes.config.run_config import load_run
from loraplex.recipes.data.encode import encode_training
from loraplex.recipes.prepare import PreparedRun


@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_merge_inspect(room, tmp_path, method, capsys):
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert main(["train", str(write_run(room, out, method)), "--train.max_steps", "15"]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "trainable parameters" in printed
    found = rows(out)
    keys = [(row["step"], row["event"], row.get("task")) for row in found]
    assert len(keys) == len(set(keys))
    assert [row["step"] for row in found if row["event"] == "train"] == list(range(1, 16))
    evaluations = [row for row in found if row["event"] == "eval"]
    assert [row["step"] for row in evaluations] == [0, 5, 10, 15]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert {"run.yaml", "versions.json", "loss.png", "adapter_model.safetensors"} <= set(os.listdir(out))
    card = (out / "README.md").read_text()
    assert ("import loraplex" in card) == (method != "lora")
    assert f"| reviews | loss | {evaluations[0]['loss']:.4f} | {evaluations[-1]['loss']:.4f} |" in card
    assert not [name for name in os.listdir(out) if name.endswith((".bin", ".tmp")) or name.startswith(".")]

    assert main(["eval", str(out), "--base", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["tasks"]["reviews"]
    assert measured["base"] == {k: evaluations[0][k] for k in measured["base"]}
    assert measured["adapted"]["loss"] == pytest.approx(evaluations[-1]["loss"], abs=1e-6)

    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert main(["inspect", str(out)]) == 0
    assert "self_attn.v_proj" in capsys.readouterr().out

    routed = method == "masa"
    if routed:
        assert main(["merge", str(out), "-o", str(merged)]) == 2
        message = capsys.readouterr().err
        assert "gates depend on the input" in message
        assert "--calibration" in message
        assert not merged.exists()
    arguments = ["--calibration"] if routed else ["--safe"]
    assert main(["merge", str(out), "-o", str(merged), *arguments]) == 0
    plain = AutoModelForCausalLM.from_pretrained(merged)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(room / "llama"), out)
    ids = AutoTokenizer.from_pretrained(merged)("the film is very bright", return_tensors="pt")["input_ids"]
    if routed:  # mean gates: near the adapted model, not equal to it
        base = AutoModelForCausalLM.from_pretrained(room / "llama")
        assert distance(plain, adapted, ids) < 0.5 * distance(base, adapted, ids)
    else:
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def distance(one: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return (one(ids).logits - other(ids).logits).norm()


def test_several_data_sets(room, tmp_path):
    out = tmp_path / "out"
    again = {**entry(room, weight=1.0, eval_size=4, max_examples=20), "name": "again"}
    data = [entry(room, weight=1.0), entry(room, "more", weight=2.0, eval_size=8), again]
    run = write_run(room, out, "multilora", data=data)
    assert main(["train", str(run), "--train.max_steps", "6"]) == 0
    evaluations = [row for row in rows(out) if row["event"] == "eval"]
    assert [(row["step"], row["task"], row["examples"]) for row in evaluations[:3]] == [
        (0, "reviews", 16),
        (0, "more", 8),
        (0, "again", 4),
    ]
    assert {row["step"] for row in evaluations} == {0, 5, 6}


@pytest.mark.parametrize("method", METHODS)
def test_classification(room, tmp_path, method, capsys):
    out, merged = tmp_path / "out", tmp_path / "merged"
    run = write_run(room, out, method, task="classification", model=str(room / "bert"), data=[classes(room)])
    options = ["--adapter.target_modules", "[query, value]", "--train.max_steps", "12"]
    if method == "aslora":
        options += ["--adapter.num_merges", "1"]
    assert main(["train", str(run), *options]) == 0
    evaluations = [row for row in rows(out) if row["event"] == "eval"]
    assert {"loss", "accuracy", "f1", "examples"} <= set(evaluations[-1])
    assert any("classifier" in key for key in load_file(out / "adapter_model.safetensors"))
    capsys.readouterr()
    assert main(["eval", str(out), "--base", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["tasks"]["reviews"]
    assert measured["base"] == {k: evaluations[0][k] for k in measured["base"]}
    assert measured["adapted"]["loss"] == pytest.approx(evaluations[-1]["loss"], abs=1e-6)
    calibration = ["--calibration"] if method == "masa" else []
    assert main(["merge", str(out), "-o", str(merged), *calibration]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    assert plain.config.id2label == dict(enumerate(json.loads((out / "labels.json").read_text())))


def classes(room: Path) -> dict:
    return {"path": str(room / "reviews.jsonl"), "eval_size": 16}


def test_evaluation_of_other_data(room, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", str(write_run(room, out, "lora")), "--train.max_steps", "2"]) == 0
    capsys.readouterr()
    assert main(["eval", str(out / "checkpoint-2"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["reviews"]["adapted"]["examples"] == 16
    data = json.dumps(entry(room, "more", eval_size=10))
    assert main(["eval", str(out), "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["more"]["adapted"]["examples"] == 10
    (out / "run.yaml").unlink()
    assert main(["eval", str(out)]) == 2
    assert "give --data or --run" in capsys.readouterr().err
    assert main(["eval", str(out), "--data", data, "--json"]) == 0
    with (out / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(200)
    assert main(["eval", str(out), "--data", data]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_merge_never_overwrites_by_accident(room, tmp_path, capsys):
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert main(["train", str(write_run(room, out, "multilora")), "--train.max_steps", "2"]) == 0
    merged.mkdir()
    (merged / "precious.txt").write_text("mine")
    assert main(["merge", str(out), "-o", str(merged)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["merge", str(out), "-o", str(merged), "--force"]) == 0
    assert not (merged / "precious.txt").exists()
    assert (merged / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "out", "out.yaml"]
    assert main(["merge", str(out), "-o", str(tmp_path / "other"), "--calibration"]) == 2
    assert "leave --calibration out" in capsys.readouterr().err


def test_weight_decay_spares_multilora_scaling():
    from loraplex import MultiLoraConfig
    from loraplex.recipes.training.trainers import ClassifierTrainer

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(layer, MultiLoraConfig(r=2, target_modules=["0"]))
    names = ClassifierTrainer.get_decay_parameter_names(ClassifierTrainer.__new__(ClassifierTrainer), model)
    assert any("lora_A" in name for name in names)
    assert not any("lora_scaling" in name for name in names)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by its old name
def test_metrics_of_an_empty_update_are_those_of_the_base(room):
    from loraplex.recipes.data.tasks import DataSpec, load_task
    from loraplex.recipes.evaluation import Evaluator

    base = AutoModelForCausalLM.from_pretrained(room / "llama").eval()
    words = AutoTokenizer.from_pretrained(room / "llama")
    task = load_task(DataSpec(**entry(room)), 0, "sft", True)
    plain = Evaluator(task, words, batch_size=5)(base)
    assert plain["perplexity"] == pytest.approx(math.exp(plain["loss"]))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert Evaluator(task, words, batch_size=5)(adapted) == plain


def test_plain_text_where_the_tokenizer_has_a_chat_template(room, tmp_path):
    """`train.chat: false` leaves the template out of training and evaluation alike."""
    text = {}
    for chat in ("true", "false"):
        run = load_run(write_run(room, tmp_path / chat, "masa"), [("train.chat", chat == "true")])
        prepared = PreparedRun(run)
        tokenizer, (task,) = prepared.tokenizer, prepared.tasks
        for part in (task.train, task.eval):
            (row, *_) = encode_training(tokenizer, part, 64).to_list()
            text[chat] = tokenizer.decode(row["input_ids"])
            assert tokenizer.decode([t for t in row["labels"] if t >= 0]).split()[0] in ("good", "bad")
            assert ("user :" in text[chat], "assistant :" in text[chat]) == (chat == "true", chat == "true")
        assert text[chat].endswith("<eos>")
    training_arguments(run)  # no field of the trainer's
