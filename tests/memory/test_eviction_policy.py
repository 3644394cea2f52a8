"""One contract for every policy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory import (
    LRU,
    EvictionPolicy,
    ImportanceWeightedLRU,
    Modality,
    ModalityAwareLRU,
    MutationType,
    PageMutation,
    PageTable,
    PageTableEntry,
    PageType,
    StorageTier,
)
from proxy.memory.anti_thrash import FAULT_PROTECTION_TURNS
from proxy.memory.eviction_policy import eviction_order
from proxy.memory.models import PinKind
from proxy.memory.pins import PIN_DECAY_TURNS
from tests.memory.doors import fault_in, pin, register_id

POLICIES: list[EvictionPolicy] = [LRU(), ImportanceWeightedLRU(), ModalityAwareLRU()]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)


def entry(
    last_turn: int = 0,
    importance: float = 0.5,
    modality: Modality = Modality.TEXT,
    page_type: PageType = PageType.TRANSCRIPT,
    page: str = "msg_0001",
) -> PageTableEntry:
    table = PageTable()
    table.apply(
        PageMutation(
            MutationType.CREATE,
            page,
            last_turn,
            tier=StorageTier.L0,
            importance=importance,
            modality=modality,
            page_type=page_type,
        )
    )
    (made,) = table
    return made


@every_policy
@given(
    turn=st.integers(0, 10_000),
    first=st.integers(0, 10_000),
    later=st.integers(0, 10_000),
    low=st.floats(0, 1),
    more=st.floats(0, 1),
    modality=st.sampled_from(Modality),
    kind=st.sampled_from(PageType),
)
def test_more_recent_and_more_important_never_score_lower(
    policy: EvictionPolicy,
    turn: int,
    first: int,
    later: int,
    low: float,
    more: float,
    modality: Modality,
    kind: PageType,
) -> None:
    old = policy.score(entry(first, low, modality, kind), turn)
    assert math.isfinite(old)
    assert old == policy.score(entry(first, low, modality, kind), turn)
    assert policy.score(entry(max(first, later), low, modality, kind), turn) >= old
    assert policy.score(entry(first, max(low, more), modality, kind), turn) >= old


@every_policy
def test_pinned_pages_never_leave(policy: EvictionPolicy) -> None:
    table = PageTable()
    register_id(table, "msg_0001", 10, turn=1)
    table.apply(PageMutation(MutationType.PIN, "msg_0001", 1))
    assert policy.score(next(iter(table)), 10_000) == math.inf
    assert eviction_order(table, 10_000, policy) == []


@every_policy
def test_a_guessed_pin_decays(policy: EvictionPolicy) -> None:
    table = PageTable()
    entry = register_id(table, "msg_0001", 10, turn=1)
    pin(table, "msg_0001", turn=1, kind=PinKind.INFERRED)
    assert policy.score(entry, 1 + PIN_DECAY_TURNS) == math.inf
    assert math.isfinite(policy.score(entry, 2 + PIN_DECAY_TURNS))


@every_policy
def test_a_recently_faulted_page_outlasts_every_unprotected_one(policy: EvictionPolicy) -> None:
    table = PageTable()
    register_id(table, "msg_0001", 10, turn=1)
    fault_in(table, "msg_0001", turn=50)
    faulted = table.lookup("msg_0001")
    assert faulted is not None
    best = entry(60, 1.0, Modality.TEXT, PageType.CLAIM)
    protected_until = 50 + FAULT_PROTECTION_TURNS - 1
    assert policy.score(faulted, protected_until) > policy.score(best, protected_until)
    assert policy.score(faulted, protected_until + 1) < policy.score(best, protected_until + 1)


@every_policy
def test_the_order_is_total_and_oldest_first_among_equals(policy: EvictionPolicy) -> None:
    table = PageTable()
    for number in (3, 1, 2):
        register_id(table, f"msg_{number:04d}", 10, turn=1)
    order = [e.page_id for e in eviction_order(table, 9, policy)]
    assert order == ["msg_0001", "msg_0002", "msg_0003"]


def test_importance_type_and_modality_count_where_the_name_says_so() -> None:
    turn = 20
    for policy in (ImportanceWeightedLRU(), ModalityAwareLRU()):
        plain = policy.score(entry(10), turn)
        assert policy.score(entry(10, importance=0.9), turn) > plain
        assert policy.score(entry(10, page_type=PageType.CLAIM), turn) > plain
    image = entry(10, modality=Modality.IMAGE)
    assert ModalityAwareLRU().score(image, turn) < ModalityAwareLRU().score(entry(10), turn)
    assert LRU().score(image, turn) == LRU().score(entry(10, importance=1.0), turn)
