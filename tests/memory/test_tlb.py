import pytest

from proxy.memory import (
    CompressionLevel,
    MemoryPage,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    StorageTier,
)
from proxy.memory.pages import page_id
from proxy.memory.tlb import DEFAULT_TLB_ENTRIES, PageTLB, TLBWithPageTable


def filled(pages: int, tlb: PageTLB | None = None) -> TLBWithPageTable:
    storage: dict[bytes, bytes] = {}
    table = PageTable(load=storage.get)
    for position in range(pages):
        table.register_id(page_id(position), 10, 1)
    storage.update(table.checkpoint().blocks)
    return TLBWithPageTable(table, tlb)


def test_as_in_the_seeds() -> None:
    table, tlb = PageTable(), PageTLB(max_entries=512)
    combined = TLBWithPageTable(table, tlb)
    page = MemoryPage(page_id="msg_001", content="hi", storage_tier=StorageTier.L0)
    assert combined.register(page) is table.lookup("msg_001")
    assert combined.lookup("msg_001") is table.lookup("msg_001")
    table.update_location("msg_001", tier=StorageTier.L2, artifact_id="a1")  # past the TLB
    entry = combined.lookup("msg_001")
    assert entry is not None and (entry.tier, entry.artifact_id) == (StorageTier.L2, "a1")
    assert TLBWithPageTable(table).tlb.max_entries == DEFAULT_TLB_ENTRIES


def test_hits_misses_and_evictions_are_counted() -> None:
    combined = filled(10, PageTLB(max_entries=2))
    assert combined.tlb.get_stats().hit_rate == 0.0
    for position in (0, 0, 1, 2, 1, 0):
        assert combined.lookup(page_id(position)) is not None
    assert combined.lookup("msg_9999") is None
    stats = combined.tlb.get_stats()
    assert (stats.hits, stats.misses, stats.evictions) == (2, 5, 2)
    assert (stats.size, stats.hit_rate) == (2, 2 / 7)


def test_the_least_recently_used_leaves_first() -> None:
    tlb = PageTLB(max_entries=2)
    entries = list(filled(3))
    tlb.insert(entries[0])
    tlb.insert(entries[1])
    tlb.lookup(entries[0].page_id)
    tlb.insert(entries[2])
    assert list(tlb.page_ids()) == [entries[0].page_id, entries[2].page_id]
    tlb.invalidate(entries[0].page_id)
    tlb.invalidate("unknown")
    assert (len(tlb), entries[0].page_id in tlb, entries[2].page_id in tlb) == (1, False, True)
    tlb.clear()
    assert len(tlb) == 0
    with pytest.raises(ValueError, match="at least 1"):
        PageTLB(max_entries=0)


def test_invariant_10_after_a_shed_only_the_tlb_changes_and_the_window_are_in_ram() -> None:
    combined = filled(5_000, PageTLB(max_entries=16))
    for position in range(0, 5_000, 10):
        combined.lookup(page_id(position))
    combined.page_table.apply(PageMutation(MutationType.ACCESS, page_id(3), 2))
    combined.map(page_id(4), 2, CompressionLevel.FULL)
    combined.shed()
    assert combined.in_ram == 16 + 1  # the mapped page is in the TLB too
    assert len(combined) == 5_000 == combined.get_stats().total_pages


def test_a_shed_behind_its_back_leaves_no_stale_entry() -> None:
    combined = filled(200)
    combined.lookup(page_id(5))
    combined.page_table.shed()
    combined.page_table.fault_in(page_id(5), turn=7)
    entry = combined.lookup(page_id(5))
    assert entry is not None and entry.faulted_turn == 7
    combined.page_table.checkpoint()
    combined.evict(page_id(5), 8)
    assert combined.lookup(page_id(5)) is combined.page_table.lookup(page_id(5))


def test_a_tlb_of_another_table_brings_nothing_along() -> None:
    tlb = PageTLB()
    old = filled(3, tlb)
    old.lookup(page_id(0))
    new = TLBWithPageTable(PageTable(), tlb)
    assert new.lookup(page_id(0)) is None


def test_it_stands_wherever_a_table_does() -> None:
    log = MutationLogLite()
    combined = TLBWithPageTable(PageTable(log.append))
    combined.register_id("msg_0001", 10, turn=1, tier=StorageTier.L0)
    combined.register_id("msg_0002", 10, turn=2)
    combined.update_location("msg_0002", StorageTier.L3, turn=2)
    combined.fault_in("msg_0002", turn=3)
    combined.pin("msg_0001", turn=3)
    combined.unpin("msg_0001", turn=3)
    combined.evict("msg_0001", turn=4)
    assert [e.page_id for e in combined.resident()] == ["msg_0002"]
    assert [e.page_id for e in combined.get_by_tier(StorageTier.L2)] == ["msg_0001"]
    assert (len(combined), "msg_0002" in combined, combined.turn) == (2, True, 4)
    assert TLBWithPageTable(PageTable()).replay(log.entries).page_table == combined.page_table
    assert list(combined) == list(combined.page_table)
    assert combined.checkpoint().root == log.replay().checkpoint().root
    for change in (combined.evict, combined.fault_in, combined.pin):
        with pytest.raises(KeyError, match="no page 'msg_0009'"):
            change("msg_0009", turn=5)
    with pytest.raises(KeyError, match="no page 'msg_0009'"):
        combined.update_location("msg_0009", StorageTier.L2)
