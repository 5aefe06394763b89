"""Mutations of an adapter's folder: its settings, its weights file, and what may lie beside them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import raw
from tests.fuzz.draw import PATTERNS, TEXTS, Draw, mutate_bytes, mutate_json, mutate_tree, short
from tests.fuzz.oracle import COMMON, OWN
from tests.fuzz.raw import Raw, Tensors
from tests.fuzz.room import OURS, Room

FIELDS = sorted({*COMMON, *(name for own in OWN.values() for name in own)})
HOST_FIELDS = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config", "auto_map", "trust_remote_code", "_unproven", "_weights", "__class__", "method", "use_dora",
)  # fmt: skip
TYPES = (
    "adapter.evil:Config", "evil:Config", "evil", "LORA", "lora", "multilora", "MULTILORA ", "MASA", "ASLORA",
    "DUALLORA", "MULTILORA", "LOHA", "ADALORA", "PROMPT_TUNING", "", None, 5, [], ["MASA"], {"value": "MASA"}, True,
)  # fmt: skip
STATES = (
    [[0, 1, 5]], [[-1, 1, 2]], [[2**40, 1, 2]], [[1, 0, 2]], [[1, 2, 0]], [[1, 2, 2]], [[2, 2, 2]], [[0, 0, 0]],
    [[0, 1, 2]], [[0, 0, 2]], [[2, 1, 0]], [[1, 1, 1]],
)  # fmt: skip
WARMUPS = ([-5, 10], [5, -10], [0, 0], [3, 0], [2**62, 1], [10, 3], [-1, -1], [0, 4], [4, 4], [7, 2**40])
EVIL = 'open("ran-code", "w").close()\nclass Config: pass\nclass Model: pass\nraise SystemExit(77)\n'


@dataclass
class Folder:
    """An adapter on its way to the disk."""

    room: Room
    name: str
    config: Any
    tensors: Tensors
    config_bytes: bytes | None = None
    """Instead of `config`."""
    weights_bytes: bytes | None = None
    """Instead of `tensors`."""
    without: frozenset[str] = frozenset()
    more: dict[str, bytes] | None = None
    links: dict[str, str] | None = None
    """Name → what it points to, in place of any file of that name."""
    harmless: bool = True
    """Nothing that was done may keep the adapter from loading."""

    def write(self, place: Path) -> None:
        """Put everything into the folder `place`."""
        place.mkdir(parents=True)
        if "adapter_config.json" not in self.without:
            settings = json.dumps(self.config).encode() if self.config_bytes is None else self.config_bytes
            (place / "adapter_config.json").write_bytes(self.room.placed(settings))
        if "adapter_model.safetensors" not in self.without:
            weights = place / "adapter_model.safetensors"
            if self.weights_bytes is None:
                raw.write(weights, self.tensors)
            else:
                weights.write_bytes(self.weights_bytes)
        for name, content in (self.more or {}).items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for name, goal in (self.links or {}).items():
            path = place / name
            if not path.is_dir():
                # What it stood for lies one folder up, as in the hub's cache.
                if path.is_file() and goal == "../blob":
                    path.rename(place.parent / "blob")
                path.unlink(missing_ok=True)
                path.symlink_to(goal)


def good(room: Room, name: str) -> Folder:
    """An adapter as it was saved."""
    return Folder(room, name, json.loads(json.dumps(room.configs[name])), dict(room.tensors[name]))


def hostile(draw: Draw, room: Room, names: tuple[str, ...] = OURS) -> Folder:
    """An adapter with one to three mutations; one in thirty has harmless ones only."""
    folder = good(room, draw.choice(names))
    draw.note(folder.name)
    if draw.chance(0.03):
        _harmless(draw, folder)
        return folder
    folder.harmless = False
    for _ in range(draw.times()):
        part = draw.choices([_settings, mutate_weights, _beside], [5, 6, 0.5])[0]
        part(draw, folder, room)
    return folder


def _harmless(draw: Draw, folder: Folder) -> None:
    """Another order, another dtype of the floats, other files: the same adapter."""
    names = list(folder.tensors)
    draw.shuffle(names)
    folder.tensors = {name: folder.tensors[name] for name in names}
    folder.config = dict(draw.sample(sorted(folder.config.items(), key=str), len(folder.config)))
    if draw.chance(0.5):
        folder.more = {"README.md": b"\xff\xfe no text", "notes.json": b"{", "evil.py": EVIL.encode()}
    if draw.chance(0.3):
        folder.links = {"adapter_model.safetensors": "../blob"}
    if draw.chance(0.3):
        header, data = raw.header_of(folder.tensors, {"format": "pt", "by": "\u202e"})
        folder.weights_bytes = raw.pack(json.dumps(header).encode() + b"   ", data)
    draw.note("harmless")


# Settings


def _settings(draw: Draw, folder: Folder, room: Room) -> None:
    if not isinstance(folder.config, dict):
        folder.config = draw.value()
        return
    action = draw.choices(
        [_one_field, _host_field, _peft_type, _pattern_field, _any_field, _near_field, _text, _another_method],
        [5, 2, 1.5, 2, 2, 4, 1.5, 0.7],
    )[0]
    action(draw, folder, room)


def _one_field(draw: Draw, folder: Folder, room: Room) -> None:
    own = [name for name in FIELDS if name in folder.config]
    name = draw.choice(own or FIELDS)
    folder.config[name] = draw.value()
    draw.note(f"{name}={short(folder.config[name])}")


def _host_field(draw: Draw, folder: Folder, room: Room) -> None:
    name = draw.choice(HOST_FIELDS)
    folder.config[name] = draw.choice([
        draw.value(), {"base_model_class": "Config", "parent_library": "evil"}, {"AutoConfig": "evil.Config"}, "evil",
    ])  # fmt: skip
    draw.note(f"{name}={short(folder.config[name])}")


def _peft_type(draw: Draw, folder: Folder, room: Room) -> None:
    folder.config["peft_type"] = draw.choice(TYPES)
    draw.note(f"peft_type={folder.config['peft_type']!r}")


def _pattern_field(draw: Draw, folder: Folder, room: Room) -> None:
    name = draw.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern",
                        "modules_to_save"])  # fmt: skip
    pattern = draw.choice(PATTERNS)
    if name.endswith("s_pattern"):
        folder.config["layers_to_transform"] = draw.choice([None, 0, [0, 1], -1])
    as_mapping = name in ("rank_pattern", "alpha_pattern")
    folder.config[name] = {pattern: draw.choice([2, 3, 10**9])} if as_mapping else draw.choice([pattern, [pattern]])
    draw.note(f"{name}={short(folder.config[name])}")


def _any_field(draw: Draw, folder: Folder, room: Room) -> None:
    folder.config = mutate_tree(draw, folder.config, [*FIELDS, "unknown_field"])


def _near_field(draw: Draw, folder: Folder, room: Room) -> None:
    """A value that could stand there, so that a file of the wrong shape or another ΔW comes out."""
    near: dict[str, list[Any]] = {
        "r": [1, 2, 3, 4, 8], "lora_alpha": [1, 2.5, 6], "use_rslora": [True, False], "num_modules": [1, 2, 3, 4],
        "scaling_granularity": ["channel", "module"], "num_experts": [1, 2, 3, 4], "share_layers": [None, 1, 2, 3, 9],
        "expert_mixing": ["router", "sum", "concat"], "num_merges": [None, 0, 1, 2, 3], "r_magnitude": [None, 1, 2, 3],
        "r_direction": [None, 1, 2, 3], "bias": ["none", "all", "lora_only"], "warmup_steps": [1, 9, 0.5],
        "modules_to_save": [None, [], ["lm_head"], ["embed_tokens"], ["absent"], ["q_proj"], ["layers"],
                            ["s"], ["factors"], ["default"], ["x" * 5000]], "lora_dropout": [0.5],
        "target_modules": [["q_proj"], ["v_proj", "q_proj", "k_proj"], "all-linear", r".*\.[qv]_proj", ["absent"], None,
                           ["q_proj", "v_proj", "absent"], ["embed_tokens"], ["lm_head", "q_proj", "v_proj"]],
        "layers_to_transform": [None, 0, [0, 1], [0, 1, 2], [7], []], "rank_pattern": [{}, {"q_proj": 3}, None],
        "alpha_pattern": [{}, {"q_proj": 1}, {r"layers\.0\..*": 9}], "exclude_modules": [["v_proj"], "v_proj", []],
        "compute": ["added", "apart", "reference"], "cache_delta": [True], "merge_start_step": [0.1, 5],
        "init_weights": [False], "layers_pattern": ["layers", ["layers"], "h"], "task_type": ["CAUSAL_LM", None],
    }  # fmt: skip
    name = draw.choice([name for name in near if name in folder.config] or ["r"])
    folder.config[name] = draw.choice(near[name])
    draw.note(f"{name}={short(folder.config[name])}")


def _text(draw: Draw, folder: Folder, room: Room) -> None:
    folder.config_bytes = mutate_json(draw, folder.config)


def _another_method(draw: Draw, folder: Folder, room: Room) -> None:
    name = draw.choice(sorted(room.configs))
    folder.config = json.loads(json.dumps(room.configs[name]))
    draw.note(f"settings of {name}")


# Weights


def mutate_weights(draw: Draw, folder: Folder, room: Room) -> None:
    """One mutation of the tensors, or of the file that they lie in."""
    if not folder.tensors:
        return
    actions: list[Callable[[Draw, Folder, Room], None]] = [
        _drop, _rename, _add, _reshape, _retype, _values, _state, _header, _cut, _replace_file,
    ]  # fmt: skip
    draw.choices(actions, [3, 4, 4, 4, 3, 3, 5, 4, 2, 0.7])[0](draw, folder, room)


def _key(draw: Draw, folder: Folder) -> str:
    return draw.choice(list(folder.tensors))


def _drop(draw: Draw, folder: Folder, room: Room) -> None:
    key = _key(draw, folder)
    del folder.tensors[key]
    draw.note(f"no {key}")


def _rename(draw: Draw, folder: Folder, room: Room) -> None:
    key = _key(draw, folder)
    changes: list[Callable[[str], str]] = [
        lambda k: k.removeprefix("base_model.model."),
        lambda k: f"base_model.model.{k}",
        lambda k: k.replace(".1.", ".7.").replace("_A", "_B"),
        lambda k: k.replace("_factors.", "_factors.default.").replace("_shared.", "_shared.default."),
        lambda k: k.upper(),
        lambda k: k.replace("q_proj", "k_proj"),
        lambda k: k.replace(".", "..", 1),
        lambda k: f"{k}.weight",
        lambda k: f"{k}\x00",
        lambda k: draw.choice(TEXTS),
        lambda k: k.replace("__", ".", 1),
        lambda k: k.replace("q_proj.", "q_proj.base_layer."),
        lambda k: k.replace("lm_head", "lm_head.modules_to_save.default"),
        lambda k: k.replace("lm_head", "lm_head.original_module"),
    ]
    new = draw.choice(changes)(key)
    folder.tensors = {new if name == key else name: raw_ for name, raw_ in folder.tensors.items()}
    draw.note(f"{key} → {short(new)}")


def _add(draw: Draw, folder: Folder, room: Room) -> None:
    names = [*room.base.state_dict()]
    other = draw.choice(OURS)
    module = "model.layers.0.self_attn.q_proj"
    key = draw.choice([
        f"base_model.model.{draw.choice(names)}", draw.choice(names), "base_model.model.lm_head.weight",
        f"base_model.model.{module}.base_layer.weight", f"{module}.base_layer.bias",
        "base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.original_module.weight",
        "base_model.model.model.embed_tokens.weight", f"base_model.model.{module}.lora_A.weight",
        draw.choice(list(room.tensors[other])), "base_model.model.loraplex_bank.extra", "x", "", "base_model.model.",
        f"base_model.model.{module}.multilora_factors.other.lora_A", f"base_model.model.{module}.bias",
    ])  # fmt: skip
    plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
    tensor = room.base.state_dict().get(plain)
    if tensor is not None:
        value = Raw.of(torch.full_like(tensor, 7.0))
    else:
        value = room.tensors[other].get(key) or Raw.of(torch.ones(2, 3))
    folder.tensors = {**folder.tensors, key: value} if draw.chance(0.5) else {key: value, **folder.tensors}
    draw.note(f"extra {short(key, 90)}")


def _reshape(draw: Draw, folder: Folder, room: Room) -> None:
    key = _key(draw, folder)
    if folder.tensors[key].dtype not in raw.DTYPES:
        return
    tensor = folder.tensors[key].tensor()
    if not tensor.numel():
        return  # of an earlier mutation
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.T if tensor.ndim == 2 else tensor[None],
        lambda: tensor.reshape(-1),
        lambda: tensor[None],
        lambda: tensor[..., :1] if tensor.ndim else tensor,
        lambda: tensor[:0] if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor], -1) if tensor.ndim else tensor,
        lambda: tensor.reshape(-1)[:1].reshape([1] * draw.choice([1, 2, 70])),
        lambda: tensor.reshape(-1)[0],
    ]
    folder.tensors[key] = Raw.of(draw.choice(changes)().contiguous())
    draw.note(f"{key} is {folder.tensors[key].shape}")


def _retype(draw: Draw, folder: Folder, room: Room) -> None:
    keys = [_key(draw, folder)] if draw.chance(0.7) else list(folder.tensors)
    name = draw.choice([*raw.DTYPES, "F8_E4M3", "C64", "F8_E5M2"])
    for key in keys:
        if folder.tensors[key].dtype not in raw.DTYPES:
            continue
        if name in raw.DTYPES:
            folder.tensors[key] = Raw.of(folder.tensors[key].tensor().to(raw.DTYPES[name]))
        else:
            old = folder.tensors[key]
            size = 8 if name == "C64" else 1
            folder.tensors[key] = Raw(name, [len(old.data) // size], old.data[: len(old.data) // size * size])
    draw.note(f"{keys[0] if len(keys) == 1 else 'all'} as {name}")


def _values(draw: Draw, folder: Folder, room: Room) -> None:
    key = _key(draw, folder)
    if folder.tensors[key].dtype not in raw.DTYPES:
        return
    tensor = folder.tensors[key].tensor().clone()
    value = draw.choice([float("nan"), float("inf"), -float("inf"), 1e38, 0.0, -3.0, 1e-40])
    if tensor.is_floating_point():
        where = slice(None) if draw.chance(0.4) else slice(0, 1)
        tensor.view(-1)[where] = value
    folder.tensors[key] = Raw.of(tensor)
    draw.note(f"{key} holds {value}")


def _state(draw: Draw, folder: Folder, room: Room) -> None:
    """ASLoRA's merge map, Dual LoRA's warm-up."""
    for key in list(folder.tensors):
        if not key.endswith(("merges", "warmup")) or draw.chance(0.3):
            continue
        if key.endswith("merges"):
            row = list(draw.choice(STATES)[0])
            steps = [draw.choice([0, 5, -3, 2**50]) if draw.chance(0.3) else int(m != n) * 3 for n, m in enumerate(row)]
            tensor = torch.tensor([row, steps])
        else:
            tensor = torch.tensor(draw.choice(WARMUPS))
        if draw.chance(0.15):
            tensor = draw.choice([tensor[:1], tensor.float(), tensor.int(), tensor.double() + 0.5, tensor.bool()])
        folder.tensors[key] = Raw.of(tensor)
        draw.note(f"{key.rpartition('.')[2]} = {tensor.tolist()}")


def _header(draw: Draw, folder: Folder, room: Room) -> None:
    """A header that lies about what follows."""
    header, data = raw.header_of(folder.tensors)
    name = _key(draw, folder)
    action = draw.randrange(9)
    text: bytes | None = None
    length = None
    if action == 0:
        header[name]["data_offsets"] = draw.choice(
            [[0, 0], [0, 2**63], [-8, 8], [len(data), len(data) + 8], [8, 0], [0]]
        )
    elif action == 1:
        header[name]["shape"] = draw.choice([[2**40, 2**40], [-1], [2**63], [0], [], ["2"], None, [1.5], [1] * 3000])
    elif action == 2:
        header[name]["dtype"] = draw.choice(["I64", "F64", "BOOL", "U16", "nope", None, 3, "F4"])
    elif action == 3:
        header = mutate_tree(draw, header)
    elif action == 4:
        length = draw.choice([0, 1, 8, 2**31, 2**63, 2**64 - 1, len(data) + 10**6])
    elif action == 5:
        text = draw.choice([b"", b"[]", b"null", b"5", b"{" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"x": 1}'])
    elif action == 6:
        body = json.dumps(header)[1:-1]
        text = f"{{{body}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode()
    elif action == 7:
        header["__metadata__"] = draw.choice([None, 5, [], {"format": 3}, {"format": "tf"}, {"a": {"b": {}}}, {}])
    else:
        data = data + draw.choice([b"\x00", b"\x00" * 4096])
    draw.note(f"header: action {action} on {name}")
    folder.weights_bytes = raw.pack(dumps(header) if text is None else text, data, length)


def dumps(tree: Any) -> bytes:
    """JSON, of whatever came out of the mutations."""
    try:
        return json.dumps(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"{}"


def _cut(draw: Draw, folder: Folder, room: Room) -> None:
    header, data = raw.header_of(folder.tensors)
    content = raw.pack(json.dumps(header).encode(), data)
    edge = len(content) - len(data)
    if draw.chance(0.6):
        at = draw.choice([0, 1, 7, 8, 9, edge - 1, edge, edge + 1, len(content) - 1, draw.randrange(len(content))])
        content = content[:at]
        draw.note(f"cut at {at}")
    else:
        content = mutate_bytes(draw, content)
    folder.weights_bytes = content


class _Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, (EVIL,)


def _replace_file(draw: Draw, folder: Folder, room: Room) -> None:
    action = draw.randrange(4)
    draw.note(f"weights file: action {action}")
    if action == 0:
        folder.without |= {"adapter_model.safetensors"}
    elif action == 1:
        folder.without |= {"adapter_model.safetensors"}
        folder.more = {**(folder.more or {}), "adapter_model.bin": pickle.dumps(_Evil())}
    elif action == 2:
        folder.weights_bytes = pickle.dumps(_Evil())
    else:
        folder.without |= {"adapter_model.safetensors"}
        folder.more = {**(folder.more or {}), "adapter_model.safetensors/x": b"a folder"}


# Other files


def _beside(draw: Draw, folder: Folder, room: Room) -> None:
    if draw.chance(0.4):
        name = draw.choice(["adapter_model.safetensors", "adapter_config.json", "README.md", "loraplex.json",
                            "labels.json", "run.yaml", ".loraplex.json", "adapter_model.bin"])  # fmt: skip
        goal = draw.choice(
            ["../blob", "../blob", "../../base/config.json", "/dev/zero", "/dev/null", "nowhere", "../..", name, "."]
        )
        folder.links = {**(folder.links or {}), name: goal}
        draw.note(f"{name} → {goal}")
        return
    name = draw.choice(["evil.py", "README.md", "run.yaml", "labels.json", "config.json", "adapter_config.json/x",
                        "model.safetensors", "tokenizer_config.json", "__init__.py", "added_tokens.json"])  # fmt: skip
    if name == "adapter_config.json/x":
        folder.without |= {"adapter_config.json"}
    content = draw.choice([EVIL.encode(), b"", b"{", b"[" * 2000, b"\xff\xfe", json.dumps(draw.value()).encode()])
    folder.more = {**(folder.more or {}), name: content}
    draw.note(f"{name}: {content[:20]!r}")
