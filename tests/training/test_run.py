"""Whole runs of the command on tiny models: train, stop, resume, evaluate, merge, inspect."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from loraplex.cli import main
from loraplex.training.callbacks import ProgressLine

METHODS = {
    "masa": {"expert_mixing": "router"},
    "aslora": {"merge_start_step": 2, "merge_interval": 3, "num_merges": 2},
    "dual_lora": {"warmup_steps": 6},
    "multilora": {},
    "lora": {},
}
WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", "good", "bad", "dull", "bright"]
WORDS += ["film", "review", "is", "the", "very", "."]
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT if chat else None
    return fast


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, a tiny Bert, and reviews that are good if they say "bright"."""
    room = tmp_path_factory.mktemp("room")
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(
            **size, num_hidden_layers=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None
        )
    ).save_pretrained(room / "llama")
    tokenizer(chat=True).save_pretrained(room / "llama")
    BertModel(BertConfig(**size, num_hidden_layers=2, pad_token_id=0)).save_pretrained(room / "bert")
    tokenizer(chat=False).save_pretrained(room / "bert")
    for name, seed in (("reviews", 0), ("more", 1)):
        draw = random.Random(seed)
        rows = []
        for _ in range(80):
            good = draw.random() < 0.5
            words = [draw.choice(["the", "film", "very", "is", "."]) for _ in range(draw.randint(4, 14))]
            words.insert(draw.randint(0, len(words)), "bright" if good else "dull")
            rows.append({"text": " ".join(words), "label": "good" if good else "bad"})
        (room / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return room


def entry(room: Path, name: str = "reviews", **fields) -> dict:
    templates = {"prompt": "review : {text}", "response": "{label}", "labels": {"good": "good", "bad": "bad"}}
    return {"path": str(room / f"{name}.jsonl"), **templates, "eval_size": 16, **fields}


def write_run(room: Path, output_dir: Path, method: str, **changes) -> Path:
    train = {"max_steps": 12, "learning_rate": 5e-3, "eval_steps": 5, "save_steps": 4, "weight_decay": 0.1}
    run = {
        "model": str(room / "llama"),
        "method": method,
        "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **METHODS[method]},
        "data": [entry(room)],
        "train": {**train, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"},
        "output_dir": str(output_dir),
    }
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**run, **changes}))
    return path


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(found: list[dict]) -> list[dict]:
    return [row for row in found if row["event"] != "end"]


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


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_continues_bit_for_bit(room, tmp_path, method, monkeypatch, capfd):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"train": {"max_steps": 16, "eval_steps": 5, "save_steps": 6, "learning_rate": 5e-3}}
    assert main(["train", str(write_run(room, whole, method, **changes))]) == 0
    with monkeypatch.context() as patched:
        # Ctrl-C in the middle of ASLoRA's merges and of Dual LoRA's warm-up.
        patched.setattr(ProgressLine, "on_step_begin", signal_before_step(4, signal.SIGINT), raising=False)
        assert main(["train", str(write_run(room, broken, method, **changes))]) == 130
    assert f"continue with: loraplex train {broken}/run.yaml --resume" in capfd.readouterr().err
    assert [row["step"] for row in rows(broken) if row["event"] == "train"] == [1, 2, 3, 4]
    assert os.listdir(broken / "checkpoint-4")
    assert not (broken / "adapter_model.safetensors").exists()
    assert main(["train", str(broken / "run.yaml"), "--resume"]) == 0
    assert without_times(rows(broken)) == without_times(rows(whole))
    assert (broken / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def signal_before_step(step: int, *numbers: int):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            for number in numbers:
                signal.raise_signal(number)

    return on_step_begin


def interrupt(run: Path, output_dir: Path, after: int, number: int) -> int:
    """Train in a process of its own, send it a signal once `after` steps are logged; its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from loraplex.cli import main; raise SystemExit(main())", "train", str(run)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (output_dir / "metrics.jsonl").is_file() and len(rows_so_far(output_dir)) >= after:
                process.send_signal(number)
                break
            time.sleep(0.02)
        _, errors = process.communicate(timeout=60)
    assert "continue with: loraplex train" in errors, errors
    return process.returncode


def rows_so_far(output_dir: Path) -> list[str]:
    return [line for line in (output_dir / "metrics.jsonl").read_text().splitlines() if '"train"' in line]


def test_ctrl_c_from_outside_and_a_broken_checkpoint(room, tmp_path, capsys):
    """Another process is stopped by Ctrl-C and its last checkpoint cut off; the end is that of an unbroken run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train = {"max_steps": 60, "eval_steps": 20, "save_steps": 3, "save_total_limit": None, "learning_rate": 5e-3}
    assert main(["train", str(write_run(room, whole, "aslora", train=train))]) == 0
    assert interrupt(write_run(room, broken, "aslora", train=train), broken, 4, signal.SIGINT) == 130
    newest = max(broken.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert newest.name == f"checkpoint-{len(rows_so_far(broken))}"
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    capsys.readouterr()
    assert main(["train", str(broken / "run.yaml"), "--resume"]) == 0
    assert f"{newest.name}: optimizer.pt is cut off" in capsys.readouterr().err
    assert without_times(rows(broken)) == without_times(rows(whole))
    assert (broken / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_sigterm_and_a_second_signal(room, tmp_path, monkeypatch, capfd):
    run = write_run(room, tmp_path / "out", "lora", train={"max_steps": 9, "eval_steps": None, "save_steps": 2})
    monkeypatch.setattr(ProgressLine, "on_step_begin", signal_before_step(4, signal.SIGTERM), raising=False)
    assert main(["train", str(run)]) == 143
    assert "SIGTERM: finishing the current step" in capfd.readouterr().err
    twice = [signal.SIGINT, signal.SIGINT]
    monkeypatch.setattr(ProgressLine, "on_step_begin", signal_before_step(7, *twice), raising=False)
    assert main(["train", str(run), "--resume"]) == 130
    assert "continue with: loraplex train" in capfd.readouterr().err
    assert not (tmp_path / "out" / "checkpoint-7").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_of_a_run_that_only_lacks_its_end(room, tmp_path):
    out = tmp_path / "out"
    assert main(["train", str(write_run(room, out, "lora"))]) == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    (out / "adapter_model.safetensors").unlink()
    assert main(["train", str(out / "run.yaml"), "--resume"]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert [row["step"] for row in rows(out) if row["event"] == "train"] == list(range(1, 13))


def test_refuses_to_mix_runs(room, tmp_path, capsys):
    out = tmp_path / "out"
    run = write_run(room, out, "lora")
    assert main(["train", str(run), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["train", str(run), "--train.max_steps", "4", "--train.eval_steps", "null"]) == 0
    capsys.readouterr()
    assert main(["train", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", str(run), "--resume", "--adapter.r", "2"]) == 2
    assert "adapter.r was 4 and is 2 now" in capsys.readouterr().err
    shutil.rmtree(out / "checkpoint-4")
    assert main(["train", str(run)]) == 2
    assert "trained adapter" in capsys.readouterr().err


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
    from loraplex.training.trainers import ClassifierTrainer

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(layer, MultiLoraConfig(r=2, target_modules=["0"]))
    names = ClassifierTrainer.get_decay_parameter_names(ClassifierTrainer.__new__(ClassifierTrainer), model)
    assert any("lora_A" in name for name in names)
    assert not any("lora_scaling" in name for name in names)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by its old name
def test_metrics_of_an_empty_update_are_those_of_the_base(room):
    from loraplex.evaluate import Evaluator
    from loraplex.training.data import DataSpec, load_task

    base = AutoModelForCausalLM.from_pretrained(room / "llama").eval()
    words = AutoTokenizer.from_pretrained(room / "llama")
    task = load_task(DataSpec(**entry(room)), 0, "sft", True)
    plain = Evaluator(task, words, batch_size=5)(base)
    assert plain["perplexity"] == pytest.approx(math.exp(plain["loss"]))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert Evaluator(task, words, batch_size=5)(adapted) == plain
