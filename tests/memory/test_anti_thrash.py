import pytest

from proxy.memory import PageTable, StorageTier
from proxy.memory.anti_thrash import MAX_RECORDED_PAGES, AntiThrashPolicy
from tests.memory.doors import evict, fault_in, register_id


def test_views_of_an_entry() -> None:
    policy = AntiThrashPolicy(eviction_cooldown_turns=3, fault_protection_turns=2)
    assert policy == AntiThrashPolicy()
    table = PageTable()
    entry = register_id(table, "msg_0001", 10, turn=1, tier=StorageTier.L0)
    assert not policy.protected(entry, 1) and not policy.cooling(entry, 1)
    evict(table, "msg_0001", turn=4)
    assert [policy.cooling(entry, turn) for turn in (4, 7, 8)] == [True, True, False]
    assert [policy.is_refault(entry, turn) for turn in (7, 8)] == [True, False]
    fault_in(table, "msg_0001", turn=7)
    assert not policy.cooling(entry, 7) and not policy.is_refault(entry, 7)
    assert [policy.can_evict(entry, turn) for turn in (7, 8, 9)] == [False, False, True]


def test_the_table_counts_the_refaults_that_the_policy_sees() -> None:
    policy = AntiThrashPolicy()
    table = PageTable()
    entry = register_id(table, "msg_0001", 10, turn=0, tier=StorageTier.L0)
    turn = 0
    for pause in range(7):
        evict(table, "msg_0001", turn)
        turn += pause
        expected = entry.refault_count + policy.is_refault(entry, turn)
        fault_in(table, "msg_0001", turn)
        assert entry.refault_count == expected
    assert entry.refault_count == 4 and 0.5 < entry.importance <= 1.0


def test_without_a_table_it_remembers_what_it_was_told() -> None:
    policy = AntiThrashPolicy(eviction_cooldown_turns=3, fault_protection_turns=2)
    assert policy.can_evict("a", 1) and not policy.is_refault("a", 1)
    policy.record_eviction("a", 1)
    assert policy.is_refault("a", 4) and not policy.is_refault("a", 5)
    policy.record_fault("a", 4)
    assert not policy.can_evict("a", 5) and policy.can_evict("a", 6)
    assert not policy.is_refault("a", 4)


def test_invariant_10_its_record_is_bounded() -> None:
    policy = AntiThrashPolicy()
    for number in range(MAX_RECORDED_PAGES + 10):
        policy.record_fault(f"p{number}", 5)
    assert policy.can_evict("p0", 5) and not policy.can_evict(f"p{number}", 5)
    assert len(policy._faulted) == MAX_RECORDED_PAGES


def test_negative_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        AntiThrashPolicy(eviction_cooldown_turns=-1)
    with pytest.raises(ValueError, match="at least 0"):
        AntiThrashPolicy(fault_protection_turns=-1)
