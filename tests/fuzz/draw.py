"""Choices that depend on nothing but a case's seed and index, and the hostile values to choose from."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

PATTERNS = (
    r"(a+)+$", r"(.*)*x", r"((\w+\.?)+)+!", r"(.|..|model)*Q", r"^(([a-z_]+)\.?)*\d$Z", r".*" * 12 + "!", "[", "(?P<",
    "*", "(?=x", r"\1", "a{1000000000}", r"(?i:q)_proj", "q_proj|v_proj", "",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**9, 10**30, 0.0, -0.0, 0.5, 1.5, -2.5, 1e308, 1e-308, 1e999, -1e999,
    float("nan"), True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "x", "false", "true", "8", "none", "None", "ü𝔘\u2028", "\ud800", "\x1b[31mred\x1b[0m", "\x00", "\n\n",
    "a" * 5000, "../../victim", "/etc/passwd", "~/x", "C:\\x", "CON", "%s%n", "{0.__class__}", "$(touch x)", "`x`",
    "evil", "evil:Config", "adapter.evil:Config", "os:system", "\u202egnp.exe", "default", "q_proj", "layers",
)  # fmt: skip


class Draw(random.Random):
    """Random choices of one case, and a note of each mutation that was made."""

    def __init__(self, seed: int, index: int) -> None:
        super().__init__(f"{seed}:{index}")
        self.log: list[str] = []

    def note(self, text: str) -> None:
        """Remember a mutation, for the finding's line."""
        self.log.append(text)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def times(self, most: int = 3) -> int:
        """1 mostly, sometimes more: several mutations hide each other."""
        return self.choices(range(1, most + 1), [4.0**-k for k in range(most)])[0]

    def value(self, depth: int = 0) -> Any:
        """A hostile plain value."""
        kind = self.randrange(10 if depth < 2 else 7)
        if kind < 3:
            return self.choice(NUMBERS)
        if kind < 6:
            return self.choice(TEXTS)
        if kind == 6:
            return self.choice(PATTERNS)
        if kind == 7:
            return [self.value(depth + 1) for _ in range(self.randrange(4))]
        if kind == 8:
            return {str(self.choice(TEXTS)): self.value(depth + 1) for _ in range(self.randrange(3))}
        return self.choice([None, [], {}, [None], {"": None}, [[]], nested(self.choice([3, 90, 300]))])

    def another(self, value: Any) -> Any:
        """A value of the same type as `value`, near to it."""
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return value + self.choice([-2, -1, 1, 2, value])
        if isinstance(value, float):
            return value * self.choice([-1.0, 0.5, 2.0]) + self.choice([0.0, 0.25])
        if isinstance(value, str):
            return self.choice([value[:-1], value + "x", value.upper(), value.replace("_", ".")])
        if isinstance(value, list) and value:
            return self.choice([value[:-1], value + value[:1], [value[0]], [self.another(item) for item in value]])
        return self.value()


def nested(depth: int) -> Any:
    """Lists and mappings inside each other."""
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a tree."""
    found: list[tuple[Any, Any]] = []
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        found.append((tree, key))
        found += places(child)
    return found


def mutate_tree(draw: Draw, tree: Any, names: Sequence[str] = ()) -> Any:
    """A copy of `tree` with a value changed, removed, doubled or added; `names` are keys worth adding."""
    try:
        tree = copy.deepcopy(tree)
        inside = places(tree)
    except RecursionError:
        return tree  # deep enough
    if not inside or draw.chance(0.03):
        tree = draw.value()
        draw.note(f"root = {short(tree)}")
        return tree
    container, key = draw.choice(inside)
    action = draw.randrange(6)
    if action == 0:
        del container[key]
        draw.note(f"without {key!r}")
    elif action == 1:
        container[key] = draw.another(container[key])
        draw.note(f"{key!r} = {short(container[key])}")
    elif action == 2 and isinstance(container, dict):
        name = draw.choice(list(names) or ["unknown"]) if draw.chance(0.8) else draw.choice(TEXTS)
        container[name] = draw.value()
        draw.note(f"{name!r} = {short(container[name])}")
    elif action == 3:
        other, place = draw.choice(inside)
        value = copy.deepcopy(other[place])
        container[key] = value
        draw.note(f"{key!r} = {short(value)}")
    else:
        container[key] = draw.value()
        draw.note(f"{key!r} = {short(container[key])}")
    return tree


def mutate_bytes(draw: Draw, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """`data` cut, flipped, doubled, or with something put in."""
    where = draw.randrange(len(data) + 1)
    upto = min(len(data), where + draw.randrange(1, 40))
    actions: list[Callable[[], bytes]] = [
        lambda: data[:where],
        lambda: data[:where] + bytes([draw.randrange(256)]) + data[where + 1 :],
        lambda: data[:where] + data[where:upto] * draw.randrange(2, 5) + data[upto:],
        lambda: data[:where] + data[upto:],
        lambda: data[:where] + draw.choice(list(words) or [b"\x00"]) + data[where:],
        lambda: data[:where] + draw.randbytes(draw.randrange(1, 9)) + data[where:],
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
    ]
    number = draw.choices(range(len(actions)), [4, 4, 3, 3, 5, 2, 0.3, 0.3])[0]
    draw.note(f"bytes: action {number} at {where}")
    return actions[number]()


def mutate_json(draw: Draw, tree: Any) -> bytes:
    """The JSON text of `tree`, broken in ways that a tree can't be."""
    text = json.dumps(tree, indent=2)
    action = draw.randrange(8)
    draw.note(f"json text: action {action}")
    if action == 0 and isinstance(tree, dict) and tree:
        key = draw.choice(sorted(tree))
        again = f"{json.dumps(key)}: {json.dumps(draw.another(tree[key]))}"
        return (text.rstrip().removesuffix("}") + f", {again}}}").encode()
    if action == 1:
        return f'{{"peft_type": {"[" * draw.choice([900, 3000, 100_000])}'.encode()
    if action == 2:
        deep = draw.choice([900, 3000, 60_000])
        return text.replace(": ", f": {'[' * deep}{']' * deep}, " + '"x": ', 1).encode()
    if action == 3:
        return text.replace(" 2", f" {'9' * draw.choice([50, 4000, 5000])}", 1).encode()
    if action == 4:
        return draw.choice([b"", b"null", b"[]", b"5", b'"x"', b"\x80", b"NaN", b"{}", b"{}{}", b"\xff\xfe{\x00}\x00"])
    return mutate_bytes(draw, text.encode(), [b'"', b"{", b"]", b",", b"NaN", b"1e999", b"\\ud800", b"null"])


def short(value: Any, length: int = 60) -> str:
    """The repr of a value, cut; deep ones too."""
    try:
        text = ascii(value)
    except RecursionError:
        text = f"<deep {type(value).__name__}>"
    return text if len(text) <= length else f"{text[:length]}… ({len(text)})"
