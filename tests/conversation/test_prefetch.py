"""What is brought in before the call, and when nothing is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.effects import Search
from proxy.conversation.prefetch import Chosen, Prefetch
from proxy.memory import AntiThrashPolicy, CompressionLevel, PageTable, page_id
from proxy.memory.ids import Hit
from proxy.memory.prefetcher import asks_back
from proxy.memory.tlb import TLBWithPageTable
from proxy.tokens import get_counter
from tests.conversation.player import limits_of
from tests.conversation.test_pathpages import pages_of
from tests.examples import examples

COUNTER = get_counter("gpt-4o")


def prefetch(question: str, offer: bool = True, room: int = 4000, **changes: Any) -> Prefetch:
    texts = ["the red door", "word " * 150, "a lamp", question]
    pages = pages_of([{"role": "user", "content": text} for text in texts], 1024)
    table = TLBWithPageTable(PageTable())
    for position in range(len(texts)):
        table.register_id(page_id(position), pages.tokens(position), 1)
    return Prefetch(pages, table, COUNTER, limits_of(4000, **changes), offer, room, 9, False, AntiThrashPolicy())


def choose(it: Prefetch, hits: list[Hit], left: int = 4000) -> list[Chosen]:
    dialogue = it.choose(left)
    try:
        effect = next(dialogue)
        assert isinstance(effect, Search) and effect.before == 3
        dialogue.send([h for h in hits if not effect.skip(h.position, h.part)])
    except StopIteration as end:
        chosen: list[Chosen] = end.value
        return chosen
    raise AssertionError("one search only")


HITS = [Hit(2, 0, 5.0, 2.0), Hit(0, 0, 9.0, 2.0), Hit(1, 0, 8.0, 2.0)]


def test_what_asks_back() -> None:
    assert asks_back("Where was it?") and asks_back("Please summarize") and asks_back("we agreed on it")
    assert not asks_back("Write a poem about rain.")
    assert prefetch("Write a poem.").reserve() == 0 < prefetch("Write a poem.", offer=False).reserve()


def test_pages_come_in_path_order_and_on_evidence_only() -> None:
    assert [c.position for c in choose(prefetch("which door?"), HITS)] == [0, 1, 2]
    assert choose(prefetch("which door?"), [Hit(0, 0, 9.0, 0.1)]) == []
    assert len(choose(prefetch("which door?", prefetch_pages=1), HITS)) == 1
    assert choose(prefetch("which door?", prefetch_pages=0), HITS) == []
    assert choose(prefetch("which door?"), HITS, left=-5) == []


def test_what_is_in_the_window_whole_is_not_brought_again() -> None:
    it = prefetch("which door?")
    it.table.map(page_id(0), 1, CompressionLevel.FULL)
    it.table.map(page_id(2), 1, CompressionLevel.ABSTRACT)
    assert [c.position for c in choose(it, HITS)] == [1, 2]


@examples(60)
@given(st.integers(0, 4000), st.integers(-10, 400), st.booleans(), st.integers(0, 300))
def test_invariant_03_the_block_fits_its_room(room: int, left: int, offer: bool, most: int) -> None:
    it = prefetch("which door?", offer, room, prefetch_tokens=most, fault_tokens=100)
    chosen = choose(it, HITS, left)
    assert sum(c.tokens for c in chosen) <= max(0, min(it.reserve(), left) - 16)
    assert all(COUNTER.text(c.line) <= c.tokens for c in chosen)
