"""What derives from a path's messages: summaries, claims, and where they come from. Pure.

Promises: an immutable value that grows by closed segments; a claim whose place another took says so;
every page can be walked to the messages that it rests on, and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from proxy.memory.claims import Claim, claim_of, claim_text, fold_claims
from proxy.memory.manifest import AvailablePageEntry
from proxy.memory.models import MemoryPage, PageType
from proxy.memory.provenance import ProvenanceGraph
from proxy.memory.search_handler import PageSearchHandler
from proxy.memory.segments import Segment, decode_segment

_SHOWN_SOURCES = 2  # message ids named behind a claim


@dataclass(frozen=True)
class Derived:
    """`segments` and `claims_made` count what was ever made; positions before `end` are in a segment."""

    pages: Mapping[str, MemoryPage] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    segments: int = 0
    claims_made: int = 0
    end: int = 0

    def with_segment(self, segment: Segment, end: int, max_claims: int) -> Derived:
        """This and what `segment` left; it ends before the position `end`."""
        new = [claim for page in segment.claims if (claim := claim_of(page)) is not None]
        claims = fold_claims(self.claims, new, segment.superseded, segment.merged, max_claims)
        kept = {claim.claim_id for claim in claims}
        pages = dict(self.pages)  # copied as a whole: one by one, thousands of summaries cost
        for claim in self.claims:
            if claim.claim_id not in kept:
                pages.pop(claim.claim_id, None)
        for page in segment.pages():
            if page.text() and (page.page_id in kept or not _is_claim(page)):
                pages[page.page_id] = page
        for claim in claims:  # said again: it rests on more
            old = pages.get(claim.claim_id)
            if old is not None and len(old.provenance) != len(claim.provenance):
                update = {"provenance": list(claim.provenance), "importance": claim.importance}
                pages[claim.claim_id] = old.model_copy(update=update)
        return Derived(
            pages, claims, self.segments + 1, self.claims_made + len(segment.claims), end
        )

    @cached_property
    def superseded(self) -> Mapping[str, str]:
        """The claims whose place another took, and which."""
        return {c.claim_id: c.superseded_by for c in self.claims if c.superseded_by}

    @cached_property
    def provenance(self) -> ProvenanceGraph:
        """Who rests on whom, walked both ways."""
        graph = ProvenanceGraph()
        for page in self.pages.values():
            graph.add_page(page)
        return graph

    def text(self, page_id: str) -> str:
        """What is shown of a derived page: a claim with the messages that it was said in."""
        page = self.pages[page_id]
        text = claim_text(page, self.superseded.get(page_id))
        if not _is_claim(page) or not page.provenance:
            return text
        return f"{text} [{', '.join(page.provenance[:_SHOWN_SOURCES])}]"

    @cached_property
    def words(self) -> PageSearchHandler:
        """For searches by the pages' words; an index page serves the manifest."""
        return PageSearchHandler(
            AvailablePageEntry(page_id=i, hint=page.text())
            for i, page in self.pages.items()
            if page.page_type is not PageType.INDEX
        )


def _is_claim(page: MemoryPage) -> bool:
    return page.page_type is PageType.CLAIM


NO_DERIVED = Derived()


# -- as stored


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
