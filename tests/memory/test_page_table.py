import pytest
from hypothesis import given, settings

from proxy.memory import (
    CompressionLevel,
    MemoryPage,
    Modality,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    StorageTier,
)
from proxy.memory.eviction import EVICTION_COOLDOWN_TURNS
from proxy.memory.page_table import DEFAULT_IMPORTANCE
from proxy.memory.pages import page_id
from tests.memory.strategies import histories


def test_register_as_in_the_seeds() -> None:
    table = PageTable()
    entry = table.register(
        MemoryPage(page_id="msg_0001", content="hello", storage_tier=StorageTier.L0, pinned=True)
    )
    assert (entry.page_id, entry.tier, entry.pinned, entry.position) == (
        "msg_0001",
        StorageTier.L0,
        True,
        0,
    )
    assert table.lookup("msg_0001") is entry
    assert table.lookup("msg_0002") is None


def test_update_location_moves_between_tiers_and_back() -> None:
    table = PageTable()
    table.register(MemoryPage(page_id="msg_0001", content="x" * 40, storage_tier=StorageTier.L0))
    table.update_location("msg_0001", tier=StorageTier.L2, artifact_id="a1", turn=3)
    entry = table.get_by_tier(StorageTier.L2)[0]
    assert (entry.artifact_id, entry.evicted_turn, entry.l0_tokens) == ("a1", 3, 0)
    assert table.resident() == []
    table.update_location("msg_0001", tier=StorageTier.L0)
    assert table.resident()[0].l0_tokens == 10
    table.update_location("msg_0001", tier=StorageTier.L3)
    table.update_location("msg_0001", tier=StorageTier.L4)
    assert table.get_stats().pages_by_tier == {StorageTier.L4: 1}


def test_registering_a_known_page_keeps_its_history() -> None:
    table = PageTable()
    page = MemoryPage(page_id="msg_0001", content="x", storage_tier=StorageTier.L0)
    table.register(page)
    table.evict("msg_0001", turn=2)
    table.fault_in("msg_0001", turn=3)
    again = table.register(page, turn=4)
    assert (again.fault_count, len(table)) == (1, 1)


def test_resident_is_in_conversation_order_with_levels() -> None:
    table = PageTable()
    for position in (2, 0, 1):
        table.register_id(page_id(position), 100, turn=1)
    table.register_id(page_id(0, 2), 100, turn=1)
    table.map(page_id(2), 2, CompressionLevel.FULL)
    table.map(page_id(0, 2), 2, CompressionLevel.ABSTRACT, tokens=20)
    table.map(page_id(0), 2, CompressionLevel.FULL)
    assert [(e.page_id, int(e.level)) for e in table.resident()] == [
        ("msg_0001", 0),
        ("msg_0001.2", 2),
        ("msg_0003", 0),
    ]
    assert table.get_stats().l0_tokens == 220


def test_a_refault_within_the_cooldown_raises_importance_and_a_later_one_does_not() -> None:
    table = PageTable()
    for name in ("msg_0001", "msg_0002"):
        table.register_id(name, 10, turn=1, tier=StorageTier.L0)
        table.evict(name, turn=2)
    soon = table.fault_in("msg_0001", turn=2 + EVICTION_COOLDOWN_TURNS)
    late = table.fault_in("msg_0002", turn=3 + EVICTION_COOLDOWN_TURNS)
    assert (soon.refault_count, late.refault_count) == (1, 0)
    assert soon.importance > DEFAULT_IMPORTANCE == late.importance


def test_errors_change_nothing() -> None:
    log = MutationLogLite()
    table = PageTable(log.append)
    table.register_id("msg_0001", 10, turn=1)
    bad = [
        PageMutation(MutationType.CREATE, "msg_0001", 2),
        PageMutation(MutationType.EVICT, "msg_0001", 2, tier=StorageTier.L0),
        PageMutation(MutationType.COMPRESS, "msg_0001", 2),
        PageMutation(MutationType.UPDATE, "msg_0001", 2, tier=StorageTier.L0),
    ]
    for mutation in bad:
        with pytest.raises(ValueError, match=r"."):
            table.apply(mutation)
    with pytest.raises(KeyError):
        table.evict("msg_0002", turn=2)
    assert (table.turn, len(log)) == (1, 1)
    assert log.replay() == table


@settings(max_examples=50, deadline=None)
@given(histories())
def test_invariant_07_the_table_is_a_fold_of_its_log(history: list[PageMutation]) -> None:
    log = MutationLogLite()
    table = PageTable(log.append).replay(history)
    assert list(log.entries) == history
    assert PageTable().replay(log.entries) == table
    assert log.replay() == table
    stats = table.get_stats()
    assert stats.total_pages == len(table) == sum(stats.pages_by_tier.values())
    for tier in StorageTier:
        assert all(entry.tier is tier for entry in table.get_by_tier(tier))
    assert all(e.l0_tokens == 0 for e in table if e.tier is not StorageTier.L0)


def test_the_fast_path_registers_what_the_model_path_does() -> None:
    fast, slow = PageTable(), PageTable()
    fast.register_id("msg_0007.3", 12, turn=4, modality=Modality.STRUCTURED)
    slow.register(
        MemoryPage(
            page_id="msg_0007.3",
            modality=Modality.STRUCTURED,
            size_tokens=12,
            storage_tier=StorageTier.L2,
        ),
        turn=4,
    )
    assert fast == slow
