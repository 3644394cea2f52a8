"""Answers the model's VM calls: page_fault and search_pages, within the turn's limits. Pure.

Promises: every call gets a result the model can use, an error included; what a turn may load is
bounded in pages and tokens; no result is longer, as the JSON that it is, than the window can take;
a page that is already in front of the model costs nothing; only pages of this path can be named or
found (invariant 6); an image comes back as it was, in a message that the API takes it in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from proxy.conversation.effects import Effect, Load, Search
from proxy.conversation.limits import Limits
from proxy.conversation.pages import PathPages
from proxy.conversation.report import FaultReport, SearchReport
from proxy.memory.compressor import compress_text
from proxy.memory.context_packer import quote_json
from proxy.memory.fault_handler import FaultResult, PageFaultHandler
from proxy.memory.models import (
    Actor,
    CompressionLevel,
    FaultReason,
    MemoryPage,
    Modality,
    MutationType,
    PageMutation,
    StorageTier,
)
from proxy.memory.pages import Hit
from proxy.memory.tlb import TLBWithPageTable
from proxy.memory.vm_args import FaultArgs, SearchArgs, parse_fault_args, parse_search_args
from proxy.memory.vm_results import SearchResultEntry, error_result, search_result
from proxy.tokens import TokenCounter

_SEARCH_SHARE = 2 / 3  # of what a page may take: a list of leads stays in the window as long as a page
_DERIVED_RESULTS = 2  # summaries and claims in a search's results, beside the messages asked for
_RESULT_OVERHEAD = 72  # the JSON around a page's text
_MEDIA_OVERHEAD = 48  # the message around a page's media, and its notice
NO_TOOL = "none"  # a call of a tool that nobody has
NO_ROOM = error_result("There is no room left; answer with what you have.")


class Room(NamedTuple):
    """What one result may take: `tokens`, its fair part of the window, by the page's own text, and
    `spare_tokens`, all that there is (at least `NO_ROOM`'s), by the result's text as it is sent."""

    tokens: int
    spare_tokens: int


class Served(NamedTuple):
    """A tool message's content, and the media that go in a user message after it."""

    content: str
    parts: Sequence[dict[str, Any]] = ()


class _Words:
    """Counts texts: as JSON where the window could not take that. No method of the server's, which
    would be a cycle through it: a turn is gone with its last reference."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count
        self.spare_tokens: int | None = None  # for the page whose level is being chosen

    def __call__(self, text: str) -> int:
        if self.spare_tokens is not None:
            quoted = self._count(quote_json(text))
            if quoted > self.spare_tokens:
                return quoted
        return self._count(text)


class FaultServer:
    """One per turn. `apply` records a mutation."""

    def __init__(
        self,
        pages: PathPages,
        table: TLBWithPageTable,
        counter: TokenCounter,
        limits: Limits,
        turn: int,
        apply: Callable[[PageMutation], None],
        reason: FaultReason = FaultReason.RESOLVE_REFERENCE,
    ) -> None:
        self._pages = pages
        self._table = table
        self._counter = counter
        self._limits = limits
        self._turn = turn
        self._apply = apply
        self._reason = reason
        self._words = _Words(counter.text)
        self.handler = PageFaultHandler(
            table,
            max_faults_per_turn=limits.faults_per_turn,
            max_tokens_per_turn=limits.fault_tokens,
            locate=pages.expand,
            apply=apply,
            compress=lambda page, level: pages.registry.compress(page, level, counter),
            count=self._words,
            part_tokens=counter.part,
            overhead_tokens=_RESULT_OVERHEAD,
            turn=turn,
        )
        self.faults: list[FaultReport] = []
        self.searches: list[SearchReport] = []

    @property
    def exhausted(self) -> bool:
        return not self.handler.can_fault()

    def serve(
        self, tool: str, arguments: str, room: Room, media: bool = True
    ) -> Generator[Effect, Any, Served]:
        """The result of one call. `media` false: no message may follow, so images stay words."""
        if tool == "search_pages":
            return Served((yield from self._search(arguments, room)))
        if tool == NO_TOOL:
            return self._error("", 0, "There is no such tool; answer in words.", room)
        args = parse_fault_args(arguments)
        if isinstance(args, str):
            return self._error("", 0, args, room)
        return (yield from self._fault(args, room, media))

    def _error(self, wanted: str, level: int, message: str, room: Room) -> Served:
        self.faults.append(FaultReport(wanted, int(level), 0, message))
        return Served(self._says(message, room))

    def _says(self, message: str, room: Room) -> str:
        """A sentence for the model, the shortest one where there is no room for it."""
        said = error_result(message)
        return said if self._counter.text(said) <= room.spare_tokens else NO_ROOM

    # -- page_fault

    def _fault(
        self, args: FaultArgs, room: Room, media: bool
    ) -> Generator[Effect, Any, Served]:
        wanted, level = args
        ids = self._pages.expand(wanted)
        if not ids:
            last = self._pages[len(self._pages.path) - 1].ids[0]
            error = f"There is no page {wanted}: pages are msg_0001 to {last}."
            return self._error(wanted, level, error, room)
        if not media and self._pages.medium(ids[0]) is not None:
            level = max(level, CompressionLevel.ABSTRACT)
        before = self._refaults(ids[0])
        beside = _MEDIA_OVERHEAD if self._pages.medium(ids[0]) is not None else 0
        result = yield from self._resolve(wanted, level, room, beside)
        if result.resident:
            self.faults.append(FaultReport(wanted, int(level), 0))
            return Served(self._says(f"{wanted} is already loaded: you have it above.", room))
        if result.page is None:
            return self._error(wanted, level, result.error or "", room)
        shown = int(result.page.compression_level)
        refault = self._refaults(ids[0]) > before
        self.faults.append(FaultReport(wanted, shown, result.tokens, refault=refault))
        told = self.handler.build_tool_result(result.page)
        return Served(told.model_dump_json(), result.parts)

    def _refaults(self, wanted: str) -> int:
        entry = self._table.lookup(wanted)
        return entry.refault_count if entry is not None else 0

    def _resolve(
        self, wanted: str, level: CompressionLevel, room: Room, beside_tokens: int
    ) -> Generator[Effect, Any, FaultResult]:
        """The handler's dialogue, with each page that it wants loaded by the shell."""
        spare = room.spare_tokens - beside_tokens
        dialogue = self.handler.resolve(wanted, level, self._reason, min(room.tokens, spare))
        self._words.spare_tokens = spare - _RESULT_OVERHEAD
        page: MemoryPage | None = None
        try:
            while True:
                asked = dialogue.send(page)
                page = yield Load(asked.page_id, int(asked.level))
        except StopIteration as end:
            result: FaultResult = end.value
        self._words.spare_tokens = None
        return result

    # -- search_pages

    def _search(self, arguments: str, room: Room) -> Generator[Effect, Any, str]:
        args = parse_search_args(arguments)
        if isinstance(args, str):
            self.searches.append(SearchReport("", []))
            return self._says(args, room)
        before = len(self._pages.path) - 1
        before += any(self._outside(i) for i in self._pages[before].ids)  # it was cut: search it too
        limit = min(args.limit, self._limits.search_results)
        wide = limit if args.modality is None else limit * 4
        hits: list[Hit] = yield Search(args.query, wide, before, self._loaded_at)
        entries: list[SearchResultEntry] = []
        for hit in hits:
            wanted = self._pages.id_of(hit.position, hit.part)
            if len(entries) == limit:
                break
            if any(entry.page_id == wanted for entry in entries):
                continue  # a medium was found by its message and by the answer to it
            if args.modality is None or self._pages.modality(wanted) is args.modality:
                entries.append(self._entry(wanted, hit.score))
        entries += self._derived(args, _DERIVED_RESULTS)
        left = self.handler.policy.tokens_left or 0
        most = min(left, int(room.tokens * _SEARCH_SHARE), room.spare_tokens)
        total = before + len(self._pages.derived.pages)
        result = search_result(entries, total)
        while entries and self._counter.text(result) > most:
            entries.pop()
            result = search_result(entries, total)
        self.handler.policy.charge(self._counter.text(result))
        self.searches.append(SearchReport(args.query, [entry.page_id for entry in entries]))
        for entry in entries:
            if entry.complete:  # the model has all of it now: the next search looks further
                self._map(entry.page_id, self._counter.text(entry.hint))
        return result

    def _derived(self, args: SearchArgs, limit: int) -> list[SearchResultEntry]:
        """Summaries and claims about the query that are not in the window."""
        derived = self._pages.derived
        if not derived.pages or args.modality not in (None, Modality.TEXT):
            return []
        found = derived.words.ranked(args.query)
        outside = [(i, score) for i, score, _ in found if self._outside(i)]
        return [self._entry(i, score) for i, score in outside[:limit]]

    def _loaded_at(self, position: int, part: int) -> bool:
        entry = self._table.lookup(self._pages.id_of(position, part))
        return bool(
            entry and entry.tier is StorageTier.L0 and entry.level is CompressionLevel.FULL
        )

    def _outside(self, wanted: str) -> bool:
        entry = self._table.lookup(wanted)
        return bool(entry and entry.tier is not StorageTier.L0)

    def _map(self, wanted: str, tokens: int) -> None:
        if self._table.lookup(wanted) is not None:
            self._apply(
                PageMutation(
                    MutationType.MAP, wanted, self._turn, CompressionLevel.FULL, StorageTier.L0,
                    tokens, Actor.MODEL, FaultReason.RESOLVE_REFERENCE,
                )
            )  # fmt: skip

    def _entry(self, wanted: str, score: float) -> SearchResultEntry:
        """`hint` is the whole text when it is short (`complete`), else its most telling sentences."""
        text = self._pages.text(wanted)
        snippet = self._limits.snippet_tokens
        complete = len(text) <= snippet * 8 and self._counter.text(text) <= snippet
        complete = complete and self._pages.medium(wanted) is None
        if not complete:
            text = compress_text(text, CompressionLevel.REDUCED, snippet, self._counter.text)
        return SearchResultEntry(
            page_id=wanted,
            modality=self._pages.modality(wanted).value,
            tier=StorageTier.L2.value,
            hint=text,
            complete=complete,
            relevance=round(score, 3),
        )
