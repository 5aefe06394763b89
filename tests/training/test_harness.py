"""`eval --harness`, and our own metrics beside the harness's on the same task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import entry, tokenizer, write_run
from transformers import LlamaConfig, LlamaForCausalLM

import forking
from loraplex.commands.cli import main

CHOICES = ["bad film", "very good", "dull"]


@pytest.fixture(scope="module")
def adapter(room, tmp_path_factory) -> Path:
    """A LoRA on a tiny Llama without a chat template, and 30 questions with answers of different lengths."""
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )).save_pretrained(folder / "model")  # fmt: skip
    tokenizer(chat=False).save_pretrained(folder / "model")
    texts = [json.loads(line)["text"] for line in (room / "reviews.jsonl").read_text().splitlines()][:30]
    rows = [{"text": text, "answer": CHOICES[i % 3]} for i, text in enumerate(texts)]
    (folder / "train.jsonl").write_text((room / "more.jsonl").read_text())
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        "choosing": {
            "output_type": "multiple_choice", "doc_to_text": "review : {{text}}", "doc_to_choice": CHOICES,
            "doc_to_target": "{{" + str(CHOICES) + ".index(answer)}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "writing": {
            "output_type": "generate_until", "doc_to_text": "review : {{text}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    (folder / "tasks").mkdir()
    for name, task in tasks.items():
        files = {"data_files": {"test": str(folder / "test.jsonl")}}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    changes = {"model": str(folder / "model"), "data": [{**entry(room), "path": str(folder / "train.jsonl")}]}
    assert main(["train", str(write_run(room, folder / "out", "multilora", **changes))]) == 0
    return folder / "out"


def test_our_metrics_are_the_harness_s(adapter, capsys):
    """Accuracy, accuracy per character and exact match, of the adapted and of the base model."""
    folder = adapter.parent
    capsys.readouterr()
    options = ["--harness-path", str(folder / "tasks"), "--base", "--json"]
    assert main(["eval", str(adapter), "--harness", "choosing,writing", *options]) == 0
    theirs = json.loads(capsys.readouterr().out)["tasks"]
    data = {
        "path": str(folder / "train.jsonl"), "eval_path": str(folder / "test.jsonl"), "prompt": "review : {text}",
        "response": "{answer}", "choices": CHOICES, "generate": 4, "name": "ours",
    }  # fmt: skip
    (folder / "train.jsonl").write_text(
        (folder / "test.jsonl").read_text() + json.dumps({"text": "is", "answer": "dull"})
    )
    assert main(["eval", str(adapter), "--data", json.dumps(data), "--base", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["tasks"]["ours"]
    for model in ("base", "adapted"):
        assert theirs["choosing"][model]["examples"] == ours[model]["examples"] == 30
        assert ours[model]["accuracy"] == pytest.approx(theirs["choosing"][model]["acc"])
        assert ours[model]["accuracy_norm"] == pytest.approx(theirs["choosing"][model]["acc_norm"])
        assert ours[model]["exact_match"] == pytest.approx(theirs["writing"][model]["exact_match"])
    assert ours["base"] != ours["adapted"]


def test_the_harness_itself_loads_our_folder(adapter, tmp_path, capsys):
    """`loraplex exec lm_eval` measures what `loraplex eval --harness` does, in a process of its own."""
    folder = adapter.parent
    capsys.readouterr()
    assert main(["eval", str(adapter), "--harness", "choosing", "--harness-path", str(folder / "tasks"), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["tasks"]["choosing"]["adapted"]
    command = ["exec", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder / 'model'},peft={adapter},dtype=float32", "--tasks", "choosing"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "harness")]
    done = forking.run(main, command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (report,) = (folder / "harness").rglob("results*.json")
    theirs = json.loads(report.read_text())["results"]["choosing"]
    assert theirs["acc,none"] == pytest.approx(ours["acc"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["acc_norm"])


def test_limit_and_table(adapter, capsys):
    options = ["--harness-path", str(adapter.parent / "tasks"), "--limit", "7", "--fewshot", "0"]
    assert main(["eval", str(adapter), "--harness", "choosing", *options]) == 0
    printed = capsys.readouterr().out
    assert "choosing (7 examples)" in printed
    assert "acc_norm" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--harness", "no_such_task_here"], "knows no task no_such_task_here"),
        (["--harness", "choosing", "--harness-path", "nowhere"], "nowhere is not a folder"),
        (["--limit", "3"], "belong to --harness"),
        (["--harness", "choosing", "--data", "x.jsonl"], "brings its own data"),
    ],
)
def test_wrong_options(adapter, capsys, options, message):
    assert main(["eval", str(adapter), *options]) == 2
    assert message in capsys.readouterr().err
