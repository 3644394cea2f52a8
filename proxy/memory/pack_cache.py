"""Packed lines, kept so that an unchanged page is not quoted and counted again.

Promises: a line is found only under everything that it depends on (page id, version of the content,
what the line says beside it, level, and the counter), so losing or sharing the cache changes no
output; at most `max_entries` lines are kept, the least recently used leave first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

from pydantic import BaseModel

DEFAULT_PACK_ENTRIES = 2048


class PackedLine(NamedTuple):
    """One page's line of <VM:CONTEXT>, and its tokens with the media that it names."""

    line: str
    tokens: int


class PackCacheStats(BaseModel):
    """Counts since the cache was made."""

    entries: int = 0
    max_entries: int = DEFAULT_PACK_ENTRIES
    hits: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float:
        """0..1; 0 before the first look-up."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class PackCache:
    """Lines by what they depend on; ValueError when `max_entries` is below 1."""

    def __init__(self, max_entries: int = DEFAULT_PACK_ENTRIES) -> None:
        if max_entries < 1:
            raise ValueError("a pack cache needs room for at least one line")
        self._max_entries = max_entries
        self._lines: OrderedDict[Hashable, PackedLine] = OrderedDict()
        self._hits = 0
        self._misses = 0

    def __len__(self) -> int:
        return len(self._lines)

    def get_or_pack(self, key: Hashable, pack: Callable[[], PackedLine]) -> PackedLine:
        """The line under `key`, packed now if it is not kept."""
        found = self._lines.get(key)
        if found is not None:
            self._hits += 1
            self._lines.move_to_end(key)
            return found
        self._misses += 1
        made = self._lines[key] = pack()
        if len(self._lines) > self._max_entries:
            self._lines.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget the lines; the counts stay."""
        self._lines.clear()

    def get_stats(self) -> PackCacheStats:
        """How often it helped."""
        return PackCacheStats(
            entries=len(self._lines),
            max_entries=self._max_entries,
            hits=self._hits,
            misses=self._misses,
        )
