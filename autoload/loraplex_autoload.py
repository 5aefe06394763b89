"""Imports loraplex once PEFT is there, in every program that imports torch.

torch calls `start` while it is being imported (entry-point group `torch.backends`). An error there would break
`import torch`, so none leaves this module: all are logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_LOG = logging.getLogger(__name__)
_NEEDED = ("peft", "torch", "transformers", "accelerate")
"""Packages that loraplex imports: one that is half imported would make it fail."""


class _Waiting(MetaPathFinder):
    """Sees every import, finds nothing itself, and imports loraplex at the first moment at which that can work.

    That is right after PEFT's import. Where transformers or torch imports PEFT in the middle of its own import, it is
    the first import after that.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if "peft" in sys.modules:
            self.try_now()
        elif name == "peft":
            return self._with_our_loader(name, path, target)
        return None

    def try_now(self) -> None:
        """Import loraplex unless something that it needs is being imported."""
        if self not in sys.meta_path or _under_way():
            return
        sys.meta_path.remove(self)
        try:
            import loraplex  # noqa: F401
        except Exception:  # a program that never meets an adapter of ours must not suffer
            _LOG.warning("loraplex could not be imported: PEFT does not know its adapter types", exc_info=True)

    def _with_our_loader(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _ThenUs(spec.loader, self)
                return spec
        return None


class _ThenUs(Loader):
    """PEFT's own loader, and what comes after it."""

    def __init__(self, loader: Any, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module has its own loader, as if we had never been there.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _executed.add("peft")
        self.waiting.try_now()


_executed: set[str] = set()
"""Modules whose code has run, although Python still calls them half imported."""


def _under_way() -> bool:
    """Whether a package that loraplex needs, or a module of it, is being imported."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _NEEDED and name not in _executed:
            spec = getattr(module, "__spec__", None)
            # Python's own mark; there is no public one.
            if spec is not None and getattr(spec, "_initializing", False):
                return True
    return False


def start() -> None:
    """Wait for PEFT. Called by torch; never raises."""
    try:
        if "loraplex" not in sys.modules and not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting())
    except Exception:
        _LOG.warning("loraplex does not wait for PEFT", exc_info=True)
