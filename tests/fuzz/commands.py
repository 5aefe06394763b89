"""Command lines on hostile folders, in this process: an exit code of 0 or 2, one message, and a right file or none."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraplex.commands.cli import main
from loraplex.export.wish import WISH_NAME, Wish
from tests.fuzz import adapters, oracle, raw
from tests.fuzz.adapters import EVIL
from tests.fuzz.draw import TEXTS, Draw, mutate_bytes, mutate_json, mutate_tree, short
from tests.fuzz.room import ADAPTERS, LABELS, Room, model_config, run_tree, study_tree
from tests.fuzz.texts import document
from tests.fuzz.verdict import Result, fault_of_message, text_of
from tests.fuzz.watch import Watch, files_of, limited

_LABELS = (
    b"5", b"[]", b"null", b"{", b'["x"]', b'["a", "a"]', b"[1, 2]", b'{"a": 1}', b"\xff", b'"ab"', b"[" * 3000,
    b'[["bad"], "good"]', b'["bad", null]',
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run(draw: Draw, room: Room, place: Path, watch: Watch) -> Result:
    """One case: a folder with an adapter, perhaps its own base model and run.yaml, and one command on it."""
    command = draw.choices(list(_COMMANDS), [share for share, _ in _COMMANDS.values()])[0]
    result = Result("cli", f"cli {command}")
    arguments = _COMMANDS[command][1](draw, room, place)
    (place / "out").mkdir()
    places = files_of(place, place / "out")
    code, path = -1, list(sys.path)
    open_to = [place / arguments[1]] if "--remember" in arguments else [place / "cache"] if command == "cache" else []
    with watch.on(place, place / "out", *open_to, *_caches(room)) as seen:
        try:
            with limited(10), captured() as streams, _cache_of(place, command):
                code = main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            result.bad(f"raises {type(error).__name__}: {text_of(error)[:200]}", error)
    out, err = streams
    sys.path[:] = path
    result.problems += [f"forbidden: {event}" for event in seen]
    after = files_of(place, place / "out")
    if code == 0 and "--remember" in arguments:
        _check_remembered(result, place, arguments, places, after)
    if arguments == ["cache", "clear"]:
        places, after = ({n: s for n, s in files.items() if not n.startswith("cache")} for files in (places, after))
    if after != places:
        result.bad("files changed")
    draw.note(f"loraplex {short(arguments, 300)}")
    result.mutations = draw.log
    if not result.problems:
        _judge(result, code, out, err, place)
    if code == 0 and not result.problems and command in ("export", "merge"):
        _check_written(result, room, place, arguments)
    return result


@contextmanager
def _cache_of(place: Path, command: str) -> Any:
    """The command `cache` reads the case's own cache."""
    before = os.environ["LORAPLEX_CACHE"]
    if command == "cache":
        os.environ["LORAPLEX_CACHE"] = str(place / "cache")
    try:
        yield
    finally:
        os.environ["LORAPLEX_CACHE"] = before


def _check_remembered(result: Result, place: Path, arguments: list[str], *files: dict[str, Any]) -> None:
    """Nothing but loraplex.json was written beside the adapter, whole; what it replaced may have been a link."""
    name = f"{arguments[1]}/{WISH_NAME}"
    for found in files:
        found.pop(name, None)
    if (place / name).is_symlink():
        result.bad("loraplex.json is still a link")
    try:
        Wish.read(place / arguments[1])
    except ValueError as error:
        result.bad(f"remembers what can't be read: {error}", error)


def _caches(room: Room) -> tuple[Path, ...]:
    return tuple(room.folder / name for name in ("home", "cache", "mpl", "tmp"))


@contextmanager
def captured() -> Any:
    """Standard output and error of the block, as bytes streams that a terminal would have: strict, and lenient."""
    streams = ["", ""]
    before = sys.stdout, sys.stderr
    buffers = io.BytesIO(), io.BytesIO()
    out = io.TextIOWrapper(buffers[0], "utf-8", write_through=True)
    err = io.TextIOWrapper(buffers[1], "utf-8", errors="backslashreplace", write_through=True)
    sys.stdout, sys.stderr = out, err
    try:
        yield streams
    finally:
        sys.stdout, sys.stderr = before
        out.detach(), err.detach()
        streams[:] = [buffer.getvalue().decode("utf-8", "replace") for buffer in buffers]


def _judge(result: Result, code: int, out: str, err: str, place: Path) -> None:
    if _CONTROL.search(err + out):
        result.bad(f"prints control characters: {_CONTROL.search(err + out)!r}")
    if code == 0:
        return
    result.outcome, result.message = "refused", err[-500:]
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    message = err[err.find("error: ") :] if errors else ""
    if code != 2:
        result.bad(f"exit code {code}: {err[-200:]}")
    elif "Traceback" in err:
        result.bad("prints a traceback")
    elif not errors and not any(line.startswith(("usage: ", "loraplex")) for line in lines):
        result.bad(f"no message: {err[-200:]!r}")
    elif errors and (fault := fault_of_message(message)):
        result.bad(fault)
        result.where = message[:40]
    if left := sorted(path.name for path in (place / "out").iterdir()):
        result.bad(f"leaves {left[:3]} behind after an error")


# Command lines


def _adapter(draw: Draw, room: Room, place: Path) -> Path:
    """An adapter in the case's folder, hostile mostly, with what a training run or an attacker leaves beside it."""
    names = tuple(ADAPTERS)
    folder = adapters.hostile(draw, room, names) if draw.chance(0.65) else adapters.good(room, draw.choice(names))
    target = place / draw.choice(["adapter", "adapter", "checkpoint-3"])
    beside: dict[str, bytes] = {}
    more = dict(folder.more or {})
    if folder.name == "classifier" or draw.chance(0.4):
        _run_file(draw, room, folder, beside, more)
    if draw.chance(0.25):
        for name, content in base_files(draw, room, place).items():
            (place / "base").mkdir(exist_ok=True)
            (place / "base" / name).write_bytes(content)
        if isinstance(folder.config, dict):
            folder.config["base_model_name_or_path"] = draw.choice([str(place / "base"), "base", "./base"])
    if draw.chance(0.5):
        more |= {"evil.py": EVIL.encode(), "__init__.py": b""}
        (place / "evil.py").write_text(EVIL)
    if isinstance(folder.config, dict) and draw.chance(0.06):
        folder.config["peft_type"] = draw.choice([f"{target.name}.evil:Config", "evil:Config", "evil"])
        draw.note(f"peft_type={folder.config['peft_type']}")
    folder.more = more
    folder.write(target)
    # A checkpoint's run file lies one folder up.
    for name, content in beside.items():
        path = (place if target.name.startswith("checkpoint-") else target) / name
        if path.is_symlink():
            path.unlink()  # never write through a link of the case
        path.write_bytes(content)
    return target


def _run_file(
    draw: Draw, room: Room, folder: adapters.Folder, beside: dict[str, bytes], more: dict[str, bytes]
) -> None:
    method = "multilora" if folder.name == "classifier" else folder.name.partition("-")[0]
    tree: Any = run_tree(method=method)
    labels: bytes = json.dumps(LABELS).encode()
    if folder.name == "classifier":
        tree["task"] = "classification"
    action = draw.choices(["good", "code", "trust", "hostile", "labels"], [3, 2, 2, 4, 3])[0]
    draw.note(f"run.yaml: {action}")
    if action == "code":
        tree["method"] = draw.choice(["adapter.evil:Config", "evil:Config", "evil", "os:system"])
    elif action == "trust":
        tree.update(trust_remote_code=True, model=draw.choice(["./adapter/base", "adapter/base", "base"]))
        more |= {f"base/{name}": content for name, content in base_files(draw, room, None).items()}
    elif action == "labels":
        labels = draw.choice(_LABELS)
    content = document(draw, tree) if action == "hostile" else yaml.safe_dump(tree).encode()
    beside["run.yaml"] = room.placed(content)
    if draw.chance(0.8):
        beside["labels.json"] = labels


def base_files(draw: Draw, room: Room, place: Path | None) -> dict[str, bytes]:
    """A base model that came with the adapter; without a `place`, one that brings code along."""
    files = {path.name: path.read_bytes() for path in room.base_folder.iterdir()}
    actions = ["code", "index", "config", "weights", "tokenizer", "good"]
    action = "code" if place is None else draw.choices(actions, [2, 4, 3, 3, 1, 1])[0]
    draw.note(f"base: {action}")
    tree = json.loads(files["config.json"])
    if action == "index" and place is not None:
        _hostile_index(draw, room, files, place)
    elif action == "config":
        for _ in range(draw.times()):
            tree = mutate_tree(
                draw, tree, ["auto_map", "quantization_config", "dtype", "num_hidden_layers", "id2label"]
            )
        files["config.json"] = mutate_json(draw, tree) if draw.chance(0.3) else adapters.dumps(tree)
    elif action == "code":
        tree["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        tree["model_type"] = draw.choice(["qwen2", "evil"])
        files |= {"config.json": json.dumps(tree).encode(), "evil.py": EVIL.encode()}
    elif action in ("weights", "tokenizer"):
        names = ["model.safetensors"] if action == "weights" else ["tokenizer.json", "tokenizer_config.json"]
        name = draw.choice(names)
        files[name] = mutate_bytes(draw, files[name])
    return files


def _hostile_index(draw: Draw, room: Room, files: dict[str, bytes], place: Path) -> None:
    """Shards whose names lead out of the folder."""
    tensors = raw.read(room.base_folder / "model.safetensors")
    names = list(tensors)
    cut = draw.randrange(1, len(names))
    victim = place / "victim.safetensors"
    raw.write(victim, {name: tensors[name] for name in names[cut:]})
    elsewhere = draw.choice([str(victim), "../victim.safetensors", "sub/../../victim.safetensors", "a/b.safetensors",
                             "/dev/null", "..", ".", "", "x\x00y", "model-2.safetensors", "config.json"])  # fmt: skip
    draw.note(f"shard {short(elsewhere)}")
    for name, part in (("model-1.safetensors", names[:cut]), ("model-2.safetensors", names[cut:])):
        header, data = raw.header_of({key: tensors[key] for key in part})
        files[name] = raw.pack(json.dumps(header).encode(), data)
    where: Any = {name: "model-1.safetensors" if name in names[:cut] else elsewhere for name in names}
    if draw.chance(0.2):
        where = draw.choice([[], None, dict.fromkeys(names, 5), {}, {"x": {}}])
    index = draw.choice([{"metadata": {}, "weight_map": where}, {"weight_map": where}, where, {}])
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    if draw.chance(0.85):
        del files["model.safetensors"]


def _export(draw: Draw, room: Room, place: Path) -> list[str]:
    adapter = _adapter(draw, room, place)
    arguments = ["export", adapter.name, "-o", "out/result"]
    options = [["--rank", "8"], ["--compress", "exact"], ["--engine", "peft"], ["--dtype", "bfloat16"], ["--json"],
               ["--format", "merged"], ["--max-error", "0.1"], ["--engine", "vllm"], ["--rank", "0"], ["--force"],
               ["--calibration"], ["--calibration", str(room.folder / "data.jsonl")],
               ["--remember"], ["--remember"]]  # fmt: skip
    for _ in range(draw.choice([0, 1, 1, 2])):
        arguments += draw.choice(options)
    return arguments + _overrides(draw)


def _merge(draw: Draw, room: Room, place: Path) -> list[str]:
    adapter = _adapter(draw, room, place)
    arguments = ["merge", adapter.name, "-o", "out/result"]
    for _ in range(draw.choice([0, 0, 1, 2])):
        arguments += draw.choice([["--safe"], ["--dtype", "float16"], ["--json"], ["--force"]])
    return arguments + _overrides(draw)


def _overrides(draw: Draw) -> list[str]:
    if not draw.chance(0.1):
        return []
    return draw.choice([["--model", draw.choice(TEXTS)], ["--dtype=x"], ["--method", "masa"], ["--unknown", "1"],
                        ["--task", "classification"], ["--method", "nowhere:Config"]])  # fmt: skip


def _inspect(draw: Draw, room: Room, place: Path) -> list[str]:
    arguments = ["inspect", _adapter(draw, room, place).name]
    action = draw.choices(["plain", "json", "against", "plots"], [3, 3, 2, 0.4])[0]
    if action == "json":
        arguments.append("--json")
    elif action == "against":
        other = room.folder / "adapters" / draw.choice(["multilora", "lora", "masa-concat", "aslora"])
        arguments += ["--against", str(other)] if draw.chance(0.5) else ["--against", arguments[1]]
        if arguments[-1] == arguments[1]:
            arguments[1] = str(other)
    elif action == "plots":
        arguments += ["--plots", "out/plots"]
    return arguments


def _eval(draw: Draw, room: Room, place: Path) -> list[str]:
    arguments = ["eval", _adapter(draw, room, place).name]
    if draw.chance(0.6):
        entry = {"path": str(room.folder / "data.jsonl"), "prompt": "{text}", "response": "{label}", "eval_size": 2}
        arguments += ["--data", yaml.safe_dump(entry, default_flow_style=True, width=10**6).strip()]
    return arguments + _overrides(draw)


def _budget(draw: Draw, room: Room, place: Path) -> list[str]:
    (place / "base").mkdir()
    for name, content in base_files(draw, room, place).items():
        (place / "base" / name).write_bytes(content)
    options = [["--match", "lora:r=2"], ["--params", "0.5%"], ["--params", draw.choice(TEXTS)], ["--json"],
               ["--match", draw.choice(["lora", "lora:r=x", ":", "x:r=1", "masa:r=1000000000"])], ["--tokens", "-1"],
               ["--adapter.r", draw.choice(["0", "1000000000", "x", "[1]"])], ["--task", "classification"],
               ["--methods", draw.choice(["", "masa,,", "x"])],
               ["--adapter.target_modules", draw.choice(["all-linear", "'['", "5", "(a+)+$", "[absent]"])]]  # fmt: skip
    arguments = ["budget", "base"]
    for _ in range(draw.choice([0, 1, 2])):
        arguments += draw.choice(options)
    return arguments


def _cache(draw: Draw, room: Room, place: Path) -> list[str]:
    """A cache of converted adapters, of which anything may be broken."""
    root = place / "cache" / "plain"
    (root / "seen").mkdir(parents=True)
    for name in (digest * 40 for digest in draw.choice(["0", "0a", "0af"])):
        (root / name).mkdir()
        (root / name / "adapter_model.safetensors").write_bytes(b"x" * 9)
        note: Any = {"method": "MASA", "source": str(place / "adapter"), "files": {"adapter_model.safetensors": 9}}
        for _ in range(draw.choice([0, 1, 1, 2])):
            note = mutate_tree(draw, note, ["method", "source", "files", "x"])
        content = mutate_json(draw, note) if draw.chance(0.2) else adapters.dumps(note)
        (root / f"{name}.json").write_bytes(content)
        mark = {
            "signature": [1],
            "digest": draw.choice([name, "..", "../../out", "/", "", 5, None, "\x00", "x" * 5000]),
        }
        (root / "seen" / f"{name}.json").write_bytes(adapters.dumps(mark) if draw.chance(0.8) else b"[")
    (place / "victim").mkdir()
    kind = draw.choice(["none", "link", "folder", "held"])
    draw.note(f"cache: {kind}")
    if kind == "link":
        (root / ("b" * 40)).symlink_to(place / "victim")
        (root / f"{'b' * 40}.json").write_bytes(adapters.dumps({"method": "MASA", "source": "x", "files": {}}))
    elif kind == "folder":
        (root / "seen" / "folder.json").mkdir()
        (root / f"{'c' * 40}.json").mkdir()
    elif kind == "held":
        (root / f"{'0' * 40}.held").mkdir()
    return draw.choice([["cache"], ["cache", "--json"], ["cache", "clear"], ["cache", "list"], ["cache", "x"]])


def _train(draw: Draw, room: Room, place: Path) -> list[str]:
    (place / "run.yaml").write_bytes(room.placed(document(draw, run_tree())))
    return ["train", "run.yaml", "--dry-run"]


def _compare(draw: Draw, room: Room, place: Path) -> list[str]:
    (place / "study.yaml").write_bytes(room.placed(document(draw, study_tree())))
    return ["compare", "study.yaml", "--dry-run"]


_COMMANDS: dict[str, tuple[float, Callable[[Draw, Room, Path], list[str]]]] = {
    "export": (4, _export),
    "merge": (4, _merge),
    "inspect": (4, _inspect),
    "eval": (1.2, _eval),
    "budget": (1.2, _budget),
    "cache": (0.7, _cache),
    "train --dry-run": (1.5, _train),
    "compare --dry-run": (1.5, _compare),
}


# What was written


def _check_written(result: Result, room: Room, place: Path, arguments: list[str]) -> None:
    """The exported update, or the merged weights, are those of the adapter's own files."""
    source, target = place / arguments[1], place / "out" / "result"
    # Flipped bytes in a base's weights are weights too.
    if "base: weights" in result.mutations or any(
        option in arguments for option in ("--calibration", "--rank", "--max-error", "--model", "--method")
    ):
        return
    try:
        config = oracle.read_config(source)
        tensors = oracle.read_tensors(source)
        if config.get("peft_type") not in oracle.METHODS:
            return
        merged = arguments[0] == "merge" or "merged" in arguments
        written = _read_merged(target) if merged else oracle.read_tensors(target)
    except oracle.Invalid as invalid:
        result.bad(f"written although {invalid}")
        return
    shapes = linear_shapes()
    try:
        wanted = oracle.targeted(config, list(shapes))
        if wanted is None:
            return
        expected = oracle.expect(config, tensors, {name: shapes[name] for name in wanted})
    except oracle.Invalid as invalid:
        result.bad(f"written although {invalid}")
        return
    if not expected.finite:
        result.bad("writes NaN or Inf without being asked to")
        return
    if not expected.moderate:
        return
    base = {name: raw_.tensor().double() for name, raw_ in raw.read(room.base_folder / "model.safetensors").items()}
    tolerance = 0.02 if "bfloat16" in arguments or "float16" in arguments else 1e-4
    for name, update in expected.updates.items():
        delta = update(torch.eye(shapes[name][1], dtype=torch.float64)).T
        found = _merged(written, base, name) if merged else plain_update(written, name)
        scale = max(1.0, delta.abs().max().item(), (base[f"{name}.weight"].abs().max().item() if merged else 0.0))
        if found is None or not (found - delta).abs().max().item() / scale < tolerance:
            result.bad(f"{name}: what was written is not the adapter's update")
            return


def _read_merged(folder: Path) -> dict[str, Tensor]:
    tensors: raw.Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= raw.read(path)
    return {name: tensor.tensor() for name, tensor in tensors.items()}


@cache
def linear_shapes() -> dict[str, tuple[int, int]]:
    """Linear module of the base model → out, in."""
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(model_config()).named_modules()
    return {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, torch.nn.Linear)}


def _merged(written: dict[str, Tensor], base: dict[str, Tensor], name: str) -> Tensor | None:
    weight = written.get(f"{name}.weight")
    return None if weight is None else weight.double() - base[f"{name}.weight"]


def plain_update(written: dict[str, Tensor], name: str) -> Tensor | None:
    """B A of a plain LoRA whose scaling is 1."""
    A, B = written.get(f"{name}.lora_A.weight"), written.get(f"{name}.lora_B.weight")
    return None if A is None or B is None else B.double() @ A.double()
