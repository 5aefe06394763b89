"""What came of a run, and what it was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraplex.recipes.evaluation import Metrics

VERSIONS_NAME = "versions.json"
_REPORTED = ("loraplex", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors")


@dataclass
class Result:
    """What came of a run."""

    output_dir: Path
    step: int
    before: dict[str, Metrics] = field(default_factory=dict)
    after: dict[str, Metrics] = field(default_factory=dict)
    trainable: int = 0
    seconds: float = 0.0
    step_seconds: float | None = None
    """Median of a step, without evaluation and saving."""
    peak_memory: int = 0
    """Bytes: of the accelerator where there is one, else of the process."""
    signal: int | None = None
    """The signal that ended the run early, if one did; its checkpoint is `checkpoint`."""
    checkpoint: Path | None = None


def peak_memory() -> int:
    """Bytes at the peak: of the accelerator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, Any]:
    """What a run was made with."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _REPORTED:
        found[package] = importlib.metadata.version(package)
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found
