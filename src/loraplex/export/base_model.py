"""A base model's folder before transformers reads it, and what transformers says of one that it can't read.

A base model comes from as far away as its adapter, which names it. Its config may ask for code, for a structure that
would take hours to build, or for files of other folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from loraplex.export.checkpoint_files import indexed
from loraplex.io.field_types import shown
from loraplex.io.reading import file_name, message_of, read_json
from loraplex.runtime.out_of_memory import is_out_of_memory

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_MOST = dict.fromkeys(
    ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer"), 2000
)
# transformers writes a name for each label, and makes the numbers of all positions when it builds some embeddings.
_MOST |= {"num_labels": 10**6}
"""Settings of a config that are counted out while a model is built, and the most that is built."""


def check_base(folder: Path) -> None:
    """Refuse what a base model's folder can make transformers do beside building a model of its own classes.

    Raises:
        ValueError: names the file, and what it asks for.
    """
    for path in (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe or a device, from which reading may never end: remove it.")
    file = folder / "config.json"
    if not file.is_file():
        return
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        indexed(index)
    if (folder / "adapter_config.json").is_file():
        # transformers would go on to load it, and the base model that it names, in place of this one.
        raise ValueError(
            f"{folder} holds an adapter beside its model: merge it, or take adapter_config.json out of the folder."
        )
    config = read_json(file, dict)
    _check_settings(file, config)
    for name in _other_configs(file, config):
        if (folder / name).is_file():
            _check_settings(folder / name, read_json(folder / name, dict))


def _other_configs(file: Path, config: dict[str, Any]) -> Iterator[str]:
    """Configs that other versions of transformers read in place of `file`."""
    names = config.get("configuration_files", [])
    if not isinstance(names, list):
        raise ValueError(f"{file}: configuration_files is {shown(names)}, not a list of files.")
    for name in names:
        yield file_name(name, f"{file}, configuration_files")
        try:
            Version(name.removeprefix("config.").removesuffix(".json"))
        except InvalidVersion:
            raise ValueError(f"{file}: configuration_files names {shown(name)}, not config.VERSION.json.") from None


def _check_settings(file: Path, config: dict[str, Any]) -> None:
    """Check a config, and the configs of its parts (text, vision, …)."""
    for key in _KERNELS:
        for name in config[key].values() if isinstance(config.get(key), dict) else [config.get(key)]:
            if isinstance(name, str) and set(name) & set("/:"):
                raise ValueError(f"{file}: {key} is {shown(name)}, code from a repository: remove the key.")
    if "transformers_weights" in config:
        file_name(config["transformers_weights"], f"{file}, transformers_weights")
    for key, most in _MOST.items():
        if isinstance(config.get(key), (int, float)) and config[key] > most:
            raise ValueError(f"{file}: {key} is {shown(config[key])}, more than the {most:,} that are built.")
    for inner in config.values():
        if isinstance(inner, dict):
            _check_settings(file, inner)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """What transformers says of files that it can't read, as a ValueError that names them."""
    try:
        yield
    except (OSError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:
        # transformers checks little of a file before it computes with it: a broken one ends in any kind of error.
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{what} needs code that it brings along, which only you can allow. If you trust it: "
                "--trust-remote-code (trust_remote_code: true in a run file)."
            ) from error
        raise ValueError(f"{what} can't be read: {type(error).__name__}: {message_of(error)}") from error
