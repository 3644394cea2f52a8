"""Packed lines, kept so that an unchanged page is not quoted and counted again.

Promises: a line is found only under everything that it depends on (page id, version of the content,
what the line says beside it, level, and the counter), so losing or sharing the cache changes no
output; the lines used last are kept, at most `max_bytes` of text in all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from cachetools import LRUCache
from pydantic import BaseModel

DEFAULT_PACK_BYTES = 8 << 20


class PackedLine(NamedTuple):
    """One page's line of <VM:CONTEXT>, and its tokens with the media that it names."""

    line: str
    tokens: int


class PackCacheStats(BaseModel):
    """Counts since the cache was made. `hit_rate` is hits per look-up, 0.0 before the first."""

    entries: int = 0
    hits: int = 0
    misses: int = 0
    hit_rate: float = 0.0


class PackCache:
    """Lines by what they depend on. A line larger than `max_bytes` is not kept."""

    def __init__(self, max_bytes: int = DEFAULT_PACK_BYTES) -> None:
        self._lines: LRUCache[Hashable, PackedLine] = LRUCache(max_bytes, _size_bytes)
        self._hits = self._misses = 0

    def __len__(self) -> int:
        return len(self._lines)

    def get_or_pack(self, key: Hashable, pack: Callable[[], PackedLine]) -> PackedLine:
        """The line under `key`, packed now if it is not kept."""
        line = self._lines.get(key)
        if line is not None:
            self._hits += 1
            return line
        self._misses += 1
        line = pack()
        if _size_bytes(line) <= self._lines.maxsize:
            self._lines[key] = line
        return line

    def clear(self) -> None:
        """Forget the lines; the counts stay."""
        self._lines.clear()

    def get_stats(self) -> PackCacheStats:
        """How often it helped."""
        asked = self._hits + self._misses
        return PackCacheStats(
            entries=len(self._lines),
            hits=self._hits,
            misses=self._misses,
            hit_rate=self._hits / asked if asked else 0.0,
        )


def _size_bytes(line: PackedLine) -> int:
    """What a line takes in RAM, its key and the cache's own entry included."""
    return 512 + 2 * len(line.line)
