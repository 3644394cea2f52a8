"""The ways to change a page table, for everything that stands for one.

Promises: each method makes a `PageMutation` (two for a pinned page) and hands it to `apply`; none
changes anything itself. Without a turn, the table's latest counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

from proxy.memory.models import (
    Actor,
    CompressionLevel,
    FaultReason,
    MemoryPage,
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    PinKind,
    StorageTier,
)

_Table = TypeVar("_Table", bound="TableChanges")


def unknown(page_id: str) -> KeyError:
    """What is raised for a page that the table does not have."""
    return KeyError(f"no page {page_id!r} in this page table")


class TableChanges(ABC):
    """What a table must have is `turn`, `lookup` and `apply`."""

    turn: int

    @abstractmethod
    def lookup(self, page_id: str) -> PageTableEntry | None:
        """The entry, or None."""

    @abstractmethod
    def apply(self, mutation: PageMutation) -> PageTableEntry:
        """Change the table as the mutation says and return the entry, or raise and change nothing."""

    def register(self, page: MemoryPage, turn: int | None = None) -> PageTableEntry:
        """Enter a page; a page that is already known only has its location brought up to date."""
        at = self.turn if turn is None else turn
        if self.lookup(page.page_id) is not None:
            return self.update_location(
                page.page_id,
                tier=page.storage_tier,
                artifact_id=page.artifact_id,
                level=page.compression_level,
                turn=at,
            )
        entry = self.apply(
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
            self.pin(page.page_id, at)
        return entry

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
        return self.apply(
            PageMutation(
                MutationType.CREATE, page_id, turn, None, tier, tokens, actor, None, None, modality
            )
        )

    def update_location(
        self,
        page_id: str,
        tier: StorageTier,
        artifact_id: str | None = None,
        level: CompressionLevel | None = None,
        turn: int | None = None,
    ) -> PageTableEntry:
        """Move a page: out of L0 is an EVICT, into L0 a MAP, anything else an UPDATE."""
        entry = self.lookup(page_id)
        if entry is None:
            raise unknown(page_id)
        at = self.turn if turn is None else turn
        op = MutationType.UPDATE
        if entry.tier is StorageTier.L0 and tier is not StorageTier.L0:
            op = MutationType.EVICT
        elif entry.tier is not StorageTier.L0 and tier is StorageTier.L0:
            op = MutationType.MAP
        return self.apply(PageMutation(op, page_id, at, level, tier, artifact_id=artifact_id))

    def map(
        self, page_id: str, turn: int, level: CompressionLevel, tokens: int | None = None
    ) -> PageTableEntry:
        """Bring a page into L0 on the proxy's own account; `tokens` is its cost at that level."""
        return self.apply(
            PageMutation(MutationType.MAP, page_id, turn, level, StorageTier.L0, tokens)
        )

    def fault_in(
        self,
        page_id: str,
        turn: int,
        level: CompressionLevel = CompressionLevel.FULL,
        tokens: int | None = None,
        reason: FaultReason = FaultReason.RESOLVE_REFERENCE,
    ) -> PageTableEntry:
        """Bring a page into L0 because the model asked for it."""
        return self.apply(
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

    def evict(self, page_id: str, turn: int, tier: StorageTier = StorageTier.L2) -> PageTableEntry:
        """Take a page out of the window; its body stays where storage has it."""
        return self.apply(PageMutation(MutationType.EVICT, page_id, turn, tier=tier))

    def pin(
        self, page_id: str, turn: int, kind: PinKind = PinKind.EXPLICIT, actor: Actor = Actor.SYSTEM
    ) -> PageTableEntry:
        """Keep a page in the window; see `pins` for how long."""
        return self.apply(PageMutation(MutationType.PIN, page_id, turn, actor=actor, pin_kind=kind))

    def unpin(self, page_id: str, turn: int, actor: Actor = Actor.SYSTEM) -> PageTableEntry:
        """Take a pin back, of whatever kind."""
        return self.apply(PageMutation(MutationType.UNPIN, page_id, turn, actor=actor))

    def replay(self: _Table, mutations: Iterable[PageMutation]) -> _Table:
        """Apply all of them in order; returns the table itself."""
        for mutation in mutations:
            self.apply(mutation)
        return self
