"""The translation lookaside buffer: a small cache of page table entries in front of the table.

Promises: at most `max_entries` entries, the least recently used leave first; what it returns is
always the table's own live entry, whichever door changed or shed it; hits and misses are counted as
they happen. Nothing that the table answers depends on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import TypeAlias

from pydantic import BaseModel

from proxy.memory.models import PageMutation, PageTableEntry, PageTableStats, StorageTier
from proxy.memory.page_table import PageTable
from proxy.memory.table_blocks import Checkpoint
from proxy.memory.table_changes import TableChanges

DEFAULT_TLB_ENTRIES = 512


class TLBStats(BaseModel):
    """Counts since the TLB was made. `hit_rate` is hits per lookup, 0.0 before the first."""

    size: int = 0
    max_entries: int = DEFAULT_TLB_ENTRIES
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    hit_rate: float = 0.0


class PageTLB:
    """Entries by page id, bounded, least recently used first out."""

    def __init__(self, max_entries: int = DEFAULT_TLB_ENTRIES) -> None:
        if max_entries < 1:
            raise ValueError("max_entries is at least 1")
        self.max_entries = max_entries
        self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[str, PageTableEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._entries

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """The entry if it is here (a hit, and now the most recently used), else None (a miss)."""
        entry = self._entries.get(page_id)
        if entry is None:
            self.misses += 1
            return None
        self._entries.move_to_end(page_id)
        self.hits += 1
        return entry

    def insert(self, entry: PageTableEntry) -> None:
        """Keep an entry as the most recently used; the least recently used makes room."""
        self._entries[entry.page_id] = entry
        self._entries.move_to_end(entry.page_id)
        if len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)
            self.evictions += 1

    def invalidate(self, page_id: str) -> None:
        """Forget one entry; nothing happens when it is not here."""
        self._entries.pop(page_id, None)

    def clear(self) -> None:
        """Forget all entries; the counts go on."""
        self._entries.clear()

    def page_ids(self) -> Collection[str]:
        """The ids that are here, least recently used first; a view."""
        return self._entries.keys()

    def get_stats(self) -> TLBStats:
        """The counts and the hit rate."""
        asked = self.hits + self.misses
        return TLBStats(
            size=len(self._entries),
            max_entries=self.max_entries,
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
            hit_rate=self.hits / asked if asked else 0.0,
        )


class TLBWithPageTable(TableChanges):
    """A page table seen through a TLB; stands wherever a page table does.

    Entries are changed in place by the table alone, so a cached one is never stale; only when the
    table sheds entries from RAM (`shed` of its own) does the TLB start anew.
    """

    def __init__(self, page_table: PageTable, tlb: PageTLB | None = None) -> None:
        self.page_table = page_table
        self.tlb = PageTLB() if tlb is None else tlb
        self.tlb.clear()  # whatever it cached was of another table
        self._sheds = page_table.sheds

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """From the TLB, else from the table, and then kept; None for a page that is not there."""
        self._forget_shed()
        entry = self.tlb.lookup(page_id)
        if entry is None:
            entry = self.page_table.lookup(page_id)
            if entry is not None:
                self.tlb.insert(entry)
        return entry

    def apply(self, mutation: PageMutation) -> PageTableEntry:
        """As `PageTable.apply`; the entry is kept, as it is about to be asked for."""
        self._forget_shed()
        entry = self.page_table.apply(mutation)
        self.tlb.insert(entry)
        return entry

    def shed(self, max_entries: int = 0) -> int:
        """As `PageTable.shed`, with the TLB's entries staying in RAM too."""
        self._forget_shed()
        dropped = self.page_table.shed(max_entries, self.tlb.page_ids())
        self._sheds = self.page_table.sheds
        return dropped

    def _forget_shed(self) -> None:
        """Start anew when the table shed entries without us: those cached may be its no more."""
        if self.page_table.sheds != self._sheds:
            self._sheds = self.page_table.sheds
            self.tlb.clear()

    def checkpoint(self) -> Checkpoint:
        """As `PageTable.checkpoint`."""
        return self.page_table.checkpoint()

    @property
    def turn(self) -> int:  # type: ignore[override]
        """The latest turn of any applied mutation."""
        return self.page_table.turn

    @property
    def in_ram(self) -> int:
        """How many entries are in RAM."""
        return self.page_table.in_ram

    @property
    def total_tokens(self) -> int:
        """Of all pages at their current size, in the window or not."""
        return self.page_table.total_tokens

    def __len__(self) -> int:
        return len(self.page_table)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self.page_table

    def __iter__(self) -> Iterator[PageTableEntry]:
        """All entries in order of registration."""
        return iter(self.page_table)

    def get_by_tier(self, tier: StorageTier) -> list[PageTableEntry]:
        """As `PageTable.get_by_tier`."""
        return self.page_table.get_by_tier(tier)

    def resident(self) -> list[PageTableEntry]:
        """As `PageTable.resident`."""
        return self.page_table.resident()

    def get_stats(self) -> PageTableStats:
        """The page table's counts; the TLB's own are `tlb.get_stats()`."""
        return self.page_table.get_stats()


AnyTable: TypeAlias = PageTable | TLBWithPageTable
