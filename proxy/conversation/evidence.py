"""What is shown unasked: the pages that the newest message is about, in front of its own text. Pure.

Promises: what is chosen stays within its room; nothing is shown on words that any page has; only pages of this path
(invariant 6). It is for this turn: at the user's next message it is taken out of the log, or stays in it to the end of
the epoch where that is cheaper (`stays`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import name

from proxy.conversation.effects import Effect, Search
from proxy.conversation.pages import PathPages
from proxy.conversation.timeline import Timeline
from proxy.memory.ids import Hit
from proxy.memory.models import CompressionLevel, StorageTier
from proxy.memory.prefetcher import Candidate, Prefetcher, fresh_terms, was_used
from proxy.memory.questions import EARLIER_MESSAGES, search_queries
from proxy.memory.working_set import watermarks

if TYPE_CHECKING:
    from proxy.conversation.limits import Limits
    from proxy.conversation.turn_window import TurnWindow
    from proxy.conversation.window import Window

_ROOM_SHARE = 2  # evidence takes at most 1/2 of the room
_RESERVED_SHARE = 2  # and 1/2 of its limit is kept free for it: the log may grow into the rest
_HITS = 100  # pages that are looked at
_TAGS_TOKENS = 16  # of the block around the lines
# The levels that are tried, and how much of a page they surely take.
_LEVELS = ((CompressionLevel.FULL, 0.9), (CompressionLevel.REDUCED, 0.2))


class Shown(NamedTuple):
    """A page that is brought in, as its line of <VM:CONTEXT>; sorts in path order."""

    position: int
    page_id: str
    level: CompressionLevel
    tokens: int
    line: str


def limit(turn: TurnWindow) -> int:
    """Tokens that evidence may take in this request; 0 when there is nobody to show it to."""
    if turn.pages.path[-1].role != "user" or not turn.limits.prefetch_pages:
        return 0
    return min(turn.limits.evidence_tokens, turn.room // _ROOM_SHARE)


def reserve(turn: TurnWindow) -> int:
    """Tokens of the room that the log leaves to evidence."""
    return limit(turn) // _RESERVED_SHARE


def choose(turn: TurnWindow, left_tokens: int) -> Generator[Effect, Any, list[Shown]]:
    """The pages, in path order; `left_tokens` is what the window has free."""
    room = min(limit(turn), left_tokens) - _TAGS_TOKENS
    if room <= 0:
        return []
    hits: list[Hit] = yield _search(turn, _HITS)
    shown: dict[str, Shown] = {}

    def price(candidate: Candidate, left: int) -> int | None:
        line = _show(turn.pages, candidate, left)
        if line is None:
            return None
        shown[candidate.page_id] = line
        return line.tokens

    prefetcher = Prefetcher(turn.limits.prefetch_pages, room, asks(turn.query))
    prefetcher.choose(_candidates(turn, hits), price)
    return sorted(shown.values())


def asks(text: str) -> bool:
    """The user asks a question."""
    return "?" in text or any("QUESTION MARK" in name(c, "") for c in set(text) if not c.isascii())


def stays(window: Window, at: int, limits: Limits) -> bool:
    """Whether the evidence of the entry `at` is cheaper to carry to the end of the epoch than to take out.

    Taken out, all that stands from that entry on is read once more at the full price. Carried, it is read at the
    cached price in each turn that the epoch still has (turns like this one), and brings the next rebuild, which
    reads the window down to the low watermark anew, nearer by its share.
    """
    shown = window.entries[at].shown_tokens
    turn = sum(entry.tokens for entry in window.entries[at:]) - shown
    high, low = watermarks(limits.budget_tokens, limits.working_set)
    dearer = 1.0 - limits.cached_price
    turns = max(0, high - window.tokens) / max(1, turn)
    rebuilt = dearer * low / max(1, high - low)
    return shown * (limits.cached_price * turns + rebuilt) <= dearer * turn


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
        yield Candidate(page_id, hit.score, hit.evidence, entry.size_tokens, hit.words)


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
