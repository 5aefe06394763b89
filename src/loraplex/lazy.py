"""`import loraplex` costs milliseconds: PEFT and torch are imported when something needs them.

The promise is that the methods are registered wherever PEFT is used after `import loraplex`. It holds in every order:

- PEFT is imported already: the whole package is imported at once.
- PEFT is imported later: the package is imported as soon as PEFT's own import ends.
- PEFT is just being imported, and loraplex by something that PEFT imports: the same.
- A public name, or a module that needs PEFT, is asked for: the whole package is imported first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIGHT = frozenset(
    {"__main__", "cli", "engines", "integrations", "lazy", "plain_cache", "plain_folder", "version", "wish"}
)
"""Modules of this package that need neither PEFT nor torch, and may be imported without them."""

_HOST = "peft"
_PACKAGE = __name__.rpartition(".")[0]


class _WatchedSpec(ModuleSpec):
    """The spec of a module whose import is under way; calls `then` when it ends well.

    Python clears `_initializing` when a module has been executed. There is no public hook at that moment, and none
    at all for a module that is already being executed.
    """

    then: Callable[[], object]

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            then = self.then
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            # The entry is missing if the module raised an error.
            if self.name in sys.modules:
                then()


def _watch(spec: ModuleSpec, then: Callable[[], object]) -> None:
    spec.__class__ = _WatchedSpec
    spec.then = then  # type: ignore[attr-defined]


def when_imported(name: str, then: Callable[[], object]) -> bool:
    """Call `then` once the module `name` is imported whole: now, or when its import, which is under way, ends.

    Returns:
        False if the import of the module has not begun.
    """
    module = sys.modules.get(name)
    if module is None:
        return False
    spec = module.__spec__
    # A module that was put into sys.modules by hand has no spec.
    if spec is not None and spec.__dict__.get("_initializing"):
        _watch(spec, then)
    else:
        then()
    return True


class _Imported(Loader):
    """Hands out a module that was imported while it was looked for; a second copy would have other classes."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    @classmethod
    def spec_of(cls, module: ModuleType) -> ModuleSpec:
        """A spec with such a loader. The module has it until then: Python prefers a module's own to what we return."""
        module.__spec__ = ModuleSpec(module.__name__, cls(module))
        return module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    """Waits for PEFT, and imports the whole package before any module of it that needs PEFT."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if _state.loading:
            return None
        if name == _HOST:
            spec = _found_by_others(name, path, target)
            if spec is not None:
                _watch(spec, load)
            return spec
        package, _, inner = name.partition(".")
        if package != _PACKAGE or inner.partition(".")[0] in LIGHT:
            return None
        load()
        return _Imported.spec_of(sys.modules[name]) if name in sys.modules else None


def _found_by_others(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if not isinstance(finder, _Finder) and (spec := finder.find_spec(name, path, target)) is not None:
            return spec
    return None


class _State:
    loading = False
    finder: _Finder | None = None


_state = _State()


def load() -> ModuleType:
    """Import PEFT and the whole package, which registers the methods; returns the module of the public names."""
    if not _state.loading:
        _state.loading = True
        try:
            # PEFT first, and whole: modules of ours that import parts of it in their own order would meet a half one.
            importlib.import_module(_HOST)
            importlib.import_module(f"{_PACKAGE}.public")
        finally:
            _state.loading = False
        if _state.finder is not None:
            sys.meta_path.remove(_state.finder)
            _state.finder = None
    return importlib.import_module(f"{_PACKAGE}.public")


def install() -> None:
    """See that the methods are registered as soon as PEFT is imported."""
    if _state.finder is None and not when_imported(_HOST, load):
        _state.finder = _Finder()
        sys.meta_path.insert(0, _state.finder)
