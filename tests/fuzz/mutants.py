"""Broken versions of the package. The fuzzer must find each of them: a check that can't fail proves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import nn

from loraplex.export import lora as export
from loraplex.export import merged
from loraplex.export.plain_cache import PlainCache
from loraplex.inspection import describe as inspect
from loraplex.recipes.adapters import exporting
from loraplex.recipes.config import run_config
from loraplex.tuner import attempt, config, model, training_state
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.layer import AdapterLinear
from tests.fuzz import readers


def _while_reading(act: Callable[[str], Any]) -> Callable[[], None]:
    """A mutant that does something whenever an adapter's settings are read."""

    def mutate() -> None:
        read = AdapterConfig.from_pretrained.__func__  # type: ignore[attr-defined]

        def from_pretrained(cls: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
            act(os.fspath(folder))
            return read(cls, folder, *args, **kwargs)

        AdapterConfig.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment,method-assign]

    return mutate


def _run_neighbour(folder: str) -> None:
    for path in Path(folder).glob("*.py"):
        exec(compile(path.read_text(), str(path), "exec"), {})


def _if(word: str, act: Callable[[], Any]) -> Callable[[str], None]:
    """Act only for settings that hold `word`."""

    def maybe(folder: str) -> None:
        path = Path(folder) / "adapter_config.json"
        if path.is_file() and word.encode() in path.read_bytes():
            act()

    return maybe


def _raise(error: BaseException) -> None:
    raise error


def _loop() -> None:
    while True:
        pass


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _wrong_scale() -> None:
    forward = AdapterLinear.forward

    def scaled(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer(x)
        return base + 1.01 * (forward(self, x, *args, **kwargs) - base)

    AdapterLinear.forward = scaled  # type: ignore[method-assign]


def _after_failing(act: Callable[[nn.Module], Any]) -> Callable[[], None]:
    """A mutant that does something to the model after a failed injection."""

    def mutate() -> None:
        inject = model.AdapterModel.inject_adapter

        def broken(self: Any, target: nn.Module, *args: Any, **kwargs: Any) -> None:
            try:
                inject(self, target, *args, **kwargs)
            except BaseException:
                act(target)
                raise

        model.AdapterModel.inject_adapter = broken  # type: ignore[method-assign]

    return mutate


def _after_undoing(act: Callable[[nn.Module], Any]) -> Callable[[], None]:
    """A mutant that does something to the model after a failed load has been taken back."""

    def mutate() -> None:
        undo = attempt.Attempt.undo

        def broken(self: Any) -> None:
            undo(self)
            # `inject_adapter` undoes its rehearsal too, which has not failed.
            if sys.exc_info()[0] is not None:
                act(self._modules[0][0])

        attempt.Attempt.undo = broken  # type: ignore[method-assign]

    return mutate


def _shift_a_weight(target: nn.Module) -> None:
    with torch.no_grad():
        next(target.parameters()).add_(1e-6)


def _leave_a_module(target: nn.Module) -> None:
    target.add_module("left", nn.Linear(1, 1))


def _unfreeze(target: nn.Module) -> None:
    for parameter in target.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


def _second_changes_first() -> None:
    load = PeftModel.load_adapter

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if ".default" in name:
                parameter.data.mul_(1 + 1e-6)
        return result

    PeftModel.load_adapter = broken  # type: ignore[method-assign]


def _no_checks() -> None:
    AdapterConfig._check_common = lambda self: None  # type: ignore[method-assign]
    config.check_types = lambda cls, values: None  # type: ignore[assignment]


def _describe_raises() -> None:
    def broken(folder: Any) -> Any:
        try:
            return inspect.describe(folder)
        except ValueError as error:
            raise KeyError(str(error)) from None

    readers.describe = broken


def _any_training_state() -> None:
    def unchecked(state: dict[str, Any], *_: Any) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path, value in state.items():
            name, _, key = path.partition("/")
            found.setdefault(name, {})[key] = value
        return found

    training_state.check_training_state = unchecked


def _cache_raises() -> None:
    def broken(self: Any) -> Any:
        raise KeyError("files")

    PlainCache.entries = broken  # type: ignore[method-assign]


def _unsafe_yaml() -> None:
    run_config.parse_yaml = lambda text, source: yaml.load(text, Loader=yaml.UnsafeLoader)  # type: ignore[assignment]


def _torn_writes() -> None:
    @contextlib.contextmanager
    def in_place(target: Path) -> Iterator[Path]:
        target.mkdir(parents=True, exist_ok=True)
        yield target

    export.replaced_folder = in_place  # type: ignore[assignment]
    exporting.replaced_folder = in_place  # type: ignore[assignment]


def _wrong_export() -> None:
    pad = export.pad
    export.pad = lambda factor, width, dim: pad(factor, width, dim) * 1.01


def _wrong_merge() -> None:
    merge = merged.merged_weight

    def broken(weight: Any, target: Any, *args: Any) -> Any:
        result, module = merge(weight, target, *args)
        return (result if target is None else result * 1.01), module

    merged.merged_weight = broken
    exporting.merged_weight = broken


MUTANTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "the update is 1 % too large": ("adapter", _wrong_scale),
    "a failed load changes a base weight": ("adapter", _after_failing(_shift_a_weight)),
    "a failed load leaves a module behind": (
        "adapter",
        _after_undoing(_leave_a_module),
    ),
    "a failed load changes requires_grad": ("adapter", _after_undoing(_unfreeze)),
    "a failed load changes the mode": ("adapter", _after_undoing(lambda m: m.train())),
    "a second adapter changes the first": ("adapter", _second_changes_first),
    "an IndexError comes through": ("adapter", _while_reading(_if("exclude", lambda: _raise(IndexError("x"))))),
    "a message is endless": ("adapter", _while_reading(_if("lora_only", lambda: _raise(ValueError("x" * 10**6))))),
    "good adapters are refused": ("adapter", _while_reading(lambda f: _raise(ValueError(f"{f} is bad")))),
    "a file beside the adapter is run": ("adapter", _while_reading(_run_neighbour)),
    "a file is written into the adapter": ("adapter", _while_reading(lambda f: Path(f, "x").touch())),
    "a program is started": ("adapter", _while_reading(lambda folder: subprocess.Popen(["true"]))),
    "a socket is opened": ("adapter", _while_reading(lambda f: socket.socket().connect(("127.0.0.1", 9)))),
    "loading hangs": ("adapter", _while_reading(_if("lora_only", _loop))),
    "loading takes all memory": ("adapter", _while_reading(_if("lora_only", lambda: bytearray(2**33)))),
    "the process dies": ("adapter", _while_reading(_if("lora_only", _crash))),
    "describe raises KeyError": ("adapter", _describe_raises),
    "a training state is not checked": ("adapter", _any_training_state),
    "a broken cache raises KeyError": ("cli", _cache_raises),
    "settings are not checked": ("config", _no_checks),
    "YAML makes objects": ("yaml", _unsafe_yaml),
    "an export is 1 % too large": ("cli", _wrong_export),
    "a merge is 1 % too large": ("cli", _wrong_merge),
    "writes are torn": ("interrupt", _torn_writes),
}
"""What is broken → the kind of cases that must show it, and how to break it."""
