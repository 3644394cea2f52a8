"""Pages that a person pinned, or took a pin from. Pure.

Promises: a pin is a mutation of the page table like any other, with the person as its actor, in the log of the conversation's
next turn that pages; it names a message by its node, so a branch that says something else there knows nothing of it. A
pinned page that is not in the window comes into it with a new epoch, and stays until the pin is taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from proxy import keys
from proxy.conversation.tree import Node, NodeId
from proxy.memory.models import (
    Actor,
    CompressionLevel,
    MutationType,
    PageMutation,
    PinKind,
    StorageTier,
)
from proxy.memory.table import PageTable

MOST = 256  # of a conversation


class Pin(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What somebody wants of a page; `node` is its message. `at_s`: since when (Unix time)."""

    page_id: str
    node: NodeId
    pinned: bool
    at_s: int


encode_pins = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Pin]).decode


def pins_key(owner: bytes) -> bytes:
    return keys.PINS + owner


def decode_pins(data: bytes | None) -> list[Pin]:
    return [] if data is None else _decode(data)


def with_pin(pins: Sequence[Pin], pin: Pin) -> list[Pin]:
    """The same with what is wanted of one page now; beyond `MOST` the oldest go."""
    return [*(one for one in pins if (one.page_id, one.node) != (pin.page_id, pin.node)), pin][-MOST:]


def pinned(
    pins: Sequence[Pin], table: PageTable, path: Sequence[Node], turn: int, since: int
) -> Iterator[PageMutation]:
    """What the table lacks of them; a page that left the window since the turn `since`, as evidence does, comes back. (One
    for which an epoch had no room does not: each turn would begin one.)"""
    for pin in pins:
        entry = table.lookup(pin.page_id)
        if entry is None or not 0 <= entry.position < len(path) or path[entry.position].id != pin.node:
            continue
        if not pin.pinned:
            if entry.pinned:
                yield PageMutation(MutationType.UNPIN, pin.page_id, turn, actor=Actor.USER)
            continue
        new = entry.pin_kind is not PinKind.EXPLICIT
        if new:
            yield PageMutation(MutationType.PIN, pin.page_id, turn, actor=Actor.USER)
        if entry.tier is not StorageTier.L0 and (new or (entry.evicted_turn or 0) >= since):
            yield PageMutation(
                MutationType.MAP, pin.page_id, turn, CompressionLevel.FULL, StorageTier.L0, entry.size_tokens, Actor.USER
            )
