"""Page faults as the model asks for them: their limits, their decisions, their answers.

Promises: what cannot be served is one sentence that the model can act on. A turn spends at most `max_per_turn` faults and
`max_tokens_per_turn` tokens, and never serves the same page at the same level twice. A page that is
in the window at that level or better costs nothing; one that does not fit comes at the next level
that does; each page served is a FAULT_IN with its reason. Results are one line of JSON that cannot
open or close a `<VM:` tag.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from proxy.memory.context_packer import (
    CountsBy,
    estimate_part_tokens,
    page_parts,
    page_tokens,
    page_words,
)
from proxy.memory.levels import CompressorRegistry
from proxy.memory.models import (
    Actor,
    CompressionLevel,
    Counts,
    FaultReason,
    MemoryPage,
    MutationType,
    PageMutation,
    PageTableEntry,
    StorageTier,
    estimate_text_tokens,
)
from proxy.memory.vm_results import FaultedContent, FaultedPage, FaultEffects, FaultToolResult

_MOST_CHARS_PER_TOKEN = 16


class FaultPolicy:
    """What page faults may cost in one turn, and what they have cost so far.

    `max_tokens_per_turn` None: no limit of tokens. Search results share the tokens (`charge`).
    """

    def __init__(self, max_per_turn: int, max_tokens_per_turn: int | None = None) -> None:
        self.max_per_turn = max_per_turn
        self.max_tokens_per_turn = max_tokens_per_turn
        self.faults_used = 0
        self.tokens_used = 0
        self._served: set[tuple[str, int]] = set()

    def new_turn(self) -> None:
        """Start again with nothing spent."""
        self.faults_used = 0
        self.tokens_used = 0
        self._served.clear()

    def allow(self, page_id: str, level: int, tokens: int) -> str | None:
        """None if this page may be served now, else a sentence for the model saying why not and
        what to do.
        """
        if self.was_served(page_id, level):
            return f"{page_id} at level {int(level)} was already given to you above; use that."
        if self.faults_used >= self.max_per_turn:
            return (
                f"The limit of {self.max_per_turn} page faults for this turn is reached; "
                "answer with what is loaded."
            )
        left = self.tokens_left
        if left is not None and tokens > left:
            return (
                f"{page_id} at level {int(level)} needs {tokens} tokens and {left} are "
                "left in this turn; ask for a higher target_level or answer with what is loaded."
            )
        return None

    def spend(self, page_id: str, level: int, tokens: int) -> None:
        """Book a page that was served."""
        self.faults_used += 1
        self.tokens_used += tokens
        self._served.add((page_id, int(level)))

    def was_served(self, page_id: str, level: int) -> bool:
        """True when this turn already gave that page at that level."""
        return (page_id, int(level)) in self._served

    def charge(self, tokens: int) -> None:
        """Book tokens that were no page: a search's result."""
        self.tokens_used += tokens

    @property
    def tokens_left(self) -> int | None:
        """Tokens that this turn may still load, 0 or more; None without a limit."""
        if self.max_tokens_per_turn is None:
            return None
        return max(0, self.max_tokens_per_turn - self.tokens_used)

    @property
    def exhausted(self) -> bool:
        """True when no further fault can be allowed in this turn."""
        return self.faults_used >= self.max_per_turn or self.tokens_left == 0


class PageWanted(NamedTuple):
    """What `PageFaultHandler.resolve` asks for: one page, at this level or a fuller one."""

    page_id: str
    level: CompressionLevel


class FaultResult(BaseModel):
    """How a fault ended.

    `page` is what the model is given, at the level that fits (its `storage_tier`: where it came
    from); `error` is a sentence for the model, None on success. `resident`: it was in the window
    already and nothing was spent; then `resolve` gives no page.
    """

    success: bool
    page_id: str
    page: MemoryPage | None = None
    error: str | None = None
    tokens: int = 0
    resident: bool = False

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The page's media, which an API wants in a user's message rather than in a tool's."""
        return [] if self.page is None else page_parts(self.page)


class FaultMetrics(BaseModel):
    """Counts of one handler; `tokens` are those of pages served."""

    faults_this_turn: int = 0
    tokens_this_turn: int = 0
    faults_remaining: int = 0
    total_faults: int = 0
    total_tokens: int = 0
    total_refused: int = 0
    total_resident: int = 0


class Table(Protocol):
    """A page table, or one with a TLB in front."""

    def lookup(self, page_id: str) -> PageTableEntry | None: ...


GetPage = Callable[[str], Awaitable[MemoryPage | None]]
Compress = Callable[[MemoryPage, CompressionLevel], MemoryPage]


class PageFaultHandler:
    """Decides faults: `resolve` for whoever loads pages by effects, `handle_fault` for async callers.

    `get_page` loads a page (only `handle_fault` needs it); `locate` gives the ids of the pages that
    one id names (the parts of a long message); `apply` records mutations (default: the table's
    own); `compress` shows a page at a higher level (default: the registry's compressors); `count`
    and `part_tokens` are the tokens of a text and of a media part (default: estimates);
    `overhead_tokens` is what the frame of one result costs; `turn` is the first turn's number.
    """

    def __init__(
        self,
        page_table: Table,
        get_page: GetPage | None = None,
        max_faults_per_turn: int = 3,
        max_tokens_per_turn: int | None = None,
        *,
        locate: Callable[[str], Iterable[str]] | None = None,
        apply: Callable[[PageMutation], None] | None = None,
        compress: Compress | None = None,
        count: Callable[[str], int] = estimate_text_tokens,
        part_tokens: Callable[[dict[str, Any]], int] = estimate_part_tokens,
        overhead_tokens: int = 0,
        turn: int = 0,
    ) -> None:
        self.policy = FaultPolicy(max_faults_per_turn, max_tokens_per_turn)
        self.turn = turn
        self._table = page_table
        self._get_page = get_page
        self._locate = locate or self._parts_in_table
        self._apply = apply or page_table.apply  # type: ignore[attr-defined]
        self._counts = CountsBy(count, part_tokens)
        self._compress = compress or _by_registry(self._counts)
        self._overhead_tokens = overhead_tokens
        self._answered: set[tuple[str, int]] = set()
        self._totals = FaultMetrics()

    # -- the seeds' doors

    def can_fault(self) -> bool:
        """True while this turn may load another page."""
        return not self.policy.exhausted

    def new_turn(self, turn: int | None = None) -> None:
        """Begin `turn` (default: the next one) with nothing spent."""
        self.turn = self.turn + 1 if turn is None else turn
        self.policy.new_turn()
        self._answered.clear()

    async def handle_fault(
        self,
        page_id: str,
        target_level: CompressionLevel | int = CompressionLevel.ABSTRACT,
        reason: FaultReason = FaultReason.RESOLVE_REFERENCE,
        room_tokens: int | None = None,
    ) -> FaultResult:
        """Serve one fault; never raises for what a model may ask (ValueError: no such level)."""
        dialogue = self.resolve(page_id, target_level, reason, room_tokens)
        loaded: MemoryPage | None = None
        try:
            while True:
                loaded = await self._load(dialogue.send(loaded).page_id)
        except StopIteration as end:
            result: FaultResult = end.value
        if result.success and result.resident:
            page = await self._load(page_id)
            if page is None:
                return self._refused(page_id, f"{page_id} is already loaded: you have it above.")
            shown = self._at_level(page, CompressionLevel(target_level))
            return result.model_copy(update={"page": shown})
        return result

    async def _load(self, page_id: str) -> MemoryPage | None:
        return None if self._get_page is None else await self._get_page(page_id)

    def build_tool_result(self, page: MemoryPage) -> FaultToolResult:
        """The tool result for a page that a fault returned."""
        return FaultToolResult(
            page=FaultedPage(
                page_id=page.page_id,
                modality=page.modality,
                level=page.compression_level,
                tier=page.storage_tier,
                content=FaultedContent(text=page_words(page)),
            ),
            effects=FaultEffects(tokens_est=self._tokens(page, None) or 0),
        )

    def get_metrics(self) -> FaultMetrics:
        """This turn and the totals."""
        return self._totals.model_copy(
            update={
                "faults_this_turn": self.policy.faults_used,
                "tokens_this_turn": self.policy.tokens_used,
                "faults_remaining": max(0, self.policy.max_per_turn - self.policy.faults_used),
            }
        )

    # -- the core

    def resolve(
        self,
        page_id: str,
        level: CompressionLevel | int = CompressionLevel.ABSTRACT,
        reason: FaultReason = FaultReason.RESOLVE_REFERENCE,
        room_tokens: int | None = None,
    ) -> Generator[PageWanted, MemoryPage | None, FaultResult]:
        """One fault as a dialogue: each page wanted is answered with the page (None: unknown).

        `room_tokens` bounds what the result may take, frame included (None: only the turn's limit).
        """
        wanted = CompressionLevel(level)
        ids = tuple(self._locate(page_id))
        if not ids:
            return self._refused(page_id, f"There is no page {page_id} in this conversation.")
        entries = [self._table.lookup(i) for i in ids]
        if all(e and e.tier is StorageTier.L0 and e.level <= wanted for e in entries):
            return self._resident(page_id, wanted)
        refusal = self.policy.allow(page_id, wanted, 0)
        if refusal:
            return self._refused(page_id, refusal)
        limits = [n for n in (self.policy.tokens_left, room_tokens) if n is not None]
        room = min(limits) - self._overhead_tokens if limits else None
        found = yield from self._fit(page_id, ids, wanted, room)
        if isinstance(found, str):
            return self._refused(page_id, found)
        tokens = found.size_tokens or 0
        tier = entries[0].tier if entries[0] else StorageTier.L2
        self.policy.spend(page_id, wanted, tokens)
        for i, entry in zip(ids, entries, strict=True):
            if entry is not None:
                share = max(1, tokens // len(ids))
                self._apply(
                    PageMutation(
                        MutationType.FAULT_IN, i, self.turn, found.compression_level,
                        StorageTier.L0, share, Actor.MODEL, reason,
                    )
                )  # fmt: skip
        self._totals.total_faults += 1
        self._totals.total_tokens += tokens
        page = found.model_copy(update={"storage_tier": tier})
        return FaultResult(success=True, page_id=page_id, page=page, tokens=tokens)

    def _fit(
        self, page_id: str, ids: Sequence[str], level: CompressionLevel, room: int | None
    ) -> Generator[PageWanted, MemoryPage | None, MemoryPage | str]:
        """The page at the level asked for, or at the next one that fits; else a sentence."""
        for shown in list(CompressionLevel)[level:]:
            pages: list[MemoryPage] = []
            for i in ids:
                page = yield PageWanted(i, shown)
                if page is None:
                    return f"{page_id} could not be loaded; answer with what you have."
                pages.append(self._at_level(page, shown))
            whole = pages[0] if len(pages) == 1 else _joined(page_id, pages, shown)
            tokens = self._tokens(whole, room)
            if tokens is not None and (room is None or tokens <= room):
                return whole.model_copy(update={"size_tokens": tokens})
        return f"{page_id} does not fit into what is left; answer with what you have."

    def _resident(self, page_id: str, level: CompressionLevel) -> FaultResult:
        """It is above already: said once; whoever asks again goes round in circles."""
        self._totals.total_resident += 1
        key = (page_id, int(level))
        repeated = key in self._answered or self.policy.was_served(*key)
        self._answered.add(key)
        error = f"{page_id} is already loaded: you have it above." if repeated else None
        return FaultResult(success=not repeated, page_id=page_id, error=error, resident=True)

    def _refused(self, page_id: str, error: str) -> FaultResult:
        self._totals.total_refused += 1
        return FaultResult(success=False, page_id=page_id, error=error)

    def _parts_in_table(self, page_id: str) -> tuple[str, ...]:
        """The page itself, or the parts of the long message that the id names."""
        if self._table.lookup(page_id) is not None:
            return (page_id,)
        parts: list[str] = []
        while self._table.lookup(f"{page_id}.{len(parts) + 1}") is not None:
            parts.append(f"{page_id}.{len(parts) + 1}")
        return tuple(parts)

    def _at_level(self, page: MemoryPage, level: CompressionLevel) -> MemoryPage:
        return page if page.compression_level >= level else self._compress(page, level)

    def _tokens(self, page: MemoryPage, room: int | None) -> int | None:
        """Tokens of words and media; None for a text far beyond the room, which is not counted."""
        if room is not None and len(page_words(page)) > max(0, room) * _MOST_CHARS_PER_TOKEN:
            return None
        return page_tokens(page, self._counts)


def _by_registry(counts: Counts) -> Compress:
    registry = CompressorRegistry.default()
    return lambda page, level: registry.compress(page, level, counts)


def _joined(page_id: str, pages: Sequence[MemoryPage], level: CompressionLevel) -> MemoryPage:
    """The parts of one message as one page: exactly its text at level 0."""
    texts = [page_words(page) for page in pages]
    content = ("" if level is CompressionLevel.FULL else "\n").join(texts)
    update = {"page_id": page_id, "content": content, "compression_level": level}
    return pages[0].model_copy(update=update)
