"""What is made of the config classes: the stored schemas, and docs/keys.md with a table for each section of the files.

`python -m tests.tables` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

from loraplex.commands import keys
from loraplex.commands.keys import Key, Section, sections
from loraplex.commands.schema import schema_text

PAGE = Path(__file__).parent.parent / "docs" / "keys.md"
_TITLES = {"run": "RUN.yaml", "study": "STUDY.yaml"}
_HEAD = """\
# Keys of RUN.yaml and STUDY.yaml

This page is made from the schemas that `loraplex schema` prints, as the help of `loraplex train` and `loraplex compare`
is. N stands for a position in a list, from 0, and NAME for a name of yours. What the keys do together stands in
[cli.md](cli.md).
"""


def stored(file: str) -> Path:
    """Where the package has the schema of the file "run" or "study"."""
    return Path(keys.__file__).with_name(f"{file}.schema.json")


def page() -> str:
    """The whole page. What a study has in common with a run stands there once."""
    blocks, seen = [_HEAD], []
    for file, title in _TITLES.items():
        blocks.append(f"## {title}\n")
        for section in sections(file):
            if section.keys not in seen or section.others:
                blocks.append(_block(section))
            seen.append(section.keys)
    return "\n".join(dict.fromkeys(blocks))


def _block(section: Section) -> str:
    heading = f"### {section.prefix}KEY: {section.description}\n\n" if section.prefix else ""
    rows = [f"| `{key.name}` | {_facts(key)} | {_cell(key.description)} |" for key in section.keys]
    table = "\n".join(["| key | values; default | meaning |", "|---|---|---|", *rows]) + "\n" if rows else ""
    others = f"{section.others}\n" if section.others else ""
    return heading + table + ("\n" if table and others else "") + others


def _facts(key: Key) -> str:
    types = _cell(key.type.replace(" | ", ", "))
    return f"{types}; required" if key.required else types if key.default is None else f"{types}; `{key.default}`"


def _cell(text: str) -> str:
    return text.replace("\n", "\\n").replace("|", "\\|")


if __name__ == "__main__":
    for name in _TITLES:
        stored(name).write_text(schema_text(name), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
