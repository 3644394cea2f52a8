"""What is shown unasked: the pages that the newest message is about, in front of its own text. Pure.

Promises: what is chosen stays within its room; nothing is brought in for a message that asks for
nothing, or on evidence that any page would give; only pages of this path (invariant 6).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from proxy.conversation.effects import Effect, Search
from proxy.conversation.pages import PathPages
from proxy.conversation.timeline import Timeline
from proxy.memory.eviction import AntiThrashPolicy
from proxy.memory.ids import Hit
from proxy.memory.models import CompressionLevel, StorageTier
from proxy.memory.prefetcher import (
    MIN_EVIDENCE,
    Candidate,
    Prefetcher,
    fresh_terms,
    was_used,
)
from proxy.memory.questions import EARLIER_MESSAGES, search_queries

if TYPE_CHECKING:
    from proxy.conversation.turn_window import TurnWindow

_SHARE = 8  # evidence takes at most 1/8 of the room
_PASSIVE_SHARE = 3  # where the model cannot fault: 1/3
_PASSIVE_PAGES = 4  # and so many times as many pages
_TAGS_TOKENS = 16  # of the block around the lines
_SURE_EVIDENCE = 2 * MIN_EVIDENCE
# The levels that are tried, and how much of a page they surely take.
_LEVELS = ((CompressionLevel.FULL, 0.9), (CompressionLevel.REDUCED, 0.2))

# Signals in a user's message.
_QUESTION_MARKS = ("?", "？", "؟")
_REQUEST_CHARS = 160  # a longer text without a question mark tells something
_RECALL_STEMS = (  # looked for first: a pattern with alternatives costs more than all of them
    "remember", "remind", "recall", "recap", "summar", "earlier", "previously", "last time",
    "mention", "discuss", "we said", "we talked", "we agreed", "we decided", "i said", "you said",
    "i told", "you told", "go back to",
)  # fmt: skip
_RECALL = re.compile(
    r"\b(?:remember|remind|recall|recap|summar\w+|earlier|previously|last time|mention\w*"
    r"|discuss\w*|we (?:said|talked|agreed|decided)|(?:i|you) (?:said|told)|go back to)\b"
)

_anti_thrash = AntiThrashPolicy()


class Shown(NamedTuple):
    """A page that is brought in, as its line of <VM:CONTEXT>; sorts in path order."""

    position: int
    page_id: str
    level: CompressionLevel
    tokens: int
    line: str


def reserve(turn: TurnWindow) -> int:
    """Tokens to keep free for evidence; 0 when nothing is to be brought in."""
    limits = turn.limits
    if turn.pages.path[-1].role != "user":
        return 0
    if turn.channel.offer:
        return min(limits.prefetch_tokens, turn.room // _SHARE) if asks_back(turn.query) else 0
    return min(limits.prefetch_tokens + limits.fault_tokens, turn.room // _PASSIVE_SHARE)


def choose(turn: TurnWindow, left_tokens: int) -> Generator[Effect, Any, list[Shown]]:
    """The pages, in path order; `left_tokens` is what the window has free."""
    room = min(reserve(turn), left_tokens) - _TAGS_TOKENS
    most = turn.limits.prefetch_pages * (1 if turn.channel.offer else _PASSIVE_PAGES)
    if room <= 0 or most == 0:
        return []
    hits: list[Hit] = yield _search(turn, most * 4)
    shown: dict[str, Shown] = {}

    def price(candidate: Candidate, left: int) -> int | None:
        line = _show(turn.pages, candidate, left)
        if line is None:
            return None
        shown[candidate.page_id] = line
        return line.tokens

    Prefetcher(most, room).choose(_candidates(turn, hits), price)
    return sorted(shown.values())


def used(page: Shown, pages: PathPages, query: str, answer: str) -> bool:
    """The answer to `query` says something that stands on a page which was shown for it."""
    return was_used(pages.bare(page.page_id), fresh_terms(query, answer))


def _search(turn: TurnWindow, limit: int) -> Search:
    pages, table = turn.pages, turn.table

    def is_resident(position: int, part: int) -> bool:
        found = table.lookup(pages.id_of(position, part))
        return bool(found and found.tier is StorageTier.L0 and not found.level)

    newest = len(pages.path) - 1
    earlier = [pages[position].own_text for position in range(max(0, newest - EARLIER_MESSAGES), newest)]
    seen_s = Timeline(pages, newest, turn.context).seen_s
    return Search(search_queries(turn.query, earlier), limit, newest, is_resident, seen_s)


def _candidates(turn: TurnWindow, hits: Iterable[Hit]) -> Iterator[Candidate]:
    for hit in hits:
        page_id = turn.pages.id_of(hit.position, hit.part)
        entry = turn.table.lookup(page_id)
        if entry is None or turn.pages.medium(page_id) is not None:
            continue  # a medium is shown when it is asked for: its words came with its message
        cooling = turn.channel.offer and _anti_thrash.cooling(entry, turn.turn)
        if cooling and hit.evidence < _SURE_EVIDENCE:
            continue  # it just left: unasked, it comes back only for words that it nearly alone has
        yield Candidate(page_id, hit.score, hit.evidence, entry.size_tokens)


def _show(pages: PathPages, candidate: Candidate, room: int) -> Shown | None:
    """The page as its line, at the first level that fits."""
    for level, least in _LEVELS:
        if candidate.tokens * least > room:
            continue  # it cannot fit, so it need not be made
        packed = pages.packer.pack([pages.at(candidate.page_id, level)])
        if packed.tokens_est <= room:
            return Shown(
                pages.position(candidate.page_id), candidate.page_id, level, packed.tokens_est,
                packed.content,
            )  # fmt: skip
    return None


# -- what a user's message asks for


def points_back(text: str) -> bool:
    """Words that point back to what was said, in a question or a short request: a story that says
    "I remember" asks for nothing."""
    if len(text) > _REQUEST_CHARS and not any(mark in text for mark in _QUESTION_MARKS):
        return False
    low = text.lower()
    return any(stem in low for stem in _RECALL_STEMS) and bool(_RECALL.search(low))


def asks_back(text: str) -> bool:
    """A question, or words that point back: what the conversation already holds may be wanted.

    A statement is not worth the tokens, and a model that wants more can still fault.
    """
    return any(mark in text for mark in _QUESTION_MARKS) or points_back(text)
