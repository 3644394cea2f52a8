"""The TLB and the packed lines: bounded, counted, and never anything but what is true now."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory import MemoryPage, PageTable, PageTLB, StorageTier, TLBWithPageTable
from proxy.memory.caches import DEFAULT_TLB_ENTRIES, PackCache, PackedLine, _size_bytes
from proxy.memory.context import ContextPacker
from proxy.memory.ids import make_page_id
from proxy.memory.models import CompressionLevel, Modality
from tests.memory.counts import CountBy
from tests.memory.doors import register_id


def filled(pages: int, tlb: PageTLB | None = None) -> TLBWithPageTable:
    table = PageTable()
    for position in range(pages):
        register_id(table, make_page_id(position), 10, 1)
    return TLBWithPageTable(table, tlb)


def test_tlb_with_page_table_as_in_the_seeds() -> None:
    table, tlb = PageTable(), PageTLB(max_entries=DEFAULT_TLB_ENTRIES)
    combined = TLBWithPageTable(table, tlb)
    page = MemoryPage(page_id="msg_001", content="hi", storage_tier=StorageTier.L0)
    assert combined.register(page) is table.lookup("msg_001")
    assert combined.lookup("msg_001") is table.lookup("msg_001")
    table.update_location("msg_001", tier=StorageTier.L2, artifact_id="a1")  # past the TLB
    entry = combined.lookup("msg_001")
    assert entry is not None and (entry.tier, entry.artifact_id) == (StorageTier.L2, "a1")


def test_tlb_counts_hits_and_misses() -> None:
    combined = filled(10, PageTLB(max_entries=2))
    assert combined.tlb.get_stats().hit_rate == 0.0
    for position in (0, 0, 1, 2, 1, 0):
        assert combined.lookup(make_page_id(position)) is not None
    assert combined.lookup("msg_9999") is None
    stats = combined.tlb.get_stats()
    assert (stats.hits, stats.misses, stats.entries, stats.hit_rate) == (2, 5, 2, 2 / 7)
    with pytest.raises(ValueError, match="at least 1"):
        PageTLB(max_entries=0)


def test_tlb_of_another_table_brings_nothing_along() -> None:
    tlb = PageTLB()
    filled(3, tlb).lookup(make_page_id(0))
    assert TLBWithPageTable(PageTable(), tlb).lookup(make_page_id(0)) is None


def page(name: str = "msg_0001", content: object = "hello", **fields: object) -> MemoryPage:
    return MemoryPage(page_id=name, content=content, metadata={"role": "user"}, **fields)  # type: ignore[arg-type]


def test_pack_cache_packs_an_unchanged_page_once() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return len(text)

    cache = PackCache()
    packer = ContextPacker(CountBy(count), cache)
    first = packer.pack([page(), page("msg_0002", "more")])
    assert packer.pack([page(), page("msg_0002", "more")]) == first
    assert len(counted) == 2
    stats = cache.get_stats()
    assert (stats.hits, stats.misses, stats.hit_rate, stats.entries) == (2, 2, 0.5, 2)
    cache.clear()
    assert packer.pack([page(), page("msg_0002", "more")]) == first, "invariant 9"


def test_pack_cache_finds_a_line_under_nothing_else() -> None:
    cache = PackCache()
    pages = [
        page(),
        page("msg_0002"),
        page(content="other"),
        page(compression_level=CompressionLevel.REDUCED),
        page(modality=Modality.STRUCTURED),
        MemoryPage(page_id="msg_0001", content="hello", metadata={"role": "assistant"}),
        page(content={"type": "image_url", "image_url": {"url": "u"}}, modality=Modality.IMAGE),
    ]
    captioned = pages[-1].model_copy(update={"metadata": {"role": "user", "caption": "a cat"}})
    for one in (*pages, captioned):
        assert ContextPacker(CountBy(), cache).pack([one]) == ContextPacker(CountBy()).pack([one])
    assert cache.get_stats().hits == 0
    shorter = ContextPacker(CountBy(lambda text: 1), cache).pack([page()])
    assert shorter.tokens_est == 1  # another counter, another price


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 5))
def test_invariant_10_pack_cache_keeps_the_lines_used_last(asked: list[int], room: int) -> None:
    cache = PackCache(max_bytes=room * _size_bytes(PackedLine("x", 1)))
    recent: list[int] = []
    for key in asked:
        found = cache.lookup(key)
        assert (found is not None) == (key in recent)
        if found is None:
            cache.keep(key, PackedLine(str(key), 1))
        recent = [*[k for k in recent if k != key], key][-room:]
        assert cache.get_stats().entries == len(recent)
    cache.keep("long", PackedLine("x" * 10_000, 7))
    assert cache.lookup("long") is None, "what has no room is not kept"
