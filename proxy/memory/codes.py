"""The durable numbers of enum members, shared by the mutation log and the page table's blocks.

Promises: a member's code is its place in its list and never changes: what is stored is read back for
ever. New members are added at the end.
"""

from __future__ import annotations

from typing import TypeVar

from proxy.memory.models import (
    Actor,
    FaultReason,
    Modality,
    MutationType,
    PageType,
    PinKind,
    StorageTier,
)

OPS = (
    MutationType.CREATE,
    MutationType.FAULT_IN,
    MutationType.EVICT,
    MutationType.COMPRESS,
    MutationType.PIN,
    MutationType.UNPIN,
    MutationType.UPDATE,
    MutationType.MAP,
    MutationType.ACCESS,
)
TIERS = (StorageTier.L0, StorageTier.L1, StorageTier.L2, StorageTier.L3, StorageTier.L4)
ACTORS = (Actor.SYSTEM, Actor.USER, Actor.MODEL, Actor.TOOL)
REASONS = (
    FaultReason.USER_REQUESTED_RECALL,
    FaultReason.RESOLVE_REFERENCE,
    FaultReason.TOOL_PREREQUISITE,
    FaultReason.SPECULATIVE,
)
MODALITIES = (
    Modality.TEXT,
    Modality.IMAGE,
    Modality.AUDIO,
    Modality.VIDEO,
    Modality.STRUCTURED,
)
PAGE_TYPES = (
    PageType.TRANSCRIPT,
    PageType.SUMMARY,
    PageType.ARTIFACT,
    PageType.CLAIM,
    PageType.PROCEDURE,
    PageType.INDEX,
)
PIN_KINDS = (PinKind.EXPLICIT, PinKind.INFERRED)

_Member = TypeVar("_Member")


def codes_of(members: tuple[_Member, ...]) -> dict[_Member | None, int | None]:
    """Code by member; None has none."""
    codes: dict[_Member | None, int | None] = {None: None}
    codes.update((member, code) for code, member in enumerate(members))
    return codes


def member_of(members: tuple[_Member, ...], code: int) -> _Member:
    """The member with this code; IndexError for a code that nobody has."""
    if code < 0:  # Python would count from the end
        raise IndexError(code)
    return members[code]
