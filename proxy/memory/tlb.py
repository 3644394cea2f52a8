"""The translation lookaside buffer: a small cache of page table entries in front of the table.

Promises: at most `max_entries` entries, the least recently used leave first; what it returns is the
table's own live entry; hits and misses are counted as they happen. For programs that hold a table as
the guide shows it: a hit costs more than the look-up that it saves, so no request goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from cachetools import LRUCache
from pydantic import BaseModel

from proxy.memory.models import MemoryPage, PageMutation, PageTableEntry
from proxy.memory.table import PageTable

DEFAULT_TLB_ENTRIES = 512


class TLBStats(BaseModel):
    """Counts since the TLB was made. `hit_rate` is hits per lookup, 0.0 before the first."""

    size: int = 0
    max_entries: int = DEFAULT_TLB_ENTRIES
    hits: int = 0
    misses: int = 0
    hit_rate: float = 0.0


class PageTLB:
    """Entries by page id, bounded, least recently used first out."""

    def __init__(self, max_entries: int = DEFAULT_TLB_ENTRIES) -> None:
        if max_entries < 1:
            raise ValueError("max_entries is at least 1")
        self._entries: LRUCache[str, PageTableEntry] = LRUCache(max_entries)
        self._hits = self._misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._entries

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """The entry if it is here (a hit, and now the most recently used), else None (a miss)."""
        entry = self._entries.get(page_id)
        if entry is None:
            self._misses += 1
        else:
            self._hits += 1
        return entry

    def insert(self, entry: PageTableEntry) -> None:
        """Keep an entry as the most recently used; the least recently used makes room."""
        self._entries[entry.page_id] = entry

    def invalidate(self, page_id: str) -> None:
        """Forget one entry; nothing happens when it is not here."""
        self._entries.pop(page_id, None)

    def clear(self) -> None:
        """Forget all entries; the counts go on."""
        self._entries.clear()

    def get_stats(self) -> TLBStats:
        """The counts and the hit rate."""
        asked = self._hits + self._misses
        return TLBStats(
            size=len(self._entries),
            max_entries=int(self._entries.maxsize),
            hits=self._hits,
            misses=self._misses,
            hit_rate=self._hits / asked if asked else 0.0,
        )


class TLBWithPageTable:
    """A page table seen through a TLB. Entries are changed in place by the table alone, so a cached one
    is never stale; all but looking up is the table's own."""

    def __init__(self, page_table: PageTable, tlb: PageTLB | None = None) -> None:
        self.page_table = page_table
        self.tlb = PageTLB() if tlb is None else tlb
        self.tlb.clear()  # whatever it cached was of another table

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """From the TLB, else from the table, and then kept; None for a page that is not there."""
        entry = self.tlb.lookup(page_id)
        if entry is None:
            entry = self.page_table.lookup(page_id)
            if entry is not None:
                self.tlb.insert(entry)
        return entry

    def register(self, page: MemoryPage, turn: int | None = None) -> PageTableEntry:
        """As `PageTable.register`; the entry is kept, as it is about to be asked for."""
        entry = self.page_table.register(page, turn)
        self.tlb.insert(entry)
        return entry

    def apply(self, mutation: PageMutation) -> PageTableEntry:
        """As `PageTable.apply`."""
        return self.page_table.apply(mutation)

    def __len__(self) -> int:
        return len(self.page_table)

    def __iter__(self) -> Iterator[PageTableEntry]:
        return iter(self.page_table)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page_table, name)


AnyTable: TypeAlias = PageTable | TLBWithPageTable
