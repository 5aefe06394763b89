"""Checks that the files of a saved adapter can be read, before anything is made of them."""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from loraplex.io.field_types import shown
from loraplex.io.reading import message_of, read_json


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in `adapter_config.json`: a mapping whose `peft_type` is a name. No adapter class is imported.

    Raises:
        ValueError: names the file and the remedy.
    """
    path = os.path.join(folder, CONFIG_NAME)
    again = "copy or download the adapter again"
    try:
        settings: dict[str, Any] = read_json(Path(path), dict, again)
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(folder)} holds no adapter: {CONFIG_NAME} is missing.") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}).") from None
    with open(path, "rb") as file:
        if file.read(3) == BOM_UTF8:
            raise ValueError(f"{path} begins with a byte order mark, which PEFT can't read: save it as plain UTF-8.")
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or not re.fullmatch(r"\w+", kind, re.ASCII):
        raise ValueError(
            f'{path}: peft_type={shown(kind)} must be the name of an adapter type, such as "LORA" or "MASA": {again}.'
        )
    return settings


def check_adapter_files(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that `folder` holds an adapter that can be read: JSON, and a whole safetensors file.

    Returns:
        The settings in `adapter_config.json`.

    Raises:
        ValueError: names the file and the remedy.
    """
    settings = read_settings(folder)
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(weights):
        try:
            # Opening checks the header against the file's length: a truncated file is found here.
            with safe_open(weights, framework="pt") as tensors:
                keys = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{weights} is not a whole safetensors file ({message_of(error, 500)}): copy or download the adapter "
                "again."
            ) from None
        marks = [f".{settings['peft_type'].lower()}_{kind}." for kind in ("factors", "shared")]
        in_full = settings.get("modules_to_save")
        if isinstance(in_full, list) and in_full and all(any(mark in key for mark in marks) for key in keys):
            raise ValueError(
                f"{weights} lacks the modules that were trained in full ({shown(in_full)}): "
                "copy or download the adapter again."
            )
    elif os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
        raise ValueError(
            f"{os.path.join(folder, WEIGHTS_NAME)} is a pickle, which can run code when it is read; "
            "loraplex reads safetensors only: save the adapter again with safe_serialization=True."
        )
    return settings
