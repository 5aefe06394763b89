"""`schedule.safetensors` of a checkpoint: what fits is taken whole, and of a broken file nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import helpers as h
import loraplex

NAME = "schedule.safetensors"
State = dict[str, Tensor]


def saved(folder: Path) -> tuple[Any, State]:
    """A model whose averages no optimizer keeps, and what its checkpoint holds of them."""
    model = get_peft_model(h.ARCHS["llama"].build(), h.config("aslora", target_modules=["q_proj", "v_proj"])).train()
    h.fill(model)
    for _ in range(2):
        loraplex.step(model)
    loraplex.save_schedules(model, folder)
    return model, load_file(folder / NAME)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    model, state = saved(tmp_path)
    shared = h.shared_state(model)
    # A B that was merged away keeps nothing.
    kept = {name: dict(entries) for name, entries in shared.training_state.stored_here.items() if entries}
    assert {int(tensor) for key, tensor in state.items() if key.endswith("aslora_steps")} == {2}
    shared.training_state.stored_here = {}
    loraplex.load_schedules(model, tmp_path)
    assert kept.keys() == shared.training_state.stored_here.keys()
    for name, entries in kept.items():
        assert shared.training_state.stored_here[name]["aslora_steps"] == entries["aslora_steps"] == 2
        assert torch.equal(shared.training_state.stored_here[name]["aslora_average"], entries["aslora_average"])


def change(ending: str, value: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def act(state: State) -> None:
        key = next(key for key in sorted(state) if key.endswith(ending))
        state[key] = value(state[key])

    return act


def drop(ending: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(next(key for key in sorted(state) if key.endswith(ending)))


BROKEN: dict[str, tuple[Callable[[State], Any], str]] = {
    "another parameter": (lambda s: s.update({"default/nowhere/aslora_steps": torch.tensor(1)}), "belongs to nothing"),
    "another name": (lambda s: s.update({"default/x": torch.tensor(1)}), "belongs to nothing"),
    "a slash more": (lambda s: s.update({"default/a/b/c": torch.tensor(1)}), "belongs to nothing"),
    "a shape": (change("average", lambda t: t[:1].clone()), r"must be floating-point numbers of shape \("),
    "a kind": (change("average", lambda t: t.long()), "must be floating-point numbers"),
    "complex": (change("average", lambda t: t.to(torch.complex64)), "must be floating-point numbers"),
    "a scalar": (change("average", lambda t: t.sum().long()), "must be floating-point numbers"),
    "steps in pieces": (change("steps", lambda t: t.double()), r"must be an integer of shape \(\)"),
    "several steps": (change("steps", lambda t: torch.stack([t, t])), "must be an integer"),
    "dimensions": (change("steps", lambda t: t.reshape((1,) * 3000)), r"is torch.int64 \(1, 1, .{,500}$"),
    "negative steps": (change("steps", lambda t: -t), "is -2 in the training state"),
    "no average": (drop("average"), "lacks aslora_average"),
    "no steps": (drop("steps"), "lacks aslora_steps"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_state_changes_nothing(what: str, tmp_path: Path) -> None:
    model, state = saved(tmp_path)
    act, message = BROKEN[what]
    act(state)
    save_file(state, tmp_path / NAME)
    _refused(model, tmp_path, message)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08\0\0\0\0\0\0\0{}"])
def test_no_safetensors_file(content: bytes, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (tmp_path / NAME).write_bytes(content)
    _refused(model, tmp_path, "not a whole safetensors file")


def _refused(model: Any, folder: Path, message: str) -> None:
    shared = h.shared_state(model)
    before, kept = shared.training_state.stored_here, copy.deepcopy(shared.training_state.stored_here)
    with pytest.raises(ValueError, match=message) as caught:
        loraplex.load_schedules(model, folder)
    assert "resume from an earlier one" in str(caught.value)
    assert shared.training_state.stored_here is before
    assert repr(before) == repr(kept)


def test_a_mark_of_earlier_versions_is_read_over(tmp_path: Path) -> None:
    model, state = saved(tmp_path)
    name = sorted(state)[0].rpartition("/")[0]
    save_file({**state, f"{name}/explicit": torch.tensor(1)}, tmp_path / NAME)
    loraplex.load_schedules(model, tmp_path)
    assert all(
        entries.keys() == {"aslora_steps", "aslora_average"}
        for entries in h.shared_state(model).training_state.stored_here.values()
    )
