"""What a case found: the class of its outcome, and what is wrong with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import loraplex

LENGTH = 3000
"""Characters that a message may have."""
SOURCE = os.path.dirname(loraplex.__file__)
_VARYING = re.compile(r"=.*|0x[0-9a-f]+|[\d.]+|'[^']*'|\"[^\"]*\"|/\S+")
_RAW = ("UnicodeDecodeError", "UnicodeEncodeError", "UnicodeError", "JSONDecodeError", "ValidationError")


@dataclass
class Result:
    """One case."""

    kind: str
    path: str
    """Which way in: the function or command that was called."""
    outcome: str = "equal"
    """equal, refused, or host: refused by PEFT or transformers before any code of ours ran."""
    problems: list[str] = field(default_factory=list)
    """What must not be; empty in a good case."""
    where: str = ""
    """The place in the code that a problem comes from, for telling equal findings from new ones."""
    message: str = ""
    mutations: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def bad(self, problem: str, error: BaseException | None = None) -> None:
        """Add a problem."""
        self.problems.append(problem)
        if error is not None and not self.where:
            self.where = place_of(error)

    @property
    def signature(self) -> str:
        """Equal for findings that are probably one mistake."""
        first = _VARYING.sub("#", self.problems[0])[:80] if self.problems else ""
        return f"{self.kind}|{self.path}|{self.where}|{first}"


def frames_of(error: BaseException) -> list[tuple[str, str, int]]:
    """(file, function, line) from the outside in; `traceback` would look for the source of a thousand frames."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append((code.co_filename, code.co_name, trace.tb_lineno))
        trace = trace.tb_next
    return frames


def place_of(error: BaseException) -> str:
    """Exception, its innermost frame of ours, and the innermost of all."""
    frames = frames_of(error)
    ours = [f"{os.path.relpath(f, SOURCE)}:{name}" for f, name, _ in frames if f.startswith(SOURCE)]
    inner = f"{os.path.basename(frames[-1][0])}:{frames[-1][1]}:{frames[-1][2]}" if frames else "?"
    return f"{type(error).__name__} {ours[-1] if ours else '-'} ({inner})"


def is_ours(error: BaseException) -> bool:
    """Whether code of this package ran when the error came up, beside what stands around PEFT's entry points."""
    ours = {os.path.basename(f) for f, _, _ in frames_of(error) if f.startswith(SOURCE)}
    return bool(ours - {"entry_points.py", "attempt.py"})


def fault_of(error: BaseException) -> str | None:
    """Why this is no clear error, or None."""
    name, message = type(error).__name__, text_of(error)
    named_by_peft = type(error).__module__.partition(".")[0] == "peft"
    if not (isinstance(error, (ValueError, OSError)) or named_by_peft) or name in _RAW:
        return f"raises {name}: {message[:200]}"
    return fault_of_message(message)


def fault_of_message(message: str) -> str | None:
    """Why this is no message for a person, or None."""
    if len(message) < 15:
        return f"message names nothing: {message!r}"
    if len(message) > LENGTH:
        return f"message has {len(message)} characters: {message[:80]!r}…"
    return None


def text_of(error: BaseException) -> str:
    """The message of an error; a hostile one may fail to print."""
    try:
        return str(error)
    except Exception as other:
        return f"<{type(other).__name__} while printing {type(error).__name__}>"


def as_dict(result: Result) -> dict[str, Any]:
    """Plain values, for JSON."""
    return dict(vars(result))
