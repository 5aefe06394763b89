"""The terminal: what is printed there is text and nothing that a terminal obeys."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from loraplex.io.reading import printable

_format_warning = warnings.formatwarning


class PlainConsole(Console):
    """Shows text as it is: names from files are no markup, and their control characters are written as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed comes by here, in a table too."""
        return super().render_str(printable(text), **options)


def make_console() -> Console:
    """Standard output; as wide as it takes where no terminal sets the width."""
    return PlainConsole() if sys.stdout.isatty() else PlainConsole(width=200)


def size_text(size: float) -> str:
    """Bytes as people read them: "121.6 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _printable_warning(*args: Any, **options: Any) -> str:
    """A warning as it may be shown: PEFT's repeat names from an adapter's file."""
    return printable(_format_warning(*args, **options))


def quiet(data: bool = True) -> None:
    """Show our own progress and the libraries' errors, but not their advice; `data`: the command reads data sets."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    # Deprecations between the libraries are nothing that a user of this command can act on.
    warnings.formatwarning = _printable_warning
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    transformers.utils.logging.set_verbosity_error()
    if data:
        import datasets

        datasets.utils.logging.set_verbosity_error()
