import pytest

from proxy.memory import MutationType, PageMutation, PageTable, PageTableEntry, PageType
from proxy.memory.models import PinKind
from proxy.memory.pins import MAX_PINS, PIN_DECAY_TURNS, PinnedSet, PinReason, is_held
from tests.memory.doors import pin, unpin


def page(turn: int = 0, kind: PageType = PageType.TRANSCRIPT) -> tuple[PageTable, PageTableEntry]:
    table = PageTable()
    entry = table.apply(PageMutation(MutationType.CREATE, "msg_0001", turn, page_type=kind))
    return table, entry


def test_as_in_the_seeds() -> None:
    pinned = PinnedSet(pin_last_n_turns=3)
    pinned.pin("system_prompt")
    pinned.pin("claim_auth_decision")
    assert pinned.is_pinned("system_prompt") and not pinned.is_pinned("msg_0001")
    pinned.unpin("system_prompt")
    pinned.unpin("never pinned")
    assert (list(pinned), "system_prompt" in pinned, len(pinned)) == (
        ["claim_auth_decision"], False, 1,
    )  # fmt: skip


def test_an_explicit_pin_holds_and_an_inferred_one_decays_unless_used() -> None:
    pins = PinnedSet(decay_turns=10)
    table, entry = page()
    pin(table, "msg_0001", turn=5, kind=PinKind.INFERRED)
    assert [pins.reason(entry, turn) for turn in (15, 16)] == [PinReason.INFERRED, PinReason.NONE]
    table.apply(PageMutation(MutationType.ACCESS, "msg_0001", 20))
    assert pins.held(entry, 30) and not pins.held(entry, 31)
    pin(table, "msg_0001", turn=31)
    assert pins.reason(entry, 10_000) is PinReason.EXPLICIT
    pin(table, "msg_0001", turn=32, kind=PinKind.INFERRED)  # a guess does not weaken it
    assert pins.reason(entry, 10_000) is PinReason.EXPLICIT
    unpin(table, "msg_0001", turn=33)
    assert (entry.pin_kind, entry.pinned_turn, pins.is_pinned(entry, 33)) == (None, None, False)


def test_claims_and_the_last_turns_are_pinned_by_rule() -> None:
    pins = PinnedSet(pin_last_n_turns=3, decay_turns=10)
    _, recent = page(turn=7)
    _, claim = page(kind=PageType.CLAIM)
    assert [pins.is_pinned(recent, turn) for turn in (7, 9, 10)] == [True, True, False]
    assert [pins.reason(claim, turn) for turn in (10, 11)] == [PinReason.CLAIM, PinReason.NONE]
    assert not pins.held(recent, 7) and not pins.held(claim, 5)
    assert not PinnedSet(pin_last_n_turns=0).is_pinned(recent, 7)


def test_a_pin_by_id_counts_for_the_pages_entry() -> None:
    pins = PinnedSet()
    _, entry = page()
    pins.pin("msg_0001")
    assert pins.held(entry, 10_000) and not is_held(entry, 10_000)


def test_the_default_decay() -> None:
    table, entry = page()
    pin(table, "msg_0001", turn=0, kind=PinKind.INFERRED)
    assert is_held(entry, PIN_DECAY_TURNS) and not is_held(entry, PIN_DECAY_TURNS + 1)


def test_limits() -> None:
    pins = PinnedSet()
    for number in range(MAX_PINS):
        pins.pin(f"p{number}")
    pins.pin("p0")
    with pytest.raises(ValueError, match="can be pinned"):
        pins.pin("one more")
    for bad in ({"pin_last_n_turns": -1}, {"decay_turns": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            PinnedSet(**bad)
