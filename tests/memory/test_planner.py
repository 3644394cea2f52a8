"""The plan of an epoch: what stays, where, at which level."""

from __future__ import annotations

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
    page_id,
)
from proxy.memory.planner import Budget, Group, Plan, _price, plan
from tests.examples import examples

many = examples(100)
POLICY = ImportanceWeightedLRU()


class Case:
    """A table and the groups of its resident pages."""

    def __init__(self, sizes: list[tuple[int, int]], levels: list[int], mandatory: list[bool]) -> None:
        self.table = PageTable()
        self.shape: list[tuple[int, int, int, bool]] = []
        position = 0
        for i, (length, tokens) in enumerate(sizes):
            for p in range(position, position + length):
                self.table.register_id(page_id(p), tokens, p, tier=StorageTier.L0)
                level = levels[i % len(levels)] if levels else 0
                if level == 4:
                    self.table.evict(page_id(p), p)
                elif level:
                    self.table.map(page_id(p), p, CompressionLevel(level))
            is_mandatory = i == len(sizes) - 1 or (i < len(mandatory) and mandatory[i])
            self.shape.append((position, position + length, tokens * length, is_mandatory))
            position += length

    def groups(self) -> list[Group]:
        """The groups with a page in L0: what a caller hands in."""
        resident = {entry.position for entry in self.table.resident()}
        return [
            Group(a, b, tokens, tuple(page_id(p) for p in range(a, b)), must, a % 3 == 1)
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
    assert sum(g.tokens for g in result.native) <= max(native, must)
    case.table.replay(result.mutations)
    lines = {page for g, _ in result.context for page in g.pages}
    again = case.plan(native, context)  # the table's own account of what its lines cost
    assert again.context == result.context
    shown = [_price(case.table, g, level) for g, level in result.context]
    assert sum(shown) <= context and len(lines) == sum(len(g.pages) for g, _ in result.context)


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
def test_invariant_08_a_group_stays_and_leaves_as_a_whole(case: Case, native: int, context: int) -> None:
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
    case.table.apply(PageMutation(MutationType.PIN, page_id(1), 1))
    result = case.plan(100, 70)
    assert [g.first for g, _ in result.context] == [1]


def test_invariant_10_thousands_of_groups_are_not_all_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([(1, 100)] * 3000, [], [])
    priced = []

    def counted(table: PageTable, group: Group, level: CompressionLevel) -> int:
        priced.append(group)
        return _price(table, group, level)

    monkeypatch.setattr("proxy.memory.planner._price", counted)
    case.plan(50, 300)
    assert 0 < len(priced) < 100


def test_the_window_does_not_begin_with_an_answer_without_its_question() -> None:
    table = PageTable()
    groups = []
    for n in range(4):
        table.register_id(page_id(n), 100, 1, tier=StorageTier.L0)
        groups.append(Group(n, n + 1, 100, (page_id(n),), n == 3, answer=n == 1))
    made = plan(table, groups, Budget(300, 0), POLICY, 2)  # room for the last three
    assert [group.first for group in made.native] == [2, 3]
