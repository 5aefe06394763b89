"""What a stranger's folder says never becomes a path outside of the folder that is read or written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from runs import entry
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers as h
from loraplex.commands.cli import main
from loraplex.export.plain_cache import PlainCache
from loraplex.export.plain_folder import to_plain
from loraplex.io.reading import file_name, relative_path
from loraplex.recipes.models.loading import load_model, load_skeleton, load_tokenizer, resolve_model


@pytest.fixture
def adapter(room: Path, tmp_path: Path) -> Path:
    """A stranger's adapter, and its base model in the folder `base`."""
    shutil.copytree(room / "llama", tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), h.config("multilora"))
    h.ready(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def error(capsys: Any, *arguments: Any) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.rpartition("error: ")[2]


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


NAMES = ["../victim", "../victim.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..\\b.safetensors", "..", "."]
NAMES += [
    "",
    "C:x.safetensors",
    "nul.safetensors",
    "a\0.safetensors",
    "a\x1b[2J.safetensors",
    "x" * 300,
    "a\n.safetensors",
]


@pytest.mark.parametrize("name", [*NAMES, 5, None, ["a"], "\ud800.safetensors"], ids=ascii)
def test_a_name_that_is_no_file_name(name: Any) -> None:
    with pytest.raises(ValueError, match="only plain file names") as caught:
        file_name(name, "config.json")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "a b.txt", "Ünïcode.json", ".hidden", "con-x"])
def test_a_plain_file_name(name: str) -> None:
    assert file_name(name, "x") == name
    assert relative_path(f"sub/{name}", "x") == Path("sub", name)


@pytest.mark.parametrize("name", ["/a", "../a", "a/../../b", "a//b", "a/", "", "~/../a"])
def test_a_path_that_climbs(name: str) -> None:
    with pytest.raises(ValueError, match="only plain file names"):
        relative_path(name, "x")


@pytest.mark.parametrize("name", ["absolute", "../victim.safetensors", "sub/../../victim.safetensors", "config.json"])
@pytest.mark.parametrize("command", [["merge"], ["export", "--format", "merged"]], ids=lambda c: c[0])
def test_an_index_that_names_other_places(adapter: Path, command: list[str], name: str, capsys: Any) -> None:
    """The output folder is written elsewhere, so that the victim is the file that would be written there."""
    folder = adapter.parent
    base, victim = folder / "base", folder / "victim.safetensors"
    weights = load_file(base / "model.safetensors")
    save_file(weights, victim, {"format": "pt"})
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    name = str(victim) if name == "absolute" else name
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "sub").mkdir()
    before = all_files(folder)
    message = error(capsys, *command, adapter, "-o", folder / "out")
    assert "model.safetensors.index.json names the file" in message
    assert all_files(folder) == before
    assert not (folder / "out").exists()


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 5}, {"a": ["x"]}, {"a": "absent.safetensors"}], ids=str)
def test_an_index_that_is_none(adapter: Path, weight_map: Any, capsys: Any) -> None:
    base = adapter.parent / "base"
    (base / "model.safetensors").rename(base / "other.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in error(capsys, "merge", adapter, "-o", adapter.parent / "out")


def test_an_index_is_checked_before_transformers_reads_it(room: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    save_file({"x": torch.ones(1)}, base / "model-1.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="only plain file names"):
        load_model(str(base), "sft")


def test_weights_that_are_links(adapter: Path, capsys: Any) -> None:
    """The hub's cache is made of links, and they are read; the file they point to is never written to."""
    snapshot = adapter.parent / "models--x" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((adapter.parent / "base").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    before = all_files(blobs)
    assert main(["merge", str(adapter), "-o", str(adapter.parent / "out"), "--model", str(snapshot)]) == 0
    assert all_files(blobs) == before
    assert not any(path.is_symlink() for path in (adapter.parent / "out").iterdir())


def test_a_link_to_a_secret_is_not_copied(adapter: Path, capsys: Any) -> None:
    """Who merges into a stranger's base and uploads the result would publish what the link points to."""
    secret = adapter.parent / "id_rsa"
    secret.write_text("secret")
    (adapter.parent / "base" / "vocab.txt").symlink_to(secret)
    message = error(capsys, "merge", adapter, "-o", adapter.parent / "out")
    assert "vocab.txt is a link to" in message
    assert not (adapter.parent / "out").exists()


def test_the_output_dir_of_a_run_is_not_written(room: Path, adapter: Path, capsys: Any) -> None:
    victim = adapter.parent / "victim"
    victim.mkdir()
    (victim / "adapter_config.json").write_text("{}")
    tree = {"model": str(room / "llama"), "method": "multilora", "data": [entry(room)], "output_dir": str(victim)}
    (adapter / "run.yaml").write_text(yaml.safe_dump(tree))
    for command in (["eval", adapter], ["export", adapter, "-o", adapter.parent / "out"], ["inspect", adapter]):
        assert main([str(argument) for argument in command]) == 0
    assert all_files(victim) == {str(victim / "adapter_config.json"): b"{}"}


def test_gguf_file_stays_in_its_folder(room: Path) -> None:
    (room / "x.gguf").write_bytes(b"GGUF")
    for name in ("../x.gguf", str(room / "x.gguf"), "a/../../x.gguf"):
        with pytest.raises(ValueError, match="gguf_file names the file"):
            resolve_model(str(room / "llama"), name)


def test_a_template_s_name_is_no_path(room: Path, tmp_path: Path) -> None:
    """A tokenizer writes each of its chat templates into a file of that name."""
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    (base / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": "x"} for name in ("default", "../../victim")]
    edit(base / "tokenizer_config.json", chat_template=templates)
    assert tokenizer.chat_template is not None
    with pytest.raises(ValueError, match="chat_template names the file"):
        load_tokenizer(str(base))


def test_a_template_runs_no_code(room: Path, tmp_path: Path) -> None:
    """transformers renders templates in a sandbox; here it is seen to."""
    base = tmp_path / "base"
    shutil.copytree(room / "llama", base)
    mark = tmp_path / "ran"
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    (base / "chat_template.jinja").write_text(attack)
    message = [{"role": "user", "content": "x"}]
    tokenizer = load_tokenizer(str(base))
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        tokenizer.apply_chat_template(message, tokenize=False)
    assert not mark.exists()


def in_other_config(base: Path, **settings: Any) -> None:
    """A second config, which transformers reads in place of the first."""
    shutil.copy(base / "config.json", base / "config.4.0.0.json")
    edit(base / "config.4.0.0.json", **settings)
    edit(base / "config.json", configuration_files=["config.4.0.0.json"])


def in_templates(base: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    os.mkfifo(base / "additional_chat_templates" / "x.jinja")


CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "kernel": (lambda base: edit(base / "config.json", attn_implementation="a/kernel"), "code from a repository"),
    "_kernel": (lambda base: edit(base / "config.json", _attn_implementation={"": "a/kernel"}), "code from a rep"),
    "weights": (lambda base: edit(base / "config.json", transformers_weights="../x.safetensors"), "names the file"),
    "adapter": (lambda base: (base / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "holds an adapter"),
    "layers": (lambda base: edit(base / "config.json", num_hidden_layers=10**9), "more than the 2,000"),
    "part": (lambda base: edit(base / "config.json", text_config={"num_hidden_layers": 10**9}), "more than the 2,000"),
    "part's kernel": (lambda base: edit(base / "config.json", a={"b": {"attn_implementation": "a/b"}}), "code from a"),
    "labels": (lambda base: edit(base / "config.json", num_labels=10**8), "more than the 1,000,000"),
    "versions": (lambda base: in_other_config(base, num_hidden_layers=10**9), r"config\.4\.0\.0\.json: num_hidden"),
    "versions' names": (lambda base: edit(base / "config.json", configuration_files=["../x.json"]), "names the file"),
    "no versions": (lambda base: edit(base / "config.json", configuration_files=["config.x.json"]), "config.VERSION"),
    "no list": (lambda base: edit(base / "config.json", configuration_files=5), "not a list"),
    "pipe": (lambda base: os.mkfifo(base / "vocab.json"), "a pipe or a device"),
    "pipe in templates": (lambda base: in_templates(base), "a pipe or a device"),
    "no mapping": (lambda base: (base / "config.json").write_text("5"), "not a mapping"),
    "deep": (lambda base: (base / "config.json").write_text("[" * 100_000), "nested in more than 100 levels"),
    "types": (lambda base: edit(base / "config.json", hidden_size="x"), "can't be read"),
    "layer types": (lambda base: edit(base / "config.json", layer_types=[{}]), "can't be read"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_base_s_config_asks_for(room: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(room / "llama", tmp_path / "base")
    change, message = CONFIGS[kind]
    change(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        load_skeleton(str(tmp_path / "base"), "sft")


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_base_s_config_asks_of_a_server(adapter: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is handed an adapter builds its base model's modules too."""
    monkeypatch.setenv("LORAPLEX_CACHE", str(adapter.parent / "cache"))
    change, message = CONFIGS[kind]
    change(adapter.parent / "base")
    with pytest.raises(ValueError, match=message):
        to_plain(adapter)
    assert PlainCache().entries() == []


def test_weights_that_are_a_pipe(adapter: Path, capsys: Any) -> None:
    base = adapter.parent / "base"
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")
    assert "a pipe or a device" in error(capsys, "merge", adapter, "-o", adapter.parent / "out")


def test_links_of_the_hub_s_cache_that_lead_nowhere(room: Path, tmp_path: Path) -> None:
    shutil.copytree(room / "llama", tmp_path / "base")
    (tmp_path / "base" / "flax_model.msgpack").symlink_to("../../blobs/removed")
    assert load_model(str(tmp_path / "base"), "sft").num_parameters()


def test_megatron_and_xlora(adapter: Path, capsys: Any) -> None:
    """For these PEFT imports a library, or loads further folders that the config names."""
    edit(adapter / "adapter_config.json", peft_type="LORA", megatron_config={"a": 1}, megatron_core="megatron.evil")
    assert "megatron_config" in error(capsys, "export", adapter, "-o", adapter.parent / "out")
    edit(adapter / "adapter_config.json", peft_type="XLORA", megatron_config=None, adapters={"a": "/etc"})
    assert "X-LoRA" in error(capsys, "export", adapter, "-o", adapter.parent / "out")


def test_a_base_weight_of_another_shape(adapter: Path, capsys: Any) -> None:
    """It would be broadcast against the update without a word."""
    file = adapter.parent / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.ones(1, 32)
    save_file(weights, file, {"format": "pt"})
    assert "(1, 32)" in error(capsys, "merge", adapter, "-o", adapter.parent / "out")


def test_nothing_that_holds_the_sources_is_replaced(adapter: Path, capsys: Any) -> None:
    before = all_files(adapter.parent)
    message = error(capsys, "merge", adapter, "-o", adapter.parent, "--force")
    assert "holds" in message
    assert all_files(adapter.parent) == before
    assert os.listdir(adapter.parent.parent)
