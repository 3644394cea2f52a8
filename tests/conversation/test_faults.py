"""A round's tool calls: whose they are, what answers them, and an exchange that the window takes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.channel import choose_channel
from proxy.conversation.effects import Load
from proxy.conversation.faults import NO_ROOM, VMCalls, split_calls
from proxy.conversation.pages import PathPages
from proxy.memory.faults import Room
from proxy.memory.ids import Hit
from proxy.memory.models import (
    CompressionLevel,
    FaultReason,
    MutationType,
    PageMutation,
    StorageTier,
)
from proxy.memory.table import PageTable
from proxy.tokens import get_counter
from tests.conversation.player import (
    Played,
    Player,
    call,
    calls,
    check_pairs,
    count_tokens,
    limits_of,
    says,
    script,
    tool_messages,
)
from tests.conversation.scenario import grown
from tests.conversation.test_pages import pages_of
from tests.examples import examples
from tests.memory.doors import register_id

COUNTER = get_counter("gpt-4o")
TEXTS = ["short", "word " * 50, "sentence. " * 120, "", "last"]


class Setting:
    def __init__(self, texts: list[str] | None = None, page_tokens: int = 64, **changes: Any) -> None:
        texts = TEXTS if texts is None else texts
        self.pages: PathPages = pages_of([{"role": "user", "content": t} for t in texts], page_tokens)
        self.table = PageTable()
        for position in range(len(texts)):
            for i in self.pages[position].ids:
                register_id(self.table, i, self.pages.tokens(position), 1)
        limits = limits_of(2000, **changes)
        place = SimpleNamespace(record=None)
        context = SimpleNamespace(counter=COUNTER, now_s=0.0, place=place)
        window: Any = SimpleNamespace(
            pages=self.pages, table=self.table, context=context, limits=limits, turn=2,
            apply=self.table.apply, fault_reason=FaultReason.RESOLVE_REFERENCE, evidence=frozenset(),
            channel=choose_channel({}, limits),
        )  # fmt: skip
        self.calls, self.window = VMCalls(window), window
        self.hits: list[Hit] = []

    def ask(
        self, tool: str, arguments: Any, room: int = 2000, spare: int = 2000
    ) -> dict[str, Any]:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        asked = self.calls.read({"function": {"name": tool, "arguments": text}})
        dialogue = self.calls.answer(asked, Room(room, spare))
        reply: Any = None
        try:
            while True:
                effect = dialogue.send(reply)
                if isinstance(effect, Load):
                    reply = self.pages.at(effect.page_id, effect.level)
                else:
                    reply = [h for h in self.hits if effect.skip is None or not effect.skip(h.position, h.part)]
        except StopIteration as end:
            result: dict[str, Any] = json.loads(end.value[0])
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
    assert [f.error is None for f in it.calls.faults] == [True, True] and it.calls.faults[1].tokens == 0


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
    assert "page" in it.fault("msg_0001") and it.calls.exhausted
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
    assert it.calls.searches[0].results == ["msg_0001", "msg_0003.1"]


# -- what is shown of a page is what it was asked for

FILLER = "The tide ran out and the crew waited for the pilot at the quay. " * 8
VAULT = "The vault behind the third bookcase opens with 7719."
LEDGER = "Ada keeps the red ledger in her cabin."
LONG = f"{FILLER}{LEDGER} {FILLER}{VAULT} {FILLER}"


def test_a_result_shows_the_words_that_were_searched() -> None:
    it = Setting([LONG, "short", "?"], page_tokens=2000, snippet_tokens=48)
    it.hits = [Hit(0, 0, 1.0)]
    (found,) = it.ask("search_pages", {"query": "opening the vault"})["results"]
    assert VAULT in found["hint"] and "complete" not in found and COUNTER.text(found["hint"]) <= 48
    (other,) = it.ask("search_pages", {"query": "Ada's ledger"})["results"]
    assert LEDGER in other["hint"] and VAULT not in other["hint"]


def test_evidence_that_is_shown_in_part_is_found_by_other_words_and_what_is_shown_whole_is_left_out() -> None:
    it = Setting([LONG, "short", "A lead.", "?"], page_tokens=2000, snippet_tokens=48)
    for page_id, level in (("msg_0001", CompressionLevel.REDUCED), ("msg_0002", CompressionLevel.FULL)):
        it.table.apply(PageMutation(MutationType.MAP, page_id, 2, level, StorageTier.L0, 40))
    it.window.evidence = frozenset({"msg_0001", "msg_0002"})
    it.hits = [Hit(2, 0, 3.0), Hit(0, 0, 2.0), Hit(1, 0, 1.0)]
    results = it.ask("search_pages", {"query": "Ada's ledger"})["results"]
    assert [result["page_id"] for result in results] == ["msg_0003", "msg_0001"] and LEDGER in results[1]["hint"]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_lower_level_shows_what_was_searched_and_what_the_user_asks(level: int) -> None:
    it = Setting([LONG, "short", "Where is the ledger?"], page_tokens=2000)
    page = it.fault("msg_0001", level)["page"]
    assert page["level"] == level and "ledger" in page["content"]["text"]
    assert "vault" not in page["content"]["text"] or level == 1
    it.ask("search_pages", {"query": "vault"})
    page = it.fault("msg_0001", level)["page"]  # asked for other words, it is another page to show
    assert "vault" in page["content"]["text"] and COUNTER.text(page["content"]["text"]) <= (200, 48, 12)[level - 1]
    assert "already given" in it.fault("msg_0001", level)["error"]


def test_a_page_without_room_shows_what_was_asked_and_says_so() -> None:
    it = Setting([LONG, "short", "Where is the ledger?"], page_tokens=2000)
    result = it.fault("msg_0001", 0, 200)
    assert LEDGER in result["page"]["content"]["text"] and result["page"]["level"] == 1
    assert result["effects"]["shortened"] == "no room for level 0"
    assert COUNTER.text(json.dumps(result)) <= 200
    whole = Setting([LONG, "?"], page_tokens=2000).fault("msg_0001")
    assert whole["page"]["content"]["text"] == LONG and "shortened" not in whole["effects"]


def test_results_that_have_no_room_are_counted() -> None:
    texts = [f"{FILLER}{VAULT} {number}" for number in range(6)]
    it = Setting([*texts, "?"], page_tokens=2000, snippet_tokens=64)
    it.hits = [Hit(number, 0, 6.0 - number) for number in range(6)]
    found = it.ask("search_pages", {"query": "vault"}, 300)
    assert 0 < len(found["results"]) < 5 and found["no_room_for"] == 5 - len(found["results"])
    assert all(VAULT in one["hint"] for one in found["results"])
    assert "no_room_for" not in it.ask("search_pages", {"query": "vault"}, 2000)
    (one,) = it.ask("search_pages", {"query": "vault"}, 120)["results"]  # shown shorter, rather than not at all
    assert "vault" in one["hint"]


def test_short_pages_stand_whole_beside_the_results_and_come_once() -> None:
    notes = [f"The vault was opened {number} times." for number in range(30)]
    it = Setting([*[FILLER + VAULT] * 4, *notes, "?"], page_tokens=2000, snippet_tokens=48)
    it.hits = [Hit(number, 0, 40.0 - number) for number in range(34)]
    found = it.ask("search_pages", {"query": "vault", "limit": 8})
    assert [one["page_id"] for one in found["results"][:3]] == ["msg_0001", "msg_0002", "msg_0003"]
    assert len(found["results"]) <= 8 and found["also"][0] == f"U (msg_0005): {notes[0]}"
    assert 8 < len(found["also"]) < 30 and found["also"] == [f"U (msg_{n + 5:04d}): {notes[n]}" for n in range(len(found["also"]))]
    assert COUNTER.text(json.dumps(found)) <= 1.1 * 8 * 1.5 * 48
    more = it.ask("search_pages", {"query": "vault", "limit": 8})  # what the model has is not found again
    assert not {line.split(":")[0] for line in more["also"]} & {line.split(":")[0] for line in found["also"]}
    assert "also" not in it.ask("search_pages", {"query": "vault", "limit": 1})  # as much as was asked for, and no more


@examples(20)
@given(st.lists(st.tuples(st.sampled_from(["fault", "search"]), st.integers(1, 6), st.integers(0, 3),
                          st.integers(-50, 900)), max_size=12), st.integers(0, 600))
def test_invariant_10_a_turn_loads_no_more_than_its_tokens(
    asked: list[tuple[str, int, int, int]], limit: int
) -> None:
    it = Setting(faults_per_turn=5, fault_tokens=limit)
    it.hits = [Hit(p, 0, 1.0) for p in (0, 1, 4)]
    for kind, page, level, room in asked:
        before = sum(f.tokens for f in it.calls.faults)
        if kind == "fault":
            it.fault(f"msg_{page:04d}", level, room)
            assert sum(f.tokens for f in it.calls.faults) - before <= max(room, 0)
        else:
            it.ask("search_pages", {"query": "x"}, room)
    assert sum(f.tokens for f in it.calls.faults) <= limit
    assert sum(f.error is None and f.tokens > 0 for f in it.calls.faults) <= 5


def test_a_page_that_was_found_twice_is_told_once() -> None:
    """A medium stands in the index by its message and by the answer to it."""
    setting = Setting()
    setting.hits = [Hit(0, 0, 2.0), Hit(4, 0, 1.5), Hit(0, 0, 1.0)]
    found = setting.ask("search_pages", {"query": "short"})
    assert [entry["page_id"] for entry in found["results"]] == ["msg_0001", "msg_0005"]


# -- rounds


def test_a_call_is_ours_by_what_its_name_means() -> None:
    fault, own = call("page_fault", {}, "c1"), call("vm_page_fault", {}, "c2")
    other, limits = call("lookup", {}, "c3"), limits_of(1500)
    said = calls(fault, own, other)
    assert split_calls(said, choose_channel({}, limits)) == ([fault, own, other], [])  # nobody else's
    tools = {"tools": tools_of("lookup")}
    assert split_calls(said, choose_channel(tools, limits)) == ([fault, own], [other])
    taken = {"tools": tools_of("page_fault")}
    assert split_calls(said, choose_channel(taken, limits)) == ([own], [fault, other])
    assert split_calls(says("x"), choose_channel({}, limits)) == ([], [])


DECORATED = st.tuples(
    st.sampled_from(["", "functions.", "default_api.", "tools/", "multi_tool_use.", "vm_", " ", "Tool: "]),
    st.sampled_from(["page_fault", "PageFault", "Page-Fault", "PAGE_FAULT", "pageFault", "page.fault"]),
    st.sampled_from(["", "_tool", "Tool", ":0", ":12", "<|channel|>commentary", "<|constrain|>json", " ", "()"]),
).map("".join)


@examples(20)
@given(DECORATED)
def test_a_decorated_name_is_ours_unless_a_clients_tool_is_nearer(name: str) -> None:
    limits = limits_of(1500)
    for tools in ([], tools_of("lookup"), tools_of("fault")):
        assert choose_channel({"tools": tools}, limits).tool(name) == "page_fault"
    assert choose_channel({"tools": tools_of(name)}, limits).tool(name) is None
    beside = choose_channel({"tools": tools_of("page_fault")}, limits)
    assert beside.names["page_fault"] == "vm_page_fault"
    assert beside.tool("vm_" + name) in ("page_fault", None)


@pytest.mark.parametrize("name", ["page", "fault", "page_faults", "search", "pages", "homepage_fault", "", None, 3])
def test_another_name_is_not_ours(name: Any) -> None:
    assert choose_channel({"tools": tools_of("lookup")}, limits_of(1500)).tool(name) is None


def tools_of(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


def asked(*answers: Any, stream: bool = False, tools: Any = None, **fields: Any) -> Played:
    """A paged conversation whose model says these in turn."""
    player = Player(limits_of(2500))
    messages = [*grown(player, 20), {"role": "user", "content": "and now?"}]
    extra = {**fields, **({"tools": tools} if tools else {})}
    return player.ask(messages, script(*answers), stream=stream, **extra)


both = pytest.mark.parametrize("stream", [False, True])


@both
@pytest.mark.parametrize("name", ["functions.page_fault", "PageFault_tool", "page_fault:0", "load", "x.y z"])
def test_a_call_in_other_words_is_served_under_a_listed_name(stream: bool, name: str) -> None:
    played = asked(calls(call(name, {"page_id": "msg_0001"}, "c1")), says("so"), stream=stream)
    assert played.message is not None and played.message["content"] == "so"
    assert "tool_calls" not in played.message
    last = played.requests[-1]
    check_pairs(last)
    (made,) = [c for m in last["messages"] for c in m.get("tool_calls") or ()]
    assert made["function"]["name"] == "page_fault"
    assert "<page_fault" not in played.bodies[-1].decode() and len(tool_messages(last)) == 1


@both
def test_a_call_of_nobodys_tool_is_told_so_and_the_turn_goes_on(stream: bool) -> None:
    played = asked(calls(call("get_weather in", {"city": "Oslo"}, "c1")), says("so"), stream=stream)
    assert (played.message or {}).get("content") == "so"
    (result,) = tool_messages(played.requests[-1])
    assert "no such tool" in result["content"]
    (made,) = [c for m in played.requests[-1]["messages"] for c in m.get("tool_calls") or ()]
    assert made["function"]["name"] == "get_weather_in"  # what an API takes
    theirs = asked(calls(call("other", {"x": 1}, "c1")), says("so"), stream=stream, tools=tools_of("lookup"))
    assert theirs.message is not None and theirs.message["tool_calls"][0]["function"]["name"] == "other"


@both
@pytest.mark.parametrize("tools", [None, tools_of("lookup")])
def test_calls_within_a_call_are_served(stream: bool, tools: Any) -> None:
    uses = [{"recipient_name": f"functions.{n}", "parameters": a}
            for n, a in (("page_fault", {"page_id": "msg_0001"}), ("search_pages", {"query": "ink"}))]
    wrapped = call("multi_tool_use.parallel", {"tool_uses": uses}, "c1")
    played = asked(calls(wrapped), says("so"), stream=stream, tools=tools)
    assert (played.message or {}).get("content") == "so"
    check_pairs(played.requests[-1])
    assert len(tool_messages(played.requests[-1])) == 2


@both
@pytest.mark.parametrize("text", [
    '{"name": "page_fault", "arguments": {"page_id": "msg_0001"}}', "page_fault(page_id='msg_0001')",
    'Let me look:\n<tool_call>{"name": "functions.page_fault", "parameters": {"page_id": "msg_0001"}}',
])  # fmt: skip
def test_a_call_as_text_becomes_a_clean_exchange(stream: bool, text: str) -> None:
    played = asked(says(text), says("so"), stream=stream)
    assert played.message is not None and (played.message["content"] or "").endswith("so")
    assert "page_fault" not in played.message["content"]
    last = played.requests[-1]
    check_pairs(last)
    (made,) = [m for m in last["messages"] if m.get("tool_calls")]
    assert not made.get("content") and made["tool_calls"][0]["function"]["name"] == "page_fault"
    assert [f.page_id for f in played.answer.report.faults if f.error is None] == ["msg_0001"]


@both
@pytest.mark.parametrize("bad", [
    says('{"name": "page_fault", "arguments": {"pag'), says("search_pages(query="), says(""), says("<think>Hm.</think>"),
])  # fmt: skip
def test_a_round_without_an_answer_is_asked_once_more_without_tools(stream: bool, bad: Any) -> None:
    first = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"))
    played = asked(first, bad, says("so"), stream=stream)
    assert (played.message or {}).get("content", "").endswith("so") and len(played.bodies) == 3
    assert "tools" not in played.requests[-1] and "tool_choice" not in played.requests[-1]


@both
def test_a_preamble_and_a_call_that_cannot_be_served_are_no_answer(stream: bool) -> None:
    preamble = calls(call("get_weather", {"city": "Oslo"}, "c1"), text="Let me see.")
    played = asked(preamble, says("so"), stream=stream, logprobs=True, web_search_options={})
    assert len(played.bodies) == 2 and (played.message or {})["content"].endswith("so")
    assert "tool_calls" not in (played.message or {})


@both
def test_an_empty_answer_without_the_memorys_doing_is_upstreams_own(stream: bool) -> None:
    played = asked(says(""), says("so"), stream=stream)
    assert len(played.bodies) == 1 and not (played.message or {}).get("content")


@both
def test_a_model_that_only_calls_ends_with_an_error_and_never_with_an_empty_answer(stream: bool) -> None:
    played = asked(says("search_pages("), stream=stream)
    assert played.answer.refused is not None and played.answer.refused.status == 502
    assert len(played.bodies) == 3


@both
def test_a_call_as_text_beside_the_clients_own_call(stream: bool) -> None:
    own = call("lookup", {"q": "x"}, "c1")
    text = '{"name": "page_fault", "arguments": {"page_id": "msg_0001"}}'
    played = asked(calls(own, text=text), stream=stream, tools=tools_of("lookup"))
    assert played.message is not None and not played.message.get("content")
    assert [c["function"]["name"] for c in played.message["tool_calls"]] == ["lookup"]


@both
def test_an_old_function_call_is_a_call(stream: bool) -> None:
    old = {"role": "assistant", "content": None,
           "function_call": {"name": "page_fault", "arguments": '{"page_id": "msg_0001"}'}}
    played = asked(old, says("so"), stream=stream)
    assert (played.message or {}).get("content") == "so"
    check_pairs(played.requests[-1])


def test_equal_ids_in_one_round_are_told_apart() -> None:
    player = Player(limits_of(2500))
    messages = [*grown(player, 20), {"role": "user", "content": "and now?"}]
    same = calls(*(call("page_fault", {"page_id": "msg_0001"}, "same") for _ in range(50)))
    played = player.ask(messages, script(same, says("so")))
    request = played.requests[-1]
    check_pairs(request)
    assert len(tool_messages(request)) == 8


def test_a_round_that_the_window_cannot_take_is_not_kept() -> None:
    player = Player(limits_of(1300))
    messages = [*grown(player, 14), {"role": "user", "content": "and now?"}]
    chatty = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"), text="well " * 900)
    played = player.ask(messages, script(chatty, chatty))
    assert len(played.bodies) == 2 and played.requests[1]["tool_choice"] == "none"
    assert count_tokens(played.requests[1]) <= 1300
    assert played.message is not None and "tool_calls" not in played.message
