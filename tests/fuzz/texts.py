"""Run and study files, and the values of overrides: YAML from a small grammar of traps, and broken bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from loraplex.recipes.config.arguments import adapter_config, check_train
from loraplex.recipes.config.run_config import load_run, parse_overrides, to_yaml
from loraplex.study.config import load_study
from loraplex.study.config import to_yaml as study_yaml
from tests.fuzz.draw import PATTERNS, TEXTS, Draw, mutate_bytes, mutate_tree, short
from tests.fuzz.room import Room, run_tree, study_tree
from tests.fuzz.verdict import Result, fault_of, text_of
from tests.fuzz.watch import Watch, files_of, limited

WORDS = (
    b"&a ", b"*a", b"*unknown", b"<<: *a\n", b"!!python/object/apply:os.system ['touch ran-code']", b"!!bool x",
    b"!!timestamp x", b"!!timestamp 2001-99-99", b"!!int x", b"!!float 1e", b"!!binary x", b"!!set {a, b}",
    b"!!omap []", b"!!str 5",
    b"!foo 5", b"!!null x", b"0x", b"0b2", b"1:99:99", b"1e999", b".inf", b"-.inf", b".nan", b"~", b"? ",
    b"? [a]\n: b\n", b"{a: b}: c\n", b"---\n", b"...\n", b"%YAML 9.9\n", b"\t", b"\x00", b"\x85", b"\xff", b"'", b'"',
    b"|\n", b">9\n", b"[", b"}", b"- - - -", b"2001-01-01", b"=", b"\xe2\x80\xa8", b"# ", b": ", b"@", b"`",
    b"\\ud800", b'"\\ud800"', b'"\\UFFFFFFFF"', b"999999999999999999999999", b"1_000", b"0o17", b"yes",
)  # fmt: skip
RUN_FIELDS = (
    "model", "gguf_file", "revision", "trust_remote_code", "dtype", "task", "method", "adapter", "data", "train",
    "output_dir", "learning_rate", "max_steps", "seed", "path", "prompt", "response", "labels", "choices", "eval_size",
    "eval_fraction", "test_size", "weight", "generate", "messages", "text_column", "on_nonfinite", "lr", "fp16",
    "optim", "report_to", "packing", "deepspeed", "fsdp", "methods", "tasks", "budget", "seeds", "learning_rates",
    "metric", "general_text", "reference", "alpha_over_r",
)  # fmt: skip


def run(draw: Draw, room: Room, place: Path, watch: Watch) -> Result:
    """One case."""
    kind = draw.choices(["load_run", "load_study", "parse_overrides"], [5, 3, 1.5])[0]
    result = Result("yaml", f"yaml {kind}")
    reading = {"load_run": _run, "load_study": _study, "parse_overrides": _overrides}[kind]
    call = reading(draw, room, place)
    work = place / "work"
    work.mkdir()
    places = files_of(place)
    with watch.on(place, work) as seen:
        try:
            with limited():
                call()
        except BaseException as error:
            result.outcome, result.message = "refused", text_of(error)[:500]
            if fault := fault_of(error):
                result.bad(fault, error)
    result.problems += [f"forbidden: {event}" for event in seen]
    if files_of(place) != places:
        result.bad("files changed")
    result.mutations = draw.log
    return result


def _run(draw: Draw, room: Room, place: Path) -> Callable[[], None]:
    path = place / "run.yaml"
    path.write_bytes(room.placed(document(draw, run_tree())))

    def call() -> None:
        run = load_run(path)
        check_train(run)
        if ":" not in run.method:
            adapter_config(run)
        _reads_back(place, to_yaml(run), lambda again: load_run(again), run)

    return call


def _study(draw: Draw, room: Room, place: Path) -> Callable[[], None]:
    path = place / "study.yaml"
    path.write_bytes(room.placed(document(draw, study_tree())))

    def call() -> None:
        study = load_study(path)
        _reads_back(place, study_yaml(study), lambda again: load_study(again), study)

    return call


def _reads_back(place: Path, text: str, load: Callable[[Path], Any], value: Any) -> None:
    """What was understood is written, read again, and equal: a value that changes on the way was misread."""
    again = place / "work" / "again.yaml"
    again.write_text(text, encoding="utf-8")
    try:
        # NaN is not equal to itself; its text is.
        if repr(load(again)) != repr(value):
            raise AssertionError("the resolved file reads back as another configuration")
    finally:
        again.unlink()


def _overrides(draw: Draw, room: Room, place: Path) -> Callable[[], None]:
    arguments = []
    for _ in range(draw.times(4)):
        key = draw.choice([
            draw.choice(RUN_FIELDS), f"train.{draw.choice(RUN_FIELDS)}", f"data.{draw.choice('019x²')}.path",
            "data.-1.path",
            "adapter.r", "data.0.labels.good", "adapter", "data", "data.0", "train.max_steps.x", ".", "a..b", "", "²",
            "adapter.rank_pattern.a.b", draw.choice(TEXTS),
        ])  # fmt: skip
        text = draw.choice([*map(str, TEXTS), "[" * 3000, *(word.decode("utf-8", "replace") for word in WORDS)])
        text = draw.choice([text, json.dumps(draw.value())])
        arguments += [f"--{key}", text] if draw.chance(0.6) else [f"--{key}={text}"]
    draw.note(short(arguments, 200))
    path = place / "run.yaml"
    path.write_bytes(room.placed(yaml.safe_dump(run_tree()).encode()))

    def call() -> None:
        overrides = parse_overrides(arguments)
        run = load_run(path, overrides)
        check_train(run)
        if ":" not in run.method:
            adapter_config(run)

    return call


def document(draw: Draw, tree: Any) -> bytes:
    """A YAML file that starts from a good one."""
    for _ in range(draw.times()):
        if not draw.chance(0.2):
            tree = mutate_tree(draw, tree, RUN_FIELDS)
    if isinstance(tree, dict) and draw.chance(0.3):
        _traps(draw, tree)
    text = json.dumps(tree) if draw.chance(0.15) else _dump(tree)
    content = text.encode("utf-8", "surrogatepass")
    if draw.chance(0.35):
        content = mutate_bytes(draw, content, WORDS)
    elif draw.chance(0.15):
        content = bomb(draw) + content
    return content


def _dump(tree: Any) -> str:
    try:
        return yaml.dump(tree, sort_keys=False, allow_unicode=True)
    except (RecursionError, yaml.YAMLError):
        return json.dumps(None)


def _traps(draw: Draw, tree: dict[str, Any]) -> None:
    """Values that are right in kind and wrong for a run."""
    traps: list[Callable[[], None]] = [
        lambda: tree.update(method=draw.choice(["evil:Config", "os:system", "masa", "aslora", "loha", "x"])),
        lambda: tree.update(model=draw.choice([*TEXTS, "package:x", "package:", "package:../..", "x.gguf"])),
        lambda: tree.update(adapter=draw.choice([{}, {"r": 10**9}, {"target_modules": draw.choice(PATTERNS)}, {"x": 1},
                                                 {"r": "2"}, {"rank_pattern": draw.choice([[], {"[": 2}])}])),
        lambda: tree.update(train={draw.choice(RUN_FIELDS): draw.value()}),
        lambda: tree.update(learning_rates=draw.choice([[1e308, 1e309], [0], [-1.0], [True], ["1e-3"], []])),
        lambda: tree.update(seeds=draw.choice([[2**70], [-1], [0.5], [True, 1], list(range(3000))])),
        lambda: tree.update(budget=draw.choice(["lora:r=0", "lora:", "9" * 5000, "1e9999", "-5%", "nan%"])),
        lambda: tree.update(data=draw.choice([[], [{}], [{"path": ""}], [{"path": "x", "weight": 1e308}] * 3])),
        lambda: tree.update(output_dir=draw.choice(["", "\x00", "a" * 5000, "/", "~", "../.."])),
    ]  # fmt: skip
    number = draw.randrange(len(traps))
    traps[number]()
    draw.note(f"trap {number}")


def bomb(draw: Draw) -> bytes:
    """Anchors that multiply, nesting that overflows, and the like."""
    kind = draw.randrange(7)
    draw.note(f"bomb {kind}")
    if kind == 0:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, draw.choice([4, 7, 9]))]
        return ("\n".join(lines) + "\n").encode()
    if kind == 1:
        lines = ["b0: &b0 {k: v}"]
        lines += [f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}], k{n}: v}}" for n in range(1, draw.choice([5, 18]))]
        return ("\n".join(lines) + "\n").encode()
    if kind == 2:
        return b"deep: " + b"[" * draw.choice([300, 1200, 60_000]) + b"]" * draw.choice([0, 300]) + b"\n"
    if kind == 3:
        return b"loop: &l [*l]\nagain: &m {x: *m}\n"
    if kind == 4:
        return b"wide: [" + b"1," * draw.choice([1000, 300_000]) + b"1]\n"
    if kind == 5:
        return b"deep:\n" + b"".join(b" " * n + b"a:\n" for n in range(1, draw.choice([200, 1500])))
    return b"long: " + b"'" + b"x" * draw.choice([10_000, 3_000_000]) + b"'\n"
