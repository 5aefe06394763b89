"""Factors that many layers read: what a method shares between layers, and how a layer reads it.

The bank (`bank.py`) owns them; a layer looks a factor up in its forward.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loraplex.io.field_types import shown
from loraplex.runtime.parallel import is_sharded, register_external_parameters, replicated, to_local
from loraplex.runtime.placement import NeverOffloaded
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.factors import Factors
from loraplex.tuner.families import Member
from loraplex.tuner.findings import Finding


class SharedFactors(NeverOffloaded, ABC):
    """What the layers of one adapter share: parameters, and the state of its schedule. A method subclasses this once.

    Names of parameters and buffers hold no dot, `<family>__<factor>`: PEFT looks for the adapter's name in a key just
    before the last dot.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    """Factors, without their family, that weight decay would undo."""
    state_names: ClassVar[tuple[str, ...]] = ()
    """Buffers, without their family, that hold the state of the schedule in an adapter's file."""

    def __init__(self, config: AdapterConfig, families: dict[str, list[Member]]) -> None:
        super().__init__()
        self._registered_external = False
        self.families = list(families)
        # Unregistered: the layers own these modules.
        self._factors = {name: [member.factors for member in family] for name, family in families.items()}
        self.add_shared(config, families)
        for name, family in families.items():
            for index, member in enumerate(family):
                # On the CPU even where torch's default device is another, such as "meta" while a model is loaded.
                place = torch.tensor([index], device="cpu")
                # Through __dict__: a registered reference would make every layer own the shared factors.
                member.factors.__dict__.update(shared=self, family=name, index=index, place=place)

    def add_shared(self, config: AdapterConfig, families: dict[str, list[Member]]) -> None:
        """Create and initialise what the families share."""

    def read_by(self, factors: Factors) -> list[nn.Parameter]:
        """The shared parameters that one layer's forward and backward read. None by default."""
        return []

    def train(self, mode: bool = True) -> SharedFactors:
        """Switch modes; when training begins, tell ZeRO-3 which layers read which shared parameters."""
        super().train(mode)
        self._move_places()
        first = next(self.parameters(), None)
        if mode and first is not None and is_sharded(first) and not self._registered_external:
            self._registered_external = True
            for factors in self.member_factors():
                register_external_parameters(factors, self.read_by(factors))
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> SharedFactors:
        super()._apply(*args, **kwargs)
        self._move_places()
        return self

    def _move_places(self) -> None:
        # Compiled layers select by `place` (see `select`). It moves to their device, so that no forward copies it.
        like = next(chain(self.parameters(), self.buffers()), None)
        for factors in self.member_factors():
            if like is not None and not like.is_meta:
                factors.__dict__["place"] = factors.__dict__["place"].to(like.device)

    def stale_parameters(self) -> list[str]:
        """Names of parameters that no layer reads any more; they are not saved."""
        return []

    def training_bytes(self) -> int:
        """What training keeps beside gradients and the optimizer's own state, in bytes."""
        return 0

    def end_schedule(self) -> bool:
        """Take on the size of the adapter after its schedule, on the meta device; False if it has none that counts."""
        return False

    # A saved adapter, whose base model is not at hand

    @classmethod
    def stored_readers(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: str, factor: str, layers: int
    ) -> list[int]:
        """Which layers of a family read a stored factor; all of them by default, none where the file does not tell.

        Args:
            config: the adapter's settings.
            tensors: the shared tensors of its file, by name.
            family: the layers' role.
            factor: the factor's name without the family.
            layers: how many layers the family has, as far as their own factors tell.

        Raises:
            ValueError: the method has no such factor (see `foreign`).
        """
        return list(range(layers))

    @classmethod
    def stored_findings(cls, tensors: Mapping[str, Tensor]) -> list[Finding]:
        """What the buffers in an adapter's file tell, after a check of each.

        Raises:
            ValueError: a buffer holds what training can't have led to.
        """
        return []

    def layout(self) -> dict[str, tuple[str, int]]:
        """Module → its family and its place in it."""
        return {f.module_name: (name, i) for name, family in self._factors.items() for i, f in enumerate(family)}

    def share_like(self, others: list[SharedFactors]) -> None:
        """Share between layers as `others` do, for an adapter that holds their sum. Nothing by default."""

    def before_save(self, adapter_name: str) -> None:
        """Called when the adapter is about to be saved. Nothing by default."""

    def buffer_names(self) -> list[str]:
        """Names of the buffers, which hold the state of the method's schedule."""
        return [name for name, _ in self.named_buffers(recurse=False)]

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Check values that are about to be loaded into buffers.

        Args:
            state: buffer's name → value, of some or all buffers.

        Raises:
            ValueError: the adapter can't be in this state.
        """
        for name, value in state.items():
            like = self.get_buffer(name)
            if value.dtype != like.dtype or value.shape != like.shape:
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape)} in the adapter's weights, but {like.dtype} "
                    f"{tuple(like.shape)} here: the file is broken, or for another model."
                )
            if not value.is_meta:
                self.check_buffer(name, to_local(value))

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """`check_state` of a state dict, which may have been cast as a whole to another dtype."""
        state = {name: state_dict[prefix + name] for name in self.buffer_names() if prefix + name in state_dict}
        for name, value in state.items():
            cast = value.to(self.get_buffer(name).dtype)
            if value.is_meta or torch.equal(to_local(cast).to(value.dtype), to_local(value)):
                state[name] = cast
        self.check_state(state)

    @classmethod
    def check_buffer(cls, name: str, value: Tensor) -> None:
        """Raise a ValueError if the buffer `name` can't have this `value`, whose dtype and shape are right."""

    def fill_stale(self, prefix: str, state: dict[str, Tensor]) -> None:
        """Add the parameters that `stale_parameters` left out to a `state` that was read from a file.

        Its keys are `prefix` + parameter's name.
        """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # When accelerate loads on rank 0 only, it expects every entry on a mesh, where FSDP2 does not put buffers.
        like = next(chain(self.parameters(), *(f.parameters() for f in self.member_factors())))
        for name, buffer in self.named_buffers(recurse=False):
            destination[prefix + name] = replicated(buffer, like)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, _ in self.named_buffers(recurse=False):
            if isinstance(value := state_dict.get(prefix + name), DTensor):
                state_dict[prefix + name] = value.to_local()
        self.check_loaded(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def member_factors(self) -> Iterator[Factors]:
        """The factors of all layers of this adapter."""
        for family in self._factors.values():
            yield from family


def foreign(name: str) -> ValueError:
    """The error for a tensor in an adapter's file that the adapter's method does not share."""
    return ValueError(
        f"The adapter's weights hold {shown(name)}, but nothing that says which layers read it: the file is broken; "
        "copy or download the adapter again."
    )


def check_stored(name: str, buffer: Tensor, fits: bool) -> None:
    """Raise a ValueError unless a buffer in an adapter's file holds integers and `fits` in shape."""
    if buffer.dtype != torch.int64 or not fits:
        raise ValueError(
            f"{shown(name)} is {buffer.dtype} {tuple(buffer.shape)} in the adapter's weights, which no such record can "
            "be: the file is broken; copy or download the adapter again."
        )


def select(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """`tensors[index]` for an index `(1,)` that is a tensor, so that one compiled graph serves every layer.

    torch.compile specialises a graph on the integers and names that it reads, and compiles anew for others, at most
    eight times. The gradient of the tensors that are not selected is zero.
    """
    return (
        torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
        .index_select(0, index.to(tensors[0].device))
        .squeeze(0)
    )


def read(shared: SharedFactors, name: str, like: Tensor | Any) -> Tensor:
    """The shared tensor `name` on the device of `like`: layers of a dispatched model live on several devices."""
    tensor: Tensor = getattr(shared, name)
    return tensor if tensor.device == like.device else tensor.to(like.device)
