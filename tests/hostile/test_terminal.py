"""Names and messages from files are shown: a terminal obeys none of their characters, nor rich their brackets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from runs import entry
from runs import write_run as a_run
from transformers import AutoModelForCausalLM

import helpers as h
from loraplex.commands.cli import main
from loraplex.export.plain_folder import to_plain
from loraplex.io.reading import MAX_MESSAGE, json_text, message_of, printable
from loraplex.recipes.console import make_console
from loraplex.recipes.training.metrics import plot_losses

EVIL = "\x1b]0;title\x07\x1b[2J[red]x[/red][/nothing]\u202e\x9b31m"


def test_names_are_shown_and_not_obeyed(capsys: Any, room: Path, tmp_path: Path) -> None:
    assert printable(EVIL) == "\\x1b]0;title\\x07\\x1b[2J[red]x[/red][/nothing]\\u202e\\x9b31m"
    make_console().print(EVIL)
    assert printable(EVIL) in capsys.readouterr().out
    assert json.loads(json_text({EVIL: "\ud800é"})) == {EVIL: "\ud800é"}
    assert json_text({EVIL: "é\ud800"}).isprintable() or "\n" in json_text({EVIL: 1})
    assert set("\x1b\x9b\u202e\ud800") & set(json_text({EVIL: "\ud800"})) == set()


def test_an_adapter_s_names_in_every_output(room: Path, tmp_path: Path, capsys: Any) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(room / "llama"), h.config("multilora"))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": EVIL}))
    for arguments in (["inspect", "adapter"], ["inspect", "adapter", "--json"], ["export", "adapter", "-o", "out"]):
        main([str(tmp_path / a) if a in ("adapter", "out") else a for a in arguments])
        captured = capsys.readouterr()
        assert "nothing" in captured.out + captured.err
        assert not set("\x1b\x9b\u202e\x07") & set(captured.out + captured.err)


def test_a_folder_s_name_in_the_list_of_converted_adapters(
    room: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / EVIL.replace("/", "|")
    get_peft_model(AutoModelForCausalLM.from_pretrained(room / "llama"), h.config("multilora")).save_pretrained(folder)
    to_plain(folder)
    capsys.readouterr()
    for arguments in (["cache"], ["cache", "--json"]):
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert "nothing" in captured.out
        assert not set("\x1b\x9b\u202e\x07") & set(captured.out)


def test_a_program_that_is_none(capsys: Any) -> None:
    assert main(["exec", EVIL]) == 2
    assert not set("\x1b\x9b\u202e\x07") & set(capsys.readouterr().err)


def test_a_message_is_not_endless() -> None:
    text = message_of(ValueError("x" * 10**6 + "end"))
    assert len(text) < MAX_MESSAGE + 100
    assert text.endswith("end")


def test_a_name_that_looks_like_a_formula(tmp_path: Path) -> None:
    rows = [{"step": n, "event": "eval", "task": r"a$\frac{$", "loss": 1.0} for n in (1, 2)]
    plot_losses(rows, tmp_path / "loss.png", r"$\undefined$")
    assert (tmp_path / "loss.png").is_file()


def test_a_run_of_hostile_names(room: Path, tmp_path: Path, capsys: Any) -> None:
    """A whole run whose data set has such a name trains, and reports it as text."""
    data = [{**entry(room), "name": EVIL + "\n$x$|<b>"}]
    file = a_run(room, tmp_path / "out", "multilora", data=data)
    assert main(["train", str(file), "--train.max_steps", "1", "--train.eval_steps", "null"]) == 0
    captured = capsys.readouterr()
    assert not set("\x1b\x9b\u202e\x07") & set(captured.out + captured.err)
    assert main(["eval", str(tmp_path / "out")]) == 0
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["data"][0]["name"] == data[0]["name"]
