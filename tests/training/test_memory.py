"""Running out of memory: one message that says where, what was planned and what to change, and a run that goes on."""

from __future__ import annotations

import shlex

import pytest
import torch
from runs import rows, write_run

from loraplex.commands.cli import main
from loraplex.recipes import prepare
from loraplex.recipes.evaluation import Evaluator
from loraplex.recipes.training.trainers import AnswerTrainer


def gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


OUT_OF_MEMORY = {"accelerator": gpu, "cpu": lambda: torch.empty(2**52), "python": lambda: bytearray(2**60)}


def fail_in_step(monkeypatch, step: int, fail) -> None:
    whole = AnswerTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            fail()
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "training_step", training_step)


def message_of(capfd, *arguments: str) -> list[str]:
    """The lines of the message of a run that must fail; nothing but it and the run's notes is printed."""
    capfd.readouterr()
    assert main(["train", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    lines = shown.err.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :]


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_in_a_step(room, tmp_path, monkeypatch, capfd, kind):
    run = write_run(room, tmp_path / "out", "multilora")
    with monkeypatch.context() as patched:
        fail_in_step(patched, 6, OUT_OF_MEMORY[kind])
        where, planned, top, *advice = message_of(capfd, str(run))
    assert where == "error: out of memory in step 6"
    assert planned.startswith("planned for 4 × 512 tokens, without gradient checkpointing: weights ")
    assert planned.count("iB") == 6
    assert "what the frozen model keeps" in top
    assert advice[-6:] == [
        "what needs less memory:",
        "  --train.per_device_train_batch_size 2 --train.gradient_accumulation_steps 2  (as many examples per step)",
        "  --train.gradient_checkpointing true  (more time)",
        "  --train.max_length 256  (longer prompts lose their middle)",
        "  --dtype bfloat16  (weights of half the size; in a new run with another --output_dir)",
        f"checkpoint-4 stays; continue with: loraplex train {tmp_path}/out/run.yaml --resume "
        "--train.per_device_train_batch_size 2 --train.gradient_accumulation_steps 2",
    ]
    assert main(shlex.split(advice[-1].partition("loraplex ")[2])) == 0
    assert "warning: train.per_device_train_batch_size was 4 and is 2 now" in capfd.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "out") if row["event"] == "train"] == list(range(1, 13))


def test_the_plan_is_that_of_the_run(room, tmp_path, monkeypatch, capfd):
    """Its parts are those that `loraplex budget` prints for the same settings."""
    train = {"per_device_train_batch_size": 9, "max_length": 40, "gradient_accumulation_steps": 3}
    run = write_run(room, tmp_path / "out", "masa", train=train, dtype="bfloat16")
    fail_in_step(monkeypatch, 1, gpu)
    lines = message_of(capfd, str(run))
    options = "--adapter.r 4 --adapter.target_modules [q_proj,v_proj] --adapter.expert_mixing router"
    autocast = ["--autocast"] if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else []
    settings = ["--methods", "masa", "--tokens", "360", "--dtype", "bfloat16", *options.split(), *autocast]
    assert main(["budget", str(room / "llama"), *settings]) == 0
    table = capfd.readouterr().out.splitlines()
    sizes = [cell.strip() for cell in next(line for line in reversed(table) if "│" in line).split("│")[2:-1]]
    names = ("weights", "adapter", "gradients", "AdamW", "kept for backward")
    expected = ", ".join(f"{name} {size}" for name, size in zip(names, sizes[:-1], strict=True))
    assert lines[1].endswith(f"{expected}; together {sizes[-1]}")
    options = "--train.per_device_train_batch_size 3 --train.gradient_accumulation_steps 9"
    assert f"  {options}  (as many examples per step)" in lines
    assert (
        lines[-1] == f"there is no checkpoint yet; start again with: loraplex train {tmp_path}/out/run.yaml {options}"
    )


def test_only_what_is_not_set_is_advised(room, tmp_path, monkeypatch, capfd):
    train = {"per_device_train_batch_size": 1, "max_length": 15, "gradient_checkpointing": True}
    fail_in_step(monkeypatch, 1, gpu)
    advice = message_of(capfd, str(write_run(room, tmp_path / "out", "lora", train=train)))[-3:]
    assert advice[:2] == ["what needs less memory:", "  --dtype bfloat16  (weights of half the size)"]
    assert advice[2].endswith("run.yaml --dtype bfloat16")
    small = write_run(room, tmp_path / "small", "lora", train=train, dtype="bfloat16")
    assert message_of(capfd, str(small))[-2] == "  --model M  (a smaller one)"


def test_in_an_evaluation(room, tmp_path, monkeypatch, capfd):
    run = write_run(room, tmp_path / "out", "aslora")
    whole = Evaluator.__call__
    calls = []

    def second_fails(self, *args):
        calls.append(self)
        return torch.empty(2**52) if len(calls) == 2 else whole(self, *args)

    monkeypatch.setattr(Evaluator, "__call__", second_fails)
    where, planned, *advice = message_of(capfd, str(run))
    assert where == "error: out of memory in the evaluation after step 5"
    assert "AdamW" in planned
    assert "gradients" not in planned
    assert "  --train.per_device_eval_batch_size 8  (the same results)" in advice
    assert advice[-1].endswith("--resume --train.per_device_eval_batch_size 8")


def test_while_the_model_is_loaded(room, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(prepare, "load_model", lambda *args, **kwargs: gpu())
    lines = message_of(capfd, str(write_run(room, tmp_path / "out", "lora")))
    assert lines[0] == "error: out of memory before the first step"
    assert lines[1].startswith("planned: weights ")
    assert lines[-1] == "  --dtype bfloat16  (weights of half the size)"


def test_other_errors_keep_their_traceback(room, tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("shapes differ")

    fail_in_step(monkeypatch, 2, broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["train", str(write_run(room, tmp_path / "out", "lora"))])
    fail_in_step(monkeypatch, 2, gpu)
    with pytest.raises(RuntimeError, match="out of memory in step 2") as caught:
        main(["train", str(write_run(room, tmp_path / "other", "lora")), "--debug"])
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
