"""SGLang: `--lora-paths NAME=FOLDER` takes one of our adapter folders.

SGLang calls `register` in each of its processes (entry-point group `sglang.srt.plugins`) and hands every adapter's path
to `LoRAConfig`; weights and rank follow from the path that it keeps.
"""

from __future__ import annotations

import os
from typing import Any

from loraplex.export.plain_folder import hold, to_plain

TARGET = "sglang.srt.lora.lora_config.LoRAConfig.__init__"

_held: list[object] = []
"""Converted adapters in use, which the cache must not remove."""


def with_plain_path(
    config: Any, path: str | None = None, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `LoRAConfig.__init__`, with the path of a plain LoRA instead of ours.

    Raises:
        ValueError: the adapter can't be converted; SGLang reports it as the reason why it was not loaded.
        OSError: the base model's config can't be read.
    """
    # A hub id, or a config that is handed over without a folder, is SGLang's business.
    if path is not None and os.path.isdir(path):
        plain = to_plain(path)
        _held.append(hold(plain))
        path = str(plain)
    return (config, path, *args), kwargs


def register() -> None:
    """Hook into SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, with_plain_path, HookType.BEFORE)
