"""`to_plain`: the right plain LoRA, once per content, from a cache that stays whole and bounded."""

from __future__ import annotations

import json
import os
import shutil
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import helpers as h
from helpers import ARCHS, adapted, naive_updates, output, products, relative
from loraplex import to_plain
from loraplex.commands.cli import main
from loraplex.export import plain_cache, plain_folder
from loraplex.export.plain_cache import PlainCache
from loraplex.export.wish import WISH_NAME, Wish, sha256_of
from loraplex.methods.masa.method import MasaFactors

EXACT = ("multilora", "aslora", "masa-sum", "masa-concat")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAPLEX_CACHE_GIB", raising=False)


def saved(folder: Path, method: str, **settings: Any) -> tuple[Any, Path, Path]:
    """A model, the folder of its adapter, and a folder that holds its base's config and nothing else."""
    model = adapted(method, **settings)
    model.save_pretrained(folder / "adapter")
    ARCHS["llama"].config().save_pretrained(folder / "base")
    return model, folder / "adapter", folder / "base"


def never(*args: Any) -> None:
    raise AssertionError("converted again")


# The conversion


@pytest.mark.parametrize("method", EXACT)
def test_equals_the_adapter(method: str, tmp_path: Path) -> None:
    model, folder, base = saved(tmp_path, method)
    plain = to_plain(folder, base)
    assert plain.parent == tmp_path / "cache" / "plain"
    assert h.lora_config(plain)["peft_type"] == "LORA"
    for name, delta in naive_updates(model).items():
        assert relative(products(plain)[name], delta) < 1e-6, name
    inputs = ARCHS["llama"].inputs()
    torch.testing.assert_close(output(h.stock(plain), inputs), output(model, inputs), rtol=1e-5, atol=1e-5)


def test_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "aslora")
    settings = h.lora_config(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    assert to_plain(folder).is_dir()
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"does not name its base model: give base="):
        to_plain(folder)
    with pytest.raises(OSError, match="nowhere"):
        to_plain(folder, tmp_path / "nowhere")


def test_adapters_of_others_are_returned_as_they_are(tmp_path: Path) -> None:
    get_peft_model(ARCHS["llama"].build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert to_plain(tmp_path / "lora") == tmp_path / "lora"
    assert not (tmp_path / "cache").exists()


# How an adapter wants to be converted


def test_dual_lora_needs_a_rank(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "dual_lora")
    with pytest.raises(ValueError, match="no exact LoRA form"):
        to_plain(folder, base)
    Wish(rank=3).write(folder)
    assert h.lora_config(to_plain(folder, base))["r"] == 3
    Wish(rank=5).write(folder)
    assert h.lora_config(to_plain(folder, base))["r"] == 5
    Wish(max_error=0.9).write(folder)
    assert h.lora_config(to_plain(folder, base))["r"] not in (3, 5)
    assert len(PlainCache().entries()) == 3


def test_routers_need_mean_gates(tmp_path: Path) -> None:
    model, folder, base = saved(tmp_path, "masa-router")
    with pytest.raises(ValueError, match="calibrat"):
        to_plain(folder, base)
    routers = [module.module_name for module in model.modules() if isinstance(module, MasaFactors)]
    gates = {name: [0.5, 0.2, 0.3] for name in routers}
    weights = sha256_of(folder / "adapter_model.safetensors")
    Wish(mean_gates=gates, weights=weights).write(folder)
    plain = to_plain(folder, base)
    for name, delta in naive_updates(model, gates).items():
        assert relative(products(plain)[name], delta) < 1e-6, name
    # Gates of other modules, experts or weights are refused.
    for wrong in ({routers[0]: [0.5, 0.2, 0.3]}, {name: [0.5, 0.5] for name in routers}):
        Wish(mean_gates=wrong, weights=weights).write(folder)
        with pytest.raises(ValueError, match="mean gates"):
            to_plain(folder, base)
    Wish(mean_gates=gates, weights="0" * 64).write(folder)
    with pytest.raises(ValueError, match="of other weights than the adapter has now"):
        to_plain(folder, base)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"rank": 4}',
        '{"format": 2}',
        '{"format": true}',
        '{"format": 1, "rank": 0}',
        '{"format": 1, "rank": true}',
        '{"format": 1, "rank": 1000000000}',
        '{"format": 1, "rank": "4"}',
        '{"format": 1, "max_error": 2}',
        '{"format": 1, "max_error": NaN}',
        '{"format": 1, "exact": 1}',
        '{"format": 1, "rank": 4, "exact": true}',
        '{"format": 1, "trust_remote_code": true}',
        '{"format": 1, "mean_gates": {"a": [1.0]}}',
        '{"format": 1, "weights": "0"}',
        '{"format": 1, "mean_gates": {}, "weights": "0"}',
        '{"format": 1, "mean_gates": {"a": [2, -1]}, "weights": "0"}',
        '{"format": 1, "mean_gates": {"a": [Infinity]}, "weights": "0"}',
        '{"format": 1, "mean_gates": {"a": "1"}, "weights": "0"}',
        '{"format": 1, "mean_gates": {"a": [1.0]}, "weights": 3}',
        '{"format": 1, "mean_gates": [1.0], "weights": "0"}',
    ],
)
def test_a_wrong_wish_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / WISH_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"loraplex.json can't be used: .* Remedy: ") as error:
        Wish.read(tmp_path)
    assert len(str(error.value)) < 600


def test_wishes_are_written_as_they_are_read(tmp_path: Path) -> None:
    for wish in (Wish(), Wish(rank=4), Wish(exact=True), Wish(mean_gates={"a": [0.25, 0.75]}, weights="0")):
        wish.write(tmp_path)
        assert Wish.read(tmp_path) == wish
    assert os.listdir(tmp_path) == [WISH_NAME]


# The cache


def test_a_hit_reads_no_weights_and_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    monkeypatch.setattr(plain_folder, "_RACY", -1.0)
    first = to_plain(folder, base)
    monkeypatch.setattr(plain_folder, "_convert", never)
    monkeypatch.setattr(plain_folder, "sha256_of", never)
    assert to_plain(folder, base) == first


def test_other_content_is_converted_anew(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    first = to_plain(folder, base)
    model = adapted("multilora", lora_alpha=3)
    model.save_pretrained(folder)
    second = to_plain(folder, base)
    assert second != first
    for name, delta in naive_updates(model).items():
        assert relative(products(second)[name], delta) < 1e-6, name
    # The same content elsewhere is the same entry.
    shutil.copytree(folder, tmp_path / "copy")
    assert to_plain(tmp_path / "copy", base) == second


def test_a_changed_file_of_equal_size_is_noticed_at_once(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    first = to_plain(folder, base)
    settings = (folder / "adapter_config.json").read_text()
    stat = (folder / "adapter_config.json").stat()
    (folder / "adapter_config.json").write_text(settings.replace('"lora_alpha": 6', '"lora_alpha": 3'))
    os.utime(folder / "adapter_config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert to_plain(folder, base) != first


def test_another_base_is_converted_anew(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    first = to_plain(folder, base)
    config = ARCHS["llama"].config()
    config.num_hidden_layers += 1
    config.save_pretrained(base)
    with pytest.raises(ValueError, match=r"weights lack model\.layers\.5"):
        to_plain(folder, base)
    assert first.is_dir()


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    plain = to_plain(folder, base)
    tensors = {name: tensor.clone() for name, tensor in h.file_tensors(plain).items()}
    whole = (plain / "adapter_model.safetensors").read_bytes()
    (plain / "adapter_model.safetensors").write_bytes(whole[:-1])
    assert to_plain(folder, base) == plain
    h.assert_same(h.file_tensors(plain), tensors)


def test_a_folder_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex.export import skeleton

    _, folder, base = saved(tmp_path, "multilora")
    theirs = skeleton.write_plain

    def written_meanwhile(*args: Any) -> None:
        theirs(*args)
        adapted("multilora", lora_alpha=3).save_pretrained(folder)

    monkeypatch.setattr(skeleton, "write_plain", written_meanwhile)
    with pytest.raises(ValueError, match="changed while it was read"):
        to_plain(folder, base)
    assert PlainCache().entries() == []
    monkeypatch.undo()
    os.environ["LORAPLEX_CACHE"] = str(tmp_path / "cache")
    try:
        assert to_plain(folder, base).is_dir()
    finally:
        del os.environ["LORAPLEX_CACHE"]


def _ask(folder: str, base: str, cache: str, results: Any) -> None:
    os.environ["LORAPLEX_CACHE"] = cache
    from loraplex.export import skeleton

    theirs, count = skeleton.write_plain, [0]

    def counted(*args: Any) -> None:
        count[0] += 1
        time.sleep(1)
        theirs(*args)

    skeleton.write_plain = counted
    path = to_plain(folder, base)
    results.put((str(path), count[0], sorted(os.listdir(path))))


def test_processes_that_ask_at_once_convert_once(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    fork = get_context("fork")
    results = fork.Queue()
    arguments = (str(folder), str(base), str(tmp_path / "cache"), results)
    processes = [fork.Process(target=_ask, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len({path for path, _, _ in answers}) == 1
    assert sum(count for _, count, _ in answers) == 1
    assert answers[0][2] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_converter_that_is_killed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    cache = PlainCache()
    digest = to_plain(folder, base).name
    assert cache.drop(cache.entries()[0])
    for rest in (cache.staging(digest), cache.root / f"..{digest}.staging.0123.tmp"):
        rest.mkdir()
        (rest / "half").write_text("")
    assert to_plain(folder, base).name == digest
    assert not list(cache.root.glob(f".*{digest}*"))


@pytest.mark.parametrize(
    "note", [{}, [], {"method": 5, "source": "x", "files": {}}, {"method": "MASA", "source": "x", "files": []}]
)
def test_a_broken_note_is_an_entry_that_is_not_there(
    note: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    cache = PlainCache()
    path = to_plain(folder, base)
    (cache.root / f"{path.name}.json").write_text(json.dumps(note))
    assert cache.find(path.name) is None
    assert cache.entries() == []
    assert main(["cache"]) == 0
    assert "0 converted adapters" in capsys.readouterr().out
    assert to_plain(folder, base) == path
    assert len(cache.entries()) == 1


def test_what_is_remembered_of_a_folder_leads_nowhere_else() -> None:
    """A digest that is a path would mark a folder elsewhere as used."""
    cache = PlainCache()
    for digest, known in [("0" * 40, True), ("../" + "0" * 40, False), ("/", False), ("", False)]:
        cache.see("key", [1], digest)
        assert cache.seen("key", [1]) == (digest if known else None)
        assert cache.seen("key", [2]) is None


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for index in range(3):
        _, folder, base = saved(tmp_path / str(index), "multilora", lora_alpha=index + 2)
        paths.append(to_plain(folder, base))
        os.utime(paths[-1], (1e9 + index, 1e9 + index))
    cache = PlainCache()
    size = cache.entries()[0].size
    held = plain_folder.hold(paths[0])
    assert held is not None
    cache.shrink(1.5 * size)
    # The oldest is held by a server: the next oldest ones go.
    assert [entry.path for entry in cache.entries()] == [paths[0]]
    held.close()
    cache.shrink(0.5 * size)
    assert cache.entries() == []
    # Whoever asked a moment ago is about to load.
    monkeypatch.setenv("LORAPLEX_CACHE_GIB", "1e-9")
    assert to_plain(folder, base).is_dir()
    assert len(cache.entries()) == 1
    monkeypatch.setenv("LORAPLEX_CACHE_GIB", "none")
    with pytest.raises(ValueError, match="LORAPLEX_CACHE_GIB=none must be a positive number of GiB"):
        plain_cache.size_limit()


def test_the_command_lists_and_clears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_folder, "_RACY", -1.0)
    _, folder, base = saved(tmp_path, "multilora")
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.startswith("0 converted adapters")
    plain = to_plain(folder, base)
    assert main(["cache", "list", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(plain.parent)
    assert [(e["path"], e["method"], e["source"]) for e in report["entries"]] == [
        (str(plain), "MULTILORA", str(folder))
    ]
    assert main(["cache"]) == 0
    assert f"{plain.name[:12]}  multilora" in capsys.readouterr().out
    held = plain_folder.hold(plain)
    assert main(["cache", "clear"]) == 0
    assert "1 stay: running servers hold them" in capsys.readouterr().err
    held.close()
    assert main(["cache", "clear"]) == 0
    assert not plain.exists()
    assert [path for path in plain.parent.rglob("*") if path.is_file()] == []


# Folders that come from anywhere


def test_broken_and_hostile_folders(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        to_plain(folder, base)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/loraplex-was-run'\ntR.")
    with pytest.raises(ValueError, match="is a pickle"):
        to_plain(folder, base)
    for text in ("", "[1]", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="holds no adapter that can be read"):
            to_plain(folder, base)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(ValueError, match="is missing, or not a file"):
        to_plain(folder, base)
    with pytest.raises(ValueError, match="is not a folder"):
        to_plain(tmp_path / "none", base)


def test_code_beside_a_base_model_is_not_run(tmp_path: Path) -> None:
    _, folder, base = saved(tmp_path, "multilora")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Config: pass\n")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    settings = h.lora_config(folder) | {"base_model_name_or_path": str(base)}
    settings["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for arguments in ((folder, base), (folder,)):
        with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
            to_plain(*arguments)
    assert not (tmp_path / "was-run").exists()
