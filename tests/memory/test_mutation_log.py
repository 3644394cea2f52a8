import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.memory import (
    CompressionLevel,
    FaultReason,
    Modality,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    PageType,
    StorageTier,
    codes,
    mutation_log,
)
from proxy.memory.models import Actor, PinKind
from proxy.memory.mutation_log import decode, encode
from tests.memory.strategies import histories


def test_get_context_at_turn_says_what_was_in_the_window() -> None:
    log = MutationLogLite()
    table = PageTable(log.append)
    table.register_id("msg_0001", 10, turn=1, tier=StorageTier.L0)
    table.register_id("msg_0002", 10, turn=2, tier=StorageTier.L0)
    table.evict("msg_0001", turn=3)
    table.fault_in("msg_0001", turn=5, level=CompressionLevel.REDUCED)
    contexts = [log.get_context_at_turn(turn) for turn in range(6)]
    assert contexts == [
        [],
        ["msg_0001"],
        ["msg_0001", "msg_0002"],
        ["msg_0002"],
        ["msg_0002"],
        ["msg_0001", "msg_0002"],
    ]
    assert log.get_levels_at_turn(5)[0] == ("msg_0001", CompressionLevel.REDUCED)


@settings(max_examples=50, deadline=None)
@given(histories())
def test_invariant_09_the_log_alone_gives_table_and_contexts(history: list[PageMutation]) -> None:
    """Everything in RAM can be dropped: the stored form rebuilds the same table."""
    stored = json.dumps(encode(history))
    log = MutationLogLite(decode(json.loads(stored)))
    table = PageTable().replay(history)
    assert list(log.entries) == history
    assert log.replay() == table
    assert log.get_context_at_turn(table.turn) == [e.page_id for e in table.resident()]


def test_a_context_is_right_for_media_and_derived_pages_in_the_order_of_the_conversation() -> None:
    log = MutationLogLite()
    table = PageTable(log.append)
    pages = ["claim_0002", "img_0002_1", "msg_0002", "summary_seg_01", "msg_0001.2", "msg_0001.1",
             "img_0001_2"]  # fmt: skip
    for number, page in enumerate(pages):
        table.register_id(page, 10, turn=number, tier=StorageTier.L0)
    assert log.get_context_at_turn(9) == [
        "claim_0002", "summary_seg_01", "msg_0001.1", "msg_0001.2", "img_0001_2", "msg_0002",
        "img_0002_1",
    ]  # fmt: skip
    assert log.get_context_at_turn(3) == ["claim_0002", "summary_seg_01", "msg_0002", "img_0002_1"]


@settings(max_examples=60, deadline=None)
@given(histories(max_size=80), st.integers(1, 9), st.data())
def test_invariant_07_every_turns_context_is_that_of_the_table_then(
    history: list[PageMutation], stride: int, data: st.DataObject
) -> None:
    log = MutationLogLite(history)
    log._stride = stride  # many snapshots, thinned out again and again
    last = history[-1].turn if history else 0
    for turn in data.draw(st.lists(st.integers(-1, last + 1), max_size=6)):
        then = PageTable().replay(m for m in history if m.turn <= turn)
        assert log.get_levels_at_turn(turn) == [(e.page_id, e.level) for e in then.resident()]


def test_invariant_10_snapshots_are_bounded_and_save_folding() -> None:
    log = MutationLogLite()
    for turn in range(60_000):
        page = f"msg_{turn + 1:04d}"
        log.append(PageMutation(MutationType.CREATE, page, turn, tier=StorageTier.L0))
        log.append(PageMutation(MutationType.EVICT, page, turn + 1, tier=StorageTier.L2))
    for turn in (59_999, 3, 30_000):
        assert log.get_context_at_turn(turn) == [f"msg_{turn + 1:04d}"]
    assert 8 <= len(log._snapshots) <= mutation_log.MAX_SNAPSHOTS
    assert log._stride < 8192


def test_a_log_whose_turns_go_back_is_answered_by_its_turns() -> None:
    log = MutationLogLite()
    table = PageTable(log.append)
    table.register_id("msg_0001", 10, turn=5, tier=StorageTier.L0)
    table.register_id("msg_0002", 10, turn=2, tier=StorageTier.L0)
    assert log.get_context_at_turn(2) == ["msg_0002"]
    assert log.get_context_at_turn(5) == ["msg_0001", "msg_0002"]


def test_a_log_from_before_pins_had_a_kind_is_read() -> None:
    log = MutationLogLite(decode([(0, "msg_0001", 1), (4, "msg_0001", 2)]))
    (entry,) = log.replay()
    assert (entry.pinned, entry.pin_kind) == (True, PinKind.EXPLICIT)
    kept = encode([PageMutation(MutationType.PIN, "msg_0001", 4, pin_kind=PinKind.INFERRED)])
    assert decode(kept)[0].pin_kind is PinKind.INFERRED


def test_encoded_rows_are_short() -> None:
    rows = encode(
        [
            PageMutation(MutationType.PIN, "msg_0001", 4),
            PageMutation(MutationType.EVICT, "msg_0001", 5, tier=StorageTier.L2),
        ]
    )
    assert rows == [(4, "msg_0001", 4), (2, "msg_0001", 5, None, 2)]


def test_every_enum_member_has_a_durable_code() -> None:
    tables = {
        codes.OPS: MutationType,
        codes.TIERS: StorageTier,
        codes.ACTORS: Actor,
        codes.REASONS: FaultReason,
        codes.MODALITIES: Modality,
        codes.PAGE_TYPES: PageType,
        codes.PIN_KINDS: PinKind,
    }
    for listed, members in tables.items():
        assert set(listed) == set(members)


@pytest.mark.parametrize(
    "row", [(), (0, "p"), (99, "p", 1), (-1, "p", 1), (0, "p", 1, 7), ("x", "p", 1), (0,) * 20]
)
def test_a_damaged_record_is_an_error(row: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"mutation record|CompressionLevel"):
        decode([row])
