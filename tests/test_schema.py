"""The JSON schemas of RUN.yaml and STUDY.yaml, and the help and documents that are made of them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from loraplex.commands.cli import COMMANDS, build_parser, main
from loraplex.commands.keys import schema, sections
from loraplex.commands.schema import schema_text
from loraplex.recipes.config.data_spec import DataSpec
from loraplex.recipes.config.run_config import RunConfig, TrainSection
from loraplex.recipes.config.yaml_text import parse_yaml, read_yaml
from loraplex.study.config import StudyConfig
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.registry import METHODS
from tests.tables import PAGE, page, stored

ROOT = Path(__file__).parent.parent
FILES = {
    "run": sorted((ROOT / "configs").glob("*.yaml")),
    "study": sorted((ROOT / "configs" / "studies").glob("*.yaml")),
}
CASES = [pytest.param(file, path, id=path.stem) for file, paths in FILES.items() for path in paths]


def faults(file: str, tree: Any) -> list[str]:
    """What an editor would mark. JSON has text as keys, as the editors' YAML has."""
    return [error.json_path for error in checker(file).iter_errors(json.loads(json.dumps(tree)))]


@cache
def checker(file: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema_text(file)))


@pytest.mark.parametrize("file", FILES)
def test_the_files_that_help_reads_are_current(file: str) -> None:
    assert json.loads(stored(file).read_text(encoding="utf-8")) == json.loads(schema_text(file)), (
        "run: python -m tests.tables"
    )


@pytest.mark.parametrize("file", FILES)
def test_the_schema_is_one(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", file]) == 0
    Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(("file", "path"), CASES)
def test_the_configs_of_the_project_are_valid(file: str, path: Path) -> None:
    assert faults(file, read_yaml(path)) == []


RUN = """
model: m
method: {method}
adapter: {adapter}
data: [{{path: x}}]
train: {train}
output_dir: out
"""


@pytest.mark.parametrize(
    ("method", "adapter", "train", "wrong"),
    [
        ("masa", "{r: 4, num_experts: 2}", "{lr_scheduler_type: cosine, optim: sgd}", []),
        ("masa", "{num_modules: 2}", "{}", ["$.adapter"]),
        ("multilora", "{num_modules: two}", "{}", ["$.adapter.num_modules"]),
        ("dual_lora", "{warmup_steps: 0.1}", "{max_steps: many}", ["$.train.max_steps"]),
        ("lora", "{use_dora: true, r: x}", "{on_nonfinite: go}", ["$.train.on_nonfinite", "$.adapter.r"]),
        ("loha", "{anything: 1}", "{}", []),
        ("my.module:Config", "{anything: 1}", "{}", []),
    ],
)
def test_what_an_editor_marks_in_a_run(method: str, adapter: str, train: str, wrong: list[str]) -> None:
    text = RUN.format(method=method, adapter=adapter, train=train)
    assert sorted(faults("run", parse_yaml(text, "a run"))) == sorted(wrong)


@pytest.mark.parametrize(
    ("methods", "wrong"),
    [
        ("[masa, lora]", 0),
        ("{masa: , lora: {size: null}, mine: {method: 'a:B', adapter: {x: 1}}}", 0),
        ("{masa: {adapter: {num_experts: 2}}}", 0),
        ("{masa: {adapter: {num_modules: 2}}}", 1),
        ("{wide: {method: masa, adapter: {num_modules: 2}}}", 1),
        ("{masa: {method: multilora, adapter: {num_modules: 2}}}", 0),
        ("{masa: {sizes: r}}", 1),
    ],
)
def test_what_an_editor_marks_in_a_study(methods: str, wrong: int) -> None:
    text = (
        f"{{model: m, tasks: {{t: [{{path: x}}]}}, methods: {methods}, learning_rates: [1], seeds: [0], output_dir: o}}"
    )
    assert len(faults("study", parse_yaml(text, "a study"))) == wrong


def listed(file: str) -> set[str]:
    return {f"{section.prefix}{key.name}" for section in sections(file) for key in section.keys}


def test_every_key_is_listed() -> None:
    """With its description, in help; the fields of the methods' configs too."""
    run = {*RunConfig.model_fields, *(f"train.{name}" for name in TrainSection.model_fields)}
    run |= {f"data.N.{name}" for name in DataSpec.model_fields}
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    for cls in METHODS.values():
        run |= {f"adapter.{field.name}" for field in dataclasses.fields(cls) if field.name not in known} | {"adapter.r"}
    assert run <= listed("run")
    study = {*StudyConfig.model_fields, "tasks.NAME.data.N.path", "methods.NAME.size", "general_text.column"}
    assert study <= listed("study")
    assert "train.learning_rate" not in listed("study")
    for file in FILES:
        assert all(key.description and key.type for section in sections(file) for key in section.keys)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, build_parser().commands[command].format_help().splitlines())) <= 80


@pytest.mark.parametrize(("command", "file"), [("train", "run"), ("compare", "study")])
def test_help_lists_every_key(command: str, file: str) -> None:
    lines = build_parser().commands[command].format_help().splitlines()
    words = {line.split()[0] for line in lines if line.startswith("  ")}
    assert {key.name for section in sections(file) for key in section.keys} <= words
    assert schema(file)["properties"].keys() <= words


def test_the_page_of_keys_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.tables"
