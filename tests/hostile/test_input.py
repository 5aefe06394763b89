"""Settings and data that are wrong, too much, or made to be obeyed: one clear line, and soon."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import helpers as h
from loraplex.commands.cli import main
from loraplex.io.reading import parse_json, read_json
from loraplex.recipes.config.data_spec import DataSpec
from loraplex.recipes.config.run_config import ConfigError, build_run, parse_overrides, set_key
from loraplex.recipes.config.yaml_text import parse_yaml
from loraplex.recipes.data.rows import read_table
from loraplex.recipes.data.tasks import load_task
from loraplex.recipes.models.budgeting import parse_parameters
from loraplex.recipes.training.checkpoints import verify
from loraplex.recipes.training.lock import locked
from loraplex.recipes.training.metrics import read_metrics


def bomb(levels: int, width: int = 9, form: str = "[{}]") -> str:
    """A text of a few lines that stands for `width` to the power of `levels` values."""
    lines = ["a0: &a0 " + form.format(", ".join("x" * width))]
    lines += [f"a{n}: &a{n} " + form.format(", ".join([f"*a{n - 1}"] * width)) for n in range(1, levels)]
    return "\n".join(lines)


# YAML

TEXTS = {
    "anchors": (bomb(9), "more than 100,000 values"),
    "list": ("a: [" + "1, " * 250_000 + "]", "more than 100,000 values"),
    "merges": (
        "a: &a {x: 1}\n" + "\n".join(f"a{n}: &a{n}\n  <<: [{', '.join(['*a'] * 400)}]" for n in range(400)),
        "more",
    ),
    "itself": ("a: &a [*a]", "itself a part"),
    "itself in a mapping": ("a: &a {b: {c: *a}}", "itself a part"),
    "deep lists": ("[" * 50_000, "more than 100 levels"),
    "deep mappings": ("{a: " * 50_000, "more than 100 levels"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(400)), "more than 100 levels"),
    "deep sequences": ("- " * 5_000 + "x", "more than 100 levels"),
    "long": ("a: " + "x" * 2**20, "larger than 1,048,576"),
    "bool": ("a: !!bool maybe", "line 1: 'maybe' is no bool"),
    "timestamp": ("a: !!timestamp x", "line 1: 'x' is no timestamp"),
    "no date": ("a: 2001-99-99", "is no timestamp"),
    "int": ("a: !!int x", "'x' is no int"),
    "no int": ("a: !!int ''", "is no int"),
    "long int": ("a: " + "1" * 5000, "is no int"),
    "float": ("a: !!float x", "'x' is no float"),
    "key": ("!!bool x: 1", "'x' is no bool"),
    "unhashable": ("? [a]\n: 1", "not valid YAML"),
    "python": ("a: !!python/object/apply:os.system [x]", "not valid YAML"),
    "twice": ("a: 1\na: 2", "given twice"),
    "binary": ("a: !!binary x", "not valid YAML"),
    "control": ("a: \x00", "not valid YAML"),
    "no mapping": ("5", "not a mapping"),
    "nothing": ("", "not a mapping"),
    "number as key": ("5: x", "is no key"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_yaml(kind: str, tmp_path: Path, capsys: Any) -> None:
    text, message = TEXTS[kind]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert main(["train", str(file)]) == 2
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 2**10  # KiB
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 1000
    assert "run.yaml" in error


def test_yaml_that_is_not_utf8(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run.yaml").write_bytes(b"a: \xff\xfe")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_aliases_that_stay_small() -> None:
    tree = parse_yaml(bomb(3) + "\nb: {<<: {x: 1}, y: 2}\nc: [*a1, *a1]", "x")
    assert tree["c"] == [tree["a1"], tree["a1"]]
    assert tree["b"] == {"x": 1, "y": 2}
    assert parse_yaml("[" * 99 + "]" * 99, "x") is not None


@pytest.mark.parametrize("tree", [[[["x" * 10_000] * 100] * 100] * 100, {"a": "x" * 10_000_000}, list(range(10**6))])
@pytest.mark.parametrize("key", ["model", "train", "data", "method", "adapter", "surprise"])
def test_a_large_value_is_not_repeated(key: str, tree: Any) -> None:
    run = {"model": "m", "method": "lora", "data": [{"path": "x"}], "output_dir": "o", key: tree}
    if not (key in ("train", "adapter") and isinstance(tree, dict)):  # whose fields are checked later, by their class
        with pytest.raises(ConfigError) as caught:
            build_run(run, "run.yaml")
        assert len(str(caught.value)) < 10_000
    with pytest.raises(ConfigError) as caught:
        set_key({"a": tree}, "a.b.c" if not isinstance(tree, dict) else "a.a.b", 1)
    assert len(str(caught.value)) < 1000


def test_thousands_of_errors_are_counted() -> None:
    data = [{"path": "x", f"k{n}": n} for n in range(3000)]
    with pytest.raises(ConfigError, match="and 2,980 more"):
        build_run({"model": "m", "method": "lora", "data": data, "output_dir": "o"}, "run.yaml")


NUMBERS: list[tuple[str, Any]] = [("data.0.weight", v) for v in (1e308, float("inf"), float("nan"), -1, 0, "x")]
NUMBERS += [(f"data.0.{k}", v) for k in ("eval_size", "max_examples", "split_seed", "generate") for v in (-1, 10**400)]
NUMBERS += [(f"data.0.{k}", float("nan")) for k in ("eval_fraction", "test_fraction")]
NUMBERS += [(f"train.{k}", float("inf")) for k in ("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay")]
NUMBERS += [(f"train.{k}", 2**40) for k in ("max_length", "seed", "max_steps", "per_device_eval_batch_size")]
NUMBERS += [(key, "a\0b") for key in ("model", "output_dir", "gguf_file", "data.0.path", "data.0.eval_path")]


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=lambda value: str(value)[:20])
def test_numbers_and_names(key: str, value: Any) -> None:
    run: dict[str, Any] = {"model": "m", "method": "lora", "data": [{"path": "x"}], "output_dir": "o"}
    set_key(run, key, value)
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as caught:
        build_run(run, "run.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", ["data.99999999999999999999.x", "data.².x", "data.-1.x"])
def test_positions(key: str) -> None:
    with pytest.raises(ConfigError, match="is no position"):
        set_key({"data": []}, key, 1)
    assert parse_overrides(["--a=1"]) == [("a", 1)]


@pytest.mark.parametrize("text", ["9" * 400 + "%", "1e999", "-1", "0", "²", "", "nan", "9" * 50])
def test_parameters(text: str) -> None:
    with pytest.raises(ConfigError, match="give a number"):
        parse_parameters(text, 10**9)


# JSON


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 200 + "]" * 200, "{", "1" * 5000, "", "[1] x"]
)
def test_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json (is|holds).*(copy|download)") as caught:
        read_json(tmp_path / "x.json")
    assert len(str(caught.value)) < 500
    assert parse_json("[" * 99 + "]" * 99, "x") is not None


def test_json_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a mapping"):
        read_json(tmp_path / "list.json", dict)
    with pytest.raises(ValueError, match="not a file"):
        read_json(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="UTF-8"):
        read_json(tmp_path / "latin.json")
    monkeypatch.setattr("loraplex.io.reading.read_text.__defaults__", ("text", 10))
    (tmp_path / "long.json").write_text(" " * 100)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_json(tmp_path / "long.json")


@pytest.mark.parametrize("text", ["5", "[]", "null", "[1, 2]", '["a", "a"]', '{"a": 1}', "[" * 10_000])
def test_labels(room: Path, tmp_path: Path, text: str, capsys: Any) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(room / "llama"), h.config("multilora"))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "SEQ_CLS"}))
    (tmp_path / "adapter" / "labels.json").write_text(text)
    assert main(["export", str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 2
    assert "labels.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["5", "[]", "{}", '{"step": "x", "event": "train"}', '{"step": 1, "event": "eval"}', "{"]
)
def test_metrics(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 .*delete the line"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "text", ["5", "{}", '{"host": 1}', '{"host": "x", "pid": "y", "started": 0.0}', "{", "[" * 5000]
)
def test_a_lock_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "listed", ["5", "[]", '{"../x": {"bytes": 1}}', '{"a": 5}', '{"a": {"bytes": "x"}}', "[" * 5000]
)
def test_a_list_of_files_that_is_none(tmp_path: Path, listed: str) -> None:
    (tmp_path / "files.json").write_text(listed)
    assert verify(tmp_path)


# Data


@pytest.mark.parametrize(
    "template",
    ["{x:99999999999}", "{x:{label}}", "{text:>{width}}", "{x:.999999f}", "{x!z}", "{", "{}", "{x:" + "<" * 200 + "}"],
)
def test_templates(template: str) -> None:
    with pytest.raises(ValidationError, match="template"):
        DataSpec(path="x", prompt=template, response="y")


def write_rows(folder: Path, *rows: Any) -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def test_a_format_that_a_value_has_not(tmp_path: Path) -> None:
    good = DataSpec(path=str(write_rows(tmp_path, {"x": 1.5})), prompt="{x:.2f} {x!r:>6}", response="{x}")
    assert load_task(good, 0).train[0]["prompt"] == "1.50    1.5"
    for value in ("a", [1], {"a": 1}, True):
        bad = DataSpec(path=str(write_rows(tmp_path, {"x": value})), prompt="{x:.2q}", response="y")
        with pytest.raises(ValueError, match="row 1: the template"):
            load_task(bad, 0)


@pytest.mark.parametrize("line", ["[" * 50_000, '{"a": ' + "[" * 500 + "]" * 500 + "}", '{"a": ' + "1" * 5000 + "}"])
def test_rows(tmp_path: Path, line: str) -> None:
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text(line + "\n")
        with pytest.raises(ValueError, match=name) as caught:
            read_table(str(tmp_path / name))
        assert len(str(caught.value)) < 500


def test_files_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    with pytest.raises(ValueError, match="parquet"):
        read_table(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="home folder"):
        read_table("~nobody-of-this-name/x.jsonl")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(ValueError, match="only plain file names"):
        read_table(str(saved))
    (saved / "state.json").write_text(json.dumps({"_data_files": 5}))
    with pytest.raises(ValueError, match="not a list of files"):
        read_table(str(saved))
    (saved / "state.json").unlink()
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(ValueError, match="only plain file names"):
        read_table(str(saved))
