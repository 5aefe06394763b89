"""No code of a stranger's folder runs: what the user did not type names none.

Each command runs in a process of its own, in the folder that holds the adapter, with that folder on the path: nothing
is easier to import there than the adapter's own files. A file that is imported leaves a mark.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from runs import entry
from transformers import AutoModelForCausalLM

import forking
import helpers as h
from loraplex.commands.cli import main

MARK = "ran"
EVIL = f"""
import pathlib
pathlib.Path({{mark!r}}).write_text("{MARK}")
from peft import LoraConfig
class Config(LoraConfig):
    pass
"""
# Custom code as hub models bring it: a config and a model class in the folder, named by auto_map.
MODEL_CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""
COMMANDS = {
    "eval": ["eval", "adapter"],
    "export": ["export", "adapter", "-o", "out", "--force"],
    "merge": ["merge", "adapter", "-o", "out", "--force"],
    "plots": ["inspect", "adapter", "--plots", "plots"],
    "against": ["inspect", "lora", "--against", "adapter"],
}
every_command = pytest.mark.parametrize("command", COMMANDS)


def _in_folder(folder: Path, arguments: list[str]) -> int:
    sys.path.insert(0, str(folder))  # as `python -m loraplex` does
    return main(arguments)


def run(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a command in `folder`."""
    log = folder / "log.txt"
    process = forking.start(_in_folder, folder, arguments, out=log, cwd=folder)
    process.join()
    return process.exitcode, log.read_text()


@pytest.fixture
def folder(room: Path, tmp_path: Path) -> Path:
    """A folder with a stranger's `adapter`, a plain LoRA beside it, and code in both."""
    base = AutoModelForCausalLM.from_pretrained(room / "llama")
    model = get_peft_model(base, h.config("multilora"))
    h.ready(model)
    model.save_pretrained(tmp_path / "adapter")
    plain = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(room / "llama"), plain).save_pretrained(tmp_path / "lora")
    code = EVIL.format(mark=str(tmp_path / MARK))
    for place in ("adapter", "."):
        (tmp_path / place / "evil.py").write_text(code)
    (tmp_path / "adapter" / "__init__.py").write_text(code)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_run(room: Path, folder: Path, **changes: object) -> None:
    tree = {"model": str(room / "llama"), "method": "multilora", "data": [entry(room)], "output_dir": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump({**tree, **changes}))


def with_code(room: Path, base: Path) -> None:
    """A base model like the room's, which brings code of its own."""
    shutil.copytree(room / "llama", base)
    (base / "evil_model.py").write_text(MODEL_CODE.format(mark=str(base.parents[1] / MARK)))
    file = base / "config.json"
    names = {"AutoConfig": "evil_model.EvilConfig", "AutoModelForCausalLM": "evil_model.EvilModel"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "evil", "auto_map": names}))


def refused(folder: Path, command: list[str], *said: str) -> None:
    """The command ends with one message, and nothing of the folder's ran."""
    code, output = run(folder, command)
    assert not (folder / MARK).exists(), output
    assert code == 2, output
    assert "Traceback" not in output
    for text in said:
        assert text in output


@every_command
@pytest.mark.parametrize("kind", ["adapter.evil:Config", ["evil:Config"], None])
def test_the_type_of_an_adapter_names_no_code(folder: Path, command: str, kind: object) -> None:
    edit(folder / "adapter", peft_type=kind)
    extra = ["--data", "x.jsonl"] if command == "eval" else []
    refused(folder, COMMANDS[command] + extra, "error: ")


@every_command
@pytest.mark.parametrize("place", ["adapter", "checkpoint-3"])
def test_a_run_in_the_folder_names_no_method(room: Path, folder: Path, command: str, place: str) -> None:
    write_run(room, folder / "adapter" if place == "adapter" else folder, method="evil:Config")
    arguments = [place if argument == "adapter" else argument for argument in COMMANDS[command]]
    if place != "adapter":
        (folder / "adapter").rename(folder / place)
    refused(folder, arguments, "method: evil:Config", "--allow-code evil:Config")


@every_command
@pytest.mark.parametrize(("place", "trust"), [("adapter", True), ("checkpoint-3", "yes")])
def test_a_run_in_the_folder_trusts_no_model(room: Path, folder: Path, command: str, place: str, trust: object) -> None:
    with_code(room, folder / "adapter" / "base")
    settings = {"model": f"./{place}/base", "trust_remote_code": trust}
    write_run(room, folder / "adapter" if place == "adapter" else folder, **settings)
    arguments = [place if argument == "adapter" else argument for argument in COMMANDS[command]]
    if place != "adapter":
        (folder / "adapter").rename(folder / place)
    refused(folder, arguments, "trust_remote_code", "--trust-remote-code")


@every_command
def test_a_base_model_in_the_folder_runs_no_code(room: Path, folder: Path, command: str) -> None:
    """Without a run the adapter's config names its base."""
    with_code(room, folder / "adapter" / "base")
    edit(folder / "adapter", base_model_name_or_path="adapter/base")
    extra = ["--data", json.dumps(entry(room))] if command == "eval" else []
    refused(folder, COMMANDS[command] + extra, "--trust-remote-code")


@every_command
def test_what_the_user_types_counts(room: Path, folder: Path, command: str) -> None:
    """The same runs with the option that the message names: it did not hold because something else was wrong."""
    with_code(room, folder / "adapter" / "base")
    write_run(room, folder / "adapter", model="./adapter/base", trust_remote_code=True)
    _, output = run(folder, [*COMMANDS[command], "--trust-remote-code"])
    assert (folder / MARK).exists(), output
    (folder / MARK).unlink()
    write_run(room, folder / "adapter", method="evil:Config")
    _, output = run(folder, [*COMMANDS[command], "--allow-code", "evil:Config"])
    assert (folder / MARK).exists(), output


@pytest.mark.parametrize("command", ["eval", "export", "merge"])
def test_a_run_that_the_user_names_counts(room: Path, folder: Path, command: str) -> None:
    with_code(room, folder / "adapter" / "base")
    write_run(room, folder, model="./adapter/base", trust_remote_code=True)
    _, output = run(folder, [*COMMANDS[command], "--run", "run.yaml"])
    assert (folder / MARK).exists(), output


@every_command
def test_other_code_than_was_allowed(room: Path, folder: Path, command: str) -> None:
    write_run(room, folder / "adapter", method="evil:Config")
    refused(folder, [*COMMANDS[command], "--allow-code", "peft:LoraConfig"], "--allow-code evil:Config")
