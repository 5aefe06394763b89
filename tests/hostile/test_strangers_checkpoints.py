"""A checkpoint that someone else wrote: `--resume` runs no code of its pickles, and says in one line what is wrong."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import write_run

from loraplex.commands.cli import main
from loraplex.recipes.training.checkpoints import FILES_NAME, write_manifest

MARK = "LORAPLEX_TEST_MARK"


class Evil:
    """Leaves a mark if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; open(os.environ[{MARK!r}], 'w').close()",)


@pytest.fixture(scope="module")
def run(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ASLoRA that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train = {"max_steps": 8, "eval_steps": None, "save_steps": 4, "learning_rate": 5e-3}
    assert main(["train", str(write_run(room, folder, "aslora", train=train))]) == 0
    shutil.rmtree(folder / "checkpoint-8")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    return folder


def pickled(name: str) -> Callable[[Path], Any]:
    return lambda folder: torch.save({"x": Evil()}, folder / name)


def plainly_pickled(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Evil()))


def of_state(**settings: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "trainer_state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def of_optimizer(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "optimizer.pt")

    return rewrite


def flatten(state: dict[int, Any]) -> None:
    for entries in state.values():
        entries["exp_avg"] = entries["exp_avg"].flatten()[:3].clone()


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"pickle in {name}": (pickled(name), "can't be read") for name in PICKLES},
    **{f"pickle as {name}": (plainly_pickled(name), "can't be read") for name in PICKLES},
    "optimizer": (lambda folder: torch.save([], folder / "optimizer.pt"), "can't be read"),
    "groups": (of_optimizer(lambda state: state["param_groups"].pop()), "can't be read"),
    "moments": (of_optimizer(lambda state: flatten(state["state"])), "exp_avg is torch.Size"),
    "rate": (of_optimizer(lambda state: state["param_groups"][0].update(lr="x")), "lr of group 0 is 'x'"),
    "no rate": (of_optimizer(lambda state: state["param_groups"][0].update(lr=math.nan)), "lr of group 0 is nan"),
    "betas": (of_optimizer(lambda state: state["param_groups"][0].update(betas=(0.9,))), "betas of group 0 is (0.9,)"),
    "random state": (lambda folder: torch.save({"python": 5}, folder / "rng_state.pth"), "can't be read"),
    "step as text": (of_state(global_step="4"), "global_step is '4'"),
    "no step": (of_state(global_step=None), "global_step is None"),
    "half a step": (of_state(global_step=4.5), "global_step is 4.5"),
    "batch": (of_state(train_batch_size="x"), "train_batch_size is 'x'"),
    "log": (of_state(log_history=5), "log_history is 5"),
    "interval": (of_state(logging_steps="x"), "logging_steps is 'x'"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_stranger_s_checkpoint(
    run: Path, tmp_path: Path, kind: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = CHECKPOINTS[kind]
    monkeypatch.setenv(MARK, str(tmp_path / "ran"))
    out = tmp_path / "out"
    shutil.copytree(run, out)
    file = out / "run.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "output_dir": str(out)}))
    change(out / "checkpoint-4")
    (out / "checkpoint-4" / FILES_NAME).unlink()
    write_manifest(out / "checkpoint-4")
    capsys.readouterr()
    assert main(["train", str(file), "--resume"]) == 2
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in said
    assert message in said.rpartition("\nerror: ")[2]


@pytest.mark.parametrize("name", ["README.md", "run.yaml", "adapter_model.safetensors", "loss.png", "metrics.jsonl"])
def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path, name: str) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(run, out)
    typed = tmp_path / "run.yaml"
    typed.write_text(yaml.safe_dump({**yaml.safe_load((out / "run.yaml").read_text()), "output_dir": str(out)}))
    content = (out / name).read_bytes() if (out / name).is_file() else b"mine"
    outside.write_bytes(content)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(outside)
    assert main(["train", str(typed), "--resume"]) in (0, 2)
    assert outside.read_bytes() == content


def test_the_mark_is_left_where_pickles_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "ran"))
    pickled("x.pt")(tmp_path)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
