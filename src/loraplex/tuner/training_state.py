"""What a schedule's parameters need in training beside their values: where it is stored, saved and loaded."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from loraplex.io.field_types import shown
from loraplex.io.reading import message_of
from loraplex.runtime.optimizer_steps import holds
from loraplex.runtime.parallel import full_shape, full_tensor, is_sharded, shard_like, to_local

_MOST_STEPS = 10**12
_AGAIN = "Copy the checkpoint again, or resume from an earlier one."
_OLD = "explicit"
"""A key that earlier versions wrote. It means nothing now."""


class TrainingState:
    """The training state of a schedule's parameters, and where it is stored.

    It is stored in `optimizer.state[parameter]`, which every trainer saves. Of parameters that are sharded, or whose
    optimizer is hidden or holds a part of them, each rank stores it here, and checkpoints hold a file of it.
    """

    def __init__(self, keys: dict[str, bool]) -> None:
        self._keys = keys
        self._homes: dict[int, weakref.ref[Optimizer] | None] = {}
        """Parameter's id → the optimizer in whose state its own is stored; None: it is stored here."""
        self.stored_here: dict[str, dict[str, Any]] = {}
        """Parameter's name → key → value, of what no optimizer stores."""

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled adapter has optimizers of its own.
        return {**self.__dict__, "_homes": {}}

    def optimizers(self) -> Iterator[Optimizer]:
        """The optimizers that were seen to step the parameters, if they still exist."""
        refs = {ref for ref in self._homes.values() if ref is not None}
        yield from (optimizer for ref in refs if (optimizer := ref()) is not None)

    def note_optimizer(
        self, optimizer: Optimizer, inner: list[Optimizer], trained: set[int], parameters: dict[str, nn.Parameter]
    ) -> None:
        """Find the optimizer in whose state each parameter's is saved; of nested optimizers it is the inner one.

        Args:
            optimizer: the outermost optimizer that has stepped.
            inner: those that stepped inside its step, the innermost first.
            trained: ids of the parameters that the schedule trains.
            parameters: the adapter's shared factors, by name.
        """
        mine = trained & holds(optimizer)
        home: dict[int, weakref.ref[Optimizer] | None] = {}
        for candidate in inner:
            home.update({i: weakref.ref(candidate) for i in holds(candidate) & mine if i not in home})
        if not home:
            home = dict.fromkeys(mine, weakref.ref(optimizer))
        elif len(home) < len(mine):
            # The inner one holds a part, as ZeroRedundancyOptimizer's does on each rank. All ranks need all of it.
            home = dict.fromkeys(mine, None)
        for name, parameter in parameters.items():
            if id(parameter) in home:
                self._move(name, parameter, self._homes.get(id(parameter)), home[id(parameter)])
        self._homes.update(home)

    def _move(
        self,
        name: str,
        parameter: nn.Parameter,
        old: weakref.ref[Optimizer] | None,
        new: weakref.ref[Optimizer] | None,
    ) -> None:
        """Take the state along to the optimizer that has taken over, unless that has loaded its own."""
        before = None if old is None else old()
        after = None if new is None else new()
        if before is None or before is after or parameter not in before.state:
            return
        if after is not None and any(key in after.state.get(parameter, {}) for key in self._keys):
            return
        # Left behind, it would be continued from there when optimizers take turns.
        left = before.state[parameter]
        self.stored_here[name] = {key: left.pop(key) for key in self._keys if key in left}

    def of(self, parameter: nn.Parameter, name: str) -> dict[str, Any]:
        """Where the training state of one parameter is kept."""
        ref = self._homes.get(id(parameter))
        home = None if ref is None else ref()
        # Not in a sharded optimizer's state: distributed checkpoints drop the keys that torch does not know.
        if home is not None and not is_sharded(parameter):
            state = home.state[parameter]
            # Optimizers initialise a parameter's state at its first gradient, and only if it is empty.
            if state or parameter.grad is not None:
                # It may come from a checkpoint of an engine that hides its optimizer, or shards it.
                state.update(self.stored_here.pop(name, {}))
                return state
        return self.stored_here.setdefault(name, {})

    def clear(self, parameters: dict[str, nn.Parameter]) -> None:
        """Drop the training state of all parameters, wherever it is known to be stored."""
        of_optimizers = [o.state[p] for o in self.optimizers() for p in parameters.values() if p in o.state]
        for state in (*self.stored_here.values(), *of_optimizers):
            for key in self._keys:
                state.pop(key, None)

    def save(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """What a resume needs and neither adapter nor optimizer holds, as full tensors. All ranks must call it."""
        state = {}
        for name, entries in self.stored_here.items():
            for key, entry in entries.items():
                value = entry["step"] if isinstance(entry, dict) else entry  # so that no optimizer casts it
                tensor = isinstance(value, Tensor)
                state[f"{name}/{key}"] = full_tensor(value, parameters[name]).cpu() if tensor else torch.tensor(value)
        return state

    def check(self, state: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
        """`check_training_state` for these parameters."""
        return check_training_state(state, parameters, self._keys)

    def load(self, state: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Go on from what `save` returned, on any number of ranks and under any engine."""
        found = self.check(state, parameters)
        self.stored_here = {}
        for name, entries in found.items():
            like = parameters[name]
            self.stored_here[name] = {
                key: shard_like(value.to(to_local(like).device), like) if value.ndim else value.item()
                for key, value in entries.items()
            }


def read_training_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Key → tensor of a checkpoint's file of training state.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({message_of(error, 500)}). {_AGAIN}") from None


def check_training_state(
    state: dict[str, Tensor], parameters: dict[str, nn.Parameter], kinds: dict[str, bool]
) -> dict[str, dict[str, Tensor]]:
    """Check a file's training state, and sort it by parameter.

    Args:
        state: "PARAMETER/KEY" → tensor.
        parameters: the adapter's shared factors, by name.
        kinds: the keys that each parameter has → whether it counts steps; else it has the parameter's shape.

    Returns:
        Parameter's name → key → tensor.

    Raises:
        ValueError: an entry belongs to no parameter, has another shape or kind, or is missing beside the others.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in state.items():
        name, _, key = path.partition("/")
        if key == _OLD:
            continue
        if name not in parameters or key not in kinds:
            raise ValueError(f"The training state holds {shown(path)}, which belongs to nothing here. {_AGAIN}")
        shape = () if kinds[key] else tuple(full_shape(parameters[name]))
        if tuple(value.shape) != shape or value.is_floating_point() == kinds[key] or value.is_complex():
            raise ValueError(
                f"{shown(path)} is {value.dtype} {shown(tuple(value.shape))} in the training state; it must be "
                f"{'an integer' if kinds[key] else 'floating-point numbers'} of shape {shape}. {_AGAIN}"
            )
        if kinds[key] and not 0 <= int(value) <= _MOST_STEPS:
            raise ValueError(f"{shown(path)} is {int(value)} in the training state, which counts no steps. {_AGAIN}")
        found.setdefault(name, {})[key] = value
    for name, entries in found.items():
        if missing := sorted(set(kinds) - set(entries)):
            raise ValueError(f"The training state of {name} lacks {', '.join(missing)}. {_AGAIN}")
    return found
