"""The configuration: what is read, what overrides what, and what a wrong key or value is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.recipes.config.arguments import adapter_config, check_train, training_arguments
from loraplex.recipes.config.run_config import ConfigError, load_run, parse_overrides, parse_yaml, to_yaml

RUN = """\
model: some/model
method: masa
adapter: {r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}
data:
  - path: a.jsonl
    prompt: "{text}"
    response: "{label}"
  - {path: b.csv, weight: 3, prompt: "{q}", response: "{a}"}
train:
  learning_rate: 1e-4
  max_steps: 10
output_dir: out
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def load(file: Path, *arguments: str):
    return load_run(file, parse_overrides(list(arguments)))


def check(file: Path, *arguments: str) -> None:
    run = load(file, *arguments)
    check_train(run)
    adapter_config(run)
    training_arguments(run)


def refused(file: Path, *arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(file, *arguments)
    return str(error.value)


def test_reads_a_file_with_defaults(file):
    run = load(file)
    assert run.train.learning_rate == 1e-4  # YAML 1.1 would read a string
    assert run.train.per_device_train_batch_size == 8
    assert (run.task, run.dtype, run.gguf_file) == ("sft", "float32", None)
    assert [spec.weight for spec in run.data] == [None, 3]


def test_resolved_configuration_reads_back_equal(file, tmp_path):
    run = load(file, "--train.optim", "sgd", "--adapter.num_experts=2")
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(run))
    assert load_run(saved) == run


def test_settings_without_a_number_stay_what_they_are(file, tmp_path):
    """null would choose PEFT's default targets; what was written is refused when the adapter's config is made."""
    run = load(file, "--adapter.target_modules", ".inf")
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(run))
    assert load_run(saved).adapter["target_modules"] == float("inf")
    with pytest.raises(ValueError, match="target_modules is inf"):
        adapter_config(load_run(saved))


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (["--train.learning_rate", "3e-5"], lambda run: run.train.learning_rate == 3e-5),
        (["--train.learning_rate=3e-5"], lambda run: run.train.learning_rate == 3e-5),
        (["--train.max_steps", "-1"], lambda run: run.train.max_steps == -1),
        (["--train.eval-steps", "null"], lambda run: run.train.eval_steps is None),
        (["--adapter.r", "16"], lambda run: run.adapter["r"] == 16),
        (["--adapter.target_modules", "[up_proj]"], lambda run: run.adapter["target_modules"] == ["up_proj"]),
        (["--adapter.target_modules", "all-linear"], lambda run: run.adapter["target_modules"] == "all-linear"),
        (["--data.0.weight", "2"], lambda run: run.data[0].weight == 2),
        (["--data.1.path=c.csv"], lambda run: run.data[1].path == "c.csv" and run.data[1].weight == 3),
        (["--data.2", "{path: d.csv}"], lambda run: run.data[2].path == "d.csv"),
        (["--data.2.path", "d.csv"], lambda run: run.data[2].path == "d.csv"),
        (["--method", "aslora", "--adapter", "{r: 2}"], lambda run: run.adapter == {"r": 2}),
        (["--train.seed", "1", "--train.seed", "2"], lambda run: run.train.seed == 2),
        (["--data.0.labels", "{1: 'yes'}"], lambda run: run.data[0].labels == {"1": "yes"}),
    ],
)
def test_overrides(file, arguments, read):
    assert read(load(file, *arguments))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--metod", "masa"], ["the command line", "'metod'", "did you mean 'method'"]),
        (["--train.learning_rat", "1"], ["train.learning_rat", "did you mean 'train.learning_rate'"]),
        (["--train.lr", "1"], ["train.lr", "did you mean 'train.learning_rate'"]),
        (["--train.batch_size", "1"], ["did you mean 'train.per_device_train_batch_size'"]),
        (["--train.label_smoothing_facto", "0.1"], ["did you mean 'train.label_smoothing_factor'"]),
        (["--train.warmup_ratio", "0.1"], ["did you mean 'train.warmup_steps'"]),
        (["--learning_rate", "1"], ["'learning_rate'", "did you mean 'train.learning_rate'"]),
        (["--adapter.num_expert", "3"], ["adapter.num_expert", "did you mean 'adapter.num_experts'"]),
        (["--adapter.task_type", "X"], ["unknown key 'adapter.task_type'"]),
        (["--data.0.pth", "x"], ["data.0.pth", "did you mean 'data.0.path'"]),
        (["--train.output_dir", "x"], ["train.output_dir", "set output_dir at the top level"]),
        (["--train.save_only_model", "true"], ["can't be resumed"]),
    ],
)
def test_unknown_key_names_the_nearest(file, arguments, parts):
    message = refused(file, *arguments)
    assert all(part in message for part in parts), message
    assert len(message) < 3000


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--method", "qlora"], ["method is 'qlora'", "did you mean 'lora'?", "masa", "adalora"]),
        (["--dtype", "int8"], ["dtype is 'int8'", "'bfloat16'"]),
        (["--train.learning_rate", "0"], ["train.learning_rate is 0", "greater than 0"]),
        (["--train.learning_rate", "fast"], ["train.learning_rate is 'fast'", "number"]),
        (["--train.max_steps", "1.5"], ["train.max_steps is 1.5", "integer"]),
        (["--train.bf16", "maybe"], ["train.bf16 is 'maybe'", "boolean"]),
        (["--train.lr_scheduler_type", "sawtooth"], ["sawtooth"]),
        (["--adapter.r", "0"], ["r=0", "at least 1"]),
        (["--adapter.r", "many"], ["adapter.r is 'many'", "integer"]),
        (["--adapter.expert_mixing", "median"], ["expert_mixing='median'", "router"]),
        (["--data", "[]"], ["data", "at least 1"]),
        (["--data.0.weight", "-1"], ["data.0.weight is -1", "greater than 0"]),
        (["--data.5.path", "x"], ["'5' is no position in a list of 2"]),
        (["--data.x.path", "x"], ["'x' is no position"]),
        (["--model.name", "x"], ["model", "'some/model'", "no fields"]),
        (["--train"], ["--train has no value"]),
        (["--train.seed", "--adapter.r=3"], ["--train.seed has no value"]),
        (["stray"], ["'stray' stands where an option is expected"]),
        (["--train.seed", "[1"], ["the value of --train.seed is not valid YAML"]),
        (["--train.seed", '"\\UFFFFFFFF"'], ["the value of --train.seed holds an escape that is no character"]),
        ([f"--adapter.{'x' * 5000}", "1"], ["unknown key 'adapter.xxx", "known keys here are"]),
        (["--model", '"\\ud800"'], ["the value of --model: line 1: '\\ud800' holds half of a surrogate pair"]),
        (["--model", '{"a": {"\\ud800": 1}}'], ["holds half of a surrogate pair"]),
        ([f"--{'x' * 5000}", "[1"], [f"the value of --{'x' * 200}… is not valid YAML"]),
        ([f"--{'x' * 5000}"], [f"--{'x' * 200}… has no value"]),
        (["--data.0.split", "x" * 501], ["data.0.split is 'xxx", "at most 500 characters"]),
    ],
)
def test_wrong_value_says_what_and_where(file, arguments, parts):
    message = refused(file, *arguments)
    assert all(part in message for part in parts), message


def test_errors_in_the_file_name_the_file(file):
    file.write_text(RUN.replace("method: masa", "methd: masa"))
    message = refused(file)
    assert f"{file}: unknown key 'methd': did you mean 'method'?" in message
    assert f"{file}: method is missing" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "not a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("model: a\nmodel: b\n", "'model' is given twice (line 2)"),
        ("", "not a mapping"),
    ],
)
def test_unreadable_file(file, text, part):
    file.write_text(text)
    assert part in refused(file)


def test_missing_file(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.yaml")
    assert "is a folder" in refused(tmp_path)


def test_arguments_carry_the_run(file):
    run = load(file, "--train.adam_beta2", "0.98", "--train.eval_steps", "null", "--train.gradient_checkpointing", "1")
    arguments = training_arguments(run)
    assert (arguments.learning_rate, arguments.adam_beta2, arguments.max_steps) == (1e-4, 0.98, 10)
    assert arguments.eval_strategy == "no"
    assert arguments.max_length is None  # examples come cut
    assert arguments.gradient_checkpointing is True


@pytest.mark.parametrize("method", ["masa", "aslora", "dual_lora", "multilora", "lora"])
def test_every_method_has_its_config(file, method):
    config = adapter_config(load(file, "--method", method))
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, {"q_proj", "v_proj"})
    assert config.task_type == "CAUSAL_LM"


def test_merge_keys(tmp_path):
    """`<<` brings in keys that a mapping's own replace, wherever it stands; a key given twice stays an error."""
    text = """
deep:
  deeper: {base: &base {r: 8, alpha: 16}, two: &two {<<: *base, r: 4}}
shallow: {<<: *two, extra: 1}
"""
    tree = parse_yaml(text, "a text")
    assert tree["deep"]["deeper"]["two"] == {"r": 4, "alpha": 16}
    assert tree["shallow"] == {"r": 4, "alpha": 16, "extra": 1}
    with pytest.raises(ConfigError, match="a text: 'r' is given twice"):
        parse_yaml("{<<: {r: 8}, r: 4, r: 2}", "a text")


def test_two_escapes_of_one_character():
    """As JSON writes it, which is YAML too."""
    assert parse_overrides(["--x", '"\\ud83d\\ude00"']) == [("x", "\U0001f600")]


@pytest.mark.parametrize("text", ["12e4567", "1e5", "yes", "012", "0o12", "1:30", "null", "1_000", "2001-01-01", "~"])
def test_texts_that_look_like_other_values_come_back(file, text, tmp_path):
    """In the run.yaml beside the adapter: a commit may look like a number."""
    run = load(file, "--revision", f"'{text}'")
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert load_run(tmp_path / "run.yaml") == run
    assert run.revision == text
