"""Adapter folders through the functions that read them without a model, and what a checkpoint keeps of a schedule."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loraplex import load_schedules, save_schedules, step, to_plain
from loraplex.inspection.describe import describe
from tests.fuzz import oracle, raw
from tests.fuzz.adapters import Folder, dumps, mutate_weights
from tests.fuzz.commands import linear_shapes, plain_update
from tests.fuzz.draw import Draw, mutate_json, mutate_tree
from tests.fuzz.room import Room
from tests.fuzz.verdict import Result, fault_of, text_of
from tests.fuzz.watch import Watch, files_of, limited

_WISHES = (
    {"format": 1, "rank": 8}, {"format": 1, "rank": 2}, {"format": 1, "max_error": 0.1}, {"format": 1, "exact": True},
    {"format": 1, "mean_gates": {"model.layers.0.self_attn.q_proj": [0.5, 0.5]}, "weights": "0" * 64},
)  # fmt: skip


def read_description(draw: Draw, room: Room, result: Result, folder: Folder, target: Path, watch: Watch) -> None:
    """`describe` needs no base model."""
    folder.write(target)
    _call(result, target, watch, lambda: describe(target).to_dict())


def read_plain(draw: Draw, room: Room, result: Result, folder: Folder, target: Path, watch: Watch) -> None:
    """`to_plain` writes into its cache only, and what it writes is the adapter."""
    if draw.chance(0.5):
        wish: Any = draw.choice(_WISHES)
        for _ in range(draw.choice([0, 0, 1, 2])):
            wish = mutate_tree(draw, wish, ["rank", "max_error", "exact", "mean_gates", "weights", "format", "x"])
        content = mutate_json(draw, wish) if draw.chance(0.2) else dumps(wish)
        folder.more = {**(folder.more or {}), "loraplex.json": content}
        folder.harmless = False
        draw.note(f"loraplex.json: {content[:80]!r}")
    # Nobody said how these are to be approximated.
    folder.harmless &= not folder.name.startswith(("dual_lora", "masa-router")) and "extras" not in folder.name
    folder.harmless &= folder.name != "dual_lora-bias"
    folder.write(target)
    cache, before = target.parent / "cache", os.environ["LORAPLEX_CACHE"]
    os.environ["LORAPLEX_CACHE"] = str(cache)
    try:
        written = _call(result, target, watch, lambda: to_plain(target, room.base_folder), cache)
    finally:
        os.environ["LORAPLEX_CACHE"] = before
    if result.outcome == "refused":
        if folder.harmless and not result.problems:
            result.bad(f"refused although nothing is wrong: {result.message[:200]}")
    elif written != target and not result.problems:
        _check(result, folder, target, written)


def _call(result: Result, target: Path, watch: Watch, call: Callable[[], Any], *allowed: Path) -> Any:
    places, value = files_of(target.parent, *allowed), None
    with watch.on(target.parent, *allowed) as seen:
        try:
            with limited():
                value = call()
        except BaseException as error:
            result.outcome, result.message = "refused", text_of(error)[:500]
            if fault := fault_of(error):
                result.bad(fault, error)
    result.problems += [f"forbidden: {event}" for event in seen]
    if files_of(target.parent, *allowed) != places:
        result.bad("files changed")
    return value


def _check(result: Result, folder: Folder, target: Path, written: Path) -> None:
    """The plain LoRA's B A is the adapter's update; with a wish of a lower rank only its modules are compared."""
    shapes = linear_shapes()
    try:
        config = oracle.read_config(target)
        wanted = oracle.targeted(config, list(shapes))
        if wanted is None:
            return
        modules = {name: shapes[name] for name in wanted}
        expected = oracle.expect(config, oracle.read_tensors(target), modules)
        plain = oracle.read_tensors(written)
    except oracle.Invalid as invalid:
        result.bad(f"converted although {invalid}")
        return
    if not expected.finite:
        result.bad("converts NaN or Inf")
        return
    if not expected.moderate:
        return
    wish = json.loads((folder.more or {}).get("loraplex.json", b"{}"))
    for name, update in expected.updates.items():
        delta = update(torch.eye(modules[name][1], dtype=torch.float64)).T
        found = plain_update(plain, name)
        approximate = wish.get("max_error") is not None or (wish.get("rank") or 8) < 8 or wish.get("mean_gates")
        if found is None or found.shape != delta.shape:
            result.bad(f"{name} is not in the plain LoRA")
        elif not approximate and not (found - delta).abs().max() < 1e-4 * max(1.0, delta.abs().max().item()):
            result.bad(f"{name}: the plain LoRA is not the adapter's update")


def read_schedules(draw: Draw, room: Room, result: Result, folder: Folder, target: Path, watch: Watch) -> None:
    """`load_schedules` takes what a checkpoint keeps of a schedule whole, or leaves all as it was."""
    model = room.host("aslora")
    for _ in range(2):
        # No optimizer is told of: what is averaged stays beside the adapter.
        step(model)
    target.mkdir()
    save_schedules(model, target)
    file = target / "schedule.safetensors"
    state = Folder(room, "aslora", None, raw.read(file))
    draw.log[:] = ["schedule"]
    for _ in range(draw.times()):
        mutate_weights(draw, state, room)
    if state.weights_bytes is None:
        raw.write(file, state.tensors)
    else:
        file.write_bytes(state.weights_bytes)
    shared = model.base_model.shared("default")
    before = _kept(shared)
    _call(result, target, watch, lambda: load_schedules(model, target))
    if result.outcome == "refused":
        if _kept(shared) != before:
            result.bad("a refused training state changed the schedule")
        return
    try:
        tensors = {key.removeprefix("default/"): value.tensor() for key, value in raw.read(file).items()
                   if key.startswith("default/") and not key.endswith("/explicit")}  # fmt: skip
    except Exception as error:
        result.bad(f"loaded although {type(error).__name__}: {text_of(error)}")
        return
    loaded = {
        f"{name}/{key}": torch.as_tensor(v)
        for name, e in shared.training_state.stored_here.items()
        for key, v in e.items()
    }
    if {key: str(value.tolist()) for key, value in loaded.items()} != {
        key: str(value.tolist()) for key, value in tensors.items()
    }:
        result.bad("the schedule has other values than the file")
    parameters = dict(shared.named_parameters())
    for name, entries in shared.training_state.stored_here.items():
        average, steps = entries.get("aslora_average"), entries.get("aslora_steps")
        if not (isinstance(steps, int) and steps >= 0 and isinstance(average, torch.Tensor)):
            result.bad(f"{name} keeps {steps!r} and a {type(average).__name__}")
        elif average.shape != parameters[name].shape or not average.is_floating_point():
            result.bad(f"the average of {name} is {average.dtype} {tuple(average.shape)}")


def _kept(shared: Any) -> str:
    return repr(
        {
            name: {k: torch.as_tensor(v).tolist() for k, v in e.items()}
            for name, e in shared.training_state.stored_here.items()
        }
    )


READERS: dict[str, Callable[[Draw, Room, Result, Folder, Path, Watch], None]] = {
    "describe": read_description,
    "to_plain": read_plain,
    "load_schedules": read_schedules,
}
"""Name → one case of it."""
