"""Data sets: files of every kind, templates and labels, turned into examples."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex.recipes.config.data_spec import DataSpec
from loraplex.recipes.config.run_config import explain, joined
from loraplex.recipes.data.tasks import build_mixture, load_task
from tests.fuzz.draw import TEXTS, Draw, mutate_bytes, mutate_tree, short
from tests.fuzz.room import Room
from tests.fuzz.verdict import Result, fault_of, text_of
from tests.fuzz.watch import Watch, files_of, limited

TEMPLATES = (
    "{text}", "review : {text}\n", "{label}", "{text.__class__}", "{text[0]}", "{text!r}", "{text!s:>5}", "{n:c}",
    "{text:{label}}", "{text:{n}}", "{0}", "{}", "{", "}", "{{}}", "{text", "{missing}", "{text!x}", "{n:.3f}",
    "{text:=^9}", "{text:99999999999}", "{n:d}",
    "{ text }", "{text}{text}", "", " ", "{n:{n}}", "{deep}", "{text:%Y}", "{n:,}", "{n:e}", "\x00{text}",
)  # fmt: skip
_WORDS = (
    b"NaN", b"[" * 3000, b"{" * 60_000, b'"', b"\x00", b"\xe2\x80\xa8", b"\r", b"1" * 5000, b"\\ud800", b",", b"'",
    b'{"a":' * 2000, b"null", b'"' + b"x" * 200_000 + b'"',
)  # fmt: skip
_PLAIN = re.compile(r"(?:[^{}]|\{(?:text|label|n)\})*")
SPEC_FIELDS = (
    "name", "split", "subset", "eval_path", "eval_split", "eval_fraction", "eval_size", "test_path", "test_split",
    "test_fraction", "test_size", "split_seed", "weight", "max_examples", "prompt", "response", "messages", "labels",
    "text_column", "text_pair_column", "label_column", "choices", "generate", "path", "unknown",
)  # fmt: skip


def run(draw: Draw, room: Room, place: Path, watch: Watch) -> Result:
    """One case."""
    rows = _rows(draw)
    kind = draw.choice(["sft", "sft", "sft" if draw.messages else "classification"])  # type: ignore[attr-defined]
    path = _write(draw, place, rows)
    spec = _spec(draw, path)
    result = Result("data", f"data {kind}")
    places = files_of(place)
    cache = room.folder / "home"
    with watch.on(place, cache) as seen:
        try:
            with limited():
                checked = DataSpec.model_validate(spec)
                task = load_task(checked, draw.randrange(3), kind, draw.messages or draw.chance(0.1))  # type: ignore[arg-type]
                if draw.chance(0.3):
                    build_mixture([task], 0, draw.choice([None, 1, 50]))
        except BaseException as error:
            result.outcome, result.message = "refused", text_of(error)[:500]
            if type(error).__name__ == "ValidationError":
                # As a run's YAML file says it.
                error = ValueError(joined(explain(entry, "run.yaml", set(), DataSpec, {}) for entry in error.errors()))
            if fault := fault_of(error):
                result.bad(fault, error)
        else:
            _check(result, task, checked, rows if draw.intact else None)  # type: ignore[attr-defined]
    result.problems += [f"forbidden: {event}" for event in seen]
    if files_of(place) != places:
        result.bad("files changed")
    result.mutations = draw.log
    return result


def _rows(draw: Draw) -> Any:
    rows: Any = [
        {"text": f"the film is {draw.choice(['dull', 'bright'])} {n}", "label": draw.choice(["good", "bad"]), "n": n}
        for n in range(draw.choice([2, 5, 12]))
    ]
    draw.messages = draw.chance(0.2)  # type: ignore[attr-defined]
    if draw.messages:  # type: ignore[attr-defined]
        rows = [{"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
                for row in rows]  # fmt: skip
    draw.intact = not draw.chance(0.4)  # type: ignore[attr-defined]
    for _ in range(0 if draw.intact else draw.times()):  # type: ignore[attr-defined]
        rows = mutate_tree(draw, rows, ["text", "label", "n", "messages", "", None])  # type: ignore[list-item]
    return rows


def _write(draw: Draw, place: Path, rows: Any) -> Path:
    suffix = draw.choices([".jsonl", ".json", ".csv", ".parquet", ".txt", ""], [6, 3, 4, 1, 0.2, 0.3])[0]
    draw.note(suffix)
    items = rows if isinstance(rows, list) else [rows]
    makers: dict[str, Callable[[], bytes]] = {
        ".jsonl": lambda: b"".join(_json(row) + b"\n" for row in items),
        ".json": lambda: _json(rows),
        ".csv": lambda: _csv(items),
        ".parquet": lambda: _parquet(items),
    }
    content = makers.get(suffix, lambda: _json(rows))()
    if draw.chance(0.25):
        draw.intact = False  # type: ignore[attr-defined]
        content = mutate_bytes(draw, content, _WORDS)
    if suffix == "":
        folder = place / "set"
        folder.mkdir()
        name = draw.choice(
            ["train.jsonl", "train.csv", "dataset_info.json", "dataset_dict.json", "state.json", "x.txt"]
        )
        (folder / name).write_bytes(content)
        return folder
    path = place / f"data{suffix}"
    path.write_bytes(content)
    return path


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _csv(rows: list[Any]) -> bytes:
    text = io.StringIO()
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else ["text", "label"]
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        writer.writerow([str(v)[:2000] for v in row.values()] if isinstance(row, dict) else [str(row)[:2000]])
    return text.getvalue().encode("utf-8", "replace")


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    try:
        parquet.write_table(pa.Table.from_pylist(rows), sink)
    except Exception:
        return b"PAR1 no table PAR1"
    return sink.getvalue()


def _spec(draw: Draw, path: Path) -> Any:
    spec: Any = {"path": str(path), "prompt": "review : {text}", "response": "{label}"}
    if draw.messages is not draw.chance(0.1):  # type: ignore[attr-defined]
        spec = {"path": str(path), "messages": "messages"}
    for _ in range(draw.choice([0, 1, 1, 2])):
        action = draw.randrange(4)
        if action == 0:
            spec[draw.choice(["prompt", "response"])] = draw.choice(TEMPLATES)
        elif action == 1:
            spec["labels"] = draw.choice([{"good": "good", "bad": "bad"}, {}, {"good": "x"}, {"good": "a", "bad": "a"},
                                          {0: "a", True: "b"}, draw.value()])  # fmt: skip
        elif action == 2:
            field, value = draw.choice([
                ("eval_size", 2), ("eval_size", 10**9), ("eval_fraction", 0.3), ("eval_fraction", 1e-300),
                ("test_size", 1), ("choices", ["good", "bad"]), ("choices", "text"),
                ("choices", [1, 2]), ("eval_path", str(path)),
                ("eval_path", "/etc/passwd"), ("eval_path", "\x00"), ("eval_split", "x"), ("weight", 1e308),
                ("max_examples", 1), ("text_pair_column", "label"), ("label_column", "n"), ("text_column", "n"),
                ("path", draw.choice(TEXTS)), ("path", "package:x"), ("subset", "../x"), ("split_seed", 2**70),
                ("generate", 10**12), ("messages", "text"), ("split", draw.choice(TEXTS)),
            ])  # fmt: skip
            spec[field] = value
        else:
            spec = mutate_tree(draw, spec, SPEC_FIELDS)
            if not isinstance(spec, dict):
                break
    draw.note(short(spec, 200))
    return spec


def _check(result: Result, task: Any, spec: DataSpec, rows: Any) -> None:
    """Examples of plain templates over intact rows are what replacing the columns' names gives."""
    plain = spec.prompt is not None and _PLAIN.fullmatch(spec.prompt) and _PLAIN.fullmatch(spec.response or "")
    if rows is None or not plain or task.kind != "sft" or spec.labels or spec.max_examples or "text" not in rows[0]:
        return
    if isinstance(task.train[0]["prompt"], list) or spec.eval_path or spec.test_path:
        return
    made = {(e["prompt"], e["completion"].strip()) for part in (task.train, task.eval, task.test) if part for e in part}
    asked = {(_fill(spec.prompt or "", row).rstrip(" "), _fill(spec.response or "", row).strip()) for row in rows}
    if made != asked:
        result.bad(f"examples differ from their rows: {short(sorted(made ^ asked)[:2], 150)}")


def _fill(template: str, row: dict[str, Any]) -> str:
    return re.sub(r"\{(text|label|n)\}", lambda match: str(row[match[1]]), template)
