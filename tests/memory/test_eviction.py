"""Who leaves: one contract for every policy, and the rules that stand above them."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.eviction import (
    FAULT_PROTECTION_TURNS,
    LRU,
    PIN_DECAY_TURNS,
    AntiThrashPolicy,
    EvictionPolicy,
    ImportanceWeightedLRU,
    ModalityAwareLRU,
    PinnedSet,
    PinReason,
    is_held,
)
from proxy.memory.models import (
    Modality,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageType,
    PinKind,
    StorageTier,
)
from proxy.memory.table import PageTable

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


def change(table: PageTable, op: MutationType, turn: int, **fields: Any) -> PageTableEntry:
    return table.apply(PageMutation(op, "msg_0001", turn, **fields))


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
def test_policy_more_recent_and_more_important_never_score_lower(
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
def test_policy_never_lets_a_pinned_page_go(policy: EvictionPolicy) -> None:
    table = PageTable()
    change(table, MutationType.CREATE, 1)
    change(table, MutationType.PIN, 1)
    assert policy.score(next(iter(table)), 10_000) == math.inf


@every_policy
def test_policy_lets_a_page_go_whose_guessed_pin_decayed(policy: EvictionPolicy) -> None:
    table = PageTable()
    entry = change(table, MutationType.CREATE, 1)
    change(table, MutationType.PIN, 1, pin_kind=PinKind.INFERRED)
    assert policy.score(entry, 1 + PIN_DECAY_TURNS) == math.inf
    assert math.isfinite(policy.score(entry, 2 + PIN_DECAY_TURNS))


@every_policy
def test_policy_a_recently_faulted_page_outlasts_every_unprotected_one(policy: EvictionPolicy) -> None:
    table = PageTable()
    change(table, MutationType.CREATE, 1)
    change(table, MutationType.FAULT_IN, 50)
    faulted = table.lookup("msg_0001")
    assert faulted is not None
    best = entry(60, 1.0, Modality.TEXT, PageType.CLAIM)
    protected_until = 50 + FAULT_PROTECTION_TURNS - 1
    assert policy.score(faulted, protected_until) > policy.score(best, protected_until)
    assert policy.score(faulted, protected_until + 1) < policy.score(best, protected_until + 1)


def test_policy_importance_type_and_modality_count_where_the_name_says_so() -> None:
    turn = 20
    for policy in (ImportanceWeightedLRU(), ModalityAwareLRU()):
        plain = policy.score(entry(10), turn)
        assert policy.score(entry(10, importance=0.9), turn) > plain
        assert policy.score(entry(10, page_type=PageType.CLAIM), turn) > plain
    image = entry(10, modality=Modality.IMAGE)
    assert ModalityAwareLRU().score(image, turn) < ModalityAwareLRU().score(entry(10), turn)
    assert LRU().score(image, turn) == LRU().score(entry(10, importance=1.0), turn)


def page(turn: int = 0, kind: PageType = PageType.TRANSCRIPT) -> tuple[PageTable, PageTableEntry]:
    table = PageTable()
    made = table.apply(PageMutation(MutationType.CREATE, "msg_0001", turn, page_type=kind))
    return table, made


def test_pinned_set_pins_by_id() -> None:
    pinned = PinnedSet()
    pinned.pin("system_prompt")
    pinned.pin("msg_0001")
    assert pinned.is_pinned("system_prompt") and not pinned.is_pinned("msg_0002")
    _, made = page()
    assert pinned.is_pinned(made, 10_000) and not is_held(made, 10_000)


def test_pinned_set_an_explicit_pin_holds_and_an_inferred_one_decays_unless_used() -> None:
    pins = PinnedSet(decay_turns=10)
    table, made = page()
    change(table, MutationType.PIN, 5, pin_kind=PinKind.INFERRED)
    assert [pins.reason(made, turn) for turn in (15, 16)] == [PinReason.INFERRED, PinReason.NONE]
    change(table, MutationType.ACCESS, 20)
    assert pins.is_pinned(made, 30) and not pins.is_pinned(made, 31)
    change(table, MutationType.PIN, 31)
    assert pins.reason(made, 10_000) is PinReason.EXPLICIT
    change(table, MutationType.PIN, 32, pin_kind=PinKind.INFERRED)  # a guess does not weaken it
    assert pins.reason(made, 10_000) is PinReason.EXPLICIT
    change(table, MutationType.UNPIN, 33)
    assert (made.pin_kind, made.pinned_turn, pins.is_pinned(made, 33)) == (None, None, False)


def test_pinned_set_claims_and_the_last_turns_are_pinned_by_rule() -> None:
    pins = PinnedSet(pin_last_n_turns=3, decay_turns=10)
    _, recent = page(turn=7)
    _, claim = page(kind=PageType.CLAIM)
    assert [pins.is_pinned(recent, turn) for turn in (7, 9, 10)] == [True, True, False]
    assert [pins.reason(claim, turn) for turn in (10, 11)] == [PinReason.CLAIM, PinReason.NONE]
    assert not PinnedSet(pin_last_n_turns=0).is_pinned(recent, 7)


def test_anti_thrash_protects_what_came_and_cools_what_left() -> None:
    policy = AntiThrashPolicy(eviction_cooldown_turns=3, fault_protection_turns=2)
    assert policy == AntiThrashPolicy()
    table = PageTable()
    made = change(table, MutationType.CREATE, 1, tier=StorageTier.L0)
    assert not policy.protected(made, 1) and not policy.cooling(made, 1)
    change(table, MutationType.EVICT, 4, tier=StorageTier.L2)
    assert [policy.cooling(made, turn) for turn in (4, 7, 8)] == [True, True, False]
    change(table, MutationType.FAULT_IN, 7)
    assert not policy.cooling(made, 7)
    assert [policy.protected(made, turn) for turn in (7, 8, 9)] == [True, True, False]


def test_anti_thrash_sees_the_refaults_that_the_table_counts() -> None:
    policy = AntiThrashPolicy()
    table = PageTable()
    made = change(table, MutationType.CREATE, 0, tier=StorageTier.L0)
    turn = 0
    for pause in range(7):
        change(table, MutationType.EVICT, turn, tier=StorageTier.L2)
        turn += pause
        expected = made.refault_count + policy.cooling(made, turn)
        change(table, MutationType.FAULT_IN, turn)
        assert made.refault_count == expected
    assert made.refault_count == 4 and 0.5 < made.importance <= 1.0


@pytest.mark.parametrize("make", [PinnedSet, AntiThrashPolicy])
def test_rules_take_no_negative_turns(make: type) -> None:
    for turns in ((-1, 1), (1, -1)):
        with pytest.raises(ValueError, match="at least 0"):
            make(*turns)
