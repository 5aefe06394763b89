"""An adapter that holds NaN or Inf is neither merged nor exported, unless the user asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from loraplex.runtime.parallel import to_local

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


@contextmanager
def allow_nonfinite() -> Iterator[None]:
    """Let adapters that hold NaN or Inf be merged and exported in this block, as they are.

    Outside such a block, merging and exporting raise a ValueError that names the broken module: NaN in one factor makes
    a whole weight matrix NaN, and later nothing shows where it came from.

        with loraplex.allow_nonfinite():
            model.merge_and_unload()
    """
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def check_factors(update: Any) -> None:
    """Raise a ValueError if the factors of an update (`Factors` or `LoraUpdate`) hold NaN or Inf."""
    if not _allowed.get():
        form = update.lora_form()
        check_finite(update.module_name, update.parameters() if form is None else form)


def check_finite(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise a ValueError if one of the tensors that an adapter holds for the module `name` contains NaN or Inf."""
    if not _allowed.get() and not all(map(is_finite, tensors)):
        raise ValueError(
            f"The adapter holds NaN or Inf on {name}: it is broken; load an earlier checkpoint. To merge or export it "
            "all the same: `with loraplex.allow_nonfinite():`, or --allow-nonfinite on the command line."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether this process's shard of `tensor` holds no NaN and no Inf; true on the meta device."""
    local = to_local(tensor)
    return local.is_meta or bool(local.isfinite().all())
