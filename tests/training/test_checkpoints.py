"""Which checkpoints are whole and which go, what is left of a cut metrics file, and whose folder it is."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import rows, write_run

from loraplex.commands.cli import main
from loraplex.io.files import put_in_place
from loraplex.recipes.config.run_config import ConfigError
from loraplex.recipes.training import trainers
from loraplex.recipes.training.checkpoints import last_complete, outdated, write_manifest
from loraplex.recipes.training.lock import LOCK_NAME, locked
from loraplex.recipes.training.metrics import read_metrics


@pytest.fixture(scope="module")
def finished(room) -> Path:
    """The folder of a run whose best adapter, at step 4, is not its last."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    train = {"max_steps": 12, "learning_rate": 5e-3, "eval_steps": 4, "save_steps": 4, "save_total_limit": 2, **best}
    assert main(["train", str(write_run(room, room / "finished", "lora", train=train))]) == 0
    return room / "finished"


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "removed": lambda file: file.unlink(),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}
WORDS = {"cut": "cut off", "emptied": "cut off", "removed": "missing", "zeroed": "damaged"}


def distributed(folder: Path) -> Path:
    """The kinds of files that several processes leave in a checkpoint."""
    files = ["rng_state_0.pth", "rng_state_1.pth", "optimizer.bin", "optimizer.safetensors", "schedule.safetensors"]
    for name in [*files, "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__1_0.distcp", "trainer_state.json"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"contents of {name}")
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("processes", ["one", "several"])
def test_damage_of_any_file_is_found(tmp_path, finished, damage, processes):
    newest = finished / "checkpoint-12" if processes == "one" else distributed(tmp_path / "whole/checkpoint-12")
    shutil.copytree(newest, tmp_path / "out/checkpoint-9")
    for file in [file for file in newest.rglob("*") if file.is_file()]:
        name = str(file.relative_to(newest))
        copy = shutil.copytree(newest, tmp_path / "out" / newest.name)
        assert last_complete(tmp_path / "out") == (copy, [])
        DAMAGES[damage](copy / name)
        word = "cut off" if name == "files.json" and damage == "zeroed" else WORDS[damage]
        assert last_complete(tmp_path / "out") == (copy.with_name("checkpoint-9"), [f"{copy.name}: {name} is {word}"])
        shutil.rmtree(copy)


def test_old_checkpoints_go_but_neither_the_latest_nor_the_best(tmp_path):
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for limit, best, steps in [(2, None, [10, 2]), (2, 2, [10, 4]), (1, 2, [10, 4]), (4, 2, []), (None, None, [])]:
        kept = None if best is None else str(tmp_path / f"checkpoint-{best}")
        assert outdated(tmp_path, 6, limit, kept) == [tmp_path / f"checkpoint-{step}" for step in steps]


def test_best_adapter_is_the_end_of_a_finished_run(finished):
    before = (finished / "adapter_model.safetensors").read_bytes()
    assert before == (finished / "checkpoint-4/adapter_model.safetensors").read_bytes()
    (finished / "adapter_model.safetensors").unlink()
    assert main(["train", str(finished / "run.yaml"), "--resume"]) == 0
    assert (finished / "adapter_model.safetensors").read_bytes() == before


def test_last_evaluation_comes_before_the_last_checkpoint(room, tmp_path, monkeypatch):
    """A run that ends right after that checkpoint has nothing left to do but to copy its adapter."""
    run = write_run(room, tmp_path / "out", "lora", train={"max_steps": 2, "eval_steps": None, "save_steps": 2})

    def put_in_place_and_end(*folders: Path) -> None:
        put_in_place(*folders)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainers, "put_in_place", put_in_place_and_end)
        assert main(["train", str(run)]) == 130
    assert main(["train", str(run), "--resume"]) == 0
    assert [(row["step"], row["event"]) for row in rows(tmp_path / "out")][-2:] == [(2, "eval"), (2, "end")]


def test_metrics_cut_off_within_a_character(tmp_path):
    row = json.dumps({"step": 1, "event": "eval", "task": "été"}, ensure_ascii=False).encode()
    (tmp_path / "metrics.jsonl").write_bytes(row + b"\n" + row[: row.index(b"t\xc3\xa9") + 2])
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(row)]


def test_lock_of_a_process_that_ended_is_taken_over(tmp_path, capsys):
    zombie = psutil.Popen([sys.executable, "-c", ""])
    started = zombie.create_time()
    while zombie.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    here, me = socket.gethostname(), psutil.Process()
    locks = [(here, zombie.pid, started), (here, me.pid, me.create_time() - 60), ("elsewhere", me.pid, started)]
    texts = [json.dumps(dict(zip(("host", "pid", "started"), lock, strict=True))) for lock in locks]
    for text in [*texts, texts[0][:20], ""]:
        (tmp_path / LOCK_NAME).write_text(text)
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == me.pid
            with pytest.raises(ConfigError, match=f"in use by process {me.pid}"), locked(tmp_path):
                pass
        assert not (tmp_path / LOCK_NAME).exists()
    assert capsys.readouterr().err.count("on elsewhere: make sure that it ended") == 1
    zombie.wait()
