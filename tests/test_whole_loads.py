"""An adapter comes onto a model as a whole, or the model is exactly as it was, whatever ends the attempt.

An exception is raised at calls of functions of loraplex, PEFT and transformers' integration while an adapter is added
or loaded, by every way there is; all that the model consists of is compared with what it was before.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import peft
import pytest
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.integrations import peft as native

import helpers as h
import loraplex
from helpers import ARCHS, PLAIN, config, ready

# PEFT warns of every second adapter on a transformers model.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

VIT = ARCHS["vit"]
BATCH = VIT.inputs()
HEAD = {"target_modules": VIT.targets, "modules_to_save": ["classifier"]}
"""With a module that is trained in full, and biases below: all that a load can change."""


def base(_: str = "") -> Any:
    return VIT.build(num_hidden_layers=2)


def host(method: str) -> PeftModel:
    """A model in training with an adapter that is not the one to come."""
    model = get_peft_model(base(), config("multilora", target_modules=VIT.targets))
    ready(model)
    return model.train()


def again(method: str) -> PeftModel:
    """A model with the very adapter that is about to be loaded, trained further."""
    model = get_peft_model(base(), mine(method))
    ready(model, seed=1)
    return model.train()


def two(method: str) -> PeftModel:
    """A model with two adapters that add up."""
    model = get_peft_model(base(), config("multilora", target_modules=VIT.targets))
    model.add_adapter("other", config("multilora", target_modules=VIT.targets, r=2))
    return model


def few(method: str) -> dict[str, int]:
    return {"num_merges": 1} if method == "aslora" else {}


def mine(method: str) -> Any:
    return config(method, bias="all", **HEAD, **few(method))


def native_host(_: str) -> Any:
    model = base()
    model.add_adapter(config("multilora", target_modules=VIT.targets), "one")
    ready(model, "one")
    return model.train()


WAYS: dict[str, tuple[Callable[[str], Any], Callable[[Any, str, Path], Any]]] = {
    "get_peft_model": (base, lambda model, method, _: get_peft_model(model, mine(method))),
    "get_peft_model of a classifier": (
        base,
        lambda model, method, _: get_peft_model(
            model, config(method, target_modules=VIT.targets, task_type="SEQ_CLS", **few(method))
        ),
    ),
    "from_pretrained": (base, lambda model, _, folder: PeftModel.from_pretrained(model, folder)),
    "PeftModel.add_adapter": (host, lambda model, _, __: model.add_adapter("second", mine("multilora"))),
    "loraplex.add_adapter": (host, lambda model, method, _: loraplex.add_adapter(model, "second", mine(method))),
    "loraplex.load_adapter": (host, lambda model, _, folder: loraplex.load_adapter(model, folder, "second")),
    "load_adapter over itself": (again, lambda model, _, folder: model.load_adapter(folder, "default", True)),
    "add_weighted_adapter": (
        two,
        lambda model, _, __: model.add_weighted_adapter(["default", "other"], [0.5, 2], "sum"),
    ),
    "native add_adapter": (base, lambda model, method, _: model.add_adapter(mine(method), "one")),
    "native second add_adapter": (native_host, lambda model, method, _: model.add_adapter(mine(method), "second")),
    "native load_adapter": (base, lambda model, _, folder: model.load_adapter(str(folder), "one")),
    "native second load_adapter": (native_host, lambda model, _, folder: model.load_adapter(str(folder), "second")),
    "loraplex.load_adapter, native": (base, lambda model, _, folder: loraplex.load_adapter(model, folder, "one")),
}


def picture(model: nn.Module) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """All attributes of all modules, and what their own containers hold, by identity; and all values."""
    parts: dict[Any, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            content = None
            if isinstance(value, dict):
                content = [(k, id(v)) for k, v in value.items()]
            elif isinstance(value, list | tuple | set):
                content = [v if isinstance(v, str) else id(v) for v in value]
            parts[name, key] = (id(value), content)
        parts[name, "type"] = type(module)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts[name, "requires_grad"] = parameter.requires_grad
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return parts, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_untouched(model: nn.Module, before: tuple[dict[Any, Any], dict[str, Tensor]], where: str) -> None:
    parts, values = picture(model)
    changed = [key for key in before[0].keys() | parts.keys() if before[0].get(key) != parts.get(key)]
    assert not changed, f"{where}: {sorted(map(str, changed))[:5]}"
    h.assert_same(values, before[1])


class Interrupt(BaseException):
    """Like KeyboardInterrupt, which pytest would take for one of its own."""


WATCHED = (*(os.path.dirname(str(module.__file__)) + os.sep for module in (peft, loraplex)), str(native.__file__))


@cache
def is_watched(code: CodeType) -> bool:
    return code.co_filename.startswith(WATCHED)


@cache
def drops(code: CodeType) -> bool:
    return code.co_qualname == "finalize.__call__" or code.co_name == "__del__"


def is_dropped(frame: FrameType) -> bool:
    """Whether Python drops what is raised here: while a generator is closed, and in what cleans up after an object."""
    if frame.f_code.co_flags & inspect.CO_GENERATOR:
        return True
    above: FrameType | None = frame
    while above is not None:
        if drops(above.f_code):
            return True
        above = above.f_back
    return False


class Tracer:
    """Counts calls of functions in the watched files, and raises at one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls: list[str] = []
        self.stop = stop

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if is_watched(code) and event == "call" and not is_dropped(frame):
            self.calls.append(f"{code.co_filename}:{code.co_qualname}")
            if len(self.calls) - 1 == self.stop:
                sys.settrace(None)
                raise Interrupt(self.calls[-1])

    def run(self, change: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            return change()
        finally:
            sys.settrace(before)


def moments(calls: list[str], every: bool) -> list[int]:
    """The first call of every function and the last of every second one, or all calls."""
    if every:
        return list(range(len(calls)))
    last = {name: index for index, name in enumerate(calls)}
    first = {name: index for index, name in reversed([*enumerate(calls)])}
    return sorted({*first.values(), *[*last.values()][::2]})


@pytest.mark.parametrize(("way", "method"), [*zip(WAYS, cycle(PLAIN), strict=False)])
def test_interrupted(method: str, way: str, tmp_path: Path) -> None:
    check_interrupts(method, way, tmp_path, every=False)


@pytest.mark.skipif("LORAPLEX_EVERY_CALL" not in os.environ, reason="takes an hour: set LORAPLEX_EVERY_CALL=1")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", PLAIN)
def test_interrupted_at_every_call(method: str, way: str, tmp_path: Path) -> None:
    check_interrupts(method, way, tmp_path, every=True)


def check_interrupts(method: str, way: str, folder: Path, every: bool) -> None:
    make, change = WAYS[way]
    saved = get_peft_model(base(), mine(method))
    ready(saved)
    saved.save_pretrained(folder)
    # A first time untraced: much is done only once in a process.
    change(make(method), method, folder)
    whole, model = Tracer(), make(method)
    whole.run(lambda: change(model, method, folder))
    model = make(method)
    before = picture(model)
    stops = moments(whole.calls, every)
    assert len(stops) > 30
    for stop in stops:
        tracer = Tracer(stop)
        with pytest.raises(Interrupt):
            tracer.run(lambda: change(model, method, folder))
        assert_untouched(model, before, f"call {stop} of {len(whole.calls)}, {tracer.calls[-1]}")
    change(model, method, folder)
    after = make(method)
    change(after, method, folder)
    assert list(model.state_dict()) == list(after.state_dict())
