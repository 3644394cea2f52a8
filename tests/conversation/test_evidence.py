"""What is shown unasked, and when nothing is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation import evidence
from proxy.conversation.effects import Search
from proxy.conversation.evidence import Shown, asks_back, reserve
from proxy.conversation.turn_window import TurnWindow
from proxy.memory import CompressionLevel, StorageTier
from proxy.memory.ids import Hit, make_page_id
from proxy.tokens import get_counter
from tests.conversation.player import limits_of
from tests.conversation.test_epoch import turn_window
from tests.examples import examples
from tests.memory.doors import map_in

COUNTER = get_counter("gpt-4o")


def opened(question: str, offer: bool = True, room: int = 4000, **changes: Any) -> TurnWindow:
    texts = ["the red door", "word " * 150, "a lamp", question]
    messages = [{"role": "user", "content": text} for text in texts]
    return turn_window(messages, room, offer, limits=limits_of(4000, **changes), tier=StorageTier.L2)


def choose(it: TurnWindow, hits: list[Hit], left: int = 4000) -> list[Shown]:
    dialogue = evidence.choose(it, left)
    try:
        effect = next(dialogue)
        assert isinstance(effect, Search) and effect.before == 3
        dialogue.send([h for h in hits if not effect.skip(h.position, h.part)])
    except StopIteration as end:
        chosen: list[Shown] = end.value
        return chosen
    raise AssertionError("one search only")


HITS = [Hit(2, 0, 5.0, 2.0), Hit(0, 0, 9.0, 2.0), Hit(1, 0, 8.0, 2.0)]


def test_what_asks_back() -> None:
    assert asks_back("Where was it?") and asks_back("Please summarize") and asks_back("we agreed on it")
    assert not asks_back("Write a poem about rain.")
    assert reserve(opened("Write a poem.")) == 0 < reserve(opened("Write a poem.", offer=False))


def test_pages_come_in_path_order_and_on_evidence_only() -> None:
    assert [c.position for c in choose(opened("which door?"), HITS)] == [0, 1, 2]
    assert choose(opened("which door?"), [Hit(0, 0, 9.0, 0.1)]) == []
    assert len(choose(opened("which door?", prefetch_pages=1), HITS)) == 1
    assert choose(opened("which door?", prefetch_pages=0), HITS) == []
    assert choose(opened("which door?"), HITS, left=-5) == []


def test_what_is_in_the_window_whole_is_not_brought_again() -> None:
    it = opened("which door?")
    map_in(it.table, make_page_id(0), 1, CompressionLevel.FULL)
    map_in(it.table, make_page_id(2), 1, CompressionLevel.ABSTRACT)
    assert [c.position for c in choose(it, HITS)] == [1, 2]


@examples(60)
@given(st.integers(0, 4000), st.integers(-10, 400), st.booleans(), st.integers(0, 300))
def test_invariant_03_the_block_fits_its_room(room: int, left: int, offer: bool, most: int) -> None:
    it = opened("which door?", offer, room, prefetch_tokens=most, fault_tokens=100)
    chosen = choose(it, HITS, left)
    assert sum(c.tokens for c in chosen) <= max(0, min(reserve(it), left) - 16)
    assert all(COUNTER.text(c.line) <= c.tokens for c in chosen)
