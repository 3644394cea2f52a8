"""Capacity, watermarks, and the seeds' WorkingSetManager: a view of a page table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxy.memory import (
    LRU,
    CompressionLevel,
    MemoryPage,
    MutationLogLite,
    PageTable,
    PageType,
    PinnedSet,
    StorageTier,
    TLBWithPageTable,
)
from proxy.memory.ids import make_page_id
from proxy.memory.working_set import (
    TokenBudget,
    WorkingSetConfig,
    WorkingSetManager,
    rebuild_target,
    watermarks,
)
from tests.memory.doors import fault_in, register_id


@given(st.integers(-10_000, 10_000_000), st.floats(0.01, 1), st.floats(0.01, 1))
def test_invariant_03_watermarks_stay_within_the_room(room: int, a: float, b: float) -> None:
    config = WorkingSetConfig(eviction_threshold=max(a, b), target_utilization=min(a, b))
    high, low = watermarks(room, config)
    assert 0 <= low <= high <= max(0, room)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 10**6), st.floats(0, 10**6), st.floats(0, 1))
def test_the_faster_a_window_fills_the_deeper_it_is_rebuilt(
    low: int, above: int, slow: float, fast: float, price: float
) -> None:
    slow, fast = sorted((slow, fast))
    deeper, target = (rebuild_target(low, low + above, growth, price) for growth in (fast, slow))
    assert low // 4 - 1 <= deeper <= target <= low
    assert rebuild_target(low, low + above, fast, 1.0) == low  # nothing is cached that could be lost


def test_a_chat_in_a_large_window_is_rebuilt_as_configured_and_an_agent_in_a_small_one_is_not() -> None:
    assert rebuild_target(14_000, 25_000, 1_200, 0.1) == 14_000
    assert rebuild_target(2_000, 3_600, 2_000, 0.1) <= 1_400


def test_defaults_are_the_designs() -> None:
    assert watermarks(1000, WorkingSetConfig()) == (900, 500)


@pytest.mark.parametrize(
    "values",
    [
        {"eviction_threshold": 0.4, "target_utilization": 0.5},
        {"max_l0_tokens": 0},
        {"max_l1_pages": -1},
        {"eviction_threshold": 1.1},
        {"unknown": 1},
    ],
)
def test_bad_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        WorkingSetConfig.model_validate(values)


def test_a_budget_counts() -> None:
    budget = TokenBudget(total_limit=1_000, reserved=400, used=150)
    assert (budget.available, budget.utilization) == (600, 0.25)
    assert budget.can_fit(450) and not budget.can_fit(451)
    over = TokenBudget(total_limit=100, reserved=400, used=5)
    assert (over.available, over.utilization) == (0, 1.0)
    assert not over.can_fit(1) and TokenBudget(total_limit=100, reserved=0).can_fit(100)


def page(number: int, tokens: int = 100, **fields: object) -> MemoryPage:
    given = {"page_id": make_page_id(number), "size_tokens": tokens, "storage_tier": StorageTier.L2}
    return MemoryPage.model_validate(given | fields)


def small(**parts: object) -> WorkingSetManager:
    config = WorkingSetConfig(max_l0_tokens=1_200, max_l1_pages=2, reserved_tokens=200)
    return WorkingSetManager(config, **parts)  # type: ignore[arg-type]


def test_as_in_the_seeds() -> None:
    work = WorkingSetManager(
        config=WorkingSetConfig(max_l0_tokens=128_000, max_l1_pages=100, reserved_tokens=4000),
        budget=TokenBudget(total_limit=128_000, reserved=4000),
    )
    assert work.add_to_l0(MemoryPage(page_id="msg_001", content="x" * 400))
    assert work.can_fit(123_900) and not work.can_fit(123_901)
    assert (work.get_l0_page_ids(), work.needs_eviction()) == (["msg_001"], False)
    work.set_importance("msg_001", importance=0.9)
    work.set_importance("system", importance=1.0)
    stats = work.get_stats()
    assert (stats.l0_pages, stats.tokens_used) == (1, 100)
    assert f"{stats.utilization:.1%}" == "0.1%"
    work.remove_from_l0("msg_001", None)
    assert (work.get_l0_page_ids(), work.budget.used) == ([], 0)


def test_it_is_a_view_of_the_table_that_it_was_given() -> None:
    log = MutationLogLite()
    combined = TLBWithPageTable(PageTable(log.append))
    work = small(table=combined.page_table)
    combined.register(page(0, storage_tier=StorageTier.L0))
    work.add_to_l0(page(0))
    assert (work.budget.used, len(work.table)) == (100, 1)
    work.add_to_l0(page(1))
    work.table.update_location(make_page_id(1), tier=StorageTier.L2, artifact_id="a1")
    assert not work.remove_from_l0(make_page_id(1), page(1))  # is out already
    assert work.get_l0_page_ids() == [make_page_id(0)]
    assert work.remove_from_l0(make_page_id(0), page(0, artifact_id="a2"))
    entry = combined.lookup(make_page_id(0))
    assert entry is not None and (entry.tier, entry.artifact_id) == (StorageTier.L2, "a2")
    assert log.replay() == combined.page_table


def test_adding_again_brings_the_page_up_to_date() -> None:
    work = small()
    work.add_to_l0(page(0))
    assert work.add_to_l0(page(0, 30, compression_level=CompressionLevel.ABSTRACT))
    entry = work.table.lookup(make_page_id(0))
    assert entry is not None
    assert (entry.level, entry.l0_tokens, entry.size_tokens) == (2, 30, 100)
    assert work.add_to_l0(page(0, 30, compression_level=CompressionLevel.ABSTRACT))
    assert (entry.access_count, work.budget.used) == (2, 30)  # each is an access
    work.remove_from_l0(make_page_id(0))
    assert work.add_to_l0(page(0, 100)) and entry.level is CompressionLevel.FULL


def test_invariant_03_what_does_not_fit_is_not_let_in() -> None:
    work = small()
    assert work.add_to_l0(page(0, 990))
    assert not work.add_to_l0(page(1, 11)) and not work.add_to_l0(page(0, 1_001))
    assert (work.budget.used, len(work.table)) == (990, 1)
    assert work.add_to_l0(page(0, 1_000)) and work.budget.used == 1_000
    assert small(budget=TokenBudget(total_limit=400, reserved=300)).can_fit(100)
    tight = small(budget=TokenBudget(total_limit=400, reserved=300, used=60))
    assert tight.can_fit(40) and not tight.can_fit(41)
    assert tight.budget.utilization == 0.6


def test_eviction_brings_it_from_above_the_high_to_the_low_watermark() -> None:
    work = small(policy=LRU())
    for number in range(9):
        register_id(work.table, make_page_id(number), 100, number + 1, tier=StorageTier.L0)
    assert not work.needs_eviction()  # 900 of 1000
    work.add_to_l0(page(9, 1))
    assert work.needs_eviction() and work.calculate_eviction_target() == 401
    order = [name for name, _ in work.get_eviction_candidates(from_tier=StorageTier.L0)]
    assert order == [make_page_id(number) for number in range(10)]
    for name in order:
        if work.calculate_eviction_target() == 0:
            break
        work.remove_from_l0(name)
    assert work.budget.used == 401 and not work.needs_eviction()
    left = work.table.lookup(make_page_id(0))
    assert left is not None and left.evicted_turn == 9


def test_what_a_rule_pins_leaves_last_and_what_somebody_pinned_never() -> None:
    work = small(pins=PinnedSet(pin_last_n_turns=2, decay_turns=100))
    work.add_to_l0(page(0, page_type=PageType.CLAIM))
    work.add_to_l0(page(1, pinned=True))
    for number in range(2, 6):
        register_id(work.table, make_page_id(number), 100, number - 1, tier=StorageTier.L0)
    work.remove_from_l0(make_page_id(2))
    fault_in(work.table, make_page_id(2), 4)
    work.pins.pin(make_page_id(4))
    order = [name for name, _ in work.get_eviction_candidates()]
    assert order == [make_page_id(number) for number in (3, 2, 5, 0)]


def test_importance_decides() -> None:
    work = small(pins=PinnedSet(pin_last_n_turns=0))
    for number in range(3):
        work.add_to_l0(page(number))
    work.set_importance(make_page_id(0), 0.9)
    work.set_importance(make_page_id(1), 0.7)
    order = [name for name, _ in work.get_eviction_candidates()]
    assert order == [make_page_id(number) for number in (2, 1, 0)]
    with pytest.raises(ValueError, match="between 0 and 1"):
        work.set_importance(make_page_id(0), 1.5)


def test_l1_is_bounded_in_pages() -> None:
    work = small()
    for number in range(4):
        work.table.register(page(number, storage_tier=StorageTier.L1))
    assert work.needs_eviction(StorageTier.L1)
    assert work.calculate_eviction_target(StorageTier.L1) == 2
    assert len(work.get_eviction_candidates(StorageTier.L1)) == 4
    assert work.calculate_eviction_target(StorageTier.L2) == 0
