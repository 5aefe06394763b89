"""The tables of keys in docs/cli.md: `python -m tests.tables` writes them anew between their markers."""

from __future__ import annotations

import re
from pathlib import Path

from loraplex.commands.keys import Key, sections

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
_BLOCK = re.compile(r"(<!-- keys of (\w+): (\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with every table as the schemas have it."""
    return _BLOCK.sub(lambda found: f"{found[1]}{table(found[2], found[3])}{found[4]}", page)


def table(file: str, prefix: str) -> str:
    """The keys of the section with this prefix ("all" has none) as a Markdown table."""
    wanted = "" if prefix == "all" else prefix
    section = next(section for section in sections(file) if section.prefix == wanted)
    rows = (f"| `{key.name}` | {_facts(key)} | {_cell(key.description)} |" for key in section.keys)
    return "\n".join(["| key | values; default | meaning |", "|---|---|---|", *rows]) + "\n"


def _facts(key: Key) -> str:
    types = _cell(key.type.replace(" | ", ", "))
    return f"{types}; required" if key.required else types if key.default is None else f"{types}; `{key.default}`"


def _cell(text: str) -> str:
    return text.replace("\n", "\\n").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
