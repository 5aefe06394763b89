"""`to_plain`: an adapter's folder → the folder of a plain LoRA. A hit reads a few files and loads no weights."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loraplex.export.plain_cache import Hold, PlainCache, size_limit
from loraplex.export.wish import WEIGHTS_NAME, WISH_NAME, Wish, read_json, sha256_of
from loraplex.tuner.config import AdapterConfig
from loraplex.version import __version__

CONFIG_NAME = "adapter_config.json"
_CONVERSION = f"1 {__version__}"
"""Another conversion may write other files: entries of an older one are not used."""
_MAX_CONFIG = 16 << 20
_RACY = 2.0
"""Seconds in which a file can change again without a later time: its content is read again instead."""


def to_plain(folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a plain LoRA that equals the adapter in `folder`, from a cache or converted now.

    Several processes that ask at once convert once. Nothing in the folder is executed, and nothing in it is written.
    Dual LoRA needs a rank and MASA's router its mean gates: `loraplex export --remember` writes both beside the
    adapter.

    Args:
        folder: an adapter's folder. One that is none of ours is returned as it is.
        base: folder or hub id of the base model, of which only the config is read; None takes the adapter's own.

    Raises:
        ValueError: the folder holds no whole adapter, or its ΔW has no plain form; the message names the remedy.
        OSError: the base model's config can't be read.
    """
    source = _Source(Path(folder).absolute(), base)
    settings = source.settings()
    if not _is_ours(settings.get("peft_type")):
        return Path(folder)
    cache, signature = PlainCache(), source.signature()
    digest = cache.seen(source.key, signature) or source.digest()
    path = cache.find(digest)
    if path is None:
        with cache.locked(digest):
            path = cache.find(digest) or _convert(source, settings, cache, digest, signature)
        cache.shrink(size_limit())
    if source.is_settled(signature):
        cache.see(source.key, signature, digest)
    return path


def _is_ours(peft_type: object) -> bool:
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) if isinstance(peft_type, str) else None  # type: ignore[call-overload]
    return known is not None and issubclass(known, AdapterConfig)


def hold(path: Path) -> Hold | None:
    """Keep a folder that `to_plain` returned from being removed for as long as the returned object lives."""
    return PlainCache().hold(path)


@dataclass(frozen=True)
class _Source:
    """An adapter's folder and its base: all that decides what the conversion writes."""

    folder: Path
    base: str | os.PathLike[str] | None

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{_CONVERSION}\0{os.path.realpath(self.folder)}\0{self.base}".encode()).hexdigest()[:32]

    def settings(self) -> dict[str, Any]:
        """The adapter's config, as far as it is JSON."""
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder: give the folder of a saved adapter.")
        try:
            return read_json(self.folder / CONFIG_NAME, _MAX_CONFIG)
        except ValueError as error:
            raise ValueError(f"{self.folder} holds no adapter that can be read: {error}") from None

    def base_name(self, settings: dict[str, Any]) -> str:
        """Folder or hub id of the base model."""
        name = settings.get("base_model_name_or_path") if self.base is None else os.fspath(self.base)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.folder} does not name its base model: give base=….")
        return name

    def files(self) -> list[Path]:
        """The files that decide the outcome; some need not exist."""
        base = self.settings().get("base_model_name_or_path") if self.base is None else os.fspath(self.base)
        beside = [Path(base) / "config.json"] if isinstance(base, str) and os.path.isdir(base) else []
        return [*(self.folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, WISH_NAME)), *beside]

    def signature(self) -> list[Any]:
        """Sizes, times and places of the files: the same as long as nobody writes them."""
        found: list[Any] = []
        for path in self.files():
            try:
                stat = path.stat()
            except FileNotFoundError:
                found.append(None)
            else:
                found.append([stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev])
        return found

    def is_settled(self, signature: list[Any]) -> bool:
        """Whether a later change of a file must change the signature."""
        return all(time.time() - max(stat[1:3]) / 1e9 > _RACY for stat in signature if stat is not None)

    def digest(self) -> str:
        """A hash of the contents."""
        whole = hashlib.sha256(_CONVERSION.encode())
        for path in self.files():
            whole.update((sha256_of(path) if path.is_file() else "none").encode())
        if not any(path.name == "config.json" for path in self.files()):
            whole.update(f"\0{self.base}".encode())  # a hub id
        return whole.hexdigest()[:40]


def _convert(source: _Source, settings: dict[str, Any], cache: PlainCache, digest: str, signature: list[Any]) -> Path:
    wish = Wish.read(source.folder)
    if wish.weights is not None and wish.weights != sha256_of(source.folder / WEIGHTS_NAME):
        raise ValueError(
            f"{source.folder / WISH_NAME} holds mean gates of other weights than the adapter has now: measure them "
            "again with loraplex export --calibration --remember."
        )
    from loraplex.export.skeleton import write_plain

    write_plain(source.folder, source.base_name(settings), wish, cache.staging(digest))
    if source.signature() != signature:
        raise ValueError(f"{source.folder} changed while it was read: try again when it is written whole.")
    return cache.put(digest, settings["peft_type"], source.folder)
