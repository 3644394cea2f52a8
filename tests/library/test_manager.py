"""The manager: messages in, requests out, nothing lost between."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import load_config
from proxy.library import MemoryManager
from proxy.memory import MemoryPage, Modality, StorageTier, VMMode, WorkingSetConfig
from proxy.tokens import get_counter
from tests.examples import examples

COUNTER = get_counter("gpt-4o")
ROOMY = WorkingSetConfig(max_l0_tokens=6_000, reserved_tokens=300)  # a fault begins no epoch
SMALL = WorkingSetConfig(max_l0_tokens=2_000, reserved_tokens=200)
PNG = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png", "detail": "low"}}


def text(number: int) -> str:
    return f"Message {number} decides that parameter p{number} is {number * 7}. " + "More words to fill the page with. " * 8


def call(name: str, arguments: Any, call_id: str | None = "c1") -> dict[str, Any]:
    raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": raw}}


def response(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, "tool_calls": list(calls)}}]}


async def fault(memory: MemoryManager, page_id: str, level: int = 2) -> Any:
    return await memory.call("page_fault", json.dumps({"page_id": page_id, "target_level": level}))


async def search(memory: MemoryManager, query: str) -> Any:
    return await memory.call("search_pages", json.dumps({"query": query}))


def tool_result(memory: MemoryManager, number: int, content: str) -> MemoryPage:
    made = call("query", {"table": "users"}, f"q{number}")
    memory.add_message({"role": "assistant", "content": None, "tool_calls": [made]})
    return memory.add_message({"role": "tool", "tool_call_id": f"q{number}", "content": content})


async def grown(turns: int = 20, config: WorkingSetConfig = SMALL, **options: Any) -> MemoryManager:
    memory = MemoryManager("s", config, **options)
    for number in range(turns):
        await memory.add_user_message(text(2 * number + 1))
        memory.request()
        await memory.add_assistant_message(text(2 * number + 2))
    return memory


async def test_invariant_04_a_full_body_is_never_lost() -> None:
    memory = await grown()
    evicted = memory.page_table.get_by_tier(StorageTier.L2)
    assert len(evicted) > 20
    for number in range(1, 41):
        page = await memory._get_page(f"msg_{number:04d}")
        assert page is not None and page.content == text(number) == memory._pages[page.page_id].content
    assert memory._pages.get("msg_0041") is None and "msg_0041" not in memory._pages


async def test_the_working_set_and_the_tlb_are_views_of_the_table() -> None:
    memory = await grown()
    now = [e.page_id for e in memory.page_table.resident()]
    assert now == memory.working_set.get_l0_page_ids()
    assert memory.working_set.get_stats().l0_pages == len(now)
    assert memory.combined.lookup(now[0]) is memory.combined.lookup(now[0]) and memory.tlb.get_stats().hits == 1


async def test_a_request_has_rules_manifest_and_tools_once_pages_are_outside() -> None:
    few = MemoryManager("s").build_request("hi")
    assert few == {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
    memory = await grown()
    request = memory.build_request("What was p3?")
    developer, *_, user = request["messages"]
    assert developer["role"] == "developer" and user["content"].endswith("What was p3?")
    raw = developer["content"].split("<VM:MANIFEST_JSON>\n")[1].split("\n</VM")[0]
    assert json.loads(raw)["total_available"] > 20
    assert [t["function"]["name"] for t in request["tools"]] == ["page_fault", "search_pages"]
    assert memory.build_request("What was p3?") == request  # it is not said twice
    passive = (await grown(mode=VMMode.PASSIVE)).build_request("go on")
    assert "tools" not in passive and "<VM:RULES>" in passive["messages"][0]["content"]


async def test_the_models_calls_are_answered_in_one_exchange() -> None:
    memory = await grown(60, ROOMY)
    before = memory.build_request("go on")
    asked = [
        call("functions.search_pages", {"query": "parameter p2"}, "a"),
        call("page_fault", {"page_id": "msg_0011", "target_level": 0}, "b"),
        call("page_fault", "{", None),
        call("weather", {}, "d"),
    ]
    result = await memory.process_response(response(*asked, content="Let me look."))
    assert isinstance(result, dict)
    found, page, unread, unknown = (json.loads(m["content"]) for m in result["tool_results"])
    assert found["results"] and found["total_available"] > 0
    assert page["page"]["content"]["text"] == text(11)
    assert "JSON" in unread["error"] and unknown == {"error": "Unknown tool: weather"}
    after = memory.request()["messages"]
    assert after[: len(before["messages"])] == before["messages"]
    assert [m["role"] for m in after[len(before["messages"]) :]] == ["assistant", "tool", "tool", "tool"]
    assert await memory.process_response(response(content="done")) == "done"
    many = [call("page_fault", {"page_id": "msg_0003"}, f"m{n}") for n in range(12)]
    told = await memory.process_response(response(*many))
    assert isinstance(told, dict) and len(told["tool_results"]) == 12
    assert "Too many" in told["tool_results"][-1]["content"]


async def test_calls_are_answered_while_everything_fits() -> None:
    memory = MemoryManager("s")
    await memory.add_user_message("We chose JWT.")
    assert (await fault(memory, "msg_0001", 0))["page"]["content"]["text"] == "We chose JWT."
    assert (await search(memory, "JWT"))["results"] == []
    assert "error" in await search(memory, "") and "error" in await memory.call("page_fault", "{")
    assert "no page" in (await fault(memory, "msg_0009"))["error"]


async def test_an_image_is_a_page_and_returns_in_a_users_message() -> None:
    memory = MemoryManager("s", SMALL)
    page = await memory.add_user_message([{"type": "text", "text": "my cat"}, PNG])
    assert page.page_id == "msg_0001" and "my cat" in page.content
    image = memory.page_table.lookup("img_0001_1")
    assert image is not None and image.modality is Modality.IMAGE and image.l0_tokens >= 85
    await memory.add_assistant_message("A tabby.")
    for number in range(20):  # later ones take its place
        await memory.add_user_message([{"type": "text", "text": "my cat"}, PNG])
        await memory.add_assistant_message(text(number))
    memory.build_request("go on")
    image = memory.page_table.lookup("img_0001_1")
    assert image is not None
    memory.page_table.update_location("img_0001_1", StorageTier.L2)
    found = await memory.process_response(response(call("page_fault", {"page_id": "img_0001_1", "target_level": 0})))
    assert isinstance(found, dict)
    tool, user = found["tool_results"]
    assert json.loads(tool["content"])["page"]["modality"] == "image"
    assert user["role"] == "user" and PNG in user["content"]


async def test_a_tools_result_stands_behind_its_call() -> None:
    memory = MemoryManager("s")
    await memory.add_user_message("How many rows?")
    assert tool_result(memory, 1, '{"rows":[1,2]}').modality is Modality.STRUCTURED
    assert memory._pages["msg_0003"].content.startswith("query({")
    assert [m["role"] for m in memory.request()["messages"]] == ["user", "assistant", "tool"]


async def test_what_leaves_is_told_before_the_request() -> None:
    memory = MemoryManager("s", SMALL)
    gone: list[str] = []
    for number in range(30):
        await memory.add_user_message(text(number))
        gone += await memory.check_and_evict()
        await memory.add_assistant_message("Yes.")
    assert gone and "msg_0001" in gone


@examples(12)
@given(st.lists(st.sampled_from(["user", "long", "tool", "answer", "fault", "search", "show"]), max_size=40))
async def test_invariants_03_and_07_any_history_replays_and_fits(steps: list[str]) -> None:
    async def played() -> tuple[MemoryManager, list[Any]]:
        memory, requests = MemoryManager("s", SMALL), []
        for number, step in enumerate(steps):
            if step == "user":
                await memory.add_user_message(f"words {number}")
            elif step == "long":
                await memory.add_user_message(text(number) * 3)
            elif step == "tool":
                tool_result(memory, number, json.dumps({"n": number}))
            elif step == "answer":
                await memory.add_assistant_message(text(number))
            elif step == "fault":
                await fault(memory, f"msg_{number % 7 + 1:04d}", number % 4)
            elif step == "search":
                await search(memory, f"parameter p{number}")
            else:
                requests.append(memory.request())
        return memory, requests

    memory, requests = await played()
    again, same = await played()
    assert requests == same and memory.page_table == again.page_table
    for request in requests:
        tokens = sum(COUNTER.message(m) for m in request["messages"]) + COUNTER.tools(request.get("tools") or [])
        assert tokens <= 1_800


async def test_a_request_is_the_same_until_something_is_said() -> None:
    memory = MemoryManager("s", SMALL)
    assert memory.request()["messages"] == [] and not memory.paged
    for number in range(20):
        await memory.add_user_message(text(number))
        assert memory.request() == memory.request()
        await memory.add_assistant_message(f"Answer {number}")
        assert memory.request() == memory.request()
    assert memory.request()["messages"][-1]["content"] == "Answer 19"


async def test_a_turn_that_is_given_up_leaves_no_trace() -> None:
    memory, other = await grown(), await grown()
    for said in ("first", "second"):
        await memory.add_user_message(said)
        await other.add_user_message(said)
        memory.request()
    await memory.add_user_message("third")
    assert memory.page_table == other.page_table
    await other.add_user_message("third")
    assert memory.request() == other.request()


async def test_vm_calls_are_welcome_only_while_a_turn_is_open() -> None:
    memory = await grown(config=ROOMY, turns=60)
    assert "no more pages" in (await fault(memory, "msg_0002"))["error"].lower()
    await memory.add_user_message("go on")
    before = memory.request()["messages"]
    asked = call("page_fault", {"page_id": "msg_0002"})
    told = await memory.process_response(response(asked))
    assert isinstance(told, dict) and text(2) in json.loads(told["tool_results"][0]["content"])["page"]["content"]["text"]
    exchange = [{"role": "assistant", "content": None, "tool_calls": [asked]}, *told["tool_results"]]
    assert memory.request()["messages"] == [*before, *exchange]


async def test_a_long_message_is_one_page_to_its_sender_and_several_in_the_table() -> None:
    memory = MemoryManager("s", settings=load_config(None, {}, {"pages.max_tokens": 64}))
    page = await memory.add_user_message("many words " * 90)
    assert (page.page_id, page.content) == ("msg_0001", "many words " * 90)
    ids = [entry.page_id for entry in memory.page_table]
    assert len(ids) > 2 and ids[:2] == ["msg_0001.1", "msg_0001.2"]
    assert "".join([memory._pages[i].content for i in ids]) == page.content


async def test_the_table_is_there_before_a_turn_pages() -> None:
    memory = MemoryManager("s")
    await memory.add_user_message("a")
    await memory.add_assistant_message("b")
    await memory.add_user_message("c")
    entries = [(e.page_id, e.tier, e.created_turn) for e in memory.page_table]
    assert entries == [(f"msg_{n:04d}", StorageTier.L0, 1 + n // 3) for n in (1, 2, 3)]


async def test_an_importance_of_the_callers_holds_at_once_and_in_later_turns() -> None:
    memory = await grown()
    await memory.add_user_message("go on")
    memory.request()
    memory.working_set.set_importance("msg_0003", 0.9)
    await memory.add_user_message("no, wait")  # the turn that was open is given up
    for _ in range(2):
        entry = memory.page_table.lookup("msg_0003")
        assert entry is not None and entry.importance == 0.9
        await memory.add_assistant_message("Well?")
        memory.request()


async def test_a_system_message_is_the_managers_own() -> None:
    memory = MemoryManager("s")
    with pytest.raises(ValueError, match="system_prompt"):
        memory.add_message({"role": "system", "content": "Be kind."})
