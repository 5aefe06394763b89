"""A prepared run: what its configuration names is made once, and refused before anything is written."""

from __future__ import annotations

from collections import Counter

import pytest
from runs import write_run

from loraplex.commands.cli import main
from loraplex.recipes import prepare
from loraplex.recipes.config.run_config import ConfigError, load_run
from loraplex.recipes.prepare import PreparedRun

MADE = ("adapter_config", "training_arguments", "load_tokenizer", "load_task", "load_model")


@pytest.fixture
def made(monkeypatch) -> Counter[str]:
    """How often each of what a run consists of is made."""
    count: Counter[str] = Counter()

    def counted(name):
        make = getattr(prepare, name)
        return lambda *args, **kwargs: (count.update([name]), make(*args, **kwargs))[1]

    for name in MADE:
        monkeypatch.setattr(prepare, name, counted(name))
    return count


def test_training_makes_each_once(room, tmp_path, made):
    out = tmp_path / "out"
    assert main(["train", str(write_run(room, out, "masa")), "--train.max_steps", "2"]) == 0
    assert made == dict.fromkeys(MADE, 1)
    made.clear()
    assert main(["eval", str(out)]) == 0
    assert made == {"load_tokenizer": 1, "load_task": 1, "load_model": 1}
    made.clear()
    assert main(["export", str(out), "-o", str(tmp_path / "lora"), "--calibration"]) == 0
    assert made == {"load_tokenizer": 1, "load_task": 1, "load_model": 1}


def test_what_no_evaluation_can_serve_is_refused_before_anything_is_written(room, tmp_path, capsys):
    out = tmp_path / "out"
    run = write_run(room, out, "multilora")
    options = ["--data.0.eval_size", "null", "--train.load_best_model_at_end", "true"]
    assert main(["train", str(run), *options]) == 2
    assert "train: " in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(("size", "resume", "strategy", "on_start"), [
    (10, False, "steps", True),
    (10, True, "steps", False),
    (None, False, "no", False),
])  # fmt: skip
def test_evaluations_are_planned_for_what_is_held_out(room, tmp_path, size, resume, strategy, on_start):
    config = load_run(write_run(room, tmp_path / "out", "multilora"), [("data.0.eval_size", size)])
    arguments = PreparedRun(config, resume=resume).arguments
    assert arguments.eval_strategy.value == strategy
    assert arguments.eval_on_start is on_start
    held_out = PreparedRun(config).tasks[0].eval
    assert (held_out is None) == (size is None)  # the description told the truth


def test_data_sets_of_one_name_are_refused(room, tmp_path):
    config = load_run(write_run(room, tmp_path / "out", "multilora"))
    run = PreparedRun(config.model_copy(update={"data": config.data * 2}))
    with pytest.raises(ConfigError, match=r"give data\.1\.name"):
        _ = run.tasks
