"""What derives from a path's messages: a line per closed segment, a model's summaries and claims, and where they
come from. Pure.

Promises: an immutable value that grows by pages, one after the other, so that what a record stores of an epoch
gives the same value again; a claim whose place another took says so; every page can be walked to the messages
that it rests on, and back; a segment is read in at most `segments.max_messages` messages.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from proxy.conversation.effects import Effect, Load
from proxy.conversation.limits import Limits
from proxy.memory.manifest import AvailablePageEntry
from proxy.memory.models import MemoryPage, MutationType, PageMutation, PageType, StorageTier
from proxy.memory.search_handler import PageSearchHandler
from proxy.memory.segments import (
    MAX_SOURCES,
    Claim,
    ProvenanceGraph,
    claim_page,
    index_id,
    index_page,
    summary_id,
    summary_page,
)
from proxy.tokens import TokenCounter

if TYPE_CHECKING:  # whose pages these are beside
    from proxy.conversation.pages import PathPages

_SHOWN_SOURCES = 2  # message ids named behind a claim
_ASKED_AGAIN = 4  # the newest segments that a model has not written about are asked for again


@dataclass(frozen=True)
class Derived:
    """`segments` and `claims_made` count what was ever made; positions before `end` are in a segment;
    `superseded`: the claims whose place another took, and which."""

    pages: Mapping[str, MemoryPage] = field(default_factory=dict)
    superseded: Mapping[str, str] = field(default_factory=dict)
    segments: int = 0
    claims_made: int = 0
    end: int = 0

    def grown(self, made: Sequence[MemoryPage], end: int, max_claims: int) -> Derived:
        """This and the pages that an epoch made. A claim that says again what is known is only another source
        of it; beyond `max_claims` the oldest superseded ones go first, then the oldest."""
        return self.grown_by([(made, end, max_claims)])

    def grown_by(self, epochs: Iterable[tuple[Sequence[MemoryPage], int, int]]) -> Derived:
        """The same of one epoch after the other."""
        pages, superseded = dict(self.pages), dict(self.superseded)
        claims = {i: page for i, page in pages.items() if page.page_type is PageType.CLAIM}
        segments, claims_made, last = self.segments, self.claims_made, self.end
        for made, end, max_claims in epochs:
            last = end
            for page in made:
                segments += page.page_type is PageType.INDEX
                if page.page_type is not PageType.CLAIM:
                    pages[page.page_id] = page
                    continue
                claims_made += 1
                known = _about(page.metadata["subject"], claims, superseded)
                if known is not None and known.content == page.content:
                    sources = list(dict.fromkeys((*known.provenance, *page.provenance)))[:MAX_SOURCES]
                    page = known.model_copy(update={"provenance": sources})
                elif known is not None:
                    superseded[known.page_id] = page.page_id
                pages[page.page_id] = claims[page.page_id] = page
                if len(claims) > max_claims:
                    old = next((i for i in claims if i in superseded), next(iter(claims)))
                    del pages[old], claims[old]
                    superseded.pop(old, None)
        return Derived(pages, superseded, segments, claims_made, last)

    @property
    def holding(self) -> list[MemoryPage]:
        """The claims whose place no other took, the oldest first."""
        claims = (page for page in self.pages.values() if page.page_type is PageType.CLAIM)
        return [page for page in claims if page.page_id not in self.superseded]

    @cached_property
    def provenance(self) -> ProvenanceGraph:
        """Who rests on whom, walked both ways."""
        return ProvenanceGraph(self.pages.values())

    @cached_property
    def words(self) -> PageSearchHandler:
        """For searches by the pages' words; an index page serves the manifest."""
        return PageSearchHandler(
            AvailablePageEntry(page_id=i, hint=page.text())
            for i, page in self.pages.items()
            if page.page_type is not PageType.INDEX
        )

    @property
    def unwritten(self) -> list[str]:
        """The ids of the summaries that a model may still write."""
        last = range(max(1, self.segments - _ASKED_AGAIN + 1), self.segments + 1)
        return [i for n in last if (i := summary_id(n)) not in self.pages]

    def text(self, page_id: str) -> str:
        """What is shown of a derived page: a claim with the messages that it was said in, and in front of it
        what took its place."""
        page = self.pages[page_id]
        if page.page_type is not PageType.CLAIM:
            return page.text()
        by = self.superseded.get(page_id)
        text = f"(superseded by {by}) {page.text()}" if by else page.text()
        return f"{text} [{', '.join(page.provenance[:_SHOWN_SOURCES])}]"


NO_DERIVED = Derived()


def _about(subject: str, claims: Mapping[str, MemoryPage], superseded: Mapping[str, str]) -> MemoryPage | None:
    """The claim that holds about a subject; nothing is known of what has no subject."""
    holding = (page for i, page in claims.items() if i not in superseded)
    return next((page for page in holding if subject and page.metadata["subject"] == subject), None)


# -- in an epoch


def derive(
    pages: PathPages, last: int, limits: Limits, counter: TokenCounter
) -> Generator[Effect, Any, list[MemoryPage]]:
    """The pages that an epoch makes, in `pages.derived` from now on: what a model has written by now about
    earlier segments, and the index of the one that ends before the position `last`, where messages left."""
    derived, made = pages.derived, list[MemoryPage]()
    claims_made = derived.claims_made
    for name in derived.unwritten if limits.written_by_models else ():
        written: MemoryPage | None = yield Load(name, 0)
        if written is None:
            continue
        number, sources = int(name.rpartition("_")[2]), written.provenance
        made.append(summary_page(number, written.text(), sources, counter.text))
        for said in written.metadata["claims"] if limits.max_claims else ():
            claims_made += 1
            made.append(claim_page(claims_made, Claim(*said), sources, counter.text))
    first = max(derived.end, last - limits.segment_messages)
    if last > first:
        ids = [pages[position].ids[0] for position in (first, last - 1)]
        texts = ["\n".join(pages[position].parts) for position in range(first, last)]
        made.append(index_page(derived.segments + 1, ids, texts, counter.text))
    pages.derived = derived.grown(made, max(last, derived.end), limits.max_claims)
    return made


def unwritten_page(pages: PathPages, page_id: str) -> MemoryPage | None:
    """A summary that a model has not written, or not yet in an epoch: its `provenance` is what it would be made
    from, and its content what these messages are known by. None for any other page."""
    derived = pages.derived
    if page_id not in derived.unwritten:
        return None
    first, last = (pages.position(i) for i in derived.pages[index_id(_number(page_id))].provenance)
    known_by = f"{first}:{pages.path[last].id.hex()}:{pages.notes_digest(last + 1).hex()}"
    sources = [pages[position].ids[0] for position in range(first, last + 1)]
    return summary_page(_number(page_id), known_by, sources, len)


def _number(page_id: str) -> int:
    return int(page_id.rpartition("_")[2])


def entered(made: Sequence[MemoryPage], before: Derived, derived: Derived, turn: int) -> list[PageMutation]:
    """The table's change from `before`: the new pages stand in the window until the plan says otherwise (an
    index serves the manifest); claims that others took the place of leave it, and so do those that are not kept
    any more."""
    mutations: list[PageMutation] = []
    for page in made:
        if page.page_id not in derived.pages:
            continue  # it said nothing new, or there were more claims than are kept
        tier = StorageTier.L2 if page.page_type is PageType.INDEX else StorageTier.L0
        mutations.append(
            PageMutation(
                MutationType.CREATE, page.page_id, turn, None, tier, page.size_tokens,
                importance=page.importance, modality=page.modality, page_type=page.page_type,
            )
        )  # fmt: skip
    replaced = [i for i in derived.superseded if i not in before.superseded]
    for old in (*replaced, *(i for i in before.pages if i not in derived.pages)):
        mutations.append(PageMutation(MutationType.EVICT, old, turn, tier=StorageTier.L2))
    return mutations


# -- as stored


class Closing(msgspec.Struct, array_like=True):
    """What a record keeps of its turn's epochs: enough to continue from. `root` is the page table's after the
    turn, where it was stored; `pages` what was derived; positions before `end` are in a segment; `max_claims` was the limit then."""

    root: bytes
    pages: list[dict[str, Any]]
    end: int
    max_claims: int


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Closing).decode


def encode_closing(root: bytes, made: Sequence[MemoryPage], end: int, max_claims: int) -> bytes:
    return _pack(Closing(root, [page.model_dump(mode="json") for page in made], end, max_claims))


def table_root(closing: bytes) -> bytes:
    """The page table's root in an encoded closing."""
    return _unpack(closing).root


def restored(closings: Iterable[bytes]) -> Derived:
    """What encoded closings made, from a path's first one on."""

    def epochs() -> Iterator[tuple[Sequence[MemoryPage], int, int]]:
        for closed in map(_unpack, closings):
            yield [MemoryPage.model_validate(page) for page in closed.pages], closed.end, closed.max_claims

    return NO_DERIVED.grown_by(epochs())
