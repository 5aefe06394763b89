"""Tells whether an error means that memory ran out."""

from __future__ import annotations

from typing import Literal

import torch

Phase = Literal["start", "step", "evaluation"]
# The CPU's allocator raises plain RuntimeErrors, and so do libraries that an accelerator gives nothing.
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")


class OutOfMemory(RuntimeError):
    """Memory ran out in a training step (counted from 1), or in the evaluation after a step."""

    def __init__(self, phase: Phase, step: int) -> None:
        super().__init__(f"out of memory in {'step' if phase == 'step' else 'the evaluation after step'} {step}")
        self.phase = phase


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
