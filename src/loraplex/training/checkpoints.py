"""Checkpoints of a run: which of them are whole, and whether a run may continue from one."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loraplex.training.config import ConfigError, RunConfig, load_run

RUN_NAME = "run.yaml"
LABELS_NAME = "labels.json"
SAVING = ".saving"
"""Where a checkpoint is written before it gets its name."""

# Keys that say how often to write something, or where; they don't touch what is trained.
_HARMLESS = {
    *("output_dir", "train.logging_steps", "train.eval_steps", "train.save_steps", "train.save_total_limit"),
    *("train.per_device_eval_batch_size", "train.report_to", "train.dataloader_num_workers"),
}


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of updates behind a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def last_complete(output_dir: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones.

    Raises:
        ConfigError: there is no checkpoint, or none of them is whole.
    """
    faults: list[str] = []
    for checkpoint in checkpoints(output_dir):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name}: {fault}")
    if faults:
        raise ConfigError(
            f"{output_dir} holds no whole checkpoint ({'; '.join(faults)}): "
            "start again without --resume, in another output_dir or after deleting these."
        )
    raise ConfigError(f"{output_dir} holds no checkpoint to resume from: start the run without --resume.")


def fault_of(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, or None; a kill while it was written leaves files out or cuts them short."""
    state_file = checkpoint / "trainer_state.json"  # the Trainer writes it last
    try:
        step = json.loads(state_file.read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{state_file.name} is missing"
    except (ValueError, KeyError):
        return f"{state_file.name} is cut off"
    if step != step_of(checkpoint):
        return f"{state_file.name} is of step {step}"
    if not any(p.name.startswith(("optimizer", "global_step", "pytorch_model_fsdp")) for p in checkpoint.iterdir()):
        return "the optimizer's state is missing"
    for file in sorted(checkpoint.rglob("*")):
        # torch's files are zip archives, whose directory stands at the end
        if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
        if file.suffix == ".safetensors" and not _is_whole(file):
            return f"{file.name} is cut off"
    return None


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def check_fresh(output_dir: Path) -> None:
    """Refuse to start a run over another one.

    Raises:
        ConfigError: `output_dir` holds checkpoints or a finished adapter.
    """
    found = checkpoints(output_dir)
    if found:
        raise ConfigError(
            f"{output_dir} holds checkpoints of a run (newest: {found[0].name}): continue it with --resume, "
            "choose another --output_dir, or delete the folder."
        )
    if (output_dir / "adapter_config.json").is_file():
        raise ConfigError(f"{output_dir} holds a trained adapter: choose another --output_dir, or delete the folder.")


def check_same_run(run: RunConfig, output_dir: Path) -> list[str]:
    """Compare a run to be resumed with the one that wrote `output_dir`; returns warnings.

    Raises:
        ConfigError: the model, the data, the method or its adapter differ: that is another run.
    """
    path = output_dir / RUN_NAME
    if not path.is_file():
        return [f"{path} is missing: can't check that this is the same run"]
    before, now = _flat(load_run(path).model_dump()), _flat(run.model_dump())
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in _HARMLESS]
    for key in changed:
        if not key.startswith("train.") or key == "train.seed":
            raise ConfigError(
                f"can't resume {output_dir}: {key} was {before.get(key)!r} and is {now.get(key)!r} now. "
                f"Resume with {path}, or start a new run in another --output_dir."
            )
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r} now: the result is not that of an unbroken run"
        for key in changed
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        items = dict(enumerate(tree)).items()
    else:
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
