"""Plans an epoch: which pages stay in the window, where, and at which level. Pure.

Promises: the same table, budget, policy and turn give the same plan; applying a plan and planning
again yields no mutation; what the plan keeps fits the budget, but for the mandatory newest groups;
a group (a tool call and its results) stays, is mapped and leaves as a whole (invariant 8); pages are
compressed before they are evicted, and nothing but their place and level changes (invariant 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proxy.memory.compressor import ABSTRACT_TOKENS
from proxy.memory.eviction_policy import EvictionPolicy
from proxy.memory.models import CompressionLevel, MutationType, PageMutation, StorageTier
from proxy.memory.page_table import PageTable

# Context lines are tried at these levels; a reference (level 3) is what the manifest already has.
_LEVELS = (CompressionLevel.ABSTRACT, CompressionLevel.REDUCED, CompressionLevel.FULL)
_LINE_TOKENS = 14  # prefix, page id and quotes of a line

_MISSES = 8  # after so many groups that did not fit the rest is not tried: there may be thousands


@dataclass(frozen=True, slots=True)
class Group:
    """Messages that go together: positions first..last-1 along the path.

    `tokens` is their cost as native messages; `mandatory` groups stay native whatever they cost;
    `answer`: it is a plain answer, which says little without the question before it.
    """

    first: int
    last: int
    tokens: int
    pages: tuple[str, ...]
    mandatory: bool = False
    answer: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens for native messages and for <VM:CONTEXT> lines."""

    native_tokens: int
    context_tokens: int


@dataclass(slots=True)
class Plan:
    """What stays native (in path order), what becomes a context line, and the change of the table."""

    native: list[Group] = field(default_factory=list)
    context: list[tuple[Group, CompressionLevel]] = field(default_factory=list)
    mutations: list[PageMutation] = field(default_factory=list)


def plan(
    table: PageTable, groups: Sequence[Group], budget: Budget, policy: EvictionPolicy, turn: int
) -> Plan:
    """Rebuild the window: `groups` are all groups with a page in L0, in path order.

    The newest groups stay native as long as they fit, without a gap but for mandatory ones; of the
    others the most valuable become context lines at the highest resolution that fits; the rest is
    evicted to L2.
    """
    native = _native(groups, budget.native_tokens)
    kept = {group.first for group in native}
    others = [group for group in groups if group.first not in kept]
    context = _context(table, others, budget, policy, turn)
    result = Plan(native, sorted(context, key=lambda item: item[0].first))
    levels = {group.first: CompressionLevel.FULL for group in native}
    levels.update((group.first, level) for group, level in context)
    for group in groups:
        level = levels.get(group.first)
        cost = None  # a native page costs its size
        if level is not None and group.first not in kept:
            cost = _price(table, group, level) // len(group.pages)
        for page_id in group.pages:
            result.mutations.extend(_change(table, page_id, level, cost, turn))
    return result


def _native(groups: Sequence[Group], budget_tokens: int) -> list[Group]:
    left = budget_tokens - sum(group.tokens for group in groups if group.mandatory)
    native: list[Group] = []
    edge = groups[-1].last if groups else 0  # where the run of newest messages begins so far
    for group in reversed(groups):
        if not group.mandatory:
            if group.last != edge or group.tokens > left:
                continue
            left -= group.tokens
        if group.last == edge:
            edge = group.first
        native.append(group)
    native.reverse()
    if len(native) > 1 and native[0].answer and not native[0].mandatory:
        del native[0]  # the window begins with a question, as some providers demand
    return native


def _context(
    table: PageTable, groups: Sequence[Group], budget: Budget, policy: EvictionPolicy, turn: int
) -> list[tuple[Group, CompressionLevel]]:
    """Key points of as many groups as fit, the best first; then the best at a higher resolution."""

    def value(group: Group) -> float:
        entries = [entry for page in group.pages if (entry := table.lookup(page))]
        return max((policy.score(entry, turn) for entry in entries), default=0.0)

    ranked = sorted(groups, key=lambda group: (-value(group), -group.first))
    left = budget.context_tokens
    chosen: dict[int, tuple[Group, CompressionLevel, int]] = {}
    for level in _LEVELS:
        misses = 0
        for group in ranked:
            if misses == _MISSES or left <= 0:
                break
            known = chosen.get(group.first)
            if known is None and level is not _LEVELS[0]:
                continue
            cost = _price(table, group, level)
            extra = cost - (known[2] if known else 0)
            if extra <= left:
                left -= extra
                chosen[group.first] = group, level, cost
            else:
                misses += 1
    return [(group, level) for group, level, _ in chosen.values()]


def _price(table: PageTable, group: Group, level: CompressionLevel) -> int:
    """What the group's lines cost at a level, from the pages' sizes alone: texts are compressed only
    once they are chosen. On the high side; the window that comes of it is counted exactly."""
    total = 0
    for page_id in group.pages:
        entry = table.lookup(page_id)
        size = entry.size_tokens if entry else 0
        if level is CompressionLevel.ABSTRACT:
            size = min(size, ABSTRACT_TOKENS)
        elif level is CompressionLevel.REDUCED:
            size = min(size, max(ABSTRACT_TOKENS, size * 9 // 20))
        else:
            size += size // 10  # JSON quoting
        total += size + _LINE_TOKENS
    return total


def _change(
    table: PageTable, page_id: str, level: CompressionLevel | None, cost: int | None, turn: int
) -> list[PageMutation]:
    entry = table.lookup(page_id)
    if entry is None:
        return []
    if level is None:
        if entry.tier is not StorageTier.L0:
            return []
        return [PageMutation(MutationType.EVICT, page_id, turn, tier=StorageTier.L2)]
    if entry.tier is not StorageTier.L0:
        return [PageMutation(MutationType.MAP, page_id, turn, level, StorageTier.L0, cost)]
    if entry.level is not level:
        tokens = entry.size_tokens if cost is None else cost
        return [PageMutation(MutationType.COMPRESS, page_id, turn, level, tokens=tokens)]
    return []
