"""One mutation a call, for tests that bring a page table into a state."""

from __future__ import annotations

from proxy.memory.models import (
    Actor,
    CompressionLevel,
    FaultReason,
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    PinKind,
    StorageTier,
)
from proxy.memory.table import PageTable

_L0 = StorageTier.L0


def register_id(
    table: PageTable, page_id: str, tokens: int, turn: int,
    modality: Modality = Modality.TEXT, tier: StorageTier = StorageTier.L2,
) -> PageTableEntry:  # fmt: skip
    create = MutationType.CREATE
    return table.apply(PageMutation(create, page_id, turn, None, tier, tokens, modality=modality))


def map_in(
    table: PageTable, page_id: str, turn: int, level: CompressionLevel, tokens: int | None = None
) -> PageTableEntry:
    return table.apply(PageMutation(MutationType.MAP, page_id, turn, level, _L0, tokens))


def fault_in(
    table: PageTable, page_id: str, turn: int,
    level: CompressionLevel = CompressionLevel.FULL, tokens: int | None = None,
) -> PageTableEntry:  # fmt: skip
    reason = FaultReason.RESOLVE_REFERENCE
    op = MutationType.FAULT_IN
    return table.apply(PageMutation(op, page_id, turn, level, _L0, tokens, Actor.MODEL, reason))


def evict(
    table: PageTable, page_id: str, turn: int, tier: StorageTier = StorageTier.L2
) -> PageTableEntry:
    return table.apply(PageMutation(MutationType.EVICT, page_id, turn, tier=tier))


def pin(
    table: PageTable, page_id: str, turn: int, kind: PinKind = PinKind.EXPLICIT
) -> PageTableEntry:
    return table.apply(PageMutation(MutationType.PIN, page_id, turn, pin_kind=kind))


def unpin(table: PageTable, page_id: str, turn: int) -> PageTableEntry:
    return table.apply(PageMutation(MutationType.UNPIN, page_id, turn))


