"""What is shown unasked, and when nothing is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation import evidence
from proxy.conversation.effects import Search
from proxy.conversation.evidence import Shown, asks, limit, stays
from proxy.conversation.turn_window import TurnWindow
from proxy.conversation.window import Entry, Window
from proxy.memory import CompressionLevel, StorageTier
from proxy.memory.ids import Hit, make_page_id
from proxy.tokens import get_counter
from tests.conversation.player import Player, call, calls, limits_of, script
from tests.conversation.test_epoch import turn_window
from tests.examples import examples
from tests.memory.doors import map_in

COUNTER = get_counter("gpt-4o")


LONG = "Ann and the others met at noon, and " * 13 + "the door of the old mill by the river was painted red in spring."


def opened(question: str, offer: bool = True, room: int = 4000, **changes: Any) -> TurnWindow:
    texts = ["the red door", LONG, "a lamp", question]
    messages = [{"role": "user", "content": text} for text in texts]
    return turn_window(messages, room, offer, limits=limits_of(4000, **changes), tier=StorageTier.L2)


def choose(it: TurnWindow, hits: list[Hit], left: int = 4000) -> list[Shown]:
    dialogue = evidence.choose(it, left)
    try:
        effect = next(dialogue)
        assert isinstance(effect, Search) and effect.before == 3 and effect.skip is None
        dialogue.send(hits)
    except StopIteration as end:
        chosen: list[Shown] = end.value
        return chosen
    raise AssertionError("one search only")


HITS = [Hit(2, 0, 5.0, 2.0), Hit(0, 0, 9.0, 2.0), Hit(1, 0, 8.0, 2.0)]


@pytest.mark.parametrize("text", ["Where was it?", "前に何と言った？", "أين كان؟", "Πού ήταν\u037e", "Ո՞ւր"])
def test_question_is_known_by_its_mark_in_any_script(text: str) -> None:
    assert asks(text) and not asks(text.translate(dict.fromkeys(map(ord, "?？؟\u037e՞"))))


def test_limit_is_the_same_with_tools_and_without_and_nothing_for_a_tools_result() -> None:
    assert limit(opened("Write a poem.")) == limit(opened("Write a poem.", offer=False)) > 0
    result = {"role": "tool", "tool_call_id": "c", "content": "done"}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Do it?"}, {"role": "assistant", "tool_calls": [call]}, result]
    assert limit(turn_window(messages, 4000, True, limits=limits_of(4000))) == 0


def log(before: int, shown: int, behind: int) -> Window:
    """A log with a user's message of 50 tokens and evidence in front of its text, and what follows it."""
    user = Entry(b"{}", 50 + shown, 1, shown_tokens=shown, shown=("msg_0001",))
    entries = (Entry(b"{}", before, 0), user, Entry(b"{}", behind, 2))
    return Window(1, "", 0, 0, 3, entries, before + 50 + shown + behind)


def test_evidence_leaves_where_little_stands_behind_it_and_stays_where_much_does() -> None:
    limits = limits_of(32_000)
    assert not stays(log(10_000, 1000, 200), 1, limits)
    assert stays(log(10_000, 1000, 9000), 1, limits)
    assert stays(log(10_000, 50, 400), 1, limits)


@examples(20)
@given(st.integers(1, 2000), st.integers(0, 20_000), st.integers(0, 20_000))
def test_evidence_that_stays_would_stay_behind_a_longer_turn_too(shown: int, behind: int, more: int) -> None:
    limits = limits_of(32_000)
    if stays(log(1000, shown, behind), 1, limits):
        assert stays(log(1000, shown, behind + more), 1, limits)


def test_pages_come_in_path_order_and_on_evidence_only() -> None:
    assert [c.position for c in choose(opened("which door?"), HITS)] == [0, 1, 2]
    assert choose(opened("which door?"), [Hit(0, 0, 9.0, 0.1)]) == []
    told = [Hit(2, 0, 9.0, 0.1), Hit(0, 0, 9.0, 5.0)]
    assert [c.position for c in choose(opened("that door"), told)] == [0]  # the other is only beside it
    assert [c.position for c in choose(opened("that door?"), told)] == [0, 2]
    assert len(choose(opened("which door?", prefetch_pages=1), HITS)) == 1
    assert choose(opened("which door?", prefetch_pages=0), HITS) == []
    assert choose(opened("which door?"), HITS, left=-5) == []


def test_what_is_in_the_window_whole_is_not_brought_again() -> None:
    it = opened("which door?")
    map_in(it.table, make_page_id(0), 1, CompressionLevel.FULL)
    map_in(it.table, make_page_id(2), 1, CompressionLevel.ABSTRACT)
    assert [c.position for c in choose(it, HITS)] == [1, 2]


def test_page_without_room_for_a_sentence_is_not_shown_by_a_word() -> None:
    it = opened("which door?")
    shown = [choose(it, [Hit(1, 0, 9.0, 2.0)], left) for left in range(40, 180, 4)]
    assert [] in shown and shown[-1] and all("painted red" in line for found in shown for *_, line in found)


@examples(20)
@given(st.integers(0, 4000), st.integers(-10, 400), st.booleans(), st.integers(0, 300))
def test_invariant_03_the_block_fits_its_room(room: int, left: int, offer: bool, most: int) -> None:
    it = opened("which door?", offer, room, prefetch_tokens=most, fault_tokens=100)
    chosen = choose(it, HITS, left)
    assert sum(c.tokens for c in chosen) <= max(0, min(limit(it), left) - 16)
    assert all(COUNTER.text(c.line) <= c.tokens for c in chosen)


def test_evidence_stays_through_an_agents_turn_until_an_epoch_needs_its_room() -> None:
    player = Player(limits_of(3000, prefetch_tokens=600))
    messages: list[dict[str, Any]] = []
    for number in range(40):
        messages.append({"role": "user", "content": f"Depot {number} holds {'crate ' * 30}of kestrel{number}x."})
        messages.append({"role": "assistant", "content": f"Noted, kestrel{number}x."})
    messages.append({"role": "user", "content": "Which depot holds kestrel3x?"})
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    seen = []
    for number in range(8):
        wanted = calls(call("look", {"n": number}, f"c{number}"))
        played = player.ask(messages, script(wanted), tools=tools)
        seen.append((played.answer.report.new_epoch, "of kestrel3x" in json.dumps(played.requests[0])))
        messages += [wanted, {"role": "tool", "tool_call_id": f"c{number}", "content": f"row {number} " * 200}]
    later = [new for new, _ in seen].index(True, 1)
    assert later > 1 and all(shown for _, shown in seen[:later]), "through the turn's requests"
    assert not seen[later][1], "until its room is needed"
