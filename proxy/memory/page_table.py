"""The page table: where every page is, at which level, and its history.

Promises: the table is a fold of its mutations. `apply` is the only writer; replaying the same
mutations gives an equal table, in the same order. No turn is read from anywhere but a mutation. An
unknown page is a `KeyError`, a second CREATE a `ValueError`.

The table can be larger than RAM: `checkpoint` gives what changed as blocks for storage, `shed` drops
what can be read back from there, `open` restores a table from its root record alone. Where an entry
is makes no difference to any answer (invariant 9). An entry is live until the next `shed`: after it,
look the page up again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from proxy.memory.codes import MODALITIES, TIERS
from proxy.memory.eviction import REFAULT_GAIN, is_cooling
from proxy.memory.models import (
    CompressionLevel,
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageTableStats,
    PageType,
    PinKind,
    StorageTier,
)
from proxy.memory.pages import parse_page_id
from proxy.memory.table_blocks import Checkpoint, Load, Root, TableBlocks, TreeRef
from proxy.memory.table_changes import TableChanges, unknown
from proxy.memory.table_store import TableStore

DEFAULT_IMPORTANCE = 0.5

_L0 = StorageTier.L0
_CREATE, _MAP, _FAULT_IN = MutationType.CREATE, MutationType.MAP, MutationType.FAULT_IN
_EVICT, _COMPRESS, _ACCESS = MutationType.EVICT, MutationType.COMPRESS, MutationType.ACCESS
_PIN, _UNPIN = MutationType.PIN, MutationType.UNPIN


class PageTable(TableChanges):
    """Entries by page id, with an index of the window.

    `on_apply` is called with each mutation after it was applied (a log's `append`, for instance).
    `root` is a checkpoint's root record and `load` gives a block's bytes by its reference (None: not
    there, which is a `LookupError` when it is needed). A root that is none is a `ValueError`.
    """

    def __init__(
        self,
        on_apply: Callable[[PageMutation], object] | None = None,
        root: bytes | None = None,
        load: Load | None = None,
    ) -> None:
        self._entries: dict[str, PageTableEntry] = {}
        self._window: dict[str, PageTableEntry] = {}
        self._on_apply = on_apply
        self._load = load
        self._store: TableStore | None = None  # None: never stored, all of it is in RAM
        self.turn = 0  # the latest turn of any applied mutation
        self.sheds = 0  # how often entries were dropped from RAM
        self._size = self._tokens = self._l0_tokens = self._pinned = 0
        self._tiers = dict.fromkeys(TIERS, 0)
        self._modalities = dict.fromkeys(MODALITIES, 0)
        if root is not None:
            self._restore(Root.decode(root))

    @classmethod
    def open(
        cls, root: bytes, load: Load, on_apply: Callable[[PageMutation], object] | None = None
    ) -> PageTable:
        """The table of a checkpoint, with its window in RAM and the rest where it was stored."""
        return cls(on_apply, root, load)

    # reading

    def __len__(self) -> int:
        return self._size

    def __contains__(self, page_id: object) -> bool:
        return isinstance(page_id, str) and self.lookup(page_id) is not None

    def __iter__(self) -> Iterator[PageTableEntry]:
        """All entries in order of registration; reads what is not in RAM."""
        if self._store is None:
            return iter(self._entries.values())
        self._store.fetch_all()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.sequence))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageTable):
            return NotImplemented
        return self.turn == other.turn and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """The entry, or None for a page that this path does not have."""
        return self._entries.get(page_id) or self._fetch(page_id)

    def _fetch(self, page_id: str) -> PageTableEntry | None:
        return None if self._store is None else self._store.fetch(page_id)

    def get_by_tier(self, tier: StorageTier) -> list[PageTableEntry]:
        """The pages of one tier in conversation order; reads what is not in RAM, but for L0."""
        if tier is _L0:
            return sorted(self._window.values(), key=_conversation_order)
        if not self._tiers[tier]:
            return []
        return sorted((e for e in self if e.tier is tier), key=_conversation_order)

    def resident(self) -> list[PageTableEntry]:
        """The pages in L0 (each with its level) in conversation order."""
        return self.get_by_tier(_L0)

    @property
    def in_ram(self) -> int:
        """How many entries are in RAM."""
        return len(self._entries)

    @property
    def total_tokens(self) -> int:
        """Of all pages at their current size, in the window or not."""
        return self._tokens

    def get_stats(self) -> PageTableStats:
        """Counts by tier and modality; tiers and modalities without pages are left out."""
        return PageTableStats(
            total_pages=self._size,
            total_tokens=self._tokens,
            pinned_pages=self._pinned,
            l0_tokens=self._l0_tokens,
            pages_by_tier={tier: count for tier, count in self._tiers.items() if count},
            pages_by_modality={kind: count for kind, count in self._modalities.items() if count},
        )

    # storage

    def checkpoint(self) -> Checkpoint:
        """The root record and the blocks that changed since the last checkpoint (or `open`).

        The caller stores the blocks, then the root, before the next `shed` or lookup of a page that
        is not in RAM. Nothing changed: the same root, no blocks.
        """
        if self._store is None:
            empty = TableBlocks(TreeRef(), TreeRef(), self._load)
            self._store = TableStore(self._entries, empty)
        blocks = self._store.write()
        root = Root(
            self.turn,
            self._size,
            self._tokens,
            self._l0_tokens,
            self._pinned,
            [self._tiers[tier] for tier in TIERS],
            [self._modalities[kind] for kind in MODALITIES],
            *self._store.blocks.refs,
        )
        return Checkpoint(root.encode(), blocks)

    def shed(self, max_entries: int = 0, keep: Collection[str] = ()) -> int:
        """Drop entries from RAM until at most `max_entries` are left; returns how many went.

        Stay in any case: pages of the window, what changed since the last checkpoint, the ids in
        `keep`, and everything while the table has no checkpoint or nothing to read it back with.
        """
        if self._store is None:
            return 0
        dropped = self._store.shed(max_entries, (self._window, keep))
        self.sheds += dropped > 0
        return dropped

    def _restore(self, root: Root) -> None:
        self.turn, self._size, self._tokens = root.turn, root.size, root.tokens
        self._l0_tokens, self._pinned = root.l0_tokens, root.pinned
        self._tiers.update(zip(TIERS, root.tiers, strict=False))
        self._modalities.update(zip(MODALITIES, root.modalities, strict=False))
        blocks = TableBlocks(root.messages, root.derived, self._load)
        self._store = TableStore(self._entries, blocks)
        self._store.fetch_window()
        self._window = {i: e for i, e in self._entries.items() if e.tier is _L0}

    # the one writer

    def apply(self, mutation: PageMutation) -> PageTableEntry:
        """Change the table as the mutation says and return the entry, or raise and change nothing."""
        op = mutation.op
        if op is _CREATE:
            entry = self._create(mutation)
        else:
            entry = self._known(mutation.page_id)
            if op is _MAP or op is _FAULT_IN:
                self._enter_l0(entry, mutation)
            elif op is _EVICT:
                self._leave_l0(entry, mutation)
            elif op is _ACCESS:
                entry.access_count += 1
                if mutation.turn > entry.last_turn:
                    entry.last_turn = mutation.turn
            elif op is _COMPRESS:
                self._set_level(entry, mutation)
            elif op is _PIN or op is _UNPIN:
                self._set_pin(entry, mutation)
            else:
                self._update(entry, mutation)
        if mutation.turn > self.turn:
            self.turn = mutation.turn
        if self._store is not None:
            self._store.changed.add(entry.page_id)
        if self._on_apply is not None:
            self._on_apply(mutation)
        return entry

    def _known(self, page_id: str) -> PageTableEntry:
        entry = self._entries.get(page_id) or self._fetch(page_id)
        if entry is None:
            raise unknown(page_id)
        return entry

    def _create(self, m: PageMutation) -> PageTableEntry:
        page_id = m.page_id
        if page_id in self._entries or self._fetch(page_id) is not None:
            raise ValueError(f"page {page_id!r} was created before; pages are immutable")
        position, part = parse_page_id(page_id) or (-1, 0)
        tier = m.tier or StorageTier.L2
        modality = m.modality or Modality.TEXT
        tokens = m.tokens or 0
        entry = PageTableEntry(
            page_id,
            position,
            part,
            self._size,
            modality,
            m.page_type or PageType.TRANSCRIPT,
            tier,
            m.level or CompressionLevel.FULL,
            tokens,
            0,
            DEFAULT_IMPORTANCE if m.importance is None else m.importance,
            m.turn,
        )
        entry.artifact_id = m.artifact_id
        entry.created_turn = m.turn
        self._entries[page_id] = entry
        self._size += 1
        self._tokens += tokens
        self._tiers[tier] += 1
        self._modalities[modality] += 1
        if tier is _L0:
            self._window[page_id] = entry
            entry.l0_tokens = tokens
            self._l0_tokens += tokens
        if self._store is not None:
            self._store.add(page_id, entry)
        return entry

    def _move(self, entry: PageTableEntry, tier: StorageTier, l0_tokens: int) -> None:
        """The only way to another tier, or to another cost in the window (0 outside it)."""
        self._l0_tokens += l0_tokens - entry.l0_tokens
        entry.l0_tokens = l0_tokens
        was = entry.tier
        if was is tier:
            return
        self._tiers[was] -= 1
        self._tiers[tier] += 1
        entry.tier = tier
        if tier is _L0:
            self._window[entry.page_id] = entry
        elif was is _L0:
            del self._window[entry.page_id]

    def _enter_l0(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.op is _FAULT_IN:
            if is_cooling(entry, m.turn):
                entry.refault_count += 1
                entry.importance = min(1.0, entry.importance + REFAULT_GAIN)
            entry.fault_count += 1
            entry.faulted_turn = m.turn
        self._move(entry, _L0, entry.size_tokens if m.tokens is None else m.tokens)
        if m.level is not None:
            entry.level = m.level
        entry.access_count += 1
        if m.turn > entry.last_turn:
            entry.last_turn = m.turn
        if m.artifact_id is not None:
            entry.artifact_id = m.artifact_id

    def _leave_l0(self, entry: PageTableEntry, m: PageMutation) -> None:
        tier = m.tier or StorageTier.L2
        if tier is _L0:
            raise ValueError("an eviction needs a tier below L0")
        self._move(entry, tier, 0)
        # Below L0 a page is its full body; a level only describes how it is shown in the window.
        entry.level = CompressionLevel.FULL if m.level is None else m.level
        entry.evicted_turn = m.turn
        if m.artifact_id is not None:
            entry.artifact_id = m.artifact_id

    def _set_level(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.level is None:
            raise ValueError("COMPRESS needs a level")
        entry.level = m.level
        if m.tokens is not None and entry.tier is _L0:
            self._move(entry, _L0, m.tokens)

    def _set_pin(self, entry: PageTableEntry, m: PageMutation) -> None:
        pinned = m.op is _PIN
        self._pinned += pinned - entry.pinned
        if not pinned:
            entry.pin_kind = entry.pinned_turn = None
        else:
            if entry.pin_kind is not PinKind.EXPLICIT:  # no guess weakens what somebody asked for
                entry.pin_kind = m.pin_kind or PinKind.EXPLICIT
            entry.pinned_turn = m.turn
        entry.pinned = pinned

    def _update(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.tier is not None and m.tier is not entry.tier:
            if _L0 in (m.tier, entry.tier):
                raise ValueError("only MAP, FAULT_IN and EVICT move a page into or out of L0")
            self._move(entry, m.tier, 0)
        if m.level is not None:
            entry.level = m.level
        if m.tokens is not None:
            self._tokens += m.tokens - entry.size_tokens
            entry.size_tokens = m.tokens
        if m.importance is not None:
            entry.importance = m.importance
        if m.artifact_id is not None:
            entry.artifact_id = m.artifact_id


def _conversation_order(entry: PageTableEntry) -> tuple[int, int, int]:
    return (entry.position, entry.part, entry.sequence)
