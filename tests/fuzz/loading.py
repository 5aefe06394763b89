"""Adapter folders through every way that loads one onto a model."""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

import loraplex
from tests.fuzz import adapters, oracle, readers
from tests.fuzz.draw import Draw
from tests.fuzz.room import OURS, Room
from tests.fuzz.verdict import Result, fault_of, is_ours, text_of
from tests.fuzz.watch import Watch, files_of, limited

Load = Callable[[Any, Path, Draw], tuple[Any, str]]
"""(model, folder, choices) → the model that has the adapter now, and the adapter's name."""


def _from_pretrained(model: Any, folder: Path, draw: Draw) -> tuple[Any, str]:
    options = draw.choice([{}, {}, {"is_trainable": True}, {"low_cpu_mem_usage": True}, {"adapter_name": "mine"}])
    return PeftModel.from_pretrained(model, str(folder), **options), options.get("adapter_name", "default")


def _second(model: Any, folder: Path, draw: Draw) -> tuple[Any, str]:
    model.load_adapter(str(folder), "second", **draw.choice([{}, {}, {"is_trainable": True}]))
    return model, "second"


def _ours_second(model: Any, folder: Path, draw: Draw) -> tuple[Any, str]:
    loraplex.load_adapter(model, str(folder), "second")
    return model, "second"


def _transformers(model: Any, folder: Path, draw: Draw) -> tuple[Any, str]:
    model.load_adapter(str(folder), "mine")
    return model, "mine"


def _ours_transformers(model: Any, folder: Path, draw: Draw) -> tuple[Any, str]:
    loraplex.load_adapter(model, str(folder), "mine")
    return model, "mine"


def _state_dict(model: Any, folder: Path, draw: Draw) -> tuple[Any, str]:
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model, "default"


PATHS: dict[str, tuple[Load, str]] = {
    "PeftModel.from_pretrained": (_from_pretrained, "base"),
    "PeftModel.load_adapter": (_second, "same"),
    "loraplex.load_adapter": (_ours_second, "any"),
    "model.load_adapter": (_transformers, "base"),
    "loraplex.load_adapter(model)": (_ours_transformers, "base"),
    "set_peft_model_state_dict": (_state_dict, "itself"),
}
"""Name → the call, and what it is called on: a base model, or one with a first adapter."""
HOSTS = {"multilora": "multilora", "aslora": "aslora", "dual_lora": "dual_lora", "masa": "masa-concat"}
"""Method → the adapter that is there first."""
_OWN_PATHS = ("loraplex.load_adapter", "loraplex.load_adapter(model)")


def run(draw: Draw, room: Room, place: Path, watch: Watch) -> Result:
    """One case."""
    folder = adapters.hostile(draw, room)
    path = draw.choice([*PATHS, *readers.READERS])
    result = Result("adapter", path)
    target = place / "adapter"
    if path in readers.READERS:
        readers.READERS[path](draw, room, result, folder, target, watch)
    else:
        folder.write(target)
        _load(draw, room, result, folder, target, watch)
    result.mutations = draw.log
    return result


def _load(draw: Draw, room: Room, result: Result, folder: adapters.Folder, target: Path, watch: Watch) -> None:
    load, on = PATHS[result.path]
    if on == "itself":
        # Settings are not read here; to Python those with 0.0 in place of false would be equal to the right ones.
        folder.config, folder.config_bytes = room.configs[folder.name], None
        try:
            load_file(target / "adapter_model.safetensors")
        except Exception:
            result.outcome = "host"
            return
    first = folder.name if on == "itself" else HOSTS[folder.name.partition("-")[0]] if on == "same" else None
    model = room.model() if on == "base" else room.host(first or draw.choice(sorted(HOSTS.values())))
    # PEFT allows trained biases in a model's only adapter.
    folder.harmless &= on not in ("same", "any") or not _overwrites(folder.config)
    before, places = snapshot(model, room), files_of(target.parent)
    error: BaseException | None = None
    with watch.on(target.parent) as seen, recorded() as notes:
        try:
            with limited():
                loaded, name = load(model, target, draw)
        except BaseException as caught:
            error = caught
    result.problems += [f"forbidden: {event}" for event in seen]
    if files_of(target.parent) != places:
        result.bad("files changed")
    if error is not None:
        _refused(result, folder, target, error)
        if result.outcome != "host" or on == "itself":
            compare(result, before, model, room, error)
        return
    if on == "itself":
        _check_values(result, folder.config, target, loaded, name, notes, room)
        return
    try:
        config = oracle.read_config(target)
    except oracle.Invalid as invalid:
        result.bad(f"loaded although {invalid}")
        return
    if not isinstance(config, dict) or config.get("peft_type") not in oracle.METHODS:
        result.outcome = "host"
        return
    try:
        if on in ("same", "any") and isinstance(config, dict) and not _overwrites(config):
            _check_first(result, before, loaded, room)
        _check_values(result, config, target, loaded, name, notes, room)
    except Exception as broken:
        result.bad(f"loaded, and then raises {type(broken).__name__}: {text_of(broken)[:200]}", broken)


def _refused(result: Result, folder: adapters.Folder, target: Path, error: BaseException) -> None:
    result.outcome, result.message = "refused", text_of(error)[:500]
    fault = fault_of(error)
    # PEFT renames the tensors of modules that were trained in full, with its own errors, before it calls a tuner.
    known = _reaches_us(target) and result.path != "set_peft_model_state_dict"
    if fault and result.path not in _OWN_PATHS and not known and not is_ours(error):
        result.outcome, fault = "host", None
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        fault = f"raises {type(error).__name__}: {text_of(error)}"
    if fault:
        result.bad(fault, error)
    elif folder.harmless:
        result.bad(f"refused although nothing is wrong: {text_of(error)[:200]}", error)


def _reaches_us(target: Path) -> bool:
    """Whether PEFT can find out from the settings that the adapter is one of ours."""
    try:
        config = oracle.read_config(target)
    except oracle.Invalid:
        return False
    return isinstance(config, dict) and config.get("peft_type") in oracle.METHODS


def _check_values(
    result: Result, config: Any, target: Path, model: Any, name: str, notes: list[str], room: Room
) -> None:
    """The loaded adapter does what its files say."""
    layers = {
        key.removeprefix("base_model.model."): layer
        for key, layer in model.named_modules()
        if type(layer).__name__ == "AdapterLinear" and layer.factors(name) is not None
    }
    linear = [key for key, module in room.base.named_modules() if isinstance(module, nn.Linear)]
    try:
        wanted = oracle.targeted(config, linear)
        tensors = oracle.read_tensors(target)
        modules = {key: (layer.out_features, layer.in_features) for key, layer in layers.items()}
        expected = oracle.expect(config, tensors, modules)
    except oracle.Invalid as invalid:
        result.bad(f"loaded although {invalid}")
        return
    if wanted is not None and sorted(wanted) != sorted(layers):
        result.bad(f"adapts {sorted(layers)[:3]}…, the settings say {sorted(wanted)[:3]}…")
    if not expected.finite:
        if not any(word in note for note in notes for word in ("NaN", "nan", "finite", "Inf")):
            result.bad("loads NaN or Inf in silence")
        return
    model.eval()
    model.set_adapter(name)
    if expected.moderate:
        _check_updates(result, layers, expected)
    _check_stored(result, model, name, expected, tensors)


def _check_updates(result: Result, layers: dict[str, Any], expected: oracle.Expectation) -> None:
    generator = torch.Generator().manual_seed(3)
    for key, layer in layers.items():
        x = torch.randn(3, layer.in_features, generator=generator)
        reference = expected.updates[key](x.double())
        if not reference.abs().max() < 1e20:
            continue
        with torch.no_grad():
            update = layer(x).double() - layer.base_layer(x).double()
        scale = max(1.0, reference.abs().max().item(), layer.base_layer(x).abs().max().item())
        error = (update - reference).abs().max().item() / scale
        if not error < 1e-4:
            result.bad(f"{key}: the output's update is off by {error:.1e}")
            return


def _check_stored(
    result: Result, model: Any, name: str, expected: oracle.Expectation, tensors: dict[str, Tensor]
) -> None:
    """What would be saved again is what was read, tensor by tensor."""
    stored = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()}
    for key, tensor in plain.items():
        if key not in tensors:
            result.bad(f"{key} is on the model, but in no file")
            return
        if not torch.equal(tensor, tensors[key].to(tensor.dtype)):
            result.bad(f"{key} has other values than its file")
            return
    spare = {key for key in tensors if ".lora_B_" in key or "__lora_B_" in key}
    if result.path == "set_peft_model_state_dict":
        # A second copy of a module that was trained in full: PEFT's function drops it before it calls a tuner.
        spare |= {
            key for key in tensors if (parts := key.split(".modules_to_save.default.")) and ".".join(parts) in plain
        }
    if lost := sorted(set(tensors) - set(plain) - spare):
        result.bad(f"{lost[0]} was read and is nowhere on the model")


def _overwrites(config: Any) -> bool:
    """Whether the adapter changes parameters of the base model, as PEFT does with biases."""
    return isinstance(config, dict) and config.get("bias", "none") != "none"


def _check_first(result: Result, before: dict[str, Any], model: Any, room: Room) -> None:
    """The first adapter works as before."""
    model.eval()
    after = snapshot(model, room)
    # The second one may have adapted further layers.
    after["active"] = {name: after["active"].get(name) for name in before["active"]}
    for name in ("active", "output", "base"):
        if not _same(before[name], after[name]):
            result.bad(f"after loading a second adapter, {name} of the first changed")


def snapshot(model: Any, room: Room) -> dict[str, Any]:
    """All that a failed load must leave alone."""
    modules = dict(model.named_modules())
    found: dict[str, Any] = {
        "modules": {name: type(module).__name__ for name, module in modules.items()},
        "identities": {name: id(module) for name, module in modules.items()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "configs": sorted(getattr(model, "peft_config", {})),
        "loaded": getattr(model, "_hf_peft_config_loaded", False),
        "active": {
            name: list(module.active_adapters)
            for name, module in modules.items()
            if isinstance(module, (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper))
        },
        "wrapped": sorted(name for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)),
    }
    with torch.no_grad():
        found["output"] = model(room.inputs).logits
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                found["base"] = model(room.inputs).logits
    return found


def compare(result: Result, before: dict[str, Any], model: Any, room: Room, error: BaseException) -> None:
    """A failed load has left the model as it was."""
    try:
        after = snapshot(model, room)
    except Exception as broken:
        result.bad(f"after a failed load, the model raises {type(broken).__name__}: {text_of(broken)[:200]}", error)
        return
    for name, value in before.items():
        if not _same(value, after[name]):
            left = [key for key in after[name] if key not in value][:3] if isinstance(value, dict) else after[name]
            result.bad(f"after a failed load, {name} changed: {str(left)[:150]}", error)
            return


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left.view(torch.int32), right.view(torch.int32))
    return bool(left == right)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Warnings and log records of the block."""
    notes: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    handler = Handler()
    logger = logging.getLogger("loraplex")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield notes
    finally:
        notes += [str(warning.message) for warning in caught]
        logger.removeHandler(handler)


def run_interrupted(draw: Draw, room: Room, place: Path) -> Result:
    """A good adapter, and Ctrl-C at some call of a function while it is loaded."""
    path = draw.choice([name for name, (_, on) in PATHS.items() if on != "itself"])
    result = Result("interrupt", f"interrupt {path}")
    load, on = PATHS[path]
    name = draw.choice([name for name in OURS if on == "base" or not _overwrites(room.configs[name])])
    model = room.model() if on == "base" else room.host(HOSTS[name.partition("-")[0]])
    at = int(10 ** draw.uniform(0, 4.6))
    result.mutations = [name, f"Ctrl-C at call {at}"]
    before = snapshot(model, room)
    calls = itertools.count(1)

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and next(calls) == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    with recorded():
        sys.setprofile(count)
        try:
            load(model, room.folder / "adapters" / name, draw)
        except KeyboardInterrupt as error:
            sys.setprofile(None)
            result.outcome = "refused"
            compare(result, before, model, room, error)
        except BaseException as error:
            sys.setprofile(None)
            result.bad(f"raises {type(error).__name__}: {text_of(error)[:200]}", error)
        finally:
            sys.setprofile(None)
    return result
