"""The command itself: help, options, exit codes, and errors that a user can act on."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

import loraplex
from loraplex.commands.cli import COMMANDS, build_parser, main, split_overrides
from loraplex.commands.keys import sections
from loraplex.recipes.config.arguments import adapter_config, check_train
from loraplex.recipes.config.run_config import load_run
from loraplex.recipes.console import quiet

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def error_of(capsys, *arguments: str) -> str:
    """The message of a command that must fail as a user's error: exit code 2, one message, no traceback."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


# The console script, and what it has imported.
SCRIPT = """
import sys
from loraplex_command import main
try:
    main()
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "peft", "rich", "yaml"}))
"""


def script(*arguments):
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["tran"], ["export", "--rank", "x"]],
)
def test_what_needs_no_command_imports_nothing_heavy(arguments):
    done = script(*arguments)
    assert done.returncode == (0 if arguments[-1].startswith("--") else 2)
    *printed, heavy = done.stdout.splitlines()
    assert heavy == ""
    assert printed or "error" in done.stderr


def test_a_command_has_all_and_libraries_say_nothing_of_their_parts(tmp_path):
    done = script("cache", "list")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "peft torch transformers yaml"
    assert done.stderr == ""


def test_the_script_after_an_import_of_the_package():
    """As a notebook or another program calls it."""
    code = f"import loraplex\nconfig = loraplex.MasaConfig\n{SCRIPT}\nassert loraplex.MasaConfig is config"
    done = subprocess.run([sys.executable, "-c", code, "cache"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_has_a_line_per_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for command in COMMANDS:
        assert sum(f"{line} ".startswith(f"{command} ") for line in lines) == 1


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"loraplex {loraplex.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["merge", "somewhere"], ["inspect", "a", "--jsn"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: loraplex" in capsys.readouterr().err


def split(command: str, *arguments: str) -> tuple[list[str], list[str]]:
    return split_overrides([command, *arguments], build_parser().commands[command].options)


def test_overrides_are_told_from_options():
    arguments = ["--adapter.r", "8", "run.yaml", "--train.max_steps", "-1", "--resume", "--method=lora"]
    own, overrides = split("train", *arguments)
    assert own == ["train", "run.yaml", "--resume"]
    assert overrides == ["--adapter.r", "8", "--train.max_steps", "-1", "--method=lora"]
    assert split("eval", "a", "--data", "x", "--data.0.eval_size", "3") == (
        ["eval", "a", "--data", "x"],
        ["--data.0.eval_size", "3"],
    )


def test_trust_with_a_value_is_the_run_s_key():
    assert split("train", "--trust-remote-code", "false", "run.yaml") == (
        ["train", "run.yaml"],
        ["--trust_remote_code=false"],
    )
    assert split("train", "--trust-remote-code", "run.yaml") == (["train", "--trust-remote-code", "run.yaml"], [])


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.keys])
def test_no_option_of_a_command_is_taken_for_a_key(command):
    """The parser itself says which options are its own: whatever it adds, it is asked for."""
    parser = build_parser().commands[command]
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    assert {"--help", "--debug", "--trust-remote-code"} < set(options)
    for option in options:
        assert split(command, option) == ([command, option], [])


@pytest.mark.parametrize("file", ["run", "study"])
def test_no_option_of_a_command_hides_a_key(file):
    keys = {f"--{key.name}" for section in sections(file) if not section.prefix for key in section.keys}
    for name, command in COMMANDS.items():
        if command.keys == file and name not in ("eval", "budget", "export", "merge"):
            assert not keys & build_parser().commands[name].options


def completed(shell_words: list[str], script: str, tmp_path: Path) -> list[str]:
    """What bash offers at the end of a command line, with the script that `loraplex completion bash` prints."""
    (tmp_path / "script").write_text(script)
    words = " ".join(f"'{word}'" for word in shell_words)
    code = (
        f"source {tmp_path / 'script'}; COMP_WORDS=({words}); COMP_CWORD={len(shell_words) - 1}; "
        "$(complete -p loraplex | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_keys_and_values(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "my.yaml").touch()
    assert completed(["loraplex", "bu"], script, tmp_path) == ["budget"]
    assert completed(["loraplex", "train", "--dry"], script, tmp_path) == ["--dry-run"]
    assert completed(["loraplex", "train", "--train.max_"], script, tmp_path) == [
        "--train.max_steps",
        "--train.max_length",
    ]
    assert completed(["loraplex", "train", "--adapter.num_ex"], script, tmp_path) == ["--adapter.num_experts"]
    assert completed(["loraplex", "train", "--data.0.eval_si"], script, tmp_path) == ["--data.0.eval_size"]
    assert completed(["loraplex", "train", "--train.on_nonfinite", "s"], script, tmp_path) == ["stop", "skip"]
    assert completed(["loraplex", "compare", "--alpha"], script, tmp_path) == ["--alpha_over_r"]
    assert completed(["loraplex", "train", "my"], script, tmp_path) == ["my.yaml"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_what_bash_is(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("budget", "dry-run", "train.max_steps", "adapter.num_experts"):
        assert word in script


def test_dry_run_prints_the_resolved_configuration(capsys):
    assert main(["train", str(ROOT / "configs" / "masa.yaml"), "--dry-run", "--adapter.r", "2"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["adapter"]["r"] == 2
    assert tree["train"]["seed"] == 0


def test_unknown_key_on_the_command_line(capsys):
    message = error_of(capsys, "train", str(ROOT / "configs" / "masa.yaml"), "--adapter.rr", "2", "--dry-run")
    assert "unknown key 'adapter.rr'" in message
    message = error_of(capsys, "train", str(ROOT / "configs" / "masa.yaml"), "--outputdir", "x")
    assert "the command line: unknown key 'outputdir': did you mean 'output_dir'?" in message


def test_missing_and_malformed_files(tmp_path, capsys):
    assert "does not exist" in error_of(capsys, "train", str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert "bad.yaml is not valid YAML" in error_of(capsys, "train", str(tmp_path / "bad.yaml"))
    for command in (["inspect"], ["eval"], ["merge", "-o", str(tmp_path / "m")]):
        assert "is not a folder" in error_of(capsys, *command, str(tmp_path / "none"))
        assert "adapter_config.json is missing" in error_of(capsys, *command, str(tmp_path))


def test_methods_of_a_study_that_are_no_names(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("methods: [{a: 1}, lora]\n")
    assert "methods is [{'a': 1}, 'lora']" in error_of(capsys, "compare", str(tmp_path / "study.yaml"))


def test_warnings_obey_no_terminal():
    """PEFT's repeat what an adapter's file says."""
    quiet(data=False)
    shown = warnings.formatwarning(UserWarning("exclude_modules=\x1b[31m\0"), UserWarning, "x.py", 1)
    assert r"exclude_modules=\x1b[31m\x00" in shown
    assert "\x1b" not in shown


def test_missing_data_and_model(tmp_path, capsys):
    run = {"model": str(tmp_path / "model"), "method": "lora", "output_dir": str(tmp_path / "out")}
    run["data"] = [{"path": str(tmp_path / "none.jsonl")}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert str(tmp_path / "model") in error_of(capsys, "train", str(tmp_path / "run.yaml"))


def test_broken_adapters(tmp_path, capsys):
    config = tmp_path / "adapter_config.json"
    config.write_text("{")
    assert "is not JSON" in error_of(capsys, "inspect", str(tmp_path))
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "not a whole safetensors file" in error_of(capsys, "inspect", str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "give --data or --run" in error_of(capsys, "eval", str(tmp_path))
    config.write_text(json.dumps({"peft_type": "VERAX", "base_model_name_or_path": "x"}))
    assert "method is 'verax': did you mean 'vera'?" in error_of(capsys, "eval", str(tmp_path), "--data", "x.jsonl")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", str(tmp_path / "none.yaml"), "--debug"])


@pytest.mark.parametrize("module", ["trl", "datasets", "yaml"])
def test_missing_extra_names_the_remedy(module, tmp_path, capsys, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == module or name.startswith("loraplex.recipes"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    message = error_of(capsys, "train", str(ROOT / "configs" / "masa.yaml"))
    assert f'{module} is not installed: pip install "loraplex[train]"' in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_the_project(path):
    run = load_run(path)
    check_train(run)
    assert adapter_config(run).r == run.adapter["r"]
    assert run.output_dir == f"runs/{path.stem}"
