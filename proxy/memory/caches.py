"""The two small caches that the guide names: of a table's entries (the TLB) and of packed lines.

Promises: bounded, the least recently used leaves first; what is found is what would be made or read now,
so losing a cache changes no output (invariant 9); hits and misses are counted as they happen.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from proxy.memory.models import MemoryPage, PageTableEntry
from proxy.memory.table import PageTable

DEFAULT_TLB_ENTRIES = 512
DEFAULT_PACK_BYTES = 8 << 20

_Value = TypeVar("_Value")


class CacheStats(BaseModel):
    """Counts since the cache was made. `hit_rate` is hits per look-up, 0.0 before the first."""

    entries: int = 0
    hits: int = 0
    misses: int = 0
    hit_rate: float = 0.0


class _Cache(Generic[_Value]):
    """Values of `size_of` each, at most `max_size` in all; a larger one is not kept."""

    def __init__(self, max_size: int, size_of: Callable[[_Value], int] = lambda _: 1) -> None:
        if max_size < 1:
            raise ValueError("a cache has room for at least 1")
        self._values: OrderedDict[Hashable, _Value] = OrderedDict()  # the most recently used last
        self._left, self._max_size, self._size_of = max_size, max_size, size_of
        self._hits = self._misses = 0
        self._lock = threading.Lock()  # windows are rebuilt in several threads

    def lookup(self, key: Hashable) -> _Value | None:
        """The value, now the most recently used (a hit), or None (a miss)."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
                self._values.move_to_end(key)
        return value

    def keep(self, key: Hashable, value: _Value) -> _Value:
        """Returns the value; the least recently used make room for it."""
        size = self._size_of(value)
        if size <= self._max_size:
            with self._lock:
                before = self._values.pop(key, None)
                self._values[key] = value
                self._left += (0 if before is None else self._size_of(before)) - size
                while self._left < 0:
                    self._left += self._size_of(self._values.popitem(last=False)[1])
        return value

    def clear(self) -> None:
        """Forget the values; the counts go on."""
        with self._lock:
            self._values.clear()
            self._left = self._max_size

    def get_stats(self) -> CacheStats:
        asked = self._hits + self._misses
        return CacheStats(
            entries=len(self._values),
            hits=self._hits,
            misses=self._misses,
            hit_rate=self._hits / asked if asked else 0.0,
        )


class PageTLB(_Cache[PageTableEntry]):
    """Entries by page id. For programs that hold a table as the guide shows it: a hit costs more than the
    look-up that it saves, so no request goes through it."""

    def __init__(self, max_entries: int = DEFAULT_TLB_ENTRIES) -> None:
        super().__init__(max_entries)


class TLBWithPageTable:
    """A page table seen through a TLB, which keeps nothing of another table. Entries are changed in place by
    the table alone, so a cached one is never stale."""

    def __init__(self, page_table: PageTable, tlb: PageTLB | None = None) -> None:
        self.page_table = page_table
        self.tlb = PageTLB() if tlb is None else tlb
        self.tlb.clear()

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """From the TLB, else from the table, and then kept; None for a page that is not there."""
        entry = self.tlb.lookup(page_id)
        if entry is None and (entry := self.page_table.lookup(page_id)) is not None:
            self.tlb.keep(page_id, entry)
        return entry

    def register(self, page: MemoryPage) -> PageTableEntry:
        """As `PageTable.register`; the entry is kept, as it is about to be asked for."""
        return self.tlb.keep(page.page_id, self.page_table.register(page))


class PackedLine(NamedTuple):
    """One page's line of <VM:CONTEXT>, and its tokens with the media that it names."""

    line: str
    tokens: int


class PackCache(_Cache[PackedLine]):
    """Lines by all that they depend on, so that an unchanged page is not quoted and counted again."""

    def __init__(self, max_bytes: int = DEFAULT_PACK_BYTES) -> None:
        super().__init__(max_bytes, _size_bytes)


def _size_bytes(line: PackedLine) -> int:
    """What a line takes in RAM, its key and the cache's own entry included."""
    return 512 + 2 * len(line.line)
