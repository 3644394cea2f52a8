"""Packed lines are kept under everything that they depend on, and no longer than there is room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.context import ContextPacker
from proxy.memory.models import CompressionLevel, MemoryPage, Modality
from proxy.memory.pack_cache import PackCache, PackedLine, _size_bytes
from tests.memory.counts import CountBy


def page(name: str = "msg_0001", content: object = "hello", **fields: object) -> MemoryPage:
    return MemoryPage(page_id=name, content=content, metadata={"role": "user"}, **fields)  # type: ignore[arg-type]


def test_an_unchanged_page_is_packed_once() -> None:
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


def test_a_line_is_not_found_under_anything_else() -> None:
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
def test_invariant_10_it_keeps_the_lines_used_last(asked: list[int], room: int) -> None:
    size_bytes = _size_bytes(PackedLine("x", 1))
    cache = PackCache(max_bytes=room * size_bytes)
    recent: list[int] = []
    for key in asked:
        hits = cache.get_stats().hits
        cache.get_or_pack(key, lambda key=key: PackedLine(str(key), 1))
        assert (cache.get_stats().hits > hits) == (key in recent)
        recent = [*[k for k in recent if k != key], key][-room:]
        assert len(cache) == len(recent)
    assert cache.get_or_pack("long", lambda: PackedLine("x" * 10_000, 7)).tokens == 7
    assert len(cache) == len(recent), "what has no room is not kept"


def test_invariant_09_losing_it_changes_no_output() -> None:
    cache = PackCache()
    packer = ContextPacker(CountBy(), cache)
    before = packer.pack([page()])
    cache.clear()
    assert packer.pack([page()]) == before

