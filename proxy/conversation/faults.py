"""Answers the model's VM calls: page_fault and search_pages, within the turn's limits. Pure.

Promises: every call gets a result the model can use, an error included; what a turn may load is
bounded in pages and tokens; a page that is already in front of the model costs nothing; only pages
of this path can be named or found (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from proxy.conversation.effects import Effect, Load, Search
from proxy.conversation.limits import Limits
from proxy.conversation.pathpages import PathPages
from proxy.conversation.report import FaultReport, SearchReport
from proxy.memory.compressor import compress_text
from proxy.memory.fault_handler import (
    FaultArgs,
    FaultPolicy,
    SearchResultEntry,
    error_result,
    fault_result,
    parse_fault_args,
    parse_search_args,
    search_result,
)
from proxy.memory.models import (
    Actor,
    CompressionLevel,
    FaultReason,
    MutationType,
    PageMutation,
    StorageTier,
)
from proxy.memory.page_table import PageTable
from proxy.memory.pages import Hit, page_id
from proxy.tokens import TokenCounter

_LEVELS = (
    CompressionLevel.FULL,
    CompressionLevel.REDUCED,
    CompressionLevel.ABSTRACT,
    CompressionLevel.REFERENCE,
)
_SEARCH_SHARE = 2 / 3  # of what a page may take: a list of leads stays in the window as long as a page
_RESULT_OVERHEAD = 72  # the JSON around a page's text


class FaultServer:
    """One per turn. `apply` records a mutation; `room` says how many tokens a result may take."""

    def __init__(
        self,
        pages: PathPages,
        table: PageTable,
        counter: TokenCounter,
        limits: Limits,
        turn: int,
        apply: Callable[[PageMutation], None],
    ) -> None:
        self._pages = pages
        self._table = table
        self._counter = counter
        self._limits = limits
        self._turn = turn
        self._apply = apply
        self.policy = FaultPolicy(limits.faults_per_turn, limits.fault_tokens)
        self.faults: list[FaultReport] = []
        self.searches: list[SearchReport] = []
        self._search_tokens = 0

    @property
    def exhausted(self) -> bool:
        spent = self.policy.tokens_used + self._search_tokens
        return self.policy.exhausted or spent >= self._limits.fault_tokens

    def serve(
        self, tool: str, arguments: str, room_tokens: int
    ) -> Generator[Effect, Any, str]:
        """The result of one call as the tool message's content."""
        if tool == "search_pages":
            return (yield from self._search(arguments, room_tokens))
        args = parse_fault_args(arguments)
        if isinstance(args, str):
            return self._error("", 0, args)
        return (yield from self._fault(args, room_tokens))

    def _error(self, wanted: str, level: int, message: str) -> str:
        self.faults.append(FaultReport(wanted, int(level), 0, message))
        return error_result(message)

    # -- page_fault

    def _fault(self, args: FaultArgs, room_tokens: int) -> Generator[Effect, Any, str]:
        wanted, level = args
        places = self._pages.locate(wanted)
        if not places:
            last = page_id(len(self._pages.path) - 1)
            return self._error(
                wanted, level, f"There is no page {wanted}: pages are msg_0001 to {last}."
            )
        ids = [page_id(position, part) for position, part in places]
        entries = [self._table.lookup(i) for i in ids]
        if all(e and e.tier is StorageTier.L0 and e.level <= level for e in entries):
            self.faults.append(FaultReport(wanted, int(level), 0))
            return error_result(f"{wanted} is already loaded: you have it above.")
        refusal = self.policy.allow(wanted, level, 0)
        if refusal:
            return self._error(wanted, level, refusal)
        left = self._limits.fault_tokens - self.policy.tokens_used - self._search_tokens
        room = min(left, room_tokens) - _RESULT_OVERHEAD
        text, shown, count = yield from self._fit(places, level, room)
        if not text:
            return self._error(
                wanted, level, f"{wanted} does not fit into what is left; answer with what you have."
            )
        tier = entries[0].tier if entries[0] else StorageTier.L2
        self.policy.spend(wanted, level, count)
        self._map(ids, shown, count)
        self.faults.append(FaultReport(wanted, int(shown), count))
        modality = self._pages.modality(places[0][0])
        return fault_result(wanted, modality, shown, tier, text, count)

    def _fit(
        self, places: list[tuple[int, int]], level: CompressionLevel, room: int
    ) -> Generator[Effect, Any, tuple[str, CompressionLevel, int]]:
        """The page at the level asked for, or at the next one that fits into `room` tokens."""
        for shown in _LEVELS[int(level) :]:
            texts = []
            for position, part in places:
                texts.append((yield Load(position, part, int(shown))))
            text = "".join(texts) if shown is CompressionLevel.FULL else "\n".join(texts)
            if len(text) > room * 16:
                continue
            count = self._counter.text(text)
            if count <= room:
                return text, shown, count
        return "", level, 0

    def _map(
        self,
        ids: list[str],
        level: CompressionLevel,
        tokens: int,
        op: MutationType = MutationType.FAULT_IN,
    ) -> None:
        for i in ids:
            if self._table.lookup(i) is not None:
                self._apply(
                    PageMutation(
                        op,
                        i,
                        self._turn,
                        level,
                        StorageTier.L0,
                        max(1, tokens // len(ids)),
                        Actor.MODEL,
                        FaultReason.RESOLVE_REFERENCE,
                    )
                )

    # -- search_pages

    def _search(self, arguments: str, room_tokens: int) -> Generator[Effect, Any, str]:
        args = parse_search_args(arguments)
        if isinstance(args, str):
            self.searches.append(SearchReport("", []))
            return error_result(args)
        before = len(self._pages.path) - 1
        before += any(self._outside(i) for i in self._pages.ids(before))  # it was cut: search it too
        limit = min(args.limit, self._limits.search_results)
        wide = limit if args.modality is None else limit * 4
        hits: list[Hit] = yield Search(args.query, wide, before, self._loaded)
        left = self._limits.fault_tokens - self.policy.tokens_used - self._search_tokens
        room = min(left, int(room_tokens * _SEARCH_SHARE))
        entries: list[SearchResultEntry] = []
        for hit in hits:
            modality = self._pages.modality(hit.position)
            if args.modality is not None and modality is not args.modality:
                continue
            if len(entries) == limit:
                break
            entries.append(self._entry(hit, modality.value))
        result = search_result(entries, before)
        while entries and self._counter.text(result) > room:
            entries.pop()
            result = search_result(entries, before)
        self._search_tokens += self._counter.text(result)
        self.searches.append(SearchReport(args.query, [entry.page_id for entry in entries]))
        for entry in entries:
            if entry.complete:  # the model has all of it now: the next search looks further
                tokens = self._counter.text(entry.hint)
                self._map([entry.page_id], CompressionLevel.FULL, tokens, MutationType.MAP)
        return result

    def _loaded(self, position: int, part: int) -> bool:
        entry = self._table.lookup(page_id(position, part))
        return bool(
            entry and entry.tier is StorageTier.L0 and entry.level is CompressionLevel.FULL
        )

    def _outside(self, wanted: str) -> bool:
        entry = self._table.lookup(wanted)
        return bool(entry and entry.tier is not StorageTier.L0)

    def _entry(self, hit: Hit, modality: str) -> SearchResultEntry:
        """`hint` is the whole text when it is short (`complete`), else its most telling sentences."""
        text = self._pages.text(hit.position, hit.part, CompressionLevel.FULL)
        snippet = self._limits.snippet_tokens
        complete = len(text) <= snippet * 8 and self._counter.text(text) <= snippet
        if not complete:
            text = compress_text(text, CompressionLevel.REDUCED, snippet, self._counter.text)
        return SearchResultEntry(
            page_id=page_id(hit.position, hit.part),
            modality=modality,
            tier=StorageTier.L2.value,
            hint=text,
            complete=complete,
            relevance=round(hit.score, 3),
        )
