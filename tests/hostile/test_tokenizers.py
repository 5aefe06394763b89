"""Tokenizers and settings for generation that come with a base model: one clear line for those that can't be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from runs import entry
from transformers import AutoModelForCausalLM, GenerationConfig

import helpers as h
from loraplex.commands.cli import main
from loraplex.recipes.config.data_spec import DataSpec
from loraplex.recipes.data.tasks import load_task
from loraplex.recipes.evaluation import Evaluator
from loraplex.recipes.models.loading import load_model, load_tokenizer


@pytest.fixture
def adapter(room: Path, tmp_path: Path) -> Path:
    """A stranger's adapter, and its base model in the folder `base`."""
    shutil.copytree(room / "llama", tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), h.config("multilora"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def of_template(text: str) -> Callable[[Path], None]:
    return lambda base: (base / "chat_template.jinja").write_text(text) and None


def of_tokens(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda base: edit(base / "tokenizer.json", change)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "undefined": (of_template("{{ x.y.z }}"), "UndefinedError"),
    "syntax": (of_template("{% for %}"), "TemplateSyntaxError"),
    "unsafe": (of_template("{{ ''.__class__.__mro__ }}"), "SecurityError"),
    "another file": (of_template("{% include '/etc/passwd' %}"), "can't be read"),
    "raises": (of_template("{{ raise_exception('\x1b[2J') }}"), r"\x1b[2J"),
    "never ends": (of_template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "RecursionError"),
    "types": (of_template("{{ messages + 1 }}"), "TypeError"),
    "nothing known": (of_tokens(lambda tree: tree["model"].update(vocab={})), "can't be read"),
    "unknown tokens": (
        of_tokens(lambda tree: tree["model"]["vocab"].update(the=500)),
        "token 500, but the model has 16",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_cannot_be_used(room: Path, adapter: Path, kind: str, capsys: Any) -> None:
    change, message = BROKEN[kind]
    change(adapter.parent / "base")
    assert main(["eval", str(adapter), "--data", json.dumps(entry(room))]) == 2
    captured = capsys.readouterr()
    said = captured.err.partition("error: ")[2]
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert "\x1b" not in said
    assert message in said


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_training_on_tokens_that_the_model_has_not(room: Path, tmp_path: Path, task: str, capsys: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(room / ("llama" if task == "sft" else "bert"), base)
    BROKEN["unknown tokens"][0](base)
    columns = {"text_column": "text", "label_column": "label"}
    data = entry(room) if task == "sft" else {"path": str(room / "reviews.jsonl"), **columns}
    run = {"model": str(base), "method": "multilora", "task": task, "data": [data], "output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", str(tmp_path / "run.yaml"), "--train.eval_on_start", "false"]) == 2
    assert "token 500, but the model has 16" in capsys.readouterr().err


def test_generation_is_greedy_whatever_lies_beside_the_base(room: Path, tmp_path: Path) -> None:
    """Beams, penalties and forced lengths of the base's own settings would be taken for what was not given."""
    model = load_model(str(room / "llama"), "sft").eval()
    task = load_task(DataSpec(**entry(room, generate=3)), 0, "sft", False)
    evaluator = Evaluator(task, load_tokenizer(str(room / "llama")))
    plain = evaluator.scores(model)["exact"]
    seen: list[Any] = []
    theirs = model.generate

    def watched(**options: Any) -> Any:
        seen.append(theirs(**options))
        return seen[-1]

    model.generate = watched  # type: ignore[method-assign]
    evaluator.scores(model)
    expected, seen[:] = [*seen], []
    settings = GenerationConfig(num_beams=3, repetition_penalty=5.0, return_dict_in_generate=True, min_new_tokens=3)
    model.generation_config = settings
    assert evaluator.scores(model)["exact"].equal(plain)
    assert all(a.equal(b) for a, b in zip(expected, seen, strict=True))
    assert model.generation_config is settings
