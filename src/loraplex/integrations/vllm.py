"""vLLM: a request that names one of our adapter folders is served, without an export by hand.

vLLM calls `register` in each of its processes (entry-point group `vllm.general_plugins`). The server asks the resolver
for every model name that it does not know, so names are judged here before they become paths.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.export.plain_folder import hold, to_plain
from loraplex.io.field_types import shown
from loraplex.io.reading import message_of

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

FOLDER = "LORAPLEX_VLLM_ADAPTERS"
"""The variable that names the folder of adapters; requests name folders in it."""

_LOG = logging.getLogger("vllm.loraplex")  # vLLM shows what its own loggers say


class AdapterFolders:
    """Resolves the name of a model to the folder of that name; what vLLM calls a LoRAResolver."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.held: dict[Path, object] = {}
        """Converted adapters in use, which the cache must not remove."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter in the folder `lora_name`, or None, with a line in the log that says why.

        Never raises: vLLM does not catch errors around this call.
        """
        try:
            return await self._resolve(base_model_name, lora_name)
        except Exception as error:  # whatever a stranger's folder holds, the server lives on
            _LOG.warning("adapter %s can't be served: %s", shown(lora_name), message_of(error))
            return None

    async def _resolve(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        from vllm.lora.request import LoRARequest

        if not is_folder_name(lora_name):
            _LOG.warning("%s is no name of an adapter: it must be one folder of %s", shown(lora_name), self.root)
            return None
        folder = self.root / lora_name
        if not folder.is_dir():
            _LOG.info("there is no adapter %s in %s", shown(lora_name), self.root)
            return None
        plain = await asyncio.to_thread(to_plain, folder, base_model_name)
        self.held[plain] = self.held.get(plain) or hold(plain)
        # vLLM gives the request a number of its own.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(plain))


def is_folder_name(name: str) -> bool:
    """Whether `name` is the plain name of one visible folder: nothing that leads elsewhere."""
    separators = {"/", "\\", os.sep, "\0"}
    return 0 < len(name) <= 255 and name[0] != "." and name.isprintable() and not separators & set(name)


def register() -> None:
    """Register the resolver with vLLM if the variable names a folder. May be called more than once."""
    place = os.environ.get(FOLDER)
    if not place:
        return
    if not Path(place).is_dir():
        raise ValueError(f"{FOLDER}={place} is not a folder: give the folder whose subfolders are adapters.")
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class LoraplexResolver(AdapterFolders, LoRAResolver):
        """Our resolver, of the type that vLLM asks for."""

    registry: Any = LoRAResolverRegistry
    if "loraplex" not in registry.get_supported_resolvers():
        registry.register_resolver("loraplex", LoraplexResolver(Path(place).absolute()))
