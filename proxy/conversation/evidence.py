"""What is shown unasked: the pages that the newest message is about, in front of its own text. Pure.

Promises: what is chosen stays within its room; nothing is brought in for a message that asks for
nothing, or on evidence that any page would give; only pages of this path (invariant 6).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from proxy.conversation.compose import with_context
from proxy.conversation.effects import Effect, Search
from proxy.conversation.pages import calls_of
from proxy.conversation.report import PrefetchReport
from proxy.memory.anti_thrash import AntiThrashPolicy
from proxy.memory.context_packer import context_block
from proxy.memory.models import (
    CompressionLevel,
    FaultReason,
    MutationType,
    PageMutation,
    PageType,
    StorageTier,
)
from proxy.memory.pages import Hit, message_text
from proxy.memory.prefetcher import (
    MIN_EVIDENCE,
    Candidate,
    Prefetcher,
    PrefetchSource,
    asks_back,
    fresh_terms,
    points_back,
    was_used,
)

if TYPE_CHECKING:
    from proxy.conversation.turn_window import TurnWindow

_SHARE = 8  # evidence takes at most 1/8 of the room
_PASSIVE_SHARE = 3  # where the model cannot fault: 1/3
_PASSIVE_PAGES = 4  # and so many times as many pages
_TAGS_TOKENS = 16  # of the block around the lines
_TOOL_TURNS = 8  # messages back in which a called tool counts as likely now
_TOOL_PAGES = 4
_DERIVED_HITS = 2
_SURE_EVIDENCE = 2 * MIN_EVIDENCE
# The levels that are tried, and how much of a page they surely take.
_LEVELS = ((CompressionLevel.FULL, 0.9), (CompressionLevel.REDUCED, 0.2))

_anti_thrash = AntiThrashPolicy()


class Shown(NamedTuple):
    """A page that is brought in, as its line of <VM:CONTEXT>; sorts in path order."""

    position: int
    page_id: str
    level: CompressionLevel
    tokens: int
    line: str
    source: PrefetchSource


class Evidence:
    """One per turn's window."""

    def __init__(self, turn: TurnWindow) -> None:
        self._turn = turn
        self._shown: list[Shown] = []

    @cached_property
    def query(self) -> str:
        """The newest message's words."""
        pages = self._turn.pages
        return message_text(pages[len(pages.path) - 1].message)

    def reserve(self) -> int:
        """Tokens to keep free for it; 0 when nothing is to be brought in."""
        turn, limits = self._turn, self._turn.limits
        if turn.pages.path[-1].role != "user":
            return 0
        if turn.channel.offer:
            if not asks_back(self.query):
                return 0
            return min(limits.prefetch_tokens, turn.room // _SHARE)
        return min(limits.prefetch_tokens + limits.fault_tokens, turn.room // _PASSIVE_SHARE)

    def bring(self, message: dict[str, Any]) -> Generator[Effect, Any, dict[str, Any] | None]:
        """The newest message with its evidence in front of its own text; None when there is none."""
        turn = self._turn
        turn.report.asked_back = points_back(self.query)
        self._shown = yield from self._choose(max(0, turn.free_tokens))
        for page in self._shown:
            turn.apply(
                PageMutation(
                    MutationType.MAP, page.page_id, turn.turn, page.level, StorageTier.L0,
                    page.tokens, reason=FaultReason.SPECULATIVE,
                )
            )  # fmt: skip
        if not self._shown:
            return None
        return with_context(message, context_block(page.line for page in self._shown))

    def settle(self, answer: str) -> None:
        """Judge what was brought in by the answer: a page that served it counts as used."""
        turn = self._turn
        fresh = fresh_terms(self.query, answer) if self._shown else frozenset()
        for page in self._shown:
            used = was_used(turn.pages.bare(page.page_id), fresh)
            turn.report.prefetched.append(PrefetchReport(page.page_id, page.source.value, used))
            if used:
                turn.apply(PageMutation(MutationType.ACCESS, page.page_id, turn.turn))

    def _choose(self, left_tokens: int) -> Generator[Effect, Any, list[Shown]]:
        """The pages, in path order; `left_tokens` is what the window has free."""
        turn = self._turn
        room = min(self.reserve(), left_tokens) - _TAGS_TOKENS
        most = turn.limits.prefetch_pages * (1 if turn.channel.offer else _PASSIVE_PAGES)
        if room <= 0 or most == 0:
            return []
        prefetcher = Prefetcher()
        source = PrefetchSource.RECALL if turn.report.asked_back else PrefetchSource.SEARCH
        hits: list[Hit] = yield self._search(self.query, most * 4)
        prefetcher.propose(self._candidates(hits, source))
        prefetcher.propose(self._derived())
        if tools := self._likely_tools():
            hits = yield self._search(f"{' '.join(tools)} {self.query}", _TOOL_PAGES)
            prefetcher.propose(self._candidates(hits, PrefetchSource.TOOL))
        shown: dict[str, Shown] = {}

        def price(candidate: Candidate) -> int | None:
            line = self._show(candidate, room - sum(kept.tokens for kept in shown.values()))
            if line is None:
                return None
            shown[candidate.page_id] = line
            return line.tokens

        return sorted(shown[candidate.page_id] for candidate in prefetcher.choose(most, room, price))

    # -- sources

    def _search(self, query: str, limit: int) -> Search:
        return Search(query, limit, len(self._turn.pages.path) - 1, self._resident_at)

    def _resident_at(self, position: int, part: int) -> bool:
        found = self._turn.table.lookup(self._turn.pages.id_of(position, part))
        return bool(found and found.tier is StorageTier.L0 and not found.level)

    def _candidates(self, hits: Iterable[Hit], source: PrefetchSource) -> Iterable[Candidate]:
        turn = self._turn
        for hit in hits:
            page_id = turn.pages.id_of(hit.position, hit.part)
            entry = turn.table.lookup(page_id)
            if entry is None or turn.pages.medium(page_id) is not None:
                continue  # a medium is shown when it is asked for: its words came with its message
            cooling = turn.channel.offer and _anti_thrash.cooling(entry, turn.turn)
            if cooling and hit.evidence < _SURE_EVIDENCE:
                continue  # it just left: unasked, it comes back only for words that it nearly alone has
            yield Candidate(page_id, source, hit.score, hit.evidence, entry.size_tokens)

    def _derived(self) -> Iterable[Candidate]:
        """Claims about the question, and the last segment's summary for one that points back."""
        derived = self._turn.pages.derived
        if not derived.pages:
            return
        unique = math.log(1.0 + len(derived.pages))  # the rarity of a word of one page alone
        for page_id, score, rarity in derived.words.ranked(self.query)[:_DERIVED_HITS]:
            entry = self._turn.table.lookup(page_id)
            kind = derived.pages[page_id].page_type
            if entry is None or entry.tier is StorageTier.L0:
                continue
            if kind is PageType.SUMMARY and not self._turn.report.asked_back:
                continue
            used = 1.0 + entry.fault_count + entry.access_count
            source = PrefetchSource.CLAIM if kind is PageType.CLAIM else PrefetchSource.SUMMARY
            yield Candidate(page_id, source, score * used, rarity / unique, entry.size_tokens)

    def _likely_tools(self) -> list[str]:
        """The tools called in the last messages: an agent goes on with what it is doing."""
        if not self._turn.context.agent:
            return []
        names: dict[str, None] = {}
        path = self._turn.pages.path
        for position in range(len(path) - 1, max(-1, len(path) - 1 - _TOOL_TURNS), -1):
            if path[position].role == "assistant":
                for call in calls_of(self._turn.pages[position].message):
                    name = (call.get("function") or {}).get("name")
                    if isinstance(name, str):
                        names[name] = None
        return list(names)

    # -- showing

    def _show(self, candidate: Candidate, room: int) -> Shown | None:
        """The page as its line, at the first level that fits."""
        pages = self._turn.pages
        for level, least in _LEVELS:
            if candidate.tokens * least > room:
                continue  # it cannot fit, so it need not be made
            packed = pages.packer.pack([pages.at(candidate.page_id, level)])
            if packed.tokens_est <= room:
                return Shown(
                    pages.position(candidate.page_id), candidate.page_id, level, packed.tokens_est,
                    packed.content, candidate.source,
                )  # fmt: skip
        return None
