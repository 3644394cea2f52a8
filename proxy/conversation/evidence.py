"""What is shown unasked: the pages that the newest message is about, in front of its own text. Pure.

Promises: what is chosen stays within its room; nothing is brought in for a message that asks for
nothing, or on evidence that any page would give; only pages of this path (invariant 6).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from proxy.conversation.effects import Effect, Search
from proxy.conversation.pages import PathPages, calls_of
from proxy.memory.eviction import AntiThrashPolicy
from proxy.memory.ids import Hit
from proxy.memory.models import CompressionLevel, PageType, StorageTier
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
    prefetcher = Prefetcher()
    source = PrefetchSource.RECALL if points_back(turn.query) else PrefetchSource.SEARCH
    hits: list[Hit] = yield _search(turn, turn.query, most * 4)
    prefetcher.propose(_candidates(turn, hits, source))
    prefetcher.propose(_derived(turn))
    if tools := _likely_tools(turn):
        hits = yield _search(turn, f"{' '.join(tools)} {turn.query}", _TOOL_PAGES)
        prefetcher.propose(_candidates(turn, hits, PrefetchSource.TOOL))
    shown: dict[str, Shown] = {}

    def price(candidate: Candidate) -> int | None:
        line = _show(turn.pages, candidate, room - sum(kept.tokens for kept in shown.values()))
        if line is None:
            return None
        shown[candidate.page_id] = line
        return line.tokens

    return sorted(shown[candidate.page_id] for candidate in prefetcher.choose(most, room, price))


def used(page: Shown, pages: PathPages, query: str, answer: str) -> bool:
    """The answer to `query` says something that stands on a page which was shown for it."""
    return was_used(pages.bare(page.page_id), fresh_terms(query, answer))


# -- sources


def _search(turn: TurnWindow, query: str, limit: int) -> Search:
    pages, table = turn.pages, turn.table

    def is_resident(position: int, part: int) -> bool:
        found = table.lookup(pages.id_of(position, part))
        return bool(found and found.tier is StorageTier.L0 and not found.level)

    return Search(query, limit, len(pages.path) - 1, is_resident)


def _candidates(
    turn: TurnWindow, hits: Iterable[Hit], source: PrefetchSource
) -> Iterator[Candidate]:
    for hit in hits:
        page_id = turn.pages.id_of(hit.position, hit.part)
        entry = turn.table.lookup(page_id)
        if entry is None or turn.pages.medium(page_id) is not None:
            continue  # a medium is shown when it is asked for: its words came with its message
        cooling = turn.channel.offer and _anti_thrash.cooling(entry, turn.turn)
        if cooling and hit.evidence < _SURE_EVIDENCE:
            continue  # it just left: unasked, it comes back only for words that it nearly alone has
        yield Candidate(page_id, source, hit.score, hit.evidence, entry.size_tokens)


def _derived(turn: TurnWindow) -> Iterator[Candidate]:
    """Claims about the question, and the last segment's summary for one that points back."""
    derived = turn.pages.derived
    if not derived.pages:
        return
    unique = math.log(1.0 + len(derived.pages))  # the rarity of a word of one page alone
    for page_id, score, rarity in derived.words.ranked(turn.query)[:_DERIVED_HITS]:
        entry = turn.table.lookup(page_id)
        kind = derived.pages[page_id].page_type
        if entry is None or entry.tier is StorageTier.L0:
            continue
        if kind is PageType.SUMMARY and not points_back(turn.query):
            continue
        times = 1.0 + entry.fault_count + entry.access_count
        source = PrefetchSource.CLAIM if kind is PageType.CLAIM else PrefetchSource.SUMMARY
        yield Candidate(page_id, source, score * times, rarity / unique, entry.size_tokens)


def _likely_tools(turn: TurnWindow) -> list[str]:
    """The tools called in the last messages: an agent goes on with what it is doing."""
    if not turn.context.agent:
        return []
    names: dict[str, None] = {}
    path = turn.pages.path
    for position in range(len(path) - 1, max(-1, len(path) - 1 - _TOOL_TURNS), -1):
        if path[position].role == "assistant":
            for call in calls_of(turn.pages[position].message):
                name = (call.get("function") or {}).get("name")
                if isinstance(name, str):
                    names[name] = None
    return list(names)


# -- showing


def _show(pages: PathPages, candidate: Candidate, room: int) -> Shown | None:
    """The page as its line, at the first level that fits."""
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
