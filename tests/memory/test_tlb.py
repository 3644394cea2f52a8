import pytest

from proxy.memory import (
    MemoryPage,
    MutationLogLite,
    PageTable,
    StorageTier,
)
from proxy.memory.ids import make_page_id
from proxy.memory.tlb import DEFAULT_TLB_ENTRIES, PageTLB, TLBWithPageTable
from tests.memory.doors import evict, fault_in, register_id


def filled(pages: int, tlb: PageTLB | None = None) -> TLBWithPageTable:
    table = PageTable()
    for position in range(pages):
        register_id(table, make_page_id(position), 10, 1)
    return TLBWithPageTable(table, tlb)


def test_tlb_with_page_table_as_in_the_seeds() -> None:
    table, tlb = PageTable(), PageTLB(max_entries=512)
    combined = TLBWithPageTable(table, tlb)
    page = MemoryPage(page_id="msg_001", content="hi", storage_tier=StorageTier.L0)
    assert combined.register(page) is table.lookup("msg_001")
    assert combined.lookup("msg_001") is table.lookup("msg_001")
    table.update_location("msg_001", tier=StorageTier.L2, artifact_id="a1")  # past the TLB
    entry = combined.lookup("msg_001")
    assert entry is not None and (entry.tier, entry.artifact_id) == (StorageTier.L2, "a1")
    assert TLBWithPageTable(table).tlb.get_stats().max_entries == DEFAULT_TLB_ENTRIES


def test_tlb_counts_hits_and_misses() -> None:
    combined = filled(10, PageTLB(max_entries=2))
    assert combined.tlb.get_stats().hit_rate == 0.0
    for position in (0, 0, 1, 2, 1, 0):
        assert combined.lookup(make_page_id(position)) is not None
    assert combined.lookup("msg_9999") is None
    stats = combined.tlb.get_stats()
    assert (stats.hits, stats.misses, stats.size, stats.hit_rate) == (2, 5, 2, 2 / 7)


def test_tlb_lets_the_least_recently_used_go_first() -> None:
    tlb = PageTLB(max_entries=2)
    entries = list(filled(3).page_table)
    tlb.insert(entries[0])
    tlb.insert(entries[1])
    tlb.lookup(entries[0].page_id)
    tlb.insert(entries[2])
    assert [entry.page_id in tlb for entry in entries] == [True, False, True]
    tlb.invalidate(entries[0].page_id)
    tlb.invalidate("unknown")
    assert (len(tlb), entries[2].page_id in tlb) == (1, True)
    tlb.clear()
    assert len(tlb) == 0
    with pytest.raises(ValueError, match="at least 1"):
        PageTLB(max_entries=0)


def test_tlb_of_another_table_brings_nothing_along() -> None:
    tlb = PageTLB()
    filled(3, tlb).lookup(make_page_id(0))
    assert TLBWithPageTable(PageTable(), tlb).lookup(make_page_id(0)) is None


def test_tlb_with_page_table_stands_wherever_a_table_does() -> None:
    log = MutationLogLite()
    combined = TLBWithPageTable(PageTable(log.append))
    register_id(combined, "msg_0001", 10, 1, tier=StorageTier.L0)
    register_id(combined, "msg_0002", 10, 2)
    combined.update_location("msg_0002", StorageTier.L3, turn=2)
    fault_in(combined, "msg_0002", 3)
    evict(combined, "msg_0001", 4)
    assert [e.page_id for e in combined.resident()] == ["msg_0002"]
    assert [e.page_id for e in combined.get_by_tier(StorageTier.L2)] == ["msg_0001"]
    assert (len(combined), combined.turn) == (2, 4)
    assert log.replay() == combined.page_table
