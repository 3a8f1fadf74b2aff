"""How long-running steps tell what they have done: one callable, silent by default."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); `done` starts at what an earlier, interrupted run had finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
