"""The page table: where every page is, at which level, and its history.

Promises: the table is a fold of its mutations. Every public method that changes something makes a
`PageMutation` and hands it to `apply`, which is the only writer; replaying the same mutations gives
an equal table, in the same order. No turn is read from anywhere but a mutation. An unknown page is
a `KeyError`, a second CREATE a `ValueError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from proxy.memory.models import (
    Actor,
    CompressionLevel,
    FaultReason,
    MemoryPage,
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageTableStats,
    PageType,
    StorageTier,
)
from proxy.memory.pages import parse_page_id

DEFAULT_IMPORTANCE = 0.5
REFAULT_COOLDOWN_TURNS = (
    8  # a page faulted back within this many turns of its eviction left too early
)
REFAULT_GAIN = 0.15  # added to its importance then, up to 1.0


class PageTable:
    """Entries by page id, with an index per tier.

    `on_apply` is called with each mutation after it was applied (a log's `append`, for instance).
    """

    def __init__(self, on_apply: Callable[[PageMutation], object] | None = None) -> None:
        self._entries: dict[str, PageTableEntry] = {}
        self._tiers: dict[StorageTier, dict[str, PageTableEntry]] = {t: {} for t in StorageTier}
        self._on_apply = on_apply
        self.turn = 0  # the latest turn of any applied mutation

    # reading

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._entries

    def __iter__(self) -> Iterator[PageTableEntry]:
        """All entries in order of registration."""
        return iter(self._entries.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageTable):
            return NotImplemented
        return self.turn == other.turn and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """The entry, or None for a page that this path does not have."""
        return self._entries.get(page_id)

    def get_by_tier(self, tier: StorageTier) -> list[PageTableEntry]:
        """The pages of one tier in conversation order."""
        return sorted(self._tiers[tier].values(), key=_conversation_order)

    def resident(self) -> list[PageTableEntry]:
        """The pages in L0 (each with its level) in conversation order."""
        return self.get_by_tier(StorageTier.L0)

    def get_stats(self) -> PageTableStats:
        """Counts by tier and modality; tiers and modalities without pages are left out."""
        by_modality: dict[Modality, int] = {}
        pinned = 0
        for entry in self._entries.values():
            by_modality[entry.modality] = by_modality.get(entry.modality, 0) + 1
            pinned += entry.pinned
        return PageTableStats(
            total_pages=len(self._entries),
            pinned_pages=pinned,
            l0_tokens=sum(e.l0_tokens for e in self._tiers[StorageTier.L0].values()),
            pages_by_tier={tier: len(pages) for tier, pages in self._tiers.items() if pages},
            pages_by_modality=by_modality,
        )

    # changing: each of these makes mutations

    def register(self, page: MemoryPage, turn: int | None = None) -> PageTableEntry:
        """Enter a page; a page that is already known only has its location brought up to date."""
        at = self.turn if turn is None else turn
        if page.page_id in self._entries:
            return self.update_location(
                page.page_id,
                tier=page.storage_tier,
                artifact_id=page.artifact_id,
                level=page.compression_level,
                turn=at,
            )
        self.apply(
            PageMutation(
                MutationType.CREATE,
                page.page_id,
                at,
                level=page.compression_level,
                tier=page.storage_tier,
                tokens=page.estimate_tokens(),
                importance=page.importance,
                modality=page.modality,
                page_type=page.page_type,
                artifact_id=page.artifact_id,
            )
        )
        if page.pinned:
            self.apply(PageMutation(MutationType.PIN, page.page_id, at))
        return self._entries[page.page_id]

    def register_id(
        self,
        page_id: str,
        tokens: int,
        turn: int,
        modality: Modality = Modality.TEXT,
        tier: StorageTier = StorageTier.L2,
        actor: Actor = Actor.SYSTEM,
    ) -> PageTableEntry:
        """The fast way in, without a `MemoryPage`: `tokens` is the full page's size."""
        self.apply(
            PageMutation(
                MutationType.CREATE, page_id, turn, None, tier, tokens, actor, None, None, modality
            )
        )
        return self._entries[page_id]

    def update_location(
        self,
        page_id: str,
        tier: StorageTier,
        artifact_id: str | None = None,
        level: CompressionLevel | None = None,
        turn: int | None = None,
    ) -> PageTableEntry:
        """Move a page: out of L0 is an EVICT, into L0 a MAP, anything else an UPDATE."""
        entry = self._known(page_id)
        at = self.turn if turn is None else turn
        op = MutationType.UPDATE
        if entry.tier is StorageTier.L0 and tier is not StorageTier.L0:
            op = MutationType.EVICT
        elif entry.tier is not StorageTier.L0 and tier is StorageTier.L0:
            op = MutationType.MAP
        self.apply(PageMutation(op, page_id, at, level, tier, artifact_id=artifact_id))
        return entry

    def map(
        self, page_id: str, turn: int, level: CompressionLevel, tokens: int | None = None
    ) -> PageTableEntry:
        """Bring a page into L0 on the proxy's own account; `tokens` is its cost at that level."""
        self.apply(PageMutation(MutationType.MAP, page_id, turn, level, StorageTier.L0, tokens))
        return self._entries[page_id]

    def fault_in(
        self,
        page_id: str,
        turn: int,
        level: CompressionLevel = CompressionLevel.FULL,
        tokens: int | None = None,
        reason: FaultReason = FaultReason.RESOLVE_REFERENCE,
    ) -> PageTableEntry:
        """Bring a page into L0 because the model asked for it."""
        self.apply(
            PageMutation(
                MutationType.FAULT_IN,
                page_id,
                turn,
                level,
                StorageTier.L0,
                tokens,
                Actor.MODEL,
                reason,
            )
        )
        return self._entries[page_id]

    def evict(self, page_id: str, turn: int, tier: StorageTier = StorageTier.L2) -> PageTableEntry:
        """Take a page out of the window; its body stays where storage has it."""
        self.apply(PageMutation(MutationType.EVICT, page_id, turn, tier=tier))
        return self._entries[page_id]

    def replay(self, mutations: Iterable[PageMutation]) -> PageTable:
        """Apply all of them in order; returns the table itself."""
        for mutation in mutations:
            self.apply(mutation)
        return self

    # the one writer

    def apply(self, mutation: PageMutation) -> None:
        """Change the table as the mutation says, or raise and change nothing."""
        op = mutation.op
        if op is MutationType.CREATE:
            self._create(mutation)
        else:
            entry = self._known(mutation.page_id)
            if op is MutationType.MAP or op is MutationType.FAULT_IN:
                self._enter_l0(entry, mutation)
            elif op is MutationType.EVICT:
                self._leave_l0(entry, mutation)
            elif op is MutationType.COMPRESS:
                self._set_level(entry, mutation)
            elif op is MutationType.PIN:
                entry.pinned = True
            elif op is MutationType.UNPIN:
                entry.pinned = False
            elif op is MutationType.ACCESS:
                entry.access_count += 1
                entry.last_turn = max(entry.last_turn, mutation.turn)
            else:
                self._update(entry, mutation)
        self.turn = max(self.turn, mutation.turn)
        if self._on_apply is not None:
            self._on_apply(mutation)

    def _known(self, page_id: str) -> PageTableEntry:
        entry = self._entries.get(page_id)
        if entry is None:
            raise KeyError(f"no page {page_id!r} in this page table")
        return entry

    def _create(self, m: PageMutation) -> None:
        if m.page_id in self._entries:
            raise ValueError(f"page {m.page_id!r} was created before; pages are immutable")
        position, part = parse_page_id(m.page_id) or (-1, 0)
        tier = m.tier or StorageTier.L2
        tokens = m.tokens or 0
        entry = PageTableEntry(
            m.page_id,
            position,
            part,
            len(self._entries),
            m.modality or Modality.TEXT,
            m.page_type or PageType.TRANSCRIPT,
            tier,
            m.level or CompressionLevel.FULL,
            tokens,
            tokens if tier is StorageTier.L0 else 0,
            DEFAULT_IMPORTANCE if m.importance is None else m.importance,
            m.turn,
        )
        entry.artifact_id = m.artifact_id
        self._entries[m.page_id] = entry
        self._tiers[tier][m.page_id] = entry

    def _move(self, entry: PageTableEntry, tier: StorageTier) -> None:
        if entry.tier is not tier:
            del self._tiers[entry.tier][entry.page_id]
            self._tiers[tier][entry.page_id] = entry
            entry.tier = tier

    def _enter_l0(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.op is MutationType.FAULT_IN:
            left = entry.evicted_turn
            outside = entry.tier is not StorageTier.L0
            if outside and left is not None and m.turn - left <= REFAULT_COOLDOWN_TURNS:
                entry.refault_count += 1
                entry.importance = min(1.0, entry.importance + REFAULT_GAIN)
            entry.fault_count += 1
            entry.faulted_turn = m.turn
        self._move(entry, StorageTier.L0)
        entry.level = entry.level if m.level is None else m.level
        entry.l0_tokens = entry.size_tokens if m.tokens is None else m.tokens
        entry.access_count += 1
        entry.last_turn = max(entry.last_turn, m.turn)
        if m.artifact_id is not None:
            entry.artifact_id = m.artifact_id

    def _leave_l0(self, entry: PageTableEntry, m: PageMutation) -> None:
        tier = m.tier or StorageTier.L2
        if tier is StorageTier.L0:
            raise ValueError("an eviction needs a tier below L0")
        self._move(entry, tier)
        # Below L0 a page is its full body; a level only describes how it is shown in the window.
        entry.level = CompressionLevel.FULL if m.level is None else m.level
        entry.l0_tokens = 0
        entry.evicted_turn = m.turn
        if m.artifact_id is not None:
            entry.artifact_id = m.artifact_id

    def _set_level(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.level is None:
            raise ValueError("COMPRESS needs a level")
        entry.level = m.level
        if m.tokens is not None and entry.tier is StorageTier.L0:
            entry.l0_tokens = m.tokens

    def _update(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.tier is not None:
            crossing = StorageTier.L0 in (m.tier, entry.tier) and m.tier is not entry.tier
            if crossing:
                raise ValueError("only MAP, FAULT_IN and EVICT move a page into or out of L0")
            self._move(entry, m.tier)
        if m.level is not None:
            entry.level = m.level
        if m.tokens is not None:
            entry.size_tokens = m.tokens
        if m.importance is not None:
            entry.importance = m.importance
        if m.artifact_id is not None:
            entry.artifact_id = m.artifact_id


def _conversation_order(entry: PageTableEntry) -> tuple[int, int, int]:
    return (entry.position, entry.part, entry.sequence)
