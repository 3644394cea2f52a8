"""What is shown unasked: the pages that the newest message is about, in front of its own text. Pure.

Promises: what is chosen stays within its room; nothing is shown on words that any page has; only pages of this path
(invariant 6). It is for this turn: at the user's next message it is taken out of the log, or stays in it to the end of
the epoch where that is cheaper (`stays`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import name

from proxy.conversation.compose import with_context
from proxy.conversation.effects import OFFLOAD, Effect, Search
from proxy.conversation.pages import PathPages
from proxy.conversation.timeline import Timeline
from proxy.memory.context import CONTEXT_CLOSE, CONTEXT_OPEN, context_block, context_line
from proxy.memory.ids import Hit
from proxy.memory.models import MEDIA_PART, CompressionLevel
from proxy.memory.passages import find_passages
from proxy.memory.prefetcher import Candidate, Prefetcher, fresh_terms, told_evidence, was_used
from proxy.memory.questions import EARLIER_MESSAGES, search_queries
from proxy.memory.working_set import watermarks

if TYPE_CHECKING:
    from proxy.conversation.limits import Limits
    from proxy.conversation.turn_window import TurnWindow
    from proxy.conversation.window import Window
    from proxy.tokens import TokenCounter

_ROOM_SHARE = 2  # evidence takes at most 1/2 of the room
_RESERVED_SHARE = 2  # and 1/2 of its limit is kept free for it: the log may grow into the rest
_HITS = 200  # pages that are looked at, in the window or not
_TAGS_TOKENS = 16  # of the block around the lines
_LEAST_WHOLE = 0.9  # of a page's tokens, that its line surely has
_PASSAGE_TOKENS = 256  # of a page that does not fit whole ...
_LEAST_PASSAGE_TOKENS = 32  # ... and no fewer: "Evan …" says nothing
_READ_CHARS = 65_536  # at once
_AT_ONCE_TOKENS = 32_768  # of pages that were found, are looked at while others wait
_LINE_TOKENS = 48  # of a line, beside its words: they are quoted


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
    search = _search(turn, _HITS)
    hits: list[Hit] = yield search
    if len(hits) * turn.table.total_tokens > _AT_ONCE_TOKENS * len(turn.table):  # by the pages' mean size
        yield OFFLOAD
    queries = [query if isinstance(query, str) else query.text for query in search.queries]
    shown: dict[str, Shown] = {}

    def price(candidate: Candidate, left: int) -> int | None:
        line = _show(turn.pages, candidate, queries, left)
        if line is None:
            return None
        shown[candidate.page_id] = line
        return line.tokens

    prefetcher = Prefetcher(turn.limits.prefetch_pages, room, asks(turn.query), alone=not turn.channel.listed)
    best, candidates, least = 0.0, list[Candidate](), -inf  # the best of what is in the window
    for hit in hits:
        if hit.score < least:
            break  # what is worse is left out, and raises nothing
        page_id = turn.pages.id_of(hit.position, hit.part)
        resident = turn.table.in_window(page_id)
        if resident is not None and not resident.level:  # whole
            best = max(best, hit.score)
            continue
        entry = turn.table.lookup(page_id)
        if entry is not None and hit.part < MEDIA_PART:  # a medium is shown when it is asked for: its words are there
            candidates.append(Candidate(page_id, hit.score, hit.evidence, entry.size_tokens, hit.words))
            if least < 0 and hit.evidence >= prefetcher.least_evidence:
                least = prefetcher.fall * candidates[0].score
    prefetcher.choose(candidates, price, best)
    return sorted(shown.values())


def with_evidence(
    message: dict[str, Any], tokens: int, shown: Sequence[Shown], counter: TokenCounter
) -> tuple[dict[str, Any], int]:
    """A user's message of so many tokens with these pages in front of its text, and its tokens then."""
    block, content = context_block(page.line for page in shown), message.get("content")
    made = with_context(message, block)
    if isinstance(content, str) and counter.adds_lines(content, len(block)):
        around = counter.text(f"{CONTEXT_OPEN}\n") + counter.text(f"{CONTEXT_CLOSE}\n\n")
        return made, tokens + around + sum(page.tokens for page in shown)
    return made, counter.message(made)


def asks(text: str) -> bool:
    """The user asks a question."""
    if "?" in text or text.isascii():
        return "?" in text
    parts = (text[at : at + _READ_CHARS] for at in range(0, len(text), _READ_CHARS))
    return any("QUESTION MARK" in name(c, "") for part in parts for c in set(part) if not c.isascii())


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


def used(shown: Iterable[Shown], pages: PathPages, query: str, answer: str) -> list[Shown]:
    """Those of the pages that were shown for `query` on which something stands that its answer says."""
    fresh = fresh_terms(query, answer)
    return [page for page in shown if was_used(pages.bare(page.page_id), fresh)]


def _search(turn: TurnWindow, limit: int) -> Search:
    """Also for what is in the window: where that is what the message is about, older pages have to be as good."""
    pages, newest = turn.pages, len(turn.pages.path) - 1
    earlier = [pages[position].own_text for position in range(max(0, newest - EARLIER_MESSAGES), newest)]
    seen_s = Timeline(pages, newest, turn.context).seen_s
    queries, least = search_queries(turn.query, earlier), None if asks(turn.query) else told_evidence
    return Search(queries, limit, newest, None, seen_s, least)


def _show(pages: PathPages, candidate: Candidate, queries: Sequence[str], room: int) -> Shown | None:
    """The page as its line: whole where that fits, else its passages about the queries."""
    page_id, count = candidate.page_id, pages.counter.text
    if candidate.tokens * _LEAST_WHOLE <= room:  # else it surely does not fit
        whole = pages.line(page_id)
        if whole.tokens <= room:
            return Shown(pages.position(page_id), page_id, CompressionLevel.FULL, whole.tokens, whole.line)
    most = min(_PASSAGE_TOKENS, room) - _LINE_TOKENS
    words = find_passages(pages.text(page_id), queries, most, count) if most >= _LEAST_PASSAGE_TOKENS else ""
    if not words:
        return None
    level = CompressionLevel.REDUCED
    line = context_line(page_id, pages.role(page_id), words, level, pages.modality(page_id))
    tokens = count(f"{line}\n")
    return Shown(pages.position(page_id), page_id, level, tokens, line) if tokens <= room else None
