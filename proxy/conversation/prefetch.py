"""Which pages are brought in before the call: those that the newest user message is about. Pure.

Promises: what is chosen stays within its room; nothing is brought in for a message that asks for
nothing, or on evidence that any page would give; only pages of this path (invariant 6).
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

from proxy.conversation.effects import Effect, Search
from proxy.conversation.limits import Limits
from proxy.conversation.pathpages import PathPages
from proxy.memory.models import CompressionLevel, StorageTier
from proxy.memory.page_table import PageTable
from proxy.memory.pages import Hit, message_text, page_id
from proxy.tokens import TokenCounter

_SHARE = 8  # prefetched pages take at most 1/8 of the room
_PASSIVE_SHARE = 3  # where the model cannot fault: 1/3
_PASSIVE_PAGES = 4  # and so many times as many pages
_MIN_EVIDENCE = 0.8  # of one word that only this page has: less is no reason to bring a page in
_LENGTH_POWER = 0.4  # measured on LoCoMo and BEAM (tests/bench/recall_memory.py)
_TAGS_TOKENS = 16  # of the block around the lines


class Chosen(NamedTuple):
    """A page to bring in, as its line of <VM:CONTEXT>."""

    position: int
    part: int
    level: CompressionLevel
    tokens: int
    line: str


@dataclass(slots=True)
class Prefetch:
    """One decision. `offer`: the model may fault for itself; `room_tokens`: the whole window's."""

    pages: PathPages
    table: PageTable
    counter: TokenCounter
    limits: Limits
    offer: bool
    room_tokens: int

    def reserve(self) -> int:
        """Tokens to keep free for it; 0 when nothing is to be brought in."""
        if self.pages.path[-1].role != "user":
            return 0
        if self.offer:
            if not asks_back(self._query()):
                return 0
            return min(self.limits.prefetch_tokens, self.room_tokens // _SHARE)
        wanted = self.limits.prefetch_tokens + self.limits.fault_tokens
        return min(wanted, self.room_tokens // _PASSIVE_SHARE)

    def choose(self, left_tokens: int) -> Generator[Effect, Any, list[Chosen]]:
        """The pages, in path order; `left_tokens` is what the window has free."""
        room = min(self.reserve(), left_tokens)
        most = self.limits.prefetch_pages * (1 if self.offer else _PASSIVE_PAGES)
        if room <= 0 or most == 0:
            return []
        last = len(self.pages.path) - 1
        hits: list[Hit] = yield Search(self._query(), most * 4, last, self._resident)
        hits.sort(key=self._density, reverse=True)
        chosen: list[Chosen] = []
        for hit in hits:
            if len(chosen) == most or hit.evidence < _MIN_EVIDENCE:
                continue
            for level in (CompressionLevel.FULL, CompressionLevel.REDUCED):
                line = self.pages.line(hit.position, hit.part, level)
                tokens = self.counter.text(line) + 1
                if tokens <= room - _TAGS_TOKENS:
                    room -= tokens
                    chosen.append(Chosen(hit.position, hit.part, level, tokens, line))
                    break
        return sorted(chosen)

    def _query(self) -> str:
        return message_text(self.pages.message(len(self.pages.path) - 1))

    def _density(self, hit: Hit) -> tuple[float, int]:
        """Value for its tokens: long pages have every word somewhere."""
        parts = len(self.pages.ids(hit.position)) if hit.part else 1
        tokens = self.pages.tokens(hit.position) / parts
        return hit.score / tokens**_LENGTH_POWER, hit.position

    def _resident(self, position: int, part: int) -> bool:
        found = self.table.lookup(page_id(position, part))
        return bool(found and found.tier is StorageTier.L0 and not found.level)


_QUESTION_MARKS = ("?", "？", "؟")
_RECALL_STEMS = (  # looked for first: a pattern with alternatives costs more than all of them
    "remember", "remind", "recall", "recap", "summar", "earlier", "previously", "last time",
    "mention", "discuss", "we said", "we talked", "we agreed", "we decided", "i said", "you said",
    "i told", "you told", "go back to",
)  # fmt: skip
_RECALL = re.compile(
    r"\b(?:remember|remind|recall|recap|summar\w+|earlier|previously|last time|mention\w*"
    r"|discuss\w*|we (?:said|talked|agreed|decided)|(?:i|you) (?:said|told)|go back to)\b"
)


def asks_back(text: str) -> bool:
    """A question, or words that point back: what the conversation already holds may be wanted.

    A statement is not worth the tokens, and a model that wants more can still fault.
    """
    if any(mark in text for mark in _QUESTION_MARKS):
        return True
    low = text.lower()
    return any(stem in low for stem in _RECALL_STEMS) and bool(_RECALL.search(low))
