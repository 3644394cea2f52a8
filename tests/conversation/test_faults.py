"""Answers to the model's own calls, within the turn's limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.effects import Load
from proxy.conversation.faults import NO_ROOM, FaultServer, Room
from proxy.conversation.pages import PathPages
from proxy.memory import CompressionLevel, PageTable, StorageTier
from proxy.memory.pages import Hit
from proxy.memory.tlb import TLBWithPageTable
from proxy.tokens import get_counter
from tests.conversation.player import limits_of
from tests.conversation.test_pages import pages_of
from tests.examples import examples

COUNTER = get_counter("gpt-4o")
TEXTS = ["short", "word " * 50, "sentence. " * 120, "", "last"]


class Setting:
    def __init__(self, **changes: Any) -> None:
        self.pages: PathPages = pages_of([{"role": "user", "content": t} for t in TEXTS])
        self.table = TLBWithPageTable(PageTable())
        for position in range(len(TEXTS)):
            for i in self.pages[position].ids:
                self.table.register_id(i, self.pages.tokens(position), 1)
        limits = limits_of(2000, **changes)
        self.server = FaultServer(self.pages, self.table, COUNTER, limits, 2, self.table.apply)
        self.hits: list[Hit] = []

    def ask(
        self, tool: str, arguments: Any, room: int = 2000, spare: int = 2000
    ) -> dict[str, Any]:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        dialogue = self.server.serve(tool, text, Room(room, spare))
        reply: Any = None
        try:
            while True:
                effect = dialogue.send(reply)
                if isinstance(effect, Load):
                    reply = self.pages.at(effect.page_id, effect.level)
                else:
                    reply = [h for h in self.hits if not effect.skip(h.position, h.part)]
        except StopIteration as end:
            result: dict[str, Any] = json.loads(end.value.content)
            return result

    def fault(self, page: str, level: int = 0, room: int = 2000) -> dict[str, Any]:
        return self.ask("page_fault", {"page_id": page, "target_level": level}, room)


def test_a_page_is_given_whole_and_is_in_the_window_from_then_on() -> None:
    it = Setting()
    page = it.fault("msg_0002")["page"]
    assert page["content"]["text"] == TEXTS[1] and page["level"] == 0
    entry = it.table.lookup("msg_0002")
    assert entry is not None and entry.tier is StorageTier.L0 and entry.fault_count == 1
    assert "already loaded" in it.fault("msg_0002")["error"]
    assert [f.error is None for f in it.server.faults] == [True, True] and it.server.faults[1].tokens == 0


def test_a_cut_messages_own_id_gives_all_its_parts() -> None:
    it = Setting()
    assert it.fault("msg_0003")["page"]["content"]["text"] == TEXTS[2]
    parts = [it.table.lookup(i) for i in it.pages[2].ids]
    assert len(parts) > 1 and all(e and e.tier is StorageTier.L0 for e in parts)


def test_what_does_not_fit_comes_at_the_next_level_that_does() -> None:
    it = Setting()
    page = it.fault("msg_0003", room=150)["page"]
    assert page["level"] > 0 and COUNTER.text(page["content"]["text"]) <= 150
    assert "does not fit" in Setting().fault("msg_0003", room=0)["error"]


def test_what_the_window_could_not_take_as_json_comes_at_the_next_level_too() -> None:
    it = Setting()
    text = TEXTS[3] = '"\\"\n' * 200
    it = Setting()
    tokens = COUNTER.text(text)
    arguments = {"page_id": "msg_0004", "target_level": 0}
    page = it.ask("page_fault", arguments, 2000, 2 * tokens)["page"]
    assert page["level"] > 0
    assert COUNTER.text(json.dumps(page)) <= 2 * tokens


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("page_fault", {"page_id": "msg_0003"}), ("page_fault", {"page_id": "msg_9999"}),
     ("page_fault", "no JSON"), ("search_pages", {"query": "word"}), ("search_pages", "no JSON")],
)  # fmt: skip
def test_no_result_is_longer_than_what_says_that_there_is_no_room(tool: str, arguments: Any) -> None:
    it = Setting()
    it.hits = [Hit(1, 0, 1.0)]
    least = COUNTER.text(NO_ROOM)
    assert COUNTER.text(json.dumps(it.ask(tool, arguments, 2000, least))) <= least + 2
    it.fault("msg_0002")
    it.fault("msg_0002")
    assert it.ask("page_fault", {"page_id": "msg_0002"}, 2000, least) == json.loads(NO_ROOM)


def test_limits_and_unknown_pages_get_a_sentence() -> None:
    it = Setting(faults_per_turn=1)
    assert "msg_0001 to msg_0005" in it.fault("msg_0099")["error"]
    assert "page" in it.fault("msg_0001") and it.server.exhausted
    assert "limit of 1" in it.fault("msg_0002")["error"]
    assert "JSON" in it.ask("page_fault", "{")["error"] and "query" in it.ask("search_pages", "{}")["error"]


def test_a_search_gives_short_pages_whole_and_only_once() -> None:
    it = Setting(snippet_tokens=20)
    it.hits = [Hit(0, 0, 2.0), Hit(2, 1, 1.0)]
    first = it.ask("search_pages", {"query": "x"})["results"]
    assert [(r["page_id"], r.get("complete", False)) for r in first] == [("msg_0001", True), ("msg_0003.1", False)]
    entry = it.table.lookup("msg_0001")
    assert entry is not None and entry.level is CompressionLevel.FULL and entry.tier is StorageTier.L0
    again = it.ask("search_pages", {"query": "x"})["results"]
    assert [r["page_id"] for r in again] == ["msg_0003.1"]
    assert it.ask("search_pages", {"query": "x", "modality": "image"}).get("results", []) == []
    assert it.server.searches[0].results == ["msg_0001", "msg_0003.1"]


@examples(60)
@given(st.lists(st.tuples(st.sampled_from(["fault", "search"]), st.integers(1, 6), st.integers(0, 3),
                          st.integers(-50, 900)), max_size=12), st.integers(0, 600))
def test_invariant_10_a_turn_loads_no_more_than_its_tokens(
    asked: list[tuple[str, int, int, int]], limit: int
) -> None:
    it = Setting(faults_per_turn=5, fault_tokens=limit)
    it.hits = [Hit(p, 0, 1.0) for p in (0, 1, 4)]
    for kind, page, level, room in asked:
        before = sum(f.tokens for f in it.server.faults)
        if kind == "fault":
            it.fault(f"msg_{page:04d}", level, room)
            assert sum(f.tokens for f in it.server.faults) - before <= max(room, 0)
        else:
            it.ask("search_pages", {"query": "x"}, room)
    assert sum(f.tokens for f in it.server.faults) <= limit
    assert sum(f.error is None and f.tokens > 0 for f in it.server.faults) <= 5


def test_a_page_that_was_found_twice_is_told_once() -> None:
    """A medium stands in the index by its message and by the answer to it."""
    setting = Setting()
    setting.hits = [Hit(0, 0, 2.0), Hit(4, 0, 1.5), Hit(0, 0, 1.0)]
    found = setting.ask("search_pages", {"query": "short"})
    assert [entry["page_id"] for entry in found["results"]] == ["msg_0001", "msg_0005"]
