"""Plans an epoch: which pages stay in the window, where, and at which level. Pure.

Promises: the same table, budget, policy and turn give the same plan; applying a plan and planning
again yields no mutation (unless it mapped missing pages of a group, which then count as just used);
what the plan keeps fits the budget, but for the mandatory newest groups;
a group (a tool call and its results) stays, is mapped and leaves as a whole (invariant 8); pages
are compressed before they are evicted, and nothing but their place and level changes (invariant 4).

Levels are chosen as a multiple-choice knapsack, solved greedily: each group's levels become upgrade
steps of falling value per token (the upper convex hull of its prices and values), and steps are
taken by value per token until the budget is used.

A text is no context line unless it is pinned, was just faulted in or derives from others: lines of other texts
were a tenth of the bill and found no more (tests/bench/ablation.py: LoCoMo 149 and 146 of 199, BEAM 46 and 47 of
74). It is looked up when a message is about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from proxy.memory.compressor import ABSTRACT_TOKENS
from proxy.memory.eviction import EvictionPolicy, is_protected
from proxy.memory.models import (
    CompressionLevel,
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    StorageTier,
)
from proxy.memory.table import PageTable

IsPinned = Callable[[PageTableEntry, int], bool]

# Context lines are tried at these levels; a reference (level 3) is what the manifest already has.
_LEVELS = (CompressionLevel.ABSTRACT, CompressionLevel.REDUCED, CompressionLevel.FULL)
_LINE_TOKENS = 14  # prefix, page id and quotes of a line
_FIRST_SHARE = 0.5  # of the context budget, for pinned and just faulted pages before all others
_CANDIDATES = 512  # the newest groups considered for a context line: more than any window has room for

_ABSTRACT_MIN_TOKENS = 20  # below this an abstract gets no shorter with its text
_THUMBNAIL_TOKENS = 85  # a picture at low detail
_KEYFRAMES = 4
_TRANSCRIPT_SHARE = 0.35  # speech has about 3.5 tokens a second, sound is billed at 10

# What a page is worth. A longer text is needed more often, as it says more: in proportion to its
# length by the names and numbers that later messages take up (access traces of 8fa8a4e), by less
# where questions are asked about it, whose answers stand in short messages as often as in long
# ones.
_SIZE_EXPONENT = 0.8
# A level of a text keeps what it shows, and a little more because the best sentences are shown: a
# share x of the tokens keeps x ** 0.7 to 1.2 of those names and numbers.
_TEXT_EXPONENT = 0.8
# What a medium is billed says little about how often it is needed: it is worth a text of so many
# tokens (sound: its words).
_MEDIUM_WORTH = {Modality.IMAGE: 128.0, Modality.VIDEO: 256.0}
# And what its levels 0, 1 and 2 keep: a thumbnail loses small print, a caption is one sentence; a
# transcript loses only the voice; keyframes lose what moves and sounds, scene titles nearly all.
_KEPT = {
    Modality.IMAGE: (1.0, 0.7, 0.35),
    Modality.AUDIO: (1.0, 0.9, 0.3),
    Modality.VIDEO: (1.0, 0.5, 0.2),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Messages that go together: positions first..last-1 along the path.

    `tokens` is their cost as native messages; `mandatory` groups stay native whatever they cost;
    `answer`: it is a plain answer, which says little without the question before it. `pages` are
    the text pages and the media of the messages. A derived page (a summary, a claim) is a group of
    its own in front of all messages: first and last are the same negative number, unlike any other
    group's, and `tokens` is more than any budget, because it can only be a context line. `fresh`: it came
    after the last answer that is known, together with the messages from this position on; -1: it is older.
    """

    first: int
    last: int
    tokens: int
    pages: tuple[str, ...]
    mandatory: bool = False
    answer: bool = False
    fresh: int = -1


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens for native messages and for <VM:CONTEXT> lines; `fresh_tokens`: for native messages where
    what is above `native_tokens` is fresh."""

    native_tokens: int
    context_tokens: int
    fresh_tokens: int = 0


@dataclass(slots=True)
class Plan:
    """What stays native (in path order), what becomes a context line, what changes in the table."""

    native: list[Group] = field(default_factory=list)
    context: list[tuple[Group, CompressionLevel]] = field(default_factory=list)
    mutations: list[PageMutation] = field(default_factory=list)


def plan(
    table: PageTable,
    groups: Sequence[Group],
    budget: Budget,
    policy: EvictionPolicy,
    turn: int,
    is_pinned: IsPinned | None = None,
) -> Plan:
    """Rebuild the window: `groups` are all groups with a page in L0, in path order.

    The newest groups stay native as long as they fit, without a gap but for mandatory ones; of the
    others those with the most value per token become context lines, if they are pinned, media or derived, each
    at the level that is worth its tokens; the rest is evicted to L2. What the native ones leave free stays free:
    filled with lines it cost a tenth more epochs and found nothing more. `is_pinned` says which pages are placed first beside those that the policy never lets go
    (score infinity); pages faulted in just now are placed with them.
    """
    native = native_groups(groups, budget)
    kept = {group.first for group in native}
    others = [group for group in groups if group.first not in kept]
    rows = [_row(table, group, policy, turn, is_pinned) for group in others]
    context = _context([row for row in rows if row.is_line], budget.context_tokens)
    result = Plan(native, sorted(context, key=lambda item: item[0].first))
    levels = {group.first: CompressionLevel.FULL for group in native}
    levels.update((group.first, level) for group, level in context)
    for group in groups:
        level = levels.get(group.first)
        as_line = group.first not in kept
        for page_id in group.pages:
            result.mutations.extend(changed(table, page_id, level, as_line, turn))
    return result


def native_groups(groups: Sequence[Group], budget: Budget) -> list[Group]:
    """Those that stay in their own roles: mandatory ones, and the newest without a gap that fit.

    Fresh ones stay beyond the budget of the others: all, or, where those are too many (a long history
    seen for the first time), those that this budget ends in.
    """
    used = sum(group.tokens for group in groups if group.mandatory)
    most = max(budget.native_tokens, budget.fresh_tokens)
    whole = used + sum(group.tokens for group in groups if group.fresh >= 0 and not group.mandatory) <= most
    native: list[Group] = []
    edge = groups[-1].last if groups else 0  # where the run of newest messages begins so far
    together, begun = -1, False  # the messages that this group came with, and whether the budget ends in them
    for group in reversed(groups):
        if not group.mandatory:
            if group.fresh != together:
                together, begun = group.fresh, used < budget.native_tokens
            beyond = group.fresh >= 0 and (whole or begun)
            if group.last != edge or used + group.tokens > (most if beyond else budget.native_tokens):
                continue
            used += group.tokens
        if group.last == edge:
            edge = group.first
        native.append(group)
    native.reverse()
    if len(native) > 1 and native[0].answer and not native[0].mandatory:
        del native[0]  # the window begins with a question, as some providers demand
    return native


# -- prices and values, from the entry's size alone: texts are compressed only once they are chosen


def price(size_tokens: int, modality: Modality, level: CompressionLevel) -> int:
    """Tokens of a page's line at a level (0 to 2), on the high side; the window that comes of it is
    counted exactly."""
    shown = _shown(size_tokens, modality, level)
    quoting = 0 if modality in _KEPT else shown // 10
    return shown + quoting + _LINE_TOKENS


def _shown(size: int, modality: Modality, level: CompressionLevel) -> int:
    if level is CompressionLevel.FULL:
        return size
    if level is CompressionLevel.ABSTRACT:
        caption = modality in _KEPT
        long = ABSTRACT_TOKENS if caption else max(_ABSTRACT_MIN_TOKENS, size // 4)
        return min(size, ABSTRACT_TOKENS, long)
    if modality is Modality.IMAGE:
        return min(size, _THUMBNAIL_TOKENS)
    if modality is Modality.VIDEO:
        return min(size, _KEYFRAMES * _THUMBNAIL_TOKENS)
    if modality is Modality.AUDIO:
        return min(size, max(ABSTRACT_TOKENS, math.ceil(size * _TRANSCRIPT_SHARE)))
    return min(size, max(ABSTRACT_TOKENS, size * 9 // 20))


def worth(size_tokens: int, modality: Modality, level: CompressionLevel) -> float:
    """What a page is worth at a level (0 to 2); a text of one token is worth 1."""
    kept = _KEPT.get(modality)
    if kept is not None:
        words = _MEDIUM_WORTH.get(modality, size_tokens * _TRANSCRIPT_SHARE)
        return float(words**_SIZE_EXPONENT) * kept[level]
    whole = float(size_tokens**_SIZE_EXPONENT)
    if level is CompressionLevel.FULL or size_tokens <= 0:
        return whole
    share = _shown(size_tokens, modality, level) / size_tokens
    return whole * float(share**_TEXT_EXPONENT)


# -- the choice


@dataclass(slots=True)
class _Row:
    """A candidate. `steps`: (value per token, tokens, level) up its convex hull, each step's tokens
    on top of the one before; `taken` of them."""

    group: Group
    entries: list[PageTableEntry]
    score: float
    first: bool  # placed before all others
    steps: list[tuple[float, int, CompressionLevel]] = field(default_factory=list)
    taken: int = 0

    @property
    def is_line(self) -> bool:
        """It may become a context line; other texts are found when they are asked for."""
        return self.first or self.group.first < 0 or any(e.modality in _KEPT for e in self.entries)

    def option(self, level: CompressionLevel) -> tuple[int, float]:
        """(tokens, value) of all pages at a level."""
        entries = self.entries
        tokens = sum(price(e.size_tokens, e.modality, level) for e in entries)
        value = sum(worth(e.size_tokens, e.modality, level) for e in entries)
        return max(1, tokens), self.score * value


def _row(
    table: PageTable, group: Group, policy: EvictionPolicy, turn: int, is_pinned: IsPinned | None
) -> _Row:
    entries = [entry for page in group.pages if (entry := table.lookup(page))]
    score = max((policy.score(entry, turn) for entry in entries), default=0.0)
    first = score == math.inf or any(
        is_protected(e, turn) or (is_pinned is not None and is_pinned(e, turn)) for e in entries
    )
    return _Row(group, entries, 1.0 if first else score, first)


def _context(rows: Iterable[_Row], budget_tokens: int) -> list[tuple[Group, CompressionLevel]]:
    """Pinned groups within their share, then all others, then what the pinned ones still want."""
    first: list[_Row] = []
    others: list[_Row] = []
    for row in rows:
        (first if row.first else others).append(row)
    first, others = first[-_CANDIDATES:], others[-_CANDIDATES:]
    for row in (*first, *others):
        row.steps = _hull([(level, *row.option(level)) for level in _LEVELS])
    one_line = min((row.steps[0][1] for row in first if row.steps), default=0)
    share = min(budget_tokens, max(one_line, int(budget_tokens * _FIRST_SHARE)))
    left = budget_tokens - share + _take(first, share)
    left = _take(others, left)
    _take(first, left)
    return [(r.group, r.steps[r.taken - 1][2]) for r in (*first, *others) if r.taken]


def _hull(
    options: Sequence[tuple[CompressionLevel, int, float]],
) -> list[tuple[float, int, CompressionLevel]]:
    """Upgrade steps of falling value per token from (level, tokens, value), tokens not falling."""
    corners: list[tuple[CompressionLevel | None, int, float]] = [(None, 0, 0.0)]
    for level, tokens, value in options:
        if tokens <= corners[-1][1]:
            corners.pop()  # it costs no more and says no less
        if value <= corners[-1][2]:
            continue
        while len(corners) > 1:
            _, before, low = corners[-2]
            _, middle, between = corners[-1]
            if (between - low) * (tokens - before) > (value - low) * (middle - before):
                break
            corners.pop()
        corners.append((level, tokens, value))
    return [
        ((after[2] - before[2]) / (after[1] - before[1]), after[1] - before[1], after[0])
        for before, after in pairwise(corners)
        if after[0] is not None
    ]


def _take(rows: Sequence[_Row], left: int) -> int:
    """Take the steps that fit, the most value per token first; returns the tokens left."""
    steps = sorted(
        (-row.steps[at][0], -row.group.first, at, row.steps[at][1], index)
        for index, row in enumerate(rows)
        for at in range(row.taken, len(row.steps))
    )
    for _, _, at, tokens, index in steps:
        if tokens <= left and rows[index].taken == at:  # no step without the one below it
            rows[index].taken += 1
            left -= tokens
    return left


def changed(
    table: PageTable, page_id: str, level: CompressionLevel | None, as_line: bool, turn: int
) -> list[PageMutation]:
    """What brings a page to a level in the window, in its own role or as a line, or out of it (None)."""
    entry = table.lookup(page_id)
    if entry is None:
        return []
    if level is None:
        if entry.tier is not StorageTier.L0:
            return []
        return [PageMutation(MutationType.EVICT, page_id, turn, tier=StorageTier.L2)]
    tokens = price(entry.size_tokens, entry.modality, level) if as_line else entry.size_tokens
    if entry.tier is not StorageTier.L0:
        return [PageMutation(MutationType.MAP, page_id, turn, level, StorageTier.L0, tokens)]
    if entry.level is not level:
        return [PageMutation(MutationType.COMPRESS, page_id, turn, level, tokens=tokens)]
    return []
