"""Hooks: methods of vLLM's classes that call us, too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Method = Callable[..., Any]


def wrap_once(owner: type, name: str, wrap: Callable[[Method], Method]) -> None:
    """Replace method `name` of `owner`, where it has one, by `wrap` of it; only once."""
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "_flash_eplb"):
        return
    wrapped = functools.wraps(original)(wrap(original))
    wrapped._flash_eplb = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def call_before(owner: type, name: str, action: Callable[[Any], None]) -> None:
    """Let method `name` call `action` with its object first."""

    def wrap(original: Method) -> Method:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            action(self)
            return original(self, *args, **kwargs)

        return method

    wrap_once(owner, name, wrap)
