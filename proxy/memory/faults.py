"""Page faults: what they may cost, how they end, and the handler that serves them.

Promises: what cannot be served is one sentence that the model can act on. A turn spends at most
`max_faults_per_turn` faults and `max_tokens_per_turn` tokens (None: no limit), which search results share,
and never serves the same page at the same level twice for the same words. A page that is in the window at that level or better costs nothing; one that
does not fit comes at the next level that does; below level 0 a text is its passages about what is asked, where it has any; each page served is a
FAULT_IN with its reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel

from proxy.memory.context import ESTIMATES, page_parts, page_tokens, page_words, quote_json
from proxy.memory.eviction import is_cooling
from proxy.memory.levels import CompressorRegistry
from proxy.memory.models import (
    Actor,
    CompressionLevel,
    Counts,
    FaultReason,
    MemoryPage,
    MutationType,
    PageMutation,
    StorageTier,
)
from proxy.memory.passages import find_passages
from proxy.memory.table import PageTable
from proxy.memory.vm_tools import FaultToolResult

RESULT_OVERHEAD = 72  # tokens of the JSON around a page's text
_MOST_CHARS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Load:
    """Answered with the `MemoryPage` at a level: the best version of it that there is by now. None for
    a page that is gone, and for a summary that no model has written yet; one that is new has
    `provenance`, what it was made from, and the `claims` that were made with it in its metadata:
    (subject, text, page id or "")."""

    page_id: str
    level: int


class Room(NamedTuple):
    """What one result may take, the frame around its text included: `tokens`, its fair part of the
    window, by the page's own text; `spare_tokens`, all that there is, by the text as it is sent (JSON)."""

    tokens: int
    spare_tokens: int


class FaultResult(BaseModel):
    """How a fault ended.

    `page` is what the model is given, at the level that fits (its `storage_tier`: where it came
    from); `error` is a sentence for the model, None on success. `resident`: it was in the window
    already and nothing was spent; then `resolve` gives no page. `refault`: it had left only lately.
    """

    success: bool
    page_id: str
    page: MemoryPage | None = None
    error: str | None = None
    tokens: int = 0
    resident: bool = False
    refault: bool = False

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The page's media, which an API wants in a user's message rather than in a tool's."""
        return [] if self.page is None else page_parts(self.page)


class FaultMetrics(BaseModel):
    """What a turn's faults have cost."""

    faults_this_turn: int = 0
    tokens_this_turn: int = 0


GetPage = Callable[[str], Awaitable[MemoryPage | None]]


class PageFaultHandler:
    """Decides faults: `resolve` for whoever loads pages by effects, `handle_fault` for async callers.

    `get_page` loads a page (only `handle_fault` needs it); `locate` gives the ids of the pages that
    one id names (the parts of a long message); `apply` records mutations (default: the table's
    own); `turn` is the first turn's number.
    """

    def __init__(
        self,
        page_table: PageTable,
        get_page: GetPage | None = None,
        max_faults_per_turn: int = 3,
        max_tokens_per_turn: int | None = None,
        *,
        locate: Callable[[str], Iterable[str]] | None = None,
        apply: Callable[[PageMutation], object] | None = None,
        registry: CompressorRegistry | None = None,
        counts: Counts = ESTIMATES,
        turn: int = 0,
    ) -> None:
        self.turn = turn
        self._max_faults = max_faults_per_turn
        self._max_tokens = max_tokens_per_turn
        self._faults_used = self._tokens_used = 0
        self._served: set[tuple[str, int, tuple[str, ...]]] = set()
        self._table = page_table
        self._get_page = get_page
        self._locate = locate or self._parts_in_table
        self._apply = apply or page_table.apply
        self._registry = registry or CompressorRegistry.default()
        self._counts = counts

    # -- the seeds' doors

    def can_fault(self) -> bool:
        """True while this turn may load another page."""
        return self._faults_used < self._max_faults and self.tokens_left != 0

    def new_turn(self) -> None:
        """Begin the next turn with nothing spent."""
        self.turn += 1
        self._faults_used = self._tokens_used = 0
        self._served.clear()

    async def handle_fault(
        self, page_id: str, target_level: CompressionLevel | int = CompressionLevel.ABSTRACT
    ) -> FaultResult:
        """Serve one fault; never raises for what a model may ask (ValueError: no such level)."""
        assert self._get_page is not None
        dialogue = self.resolve(page_id, target_level)
        loaded: MemoryPage | None = None
        try:
            while True:
                loaded = await self._get_page(dialogue.send(loaded).page_id)
        except StopIteration as end:
            result: FaultResult = end.value
        if not result.resident:
            return result
        page = await self._get_page(page_id)
        if page is None:
            return _refused(page_id, f"{page_id} is already loaded: you have it above.")
        shown = self._at_level(page, CompressionLevel(target_level))
        return result.model_copy(update={"page": shown})

    def build_tool_result(self, page: MemoryPage, asked: int = CompressionLevel.REFERENCE) -> FaultToolResult:
        """The tool result for a page that a fault returned; it says so where there was no room for the level asked."""
        return FaultToolResult.of(page, page_tokens(page, self._counts), asked)

    def get_metrics(self) -> FaultMetrics:
        return FaultMetrics(faults_this_turn=self._faults_used, tokens_this_turn=self._tokens_used)

    # -- the core

    @property
    def tokens_left(self) -> int | None:
        """Tokens that this turn may still load, 0 or more; None without a limit."""
        return None if self._max_tokens is None else max(0, self._max_tokens - self._tokens_used)

    def charge(self, tokens: int) -> None:
        """Book tokens: of a page, or of a search's result."""
        self._tokens_used += tokens

    def resolve(
        self,
        page_id: str,
        level: CompressionLevel | int = CompressionLevel.ABSTRACT,
        reason: FaultReason = FaultReason.RESOLVE_REFERENCE,
        room: Room | None = None,
        queries: Sequence[str] = (),
    ) -> Generator[Load, MemoryPage | None, FaultResult]:
        """One fault as a dialogue. `room` None: only the turn's limit bounds the result. `queries`: what the page is
        asked for, the most telling first."""
        wanted = CompressionLevel(level)
        ids = tuple(self._locate(page_id))
        if not ids:
            return _refused(page_id, f"There is no page {page_id} in this conversation.")
        entries = [self._table.lookup(i) for i in ids]
        shown = CompressionLevel.FULL if queries else wanted  # a lower level may show other passages
        if all(e and e.tier is StorageTier.L0 and e.level <= shown for e in entries):
            return FaultResult(success=True, page_id=page_id, resident=True)
        if (page_id, wanted, tuple(queries)) in self._served:
            given = f"{page_id} at level {int(wanted)} was already given to you above; use that."
            return _refused(page_id, given)
        if self._faults_used >= self._max_faults:
            limit = f"The limit of {self._max_faults} page faults for this turn is reached"
            return _refused(page_id, f"{limit}; answer with what is loaded.")
        page = yield from self._fit(page_id, ids, wanted, room, queries)
        if isinstance(page, str):
            return _refused(page_id, page)
        tokens, first = page.size_tokens or 0, entries[0]
        tier = first.tier if first is not None else StorageTier.L2
        refault = first is not None and is_cooling(first, self.turn)
        self._faults_used += 1
        self._served.add((page_id, wanted, tuple(queries)))
        self.charge(tokens)
        for i, entry in zip(ids, entries, strict=True):
            if entry is not None:
                share = max(1, tokens // len(ids))
                self._apply(
                    PageMutation(
                        MutationType.FAULT_IN, i, self.turn, page.compression_level,
                        StorageTier.L0, share, Actor.MODEL, reason,
                    )
                )  # fmt: skip
        page = page.model_copy(update={"storage_tier": tier})
        return FaultResult(
            success=True, page_id=page_id, page=page, tokens=tokens, refault=refault
        )

    def _fit(
        self, page_id: str, ids: Sequence[str], level: CompressionLevel, room: Room | None, queries: Sequence[str]
    ) -> Generator[Load, MemoryPage | None, MemoryPage | str]:
        """The page at the level asked for, or at the next one that fits; else a sentence."""
        limits = (self.tokens_left, *(room or ()))
        most = min((n - RESULT_OVERHEAD for n in limits if n is not None), default=None)
        for shown in list(CompressionLevel)[level:]:
            whole = yield from self._load(page_id, ids, shown)
            if whole is not None and shown and queries:
                # What was asked for whole takes what room there is.
                most_words = most if shown > level and shown is CompressionLevel.REDUCED else None
                full = yield from self._load(page_id, ids, CompressionLevel.FULL)
                whole = self._about(whole, full, queries, most, most_words)
            if whole is None:
                return f"{page_id} could not be loaded; answer with what you have."
            words = page_words(whole)
            if most is not None and len(words) > max(0, most) * _MOST_CHARS_PER_TOKEN:
                continue  # far too long to be worth counting
            tokens = page_tokens(whole, self._counts)
            if most is not None and tokens > most:
                continue
            if room is not None:
                sent = self._counts.text(quote_json(words))
                if sent > room.spare_tokens - RESULT_OVERHEAD:
                    continue
            return whole.model_copy(update={"size_tokens": tokens})
        return f"{page_id} does not fit into what is left; answer with what you have."

    def _load(
        self, page_id: str, ids: Sequence[str], level: CompressionLevel
    ) -> Generator[Load, MemoryPage | None, MemoryPage | None]:
        """The pages that an id names, as one."""
        pages: list[MemoryPage] = []
        for i in ids:
            page = yield Load(i, level)
            if page is None:
                return None
            pages.append(self._at_level(page, level))
        return pages[0] if len(pages) == 1 else _joined(page_id, pages, level)

    def _about(
        self, page: MemoryPage, full: MemoryPage | None, queries: Sequence[str], most: int | None, limit: int | None
    ) -> MemoryPage:
        """A text below level 0 as the passages about `queries`, in at most as many tokens as it has (`limit`: so many);
        as it is where they have no word in common."""
        if full is None or not isinstance(full.content, str):
            return page
        tokens = page_tokens(page, self._counts) if limit is None else limit
        found = find_passages(full.content, queries, tokens if most is None else min(tokens, most), self._counts.text)
        return page.model_copy(update={"content": found}) if found else page

    def _parts_in_table(self, page_id: str) -> tuple[str, ...]:
        """The page itself, or the parts of the long message that the id names."""
        if self._table.lookup(page_id) is not None:
            return (page_id,)
        parts: list[str] = []
        while self._table.lookup(f"{page_id}.{len(parts) + 1}") is not None:
            parts.append(f"{page_id}.{len(parts) + 1}")
        return tuple(parts)

    def _at_level(self, page: MemoryPage, level: CompressionLevel) -> MemoryPage:
        if page.compression_level >= level:
            return page
        return self._registry.compress(page, level, self._counts)


def _refused(page_id: str, error: str) -> FaultResult:
    return FaultResult(success=False, page_id=page_id, error=error)


def _joined(page_id: str, pages: Sequence[MemoryPage], level: CompressionLevel) -> MemoryPage:
    """The parts of one message as one page: exactly its text at level 0."""
    texts = [page_words(page) for page in pages]
    content = ("" if level is CompressionLevel.FULL else "\n").join(texts)
    update = {"page_id": page_id, "content": content, "compression_level": level}
    return pages[0].model_copy(update=update)
