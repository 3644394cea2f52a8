"""The manager: messages in, requests out, nothing lost between."""

from __future__ import annotations

import json
import timeit
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory import (
    CompressionLevel,
    MemoryManager,
    MemoryPage,
    Modality,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    PageType,
    StorageTier,
    VMMode,
    WorkingSetConfig,
)
from tests.examples import examples

SMALL = WorkingSetConfig(max_l0_tokens=500, reserved_tokens=100)
ROOM = 400
PNG = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png", "detail": "low"}}


def text(number: int) -> str:
    return f"Message {number} decides that parameter p{number} is {number * 7}. " + "More words to fill the page with. " * 8


def call(name: str, arguments: Any, call_id: str = "c1") -> dict[str, Any]:
    raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": raw}}


def response(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, "tool_calls": list(calls)}}]}


async def grown(pages: int = 30, **options: Any) -> MemoryManager:
    memory = MemoryManager("s", SMALL, **options)
    for number in range(pages):
        await memory.add_user_message(text(number))
        await memory.check_and_evict()
        memory.new_turn()
    return memory


def used(memory: MemoryManager) -> int:
    return memory.working_set.get_stats().tokens_used


async def test_invariant_03_the_window_stays_within_its_room() -> None:
    memory = MemoryManager("s", SMALL)
    for number in range(40):
        await memory.add_user_message(text(number))
        await memory.check_and_evict()
        assert used(memory) <= ROOM * 0.9
        memory.new_turn()
    resident = memory.page_table.resident()
    assert resident[-1].page_id == "msg_0040" and resident[-1].level == 0
    assert {e.level for e in resident} > {CompressionLevel.FULL}  # compressed before evicted
    ops = [m.op for m in memory.log.entries]
    assert ops.index(MutationType.COMPRESS) < ops.index(MutationType.EVICT)


async def test_invariant_04_a_full_body_is_never_lost() -> None:
    memory = await grown()
    for number in range(30):
        page = await memory._get_page(f"msg_{number + 1:04d}")
        assert page is not None and page.content == text(number)
    evicted = memory.page_table.get_by_tier(StorageTier.L2)
    assert evicted and all(e.artifact_id for e in evicted)
    assert all(e.page_id not in memory._pages for e in evicted)  # RAM is not the store


async def test_the_log_replays_to_the_table_and_answers_for_any_turn() -> None:
    memory = await grown(12)
    assert memory.log.replay() == memory.page_table
    now = [e.page_id for e in memory.page_table.resident()]
    assert memory.get_context_at_turn(memory.turn) == now
    assert memory.get_context_at_turn(1) == ["msg_0001"]


async def test_a_request_has_rules_manifest_context_and_tools() -> None:
    memory = await grown()
    await memory.add_user_message("What was p3?")
    request = memory.build_request("What was p3?")
    developer, user = request["messages"]
    assert (developer["role"], user) == ("developer", {"role": "user", "content": "What was p3?"})
    for tag in ("<VM:RULES>", "<VM:MANIFEST_JSON>", "<VM:CONTEXT>"):
        assert tag in developer["content"]
    assert "What was p3?" not in developer["content"]
    raw = developer["content"].split("<VM:MANIFEST_JSON>\n")[1].split("\n</VM")[0]
    listed = json.loads(raw)
    assert listed["total_available"] == len(memory.page_table) - len(memory.page_table.resident())
    assert [t["function"]["name"] for t in request["tools"]] == ["page_fault", "search_pages"]
    passive = MemoryManager("s", mode=VMMode.PASSIVE).build_request("hi")
    assert "tools" not in passive and "MANIFEST_JSON>\n" not in passive["messages"][0]["content"]


async def test_the_models_calls_are_answered() -> None:
    memory = await grown()
    calls = [
        call("search_pages", {"query": "Message 2 decides"}, "a"),
        call("page_fault", {"page_id": "msg_0002", "target_level": 0}, "b"),
        call("page_fault", "{", "c"),
        call("weather", {}, "d"),
    ]
    result = await memory.process_response(response(*calls))
    assert isinstance(result, dict)
    told = {m["tool_call_id"]: json.loads(m["content"]) for m in result["tool_results"]}
    assert told["a"]["results"] and told["a"]["total_available"] > 0
    assert told["b"]["page"]["content"]["text"] == text(1)
    assert "JSON" in told["c"]["error"] and "weather" in told["d"]["error"]
    assert text(1)[:30] in memory.build_request("go on")["messages"][0]["content"]
    assert await memory.process_response(response(content="done")) == "done"
    assert memory.metrics.recalls == 2 and memory.metrics.faults == 1
    many = await memory.process_response(response(*[call("page_fault", {"page_id": "x"}, str(n)) for n in range(12)]))
    assert isinstance(many, dict) and len(many["tool_results"]) == 12
    assert "Too many" in many["tool_results"][-1]["content"]


async def test_an_image_is_a_page_and_returns_in_a_users_message() -> None:
    memory = MemoryManager("s")
    page = await memory.add_user_message([{"type": "text", "text": "my cat"}, PNG])
    assert page.page_id == "msg_0001" and "my cat" in page.content
    image = memory.page_table.lookup("img_0001_1")
    assert image is not None and image.modality is Modality.IMAGE and image.l0_tokens >= 85
    request = memory.build_request("what is it?")
    content = request["messages"][1]["content"]
    assert PNG in content and content[-1] == {"type": "text", "text": "what is it?"}
    await memory._evict(image)
    found = await memory.process_response(
        response(call("page_fault", {"page_id": "img_0001_1", "target_level": 0}))
    )
    assert isinstance(found, dict)
    tool, user = found["tool_results"]
    assert json.loads(tool["content"])["page"]["modality"] == "image"
    assert user["role"] == "user" and PNG in user["content"]


async def test_tool_results_answers_and_pages_of_ones_own() -> None:
    memory = MemoryManager("s")
    shown = await memory.add_tool_result({"rows": [1, 2]}, "query", {"table": "users"})
    assert shown.modality is Modality.STRUCTURED and shown.content.startswith("query({")
    await memory.add_assistant_message("Two rows.")
    await memory.add_page(
        MemoryPage(page_id="claim_0001", page_type=PageType.CLAIM, content="users has two rows",
                   storage_tier=StorageTier.L0, pinned=True)
    )  # fmt: skip
    context = memory.build_request("next")["messages"][0]["content"]
    for line in ("J (msg_0001): ", 'A (msg_0002): "Two rows."', 'S (claim_0001): "users'):
        assert line in context
    with pytest.raises(ValueError, match="created before"):
        memory.register(MemoryPage(page_id="claim_0001", content="other"))


async def test_pinned_pages_stay() -> None:
    memory = MemoryManager("s", SMALL)
    await memory.add_page(
        MemoryPage(page_id="claim_0001", content="keep me", storage_tier=StorageTier.L0, pinned=True)
    )
    for number in range(30):
        await memory.add_user_message(text(number))
        await memory.check_and_evict()
        memory.new_turn()
    entry = memory.page_table.lookup("claim_0001")
    assert entry is not None and entry.tier is StorageTier.L0 and entry.level == 0


async def test_a_checkpoint_has_the_full_pages_of_the_window() -> None:
    memory = await grown()
    pages = await memory.storage.load_checkpoint(await memory.checkpoint("segment_1"))
    resident = [e.page_id for e in memory.page_table.resident()]
    assert [p.page_id for p in pages] == resident
    assert [p.content for p in pages] == [text(int(i[4:]) - 1) for i in resident]


async def test_a_closed_segment_leaves_a_line_and_a_checkpoint() -> None:
    memory = MemoryManager("s")
    for said in ("We decided to use PostgreSQL for the archive.", "Noted.", "What next?", "Tests."):
        await memory.add_user_message(said)
    closed = await memory.close_segment(keep_last=2)
    assert closed is not None
    assert [e.page_id for e in memory.page_table.resident()] == ["msg_0003", "msg_0004"]
    kept = await memory.storage.load_checkpoint(closed.checkpoint_id)
    assert [p.page_id for p in kept] == ["msg_0001", "msg_0002"]
    assert closed.line.page_id == "index_seg_01" and "PostgreSQL" in closed.line.text()
    assert memory.provenance.derives_from("index_seg_01") == ["msg_0001", "msg_0002"]
    assert await memory.close_segment() is None
    back = await memory.page_fault("msg_0001", 0)
    assert back.page is not None and "PostgreSQL" in back.page.content
    assert memory.log.replay() == memory.page_table


def test_a_turn_can_hold_the_core_over_its_own_table() -> None:
    table, log = PageTable(), MutationLogLite()
    core = MemoryManager("", table=table, log=log)
    core.apply(PageMutation(MutationType.CREATE, "msg_0001", 3, tier=StorageTier.L0, tokens=9))
    assert table.lookup("msg_0001") is not None and len(log) == 1
    assert core.get_context_at_turn(3) == ["msg_0001"]
    seconds = min(timeit.repeat(lambda: MemoryManager("", table=table, log=log), number=1000, repeat=5))
    assert seconds * 1000 < 100  # µs each; about 2 here


@examples(40)
@given(st.lists(st.sampled_from(["user", "long", "tool", "turn", "fault", "evict"]), max_size=40))
async def test_invariant_07_any_history_replays(steps: list[str]) -> None:
    async def played() -> MemoryManager:
        memory = MemoryManager("s", SMALL)
        for number, step in enumerate(steps):
            if step == "user":
                await memory.add_user_message(f"words {number}")
            elif step == "long":
                await memory.add_assistant_message(text(number))
            elif step == "tool":
                await memory.add_tool_result({"n": number})
            elif step == "turn":
                memory.new_turn()
            elif step == "fault":
                await memory.page_fault(f"msg_{number % 7 + 1:04d}", number % 4)
            else:
                await memory.check_and_evict()
        return memory

    memory, again = await played(), await played()
    assert memory.log.entries == again.log.entries
    assert memory.build_request("x") == again.build_request("x")
    assert memory.log.replay() == memory.page_table
