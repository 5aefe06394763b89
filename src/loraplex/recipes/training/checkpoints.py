"""Checkpoints of a run: which of them are whole, and whether a run may continue from one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from loraplex.io.field_types import shown
from loraplex.io.reading import read_json, relative_path
from loraplex.recipes.config.run_config import ConfigError, RunConfig, load_run

RUN_NAME = "run.yaml"
LABELS_NAME = "labels.json"
SAVING = ".saving"
"""Where a checkpoint is written before it gets its name, and where an old one goes to be deleted."""
UNMOVED = ".adapter-"
"""What the folders are called in which the adapter is written at the end."""
FILES_NAME = "files.json"
"""A checkpoint's file → its size and digest."""

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
        fault = verify(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name}: {fault}")
    if faults:
        raise ConfigError(
            f"{output_dir} holds no whole checkpoint ({'; '.join(faults)}): "
            "start again without --resume, in another output_dir or after deleting these."
        )
    raise ConfigError(f"{output_dir} holds no checkpoint to resume from: start the run without --resume.")


def write_manifest(checkpoint: Path) -> None:
    """List the checkpoint's files with their sizes and digests; what is not as listed is not whole."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    listed = {str(PurePosixPath(file.relative_to(checkpoint))): _signature(file) for file in files}
    (checkpoint / FILES_NAME).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def verify(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, or None: a file that is missing, cut off or damaged."""
    try:
        listed = read_json(checkpoint / FILES_NAME, dict)
    except FileNotFoundError:
        return f"{FILES_NAME} is missing"
    except ValueError:
        return f"{FILES_NAME} is cut off"
    for name, signature in listed.items():
        try:
            file = checkpoint / relative_path(name, FILES_NAME)
        except ValueError as error:
            return str(error)
        if not isinstance(signature, dict) or not isinstance(signature.get("bytes"), int):
            return f"{FILES_NAME} is damaged"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < signature["bytes"]:
            return f"{name} is cut off"
        if _signature(file) != signature:
            return f"{name} is damaged"
    return None


def _signature(file: Path) -> dict[str, int | str]:
    with file.open("rb") as data:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(data, "sha256").hexdigest()}


def outdated(output_dir: Path, step: int, limit: int | None, best: str | None) -> list[Path]:
    """The checkpoints beyond `limit`, now that the one of `step` is written; it and `best` stay.

    Those of later steps go first: the run fell back behind them because they are not whole.
    """
    found = sorted(checkpoints(output_dir), key=lambda path: (step_of(path) <= step, step_of(path)))
    spare = [path for path in found if step_of(path) != step and str(path) != best]
    return spare[: max(0, len(found) - limit)] if limit else []


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed process was in the middle of writing."""
    for path in output_dir.glob(".*"):
        if path.name == SAVING or path.name.startswith(UNMOVED):
            shutil.rmtree(path)
        elif path.suffix == ".tmp" and path.is_file():
            path.unlink()


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
                f"can't resume {output_dir}: {key} was {shown(before.get(key))} and is {shown(now.get(key))} now. "
                f"Resume with {path}, or start a new run in another --output_dir."
            )
    return [
        f"{key} was {shown(before.get(key))} and is {shown(now.get(key))} now: "
        "the result is not that of an unbroken run"
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
