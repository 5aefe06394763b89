"""Runs that are stopped and go on: nothing is lost, nothing is done twice, and the end is bit for bit the same."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import METHODS, rows, without_times, write_run
from safetensors.torch import load_file

import forking
from loraplex.commands.cli import main
from loraplex.recipes.training.callbacks import ProgressLine


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


def test_trained_tokens_continue_bit_for_bit(room, tmp_path, monkeypatch):
    """Rows of the embedding are in the checkpoint, with the optimizer's state of them."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {
        "train": {"max_steps": 10, "eval_steps": 5, "save_steps": 3, "learning_rate": 5e-3},
        "adapter": {
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "trainable_token_indices": [6, 7],
            **METHODS["aslora"],
        },
    }
    assert main(["train", str(write_run(room, whole, "aslora", **changes))]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(ProgressLine, "on_step_begin", signal_before_step(4, signal.SIGINT), raising=False)
        assert main(["train", str(write_run(room, broken, "aslora", **changes))]) == 130
    assert main(["train", str(broken / "run.yaml"), "--resume"]) == 0
    assert without_times(rows(broken)) == without_times(rows(whole))
    files = [load_file(folder / "adapter_model.safetensors") for folder in (whole, broken)]
    (tokens,) = [key for key in files[0] if "trainable_tokens_delta" in key]
    assert files[0][tokens].shape[0] == 2
    assert files[0].keys() == files[1].keys()
    assert all(files[0][key].equal(files[1][key]) for key in files[0])


def signal_before_step(step: int, *numbers: int):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            for number in numbers:
                signal.raise_signal(number)

    return on_step_begin


def interrupt(run: Path, output_dir: Path, after: int, number: int) -> int:
    """Train in a process of its own, send it a signal once `after` steps are logged; its exit code."""
    errors = output_dir.with_suffix(".err")
    process = forking.start(main, ["train", str(run)], out=errors)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (output_dir / "metrics.jsonl").is_file() and len(rows_so_far(output_dir)) >= after:
            os.kill(process.pid, number)
            break
        time.sleep(0.02)
    process.join(60)
    assert "continue with: loraplex train" in errors.read_text(), errors.read_text()
    return process.exitcode


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


@pytest.fixture
def sigint_raises():
    """Python's own handler, which a shell that starts the tests in the background would have switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_raises")
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
