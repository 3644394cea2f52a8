"""The pages brought in before the call: gathers what the sources propose, and shows what fits. Pure.

Promises: what is chosen stays within its room; nothing is brought in for a message that asks for
nothing, or on evidence that any page would give; only pages of this path (invariant 6).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from proxy.conversation.effects import Effect, Search
from proxy.conversation.limits import Limits
from proxy.conversation.pathpages import PathPages, calls_of
from proxy.memory.anti_thrash import AntiThrashPolicy
from proxy.memory.ids import Hit
from proxy.memory.message_text import message_text
from proxy.memory.models import CompressionLevel, PageType, StorageTier
from proxy.memory.prefetcher import (
    MIN_EVIDENCE,
    Candidate,
    Prefetcher,
    PrefetchSource,
    asks_back,
    points_back,
)
from proxy.memory.tlb import TLBWithPageTable
from proxy.tokens import TokenCounter

_SHARE = 8  # prefetched pages take at most 1/8 of the room
_PASSIVE_SHARE = 3  # where the model cannot fault: 1/3
_PASSIVE_PAGES = 4  # and so many times as many pages
_TAGS_TOKENS = 16  # of the block around the lines
_TOOL_TURNS = 8  # messages back in which a called tool counts as likely now
_TOOL_PAGES = 4
_DERIVED_HITS = 2
_SURE_EVIDENCE = 2 * MIN_EVIDENCE
# The levels that are tried, and how much of a page they surely take.
_LEVELS = ((CompressionLevel.FULL, 0.9), (CompressionLevel.REDUCED, 0.2))


class Chosen(NamedTuple):
    """A page to bring in, as its line of <VM:CONTEXT>; sorts in path order."""

    position: int
    page_id: str
    level: CompressionLevel
    tokens: int
    line: str
    source: PrefetchSource


@dataclass(slots=True)
class Prefetch:
    """One decision. `offer`: the model may fault for itself; `room_tokens`: the whole window's."""

    pages: PathPages
    table: TLBWithPageTable
    counter: TokenCounter
    limits: Limits
    offer: bool
    room_tokens: int
    turn: int
    agent: bool  # the client has tools of its own
    anti_thrash: AntiThrashPolicy

    def reserve(self) -> int:
        """Tokens to keep free for it; 0 when nothing is to be brought in."""
        if self.pages.path[-1].role != "user":
            return 0
        if self.offer:
            if not asks_back(self.query):
                return 0
            return min(self.limits.prefetch_tokens, self.room_tokens // _SHARE)
        wanted = self.limits.prefetch_tokens + self.limits.fault_tokens
        return min(wanted, self.room_tokens // _PASSIVE_SHARE)

    def choose(self, left_tokens: int) -> Generator[Effect, Any, list[Chosen]]:
        """The pages, in path order; `left_tokens` is what the window has free."""
        room = min(self.reserve(), left_tokens) - _TAGS_TOKENS
        most = self.limits.prefetch_pages * (1 if self.offer else _PASSIVE_PAGES)
        if room <= 0 or most == 0:
            return []
        prefetcher = Prefetcher()
        source = PrefetchSource.RECALL if points_back(self.query) else PrefetchSource.SEARCH
        hits: list[Hit] = yield self._search(self.query, most * 4)
        prefetcher.propose(self._candidates(hits, source))
        prefetcher.propose(self._derived())
        tools = self._likely_tools()
        if tools:
            hits = yield self._search(f"{' '.join(tools)} {self.query}", _TOOL_PAGES)
            prefetcher.propose(self._candidates(hits, PrefetchSource.TOOL))
        shown: dict[str, Chosen] = {}

        def price(candidate: Candidate) -> int | None:
            line = self._show(candidate, room - sum(kept.tokens for kept in shown.values()))
            if line is None:
                return None
            shown[candidate.page_id] = line
            return line.tokens

        chosen = prefetcher.choose(most, room, price)
        return sorted(shown[candidate.page_id] for candidate in chosen)

    @property
    def query(self) -> str:
        """The newest message's words."""
        return message_text(self.pages.message(len(self.pages.path) - 1))

    # -- sources

    def _search(self, query: str, limit: int) -> Search:
        return Search(query, limit, len(self.pages.path) - 1, self._resident_at)

    def _candidates(
        self, hits: Iterable[Hit], source: PrefetchSource
    ) -> Iterable[Candidate]:
        for hit in hits:
            wanted = self.pages.id_of(hit.position, hit.part)
            entry = self.table.lookup(wanted)
            if entry is None or self.pages.is_medium(wanted):
                continue  # a medium is shown when it is asked for: its words came with its message
            cooling = self.offer and self.anti_thrash.cooling(entry, self.turn)
            if cooling and hit.evidence < _SURE_EVIDENCE:
                continue  # it just left: unasked, it comes back only for words that it nearly alone has
            yield Candidate(wanted, source, hit.score, hit.evidence, entry.size_tokens)

    def _derived(self) -> Iterable[Candidate]:
        """Claims about the question, and the last segment's summary for one that points back."""
        derived = self.pages.derived
        if not derived.pages:
            return
        back = points_back(self.query)
        unique = math.log(1.0 + len(derived.pages))  # the rarity of a word of one page alone
        for wanted, score, rarity in derived.words.ranked(self.query)[:_DERIVED_HITS]:
            entry = self.table.lookup(wanted)
            page = derived.pages[wanted]
            if entry is None or entry.tier is StorageTier.L0:
                continue
            if page.page_type is PageType.SUMMARY and not back:
                continue
            used = 1.0 + entry.fault_count + entry.access_count
            claim = page.page_type is PageType.CLAIM
            source = PrefetchSource.CLAIM if claim else PrefetchSource.SUMMARY
            yield Candidate(wanted, source, score * used, rarity / unique, entry.size_tokens)

    def _likely_tools(self) -> list[str]:
        """The tools called in the last messages: an agent goes on with what it is doing."""
        if not self.agent:
            return []
        names: dict[str, None] = {}
        path = self.pages.path
        for position in range(len(path) - 1, max(-1, len(path) - 1 - _TOOL_TURNS), -1):
            if path[position].role == "assistant":
                for call in calls_of(self.pages.message(position)):
                    name = (call.get("function") or {}).get("name")
                    if isinstance(name, str):
                        names[name] = None
        return list(names)

    # -- showing

    def _show(self, candidate: Candidate, room: int) -> Chosen | None:
        """The page as its line, at the first level that fits."""
        for level, least in _LEVELS:
            if candidate.tokens * least > room:
                continue  # it cannot fit, so it need not be made
            packed = self.pages.packer.pack([self.pages.at(candidate.page_id, level)])
            if packed.tokens_est <= room:
                position = self.pages.position(candidate.page_id)
                return Chosen(
                    position, candidate.page_id, level, packed.tokens_est, packed.content,
                    candidate.source,
                )  # fmt: skip
        return None

    def _resident_at(self, position: int, part: int) -> bool:
        found = self.table.lookup(self.pages.id_of(position, part))
        return bool(found and found.tier is StorageTier.L0 and not found.level)
