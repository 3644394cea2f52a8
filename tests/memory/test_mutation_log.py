import json

import pytest
from hypothesis import given, settings

from proxy.memory import (
    Actor,
    CompressionLevel,
    FaultReason,
    Modality,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    PageType,
    StorageTier,
)
from proxy.memory import mutation_log as module
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
        module._OPS: MutationType,
        module._TIERS: StorageTier,
        module._ACTORS: Actor,
        module._REASONS: FaultReason,
        module._MODALITIES: Modality,
        module._PAGE_TYPES: PageType,
    }
    for codes, members in tables.items():
        assert set(codes) == set(members)


@pytest.mark.parametrize(
    "row", [(), (0, "p"), (99, "p", 1), (-1, "p", 1), (0, "p", 1, 7), ("x", "p", 1), (0,) * 20]
)
def test_a_damaged_record_is_an_error(row: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"mutation record|CompressionLevel"):
        decode([row])
