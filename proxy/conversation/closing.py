"""Closes a segment: what leaves the window is summarised, and what it came to is claimed. Pure.

Promises: linear in the messages that leave, of which a bounded number is read; what a closing stores
is enough to continue from (the checkpoint of a conversation): the page table's root and the segments.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from proxy.conversation.derived import Derived
from proxy.conversation.limits import Limits
from proxy.conversation.pages import PathPages
from proxy.memory.models import MutationType, PageMutation, PageType, StorageTier
from proxy.memory.segments import Segment, decode_segment
from proxy.memory.segments import close_segment as close_pages
from proxy.memory.sentences import SegmentDoc
from proxy.tokens import TokenCounter

_READ_CHARS = 8_000  # of one message; more of it is for a search to find


class Closing(msgspec.Struct, array_like=True):
    """What a record keeps of the segments that its turn closed. `root` is the page table's after the
    turn; positions before `end` are in a segment; `max_claims` was the limit then."""

    root: bytes
    segments: list[bytes]
    end: int
    max_claims: int


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Closing).decode


def encode_closing(
    root: bytes, segments: Sequence[Segment], end: int, max_claims: int
) -> bytes:
    return _pack(Closing(root, [segment.encode() for segment in segments], end, max_claims))


def table_root(closing: bytes) -> bytes:
    """The page table's root in an encoded closing."""
    return _unpack(closing).root


def grown(derived: Derived, closing: bytes) -> Derived:
    """`derived` and what an encoded closing left."""
    closed = _unpack(closing)
    for segment in closed.segments:
        derived = derived.with_segment(decode_segment(segment), closed.end, closed.max_claims)
    return derived


def close_segment(
    pages: PathPages, last: int, limits: Limits, turn: int, counter: TokenCounter
) -> Segment | None:
    """Close the segment that ends before the position `last`, and add it to the path's derived pages.

    None when nothing left the window since the last one, or nothing is to be made of it.
    """
    derived = pages.derived
    first = max(derived.end, last - limits.segment_messages)
    if last <= first or not (limits.summary_tokens or limits.max_claims):
        return None
    docs = [_doc(pages, position) for position in range(first, last)]
    segment = close_pages(
        derived.segments + 1,
        docs,
        derived.claims,
        derived.claims_made + 1,
        turn,
        counter.text,
        summary_tokens=limits.summary_tokens,
        claims_enabled=limits.max_claims > 0,
    )
    pages.derived = derived.with_segment(segment, last, limits.max_claims)
    return segment


def _doc(pages: PathPages, position: int) -> SegmentDoc:
    name = pages[position].message.get("name")
    return SegmentDoc(
        pages[position].ids[0],
        pages.path[position].role,
        name if isinstance(name, str) else "",
        "\n".join(pages[position].parts)[:_READ_CHARS],
    )


def created(
    segment: Segment, pages: PathPages, turn: int, known: Collection[str] = ()
) -> list[PageMutation]:
    """The table's change: the new pages stand in the window until the plan says otherwise (an index
    serves the manifest); claims that others took the place of leave it, and so do those of the
    `known` pages that are not kept any more."""
    mutations: list[PageMutation] = []
    for page in segment.pages():
        if page.page_id not in pages.derived.pages:
            continue  # empty, or there were more claims than are kept
        tier = StorageTier.L2 if page.page_type is PageType.INDEX else StorageTier.L0
        mutations.append(
            PageMutation(
                MutationType.CREATE, page.page_id, turn, None, tier, page.size_tokens,
                importance=page.importance, modality=page.modality, page_type=page.page_type,
            )
        )  # fmt: skip
    kept = pages.derived.pages
    replaced = (old for old, _ in segment.superseded if old in kept)
    for old in (*replaced, *(page_id for page_id in known if page_id not in kept)):
        mutations.append(PageMutation(MutationType.EVICT, old, turn, tier=StorageTier.L2))
    return mutations
