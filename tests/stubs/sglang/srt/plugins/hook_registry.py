"""Signatures of SGLang 0.5.23."""

from collections.abc import Callable
from enum import Enum
from typing import Any


class HookType(Enum):
    """When a hook is called."""

    BEFORE = "before"


class HookRegistry:
    """Hooks by the name of what they are put on."""

    hooks: dict[str, tuple[Callable[..., Any], HookType]] = {}  # noqa: RUF012

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        cls.hooks[target] = hook, hook_type
