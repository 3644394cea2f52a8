"""Token counts that a test can foresee."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class CountBy(NamedTuple):
    """`Counts`: texts by a function, each medium the same."""

    count: Callable[[str], int] = len
    media: int = 0

    def text(self, text: str) -> int:
        return self.count(text)

    def part(self, part: dict[str, Any]) -> int:
        return self.count(part["text"]) if "text" in part else self.media
