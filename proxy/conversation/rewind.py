"""Takes a window's log back to where the client's own messages differ from it. Pure.

Promises: what stood before that place keeps its bytes; every page that was shown only behind it is
found, so that the table can say that it is not in the window any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy.conversation.pathpages import owner
from proxy.conversation.records import GetRecord, Record
from proxy.conversation.tree import Anchor, Node
from proxy.conversation.window import MIXED, NATIVE, SYSTEM, Window
from proxy.memory.models import MutationType
from proxy.memory.table import decode_log


def differs_at(
    before: Window, path: Sequence[Node], anchors: Sequence[Anchor], start: int, strict: bool = False
) -> int | None:
    """The first position at which the client's system messages are not what the window has; None
    when they agree. `start` is the position of the client's first message.

    Those behind the newest message of the turn before may stay for a turn (but for `strict`): a
    client that always has one there moves it along.
    """
    covered = before.covered
    native = {e.position for e in before.entries if e.kind in (NATIVE, MIXED)}
    sent = [(e.position, e.said) for e in before.entries if e.kind == SYSTEM and e.position > start]
    now = [
        (a.position, a.said)
        for a in anchors
        if start < a.position <= covered
        and (a.position == covered or owner(path, a.position) in native)
    ]
    last = [raw for position, raw in sent if position == covered]
    here = [raw for position, raw in now if position == covered]
    inside = [one for one in sent if one[0] < covered], [one for one in now if one[0] < covered]
    for old, new in zip(*inside, strict=False):
        if old != new:
            return min(old[0], new[0])
    shorter, longer = sorted(inside, key=len)
    if len(longer) > len(shorter):
        return longer[len(shorter)][0]
    return covered if (here or strict) and here[: len(last)] != last else None


def taken_back(window: Window, position: int) -> Window:
    """The log without what stands at `position` and behind it."""
    kept = next(
        (i for i, entry in enumerate(window.entries) if entry.position >= position),
        len(window.entries),
    )
    return window.until(kept, position)


def brought_since(head: Record, position: int, get: GetRecord) -> list[str]:
    """The pages that were brought into the window, unplanned, by turns whose newest message stands at
    `position` or behind it. LookupError when a turn is missing from storage."""
    found: dict[str, None] = {}
    at: Record | None = head
    while at is not None and at.end > position:
        if at.mutations:
            for m in decode_log(at.mutations):
                mapped = m.op is MutationType.MAP and m.reason is not None
                if mapped or m.op is MutationType.FAULT_IN:
                    found[m.page_id] = None
        above = at.base
        at = get(above) if above else None
        if above and at is None:
            raise LookupError("a record that a window continues is missing from storage")
    return list(found)
