"""The plan of an epoch: what stays, where, at which level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory import (
    CompressionLevel,
    ImportanceWeightedLRU,
    MutationType,
    PageMutation,
    PageTable,
    StorageTier,
    planner,
)
from proxy.memory.ids import make_page_id, media_page_id
from proxy.memory.models import Modality, PageTableEntry, PageType
from proxy.memory.planner import Budget, Group, Plan, plan, price, worth
from tests.examples import examples
from tests.memory.doors import evict, map_in, register_id

many = examples(30)
POLICY = ImportanceWeightedLRU()


class Case:
    """A table and the groups of its resident pages."""

    def __init__(
        self, sizes: list[tuple[int, int]], levels: list[int], mandatory: list[bool]
    ) -> None:
        self.table = PageTable()
        self.shape: list[tuple[int, int, int, bool]] = []
        position = 0
        for i, (length, tokens) in enumerate(sizes):
            for p in range(position, position + length):
                register_id(self.table, make_page_id(p), tokens, p, tier=StorageTier.L0)
                level = levels[i % len(levels)] if levels else 0
                if level == 4:
                    evict(self.table, make_page_id(p), p)
                elif level:
                    map_in(self.table, make_page_id(p), p, CompressionLevel(level))
            is_mandatory = i == len(sizes) - 1 or (i < len(mandatory) and mandatory[i])
            self.shape.append((position, position + length, tokens * length, is_mandatory))
            position += length

    def groups(self) -> list[Group]:
        """The groups with a page in L0: what a caller hands in."""
        resident = {entry.position for entry in self.table.resident()}
        return [
            Group(a, b, tokens, tuple(make_page_id(p) for p in range(a, b)), must, a % 3 == 1)
            for a, b, tokens, must in self.shape
            if must or resident & set(range(a, b))
        ]

    def plan(self, native: int, context: int) -> Plan:
        return plan(self.table, self.groups(), Budget(native, context), POLICY, 99)


cases = st.builds(
    Case,
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 200)), min_size=1, max_size=12),
    st.lists(st.integers(0, 4), max_size=5),
    st.lists(st.sampled_from([False, False, False, True]), max_size=6),
)
budgets = st.integers(-50, 1500)


@many
@given(cases, budgets, st.integers(0, 600))
def test_invariant_03_what_is_kept_fits(case: Case, native: int, context: int) -> None:
    result = case.plan(native, context)
    must = sum(g.tokens for g in result.native if g.mandatory)
    as_messages = sum(g.tokens for g in result.native)
    assert as_messages <= max(native, must)
    case.table.replay(result.mutations)
    lines = [case.table.lookup(page) for g, _ in result.context for page in g.pages]
    shown = sum(price(e.size_tokens, e.modality, e.level) for e in lines if e)
    assert shown <= context + max(0, native - as_messages)
    assert len({e.page_id for e in lines if e}) == len(lines)


@many
@given(cases, budgets, st.integers(0, 600))
def test_native_groups_are_the_newest_without_a_gap_but_for_mandatory_ones(
    case: Case, native: int, context: int
) -> None:
    groups, result = case.groups(), case.plan(native, context)
    assert [g for g in groups if g.mandatory and g not in result.native] == []
    assert result.native == sorted(result.native, key=lambda g: g.first)
    edge = groups[-1].last
    for group in reversed(result.native):
        assert group.mandatory or group.last == edge
        if group.last == edge:
            edge = group.first


@many
@given(cases, budgets, st.integers(0, 600))
def test_invariant_08_a_group_stays_and_leaves_as_a_whole(
    case: Case, native: int, context: int
) -> None:
    case.table.replay(case.plan(native, context).mutations)
    for group in case.groups():
        entries = [case.table.lookup(page) for page in group.pages]
        assert len({(e.tier, e.level) for e in entries if e}) == 1


@many
@given(cases, budgets, st.integers(0, 600))
def test_invariant_07_replanning_yields_nothing(case: Case, native: int, context: int) -> None:
    first = case.plan(native, context)
    assert case.plan(native, context) == first
    case.table.replay(first.mutations)
    again = case.plan(native, context)
    assert again.mutations == []
    assert (again.native, again.context) == (first.native, first.context)


@many
@given(cases, budgets, st.integers(0, 600))
def test_the_table_says_what_the_plan_says(case: Case, native: int, context: int) -> None:
    result = case.plan(native, context)
    case.table.replay(result.mutations)
    levels = {g.first: CompressionLevel.FULL for g in result.native}
    levels |= {g.first: level for g, level in result.context}
    resident = {e.page_id: e.level for e in case.table.resident()}
    kept = [*result.native, *(g for g, _ in result.context)]
    assert resident == {page: levels[g.first] for g in kept for page in g.pages}


def test_pinned_pages_are_the_last_to_leave() -> None:
    case = Case([(1, 100)] * 8, [], [])
    case.table.apply(PageMutation(MutationType.PIN, make_page_id(1), 1))
    result = case.plan(100, 70)
    assert [g.first for g, _ in result.context] == [1]


def _all(entry: PageTableEntry, turn: int) -> bool:
    return True


class Lines:
    """Groups that can only become context lines: (size, modality) of their pages."""

    def __init__(self, *pages: list[tuple[int, Modality]]) -> None:
        self.table = PageTable()
        self.groups: list[Group] = []
        for n, own in enumerate(pages):
            ids = [make_page_id(n)] + [media_page_id(n, k, "img") for k in range(1, len(own))]
            for i, (size, modality) in zip(ids, own, strict=True):
                register_id(self.table, i, size, 1, modality, StorageTier.L0)
            self.groups.append(Group(n, n + 1, 1 << 40, tuple(ids)))

    def levels(self, context: int, pinned: Callable[[PageTableEntry, int], bool] = _all) -> dict[int, int]:
        """Group -> level of what is kept."""
        made = plan(self.table, self.groups, Budget(0, context), POLICY, 50, pinned)
        return {group.first: int(level) for group, level in made.context}


@many
@given(st.integers(0, 20_000), st.sampled_from(Modality))
def test_a_higher_level_is_shorter_and_keeps_less(size: int, modality: Modality) -> None:
    levels = [CompressionLevel(level) for level in range(3)]
    prices = [price(size, modality, level) for level in levels]
    kept = [worth(size, modality, level) for level in levels]
    assert prices == sorted(prices, reverse=True) and kept == sorted(kept, reverse=True)
    assert prices[0] >= size and prices[2] <= 66 and kept[2] >= 0


def test_pages_are_compressed_before_they_are_evicted() -> None:
    texts = Lines(*[[(400, Modality.TEXT)]] * 6)
    assert texts.levels(10_000) == dict.fromkeys(range(6), 0)
    some = texts.levels(6 * 210)
    assert set(some) == set(range(6)) and set(some.values()) <= {0, 1, 2} and max(some.values()) > 0
    assert texts.levels(6 * 66) == dict.fromkeys(range(6), 2)
    assert len(texts.levels(140)) == 2 and texts.levels(0) == {}


def test_a_picture_becomes_a_thumbnail_before_talk_is_dropped() -> None:
    both = Lines([(12, Modality.TEXT), (765, Modality.IMAGE)], [(60, Modality.TEXT)])
    assert both.levels(1000) == {0: 0, 1: 0}
    assert both.levels(300) == {0: 1, 1: 0}
    assert both.levels(100)[1] == 0


def test_a_long_recording_becomes_its_transcript_and_then_its_summary() -> None:
    sound = Lines([(2000, Modality.AUDIO)])
    assert [sound.levels(room) for room in (2100, 800, 80, 50)] == [{0: 0}, {0: 1}, {0: 2}, {}]


def test_more_room_never_keeps_less_worth() -> None:
    mixed = Lines(*[[(30 * n, kind)] for n, kind in enumerate([*Modality] * 4, 1)])
    size = {g.first: mixed.table.lookup(g.pages[0]) for g in mixed.groups}
    before = 0.0
    for room in range(0, 6000, 500):
        total = sum(
            worth(e.size_tokens, e.modality, CompressionLevel(level))
            for first, level in mixed.levels(room).items()
            if (e := size[first]) is not None
        )
        assert total >= before
        before = total


def test_pins_come_first_but_cannot_crowd_out_everything() -> None:
    texts = Lines(*[[(300, Modality.TEXT)]] * 39, [(300, Modality.AUDIO)])
    texts.table.apply(PageMutation(MutationType.ACCESS, make_page_id(39), 50))  # worth most by itself

    def pinned(entry: PageTableEntry, turn: int) -> bool:
        return entry.position < 39

    assert texts.levels(70, lambda entry, turn: entry.position == 3) == {3: 2}
    kept = texts.levels(1000, pinned)
    assert 39 in kept and len(kept) > 8


def test_a_text_is_a_line_only_where_somebody_wants_it() -> None:
    mixed = Lines([(300, Modality.TEXT)], [(300, Modality.STRUCTURED)], [(765, Modality.IMAGE)], [(9, Modality.TEXT)])
    mixed.table.apply(PageMutation(MutationType.FAULT_IN, make_page_id(3), 50, tokens=9))
    assert set(mixed.levels(2000, lambda entry, turn: False)) == {2, 3}


def test_invariant_10_few_of_thousands_of_groups_are_tried_at_every_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = Lines(*[[(100, Modality.IMAGE)]] * 3000)
    hulls: list[object] = []
    build = planner._hull
    monkeypatch.setattr(planner, "_hull", lambda options: hulls.append(options) or build(options))  # type: ignore[func-returns-value]
    kept = lines.levels(300, lambda entry, turn: False)
    assert 0 < len(hulls) <= planner._CANDIDATES and min(kept) >= 3000 - planner._CANDIDATES


def test_derived_pages_compete_as_lines_and_are_never_native() -> None:
    table = PageTable()
    table.apply(
        PageMutation(
            MutationType.CREATE, "claim_0001", 1, tier=StorageTier.L0, tokens=20,
            page_type=PageType.CLAIM,
        )
    )  # fmt: skip
    register_id(table, make_page_id(0), 20, 1, tier=StorageTier.L0)
    groups = [Group(-1, -1, 1 << 40, ("claim_0001",)), Group(0, 1, 20, (make_page_id(0),), True)]
    made = plan(table, groups, Budget(1000, 100), POLICY, 2)
    assert made.native == groups[1:] and made.context == [(groups[0], CompressionLevel.FULL)]
    alone = plan(table, groups[:1], Budget(1 << 30, 0), POLICY, 2)
    assert alone.native == []


def test_the_window_does_not_begin_with_an_answer_without_its_question() -> None:
    table = PageTable()
    groups = []
    for n in range(4):
        register_id(table, make_page_id(n), 100, 1, tier=StorageTier.L0)
        groups.append(Group(n, n + 1, 100, (make_page_id(n),), n == 3, answer=n == 1))
    made = plan(table, groups, Budget(300, 0), POLICY, 2)  # room for the last three
    assert [group.first for group in made.native] == [2, 3]


def test_what_is_fresh_stays_beyond_the_budget_of_what_is_old() -> None:
    table, tokens = PageTable(), [40, 60, 100, 100, 10]
    groups = [
        Group(n, n + 1, size, (), mandatory=n == 4, fresh=n if n > 1 else -1) for n, size in enumerate(tokens)
    ]

    def native(budget: int, fresh: int) -> list[int]:
        return [g.first for g in plan(table, groups, Budget(budget, 0, fresh), POLICY, 2).native]

    assert native(270, 300) == [1, 2, 3, 4]
    assert native(60, 300) == [2, 3, 4]  # all of it, and nothing that is older
    assert native(60, 200) == [3, 4]  # too much of it: down to the budget, which ends in a message that stays whole
    assert native(60, 100) == [4] and native(10, 200) == [4]
