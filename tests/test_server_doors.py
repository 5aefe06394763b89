"""vLLM's and SGLang's doors, against stand-ins with the real signatures (tests/stubs); tests/servers: the real ones."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import helpers as h
from helpers import ARCHS, adapted
from loraplex.export.plain_cache import PlainCache
from loraplex.export.wish import Wish
from loraplex.integrations import sglang, vllm

TESTS = Path(__file__).parent


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `adapters` of every kind and the `base` model's config; the stand-ins can be imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "sglang")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(TESTS / "stubs"))
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(vllm.FOLDER, str(tmp_path / "adapters"))
    ARCHS["llama"].config().save_pretrained(tmp_path / "base")
    for name in ("multilora", "dual_lora"):
        adapted(name).save_pretrained(tmp_path / "adapters" / name)
    (tmp_path / "adapters" / "broken").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "adapters" / ".hidden").mkdir()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "sglang")]:
        del sys.modules[name]


def resolver() -> Any:
    vllm.register()
    return import_module("vllm.lora.resolver").LoRAResolverRegistry.get_resolver("loraplex")


def resolve(room: Path, name: str) -> Any:
    return asyncio.run(resolver().resolve_lora(str(room / "base"), name))


def test_entry_points() -> None:
    points = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        module, _, name = points[group]["loraplex"].partition(":")
        assert callable(getattr(import_module(module), name))


def test_vllm_serves_our_folder(room: Path) -> None:
    request = resolve(room, "multilora")
    assert (request.lora_name, request.lora_int_id) == ("multilora", 1)
    plain = Path(request.lora_path)
    assert plain.parent == room / "cache" / "plain"
    assert h.lora_config(plain)["peft_type"] == "LORA"
    # What a server holds stays in the cache.
    assert [entry.path for entry in PlainCache().clear()] == [plain]
    assert resolve(room, "multilora").lora_path == str(plain)


def test_vllm_registers_once_and_only_if_asked(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module("vllm.lora.resolver").LoRAResolverRegistry
    monkeypatch.delenv(vllm.FOLDER)
    vllm.register()
    assert not registry.get_supported_resolvers()
    monkeypatch.setenv(vllm.FOLDER, str(room / "none"))
    with pytest.raises(ValueError, match=r"LORAPLEX_VLLM_ADAPTERS=.*none is not a folder"):
        vllm.register()
    monkeypatch.setenv(vllm.FOLDER, str(room / "adapters"))
    vllm.register()
    vllm.register()
    assert set(registry.get_supported_resolvers()) == {"loraplex"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nothing", "there is no adapter 'nothing' in"),
        ("../secret", "is no name of an adapter"),
        ("a/../../secret", "is no name of an adapter"),
        ("/etc", "is no name of an adapter"),
        ("..", "is no name of an adapter"),
        (".hidden", "is no name of an adapter"),
        ("", "is no name of an adapter"),
        ("a\0b", "is no name of an adapter"),
        ("a\nWARNING all is well", "is no name of an adapter"),
        ("a\\b", "is no name of an adapter"),
        ("x" * 300, "is no name of an adapter"),
        ("broken", "adapter 'broken' can't be served: .* adapter_config.json is missing"),
        ("dual_lora", "adapter 'dual_lora' can't be served: .* no exact LoRA form"),
    ],
)
def test_vllm_gets_none_and_a_line_in_the_log(
    room: Path, name: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vllm.loraplex"):
        assert resolve(room, name) is None
    (record,) = caplog.records
    caplog.clear()
    message = record.getMessage()
    assert re.search(line, message), message
    # A name can't write a line of its own into the log.
    assert "\n" not in message
    assert len(message) < 1000


def test_vllm_uses_the_wish_and_the_server_s_base(room: Path) -> None:
    Wish(rank=3).write(room / "adapters" / "dual_lora")
    settings = h.lora_config(room / "adapters" / "dual_lora") | {"base_model_name_or_path": "/nowhere"}
    (room / "adapters" / "dual_lora" / "adapter_config.json").write_text(json.dumps(settings))
    assert h.lora_config(Path(resolve(room, "dual_lora").lora_path))["r"] == 3


def hooked(room: Path) -> Any:
    """SGLang's class with our hook, put on as SGLang does it."""
    sglang.register()
    registry = import_module("sglang.srt.plugins.hook_registry")
    hook, kind = registry.HookRegistry.hooks[sglang.TARGET]
    assert kind is registry.HookType.BEFORE
    module, _, method = sglang.TARGET.rpartition(".")
    module, _, name = module.rpartition(".")
    cls = getattr(import_module(module), name)
    original = getattr(cls, method)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        args, kwargs = hook(*args, **kwargs) or (args, kwargs)
        original(*args, **kwargs)

    setattr(cls, method, wrapper)
    return cls


def test_sglang_loads_our_folder(room: Path) -> None:
    folder = room / "adapters" / "multilora"
    settings = h.lora_config(folder) | {"base_model_name_or_path": str(room / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    cls = hooked(room)
    for config in (cls(str(folder), base_vocab_size=5), cls(path=str(folder), base_vocab_size=5)):
        assert Path(config.path).parent == room / "cache" / "plain"
        assert (config.r, config.base_vocab_size) == (8, 5)
    # What is no folder of ours is left alone.
    assert cls(config_dict={"r": 4}).path is None
    plain = cls(config.path)
    assert plain.path == config.path
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        cls(str(room / "adapters" / "broken"))
    assert len(PlainCache().clear()) == 1
