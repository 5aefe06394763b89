"""Whether a regular expression from a config can be matched against module names in reasonable time.

Python's `re` backtracks: "(a+)+$" tries every way to cut a run of a's into pieces, and nothing can interrupt it. PEFT
matches names with `re` in its own code, so a pattern is judged before anyone uses it, from its syntax tree alone: an
estimate of how many ways there are to match one name. Two other ways were weighed: a time limit, which only another
engine has (`regex.match(timeout=)`, fast where `re` hangs), and a second process, which a library should not start.

The estimate counts a repeat as ambiguous only where what follows it can begin with a character that it repeats, so
".*\\.(q|v)_proj", "(\\w+\\.)+q_proj" and several ".*" between words are cheap, as they are for `re`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_NAME = 64
"""Length of a module's name, about."""
_MOST_STEPS = 100_000
"""Ways to match one name: a few milliseconds of `re`."""
_LONGEST = 20_000
"""Characters of a pattern. Generated ones, which list every layer, have thousands."""

_ALL = frozenset(map(chr, range(128)))
_CATEGORIES = {
    ops.CATEGORY_DIGIT: frozenset(c for c in _ALL if c.isdigit()),
    ops.CATEGORY_SPACE: frozenset(c for c in _ALL if c.isspace()),
    ops.CATEGORY_WORD: frozenset(c for c in _ALL if c.isalnum() or c == "_"),
}
_CATEGORIES |= {
    ops.CATEGORY_NOT_DIGIT: _ALL - _CATEGORIES[ops.CATEGORY_DIGIT],
    ops.CATEGORY_NOT_SPACE: _ALL - _CATEGORIES[ops.CATEGORY_SPACE],
    ops.CATEGORY_NOT_WORD: _ALL - _CATEGORIES[ops.CATEGORY_WORD],
}
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)
_ATOMIC = (ops.ASSERT, ops.ASSERT_NOT, ops.ATOMIC_GROUP, ops.POSSESSIVE_REPEAT)

Nodes = list[tuple[Any, Any]]


@dataclass(frozen=True)
class _Start:
    """How a text can begin: with which characters, and how many characters at least are fixed."""

    characters: frozenset[str]
    fixed: int = 0

    def or_else(self, other: _Start) -> _Start:
        return _Start(self.characters | other.characters, min(self.fixed, other.fixed))


_END = _Start(frozenset(), _NAME)


def check_pattern(name: str, pattern: str, within: str = "{}") -> None:
    """Check a regular expression that comes from the config's field `name`.

    Args:
        name: the field, for the message.
        pattern: the expression.
        within: the expression into which PEFT puts it.

    Raises:
        ValueError: it is no regular expression, or matching it can take more than a moment.
    """
    shown = f"{name}={pattern!r}" if len(pattern) < 200 else f"{name}={pattern[:200]!r}…"
    if len(pattern) > _LONGEST:
        raise ValueError(f"{shown} has {len(pattern)} characters; a pattern may have {_LONGEST}.")
    try:
        steps = _steps_of(within.format(pattern))
    except (re.error, OverflowError) as error:
        raise ValueError(f"{shown} is not a regular expression: {error}.") from None
    except RecursionError:
        raise ValueError(f"{shown} is nested too deeply: list the modules by name.") from None
    if steps > _MOST_STEPS:
        raise ValueError(
            f"{shown} can match one name in more than {_MOST_STEPS} ways, which takes Python's re too long: don't "
            'repeat what is repeated inside already, as in "(a+)+", and write fewer ".*" in a row; or list the '
            "modules by name."
        )


@lru_cache(maxsize=256)
def _steps_of(pattern: str) -> int:
    re.compile(pattern)
    return _steps(list(_parser.parse(pattern)), _END)


def _steps(nodes: Nodes, after: _Start) -> int:
    """In how many ways a name can be matched by these nodes in turn."""
    total = 1
    for index, node in enumerate(nodes):
        total = min(total * _steps_of_node(node, _start(nodes[index + 1 :], after)), 10 * _MOST_STEPS)
    return total


def _steps_of_node(node: tuple[Any, Any], after: _Start) -> int:
    op, value = node
    if op in _REPEATS:
        least, most, body = value
        return _steps_of_repeat(least, min(most, _NAME), list(body), after)
    if op is ops.BRANCH:
        return _steps_of_branches([list(branch) for branch in value[1]], after)
    if op is ops.GROUPREF_EXISTS:
        return sum(_steps(list(branch or []), after) for branch in value[1:])
    if (inside := _inside(node)) is not None:
        # What an assertion or an atomic group has matched is not tried again: its steps come in addition.
        steps = _steps(inside, _END if op in _ATOMIC else after)
        return 1 if op in _ATOMIC and steps <= _MOST_STEPS else steps
    return 1


def _steps_of_repeat(least: int, most: int, body: Nodes, after: _Start) -> int:
    if most == 0:
        return 1
    again = _start(body, _END)
    characters = _characters(body[0]) if len(body) == 1 else None
    if characters is not None:
        return min(_positions(characters, after), max(1, most - least + 1))
    if most == 1:
        return _steps(body, after) + 1
    inner = min(_steps(body, again), _MOST_STEPS) ** (most - 1) * _steps(body, after)
    stops = most - least + 1 if again.characters & after.characters else 1
    return min(inner * max(1, stops), 10 * _MOST_STEPS)


def _positions(characters: frozenset[str], after: _Start) -> int:
    """Where in a run of these characters the text that follows can begin."""
    common = len(characters & after.characters)
    if not common:
        return 1
    if after.fixed > 1:
        return min(_NAME, 2 * common)
    # A name holds one letter a few times, and a class of them more often.
    return min(_NAME, 2 * common + 6)


def _steps_of_branches(branches: list[Nodes], after: _Start) -> int:
    """The most ways for any text: alternatives that exclude each other don't add up."""
    words = ["".join(_word(branch)) for branch in branches]
    whole = {word for word, branch in zip(words, branches, strict=True) if len(word) == len(branch)}
    others = [
        (_start(branch, after).characters, _steps(branch, after))
        for word, branch in zip(words, branches, strict=True)
        if len(word) < len(branch)
    ]
    most = max((sum(word[:end] in whole for end in range(len(word) + 1)) for word in whole), default=0)
    firsts = {character for characters, _ in others for character in characters} if others else set()
    return max(1, most + max((sum(s for chars, s in others if c in chars) for c in firsts), default=0))


def _word(nodes: Nodes) -> list[str]:
    """The literal characters with which these nodes begin."""
    word = []
    for op, value in nodes:
        if op is not ops.LITERAL:
            break
        word.append(chr(value).lower())
    return word


def _inside(node: tuple[Any, Any]) -> Nodes | None:
    """The nodes inside a group or an assertion."""
    op, value = node
    if op is ops.SUBPATTERN:
        return list(value[3])
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        return list(value[1])
    if op is ops.ATOMIC_GROUP:
        return list(value)
    if op is ops.POSSESSIVE_REPEAT:
        return list(value[2])
    return None


def _characters(node: tuple[Any, Any]) -> frozenset[str] | None:
    """The characters that a node for one character matches, in lower case; None for other nodes."""
    op, value = node
    if op is ops.LITERAL:
        return frozenset(chr(value).lower())
    if op is ops.NOT_LITERAL:
        return _ALL - {chr(value)}
    if op is ops.ANY:
        return _ALL
    if op is ops.SUBPATTERN and len(value[3]) == 1:
        return _characters(value[3][0])
    if op is not ops.IN:
        return None
    found: frozenset[str] = frozenset()
    for kind, item in value:
        if kind is ops.LITERAL:
            found |= {chr(item)}
        elif kind is ops.RANGE:
            found |= {chr(code) for code in range(item[0], min(item[1], 127) + 1)}
        elif kind is ops.CATEGORY:
            found |= _CATEGORIES[item]
    found = _ALL - found if value[0][0] is ops.NEGATE else found
    return frozenset(character.lower() for character in found)


def _start(nodes: Nodes, after: _Start) -> _Start:
    """How a text can begin that these nodes match, with `after` behind them."""
    for index, node in enumerate(nodes):
        op, value = node
        if op is ops.AT and value in (ops.AT_END, ops.AT_END_STRING):
            return _END
        if op in (ops.AT, ops.ASSERT, ops.ASSERT_NOT):
            # It may fail wherever a repeat before it ends.
            return _Start(_ALL)
        rest = nodes[index + 1 :]
        if op in (*_REPEATS, ops.POSSESSIVE_REPEAT):
            least, most, body = value
            first = _start(list(body), _END)
            if least and first.characters:
                return _Start(first.characters, min(first.fixed, 1 if most > 1 else _NAME))
            return first.or_else(_start(rest, after))
        if op is ops.BRANCH:
            starts = [_start(list(branch) + rest, after) for branch in value[1]]
            union = starts[0]
            for start in starts[1:]:
                union = union.or_else(start)
            return union
        if (inside := _inside(node)) is not None:
            return _start(inside + rest, after)
        word = _word(nodes[index:])
        if word:
            return _Start(frozenset(word[0]), len(word))
        return _Start(_characters(node) or _ALL)
    return after
