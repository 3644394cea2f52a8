"""SessionManager: a conversation of any length stays in its window, and its pages come back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from proxy import SessionManager
from proxy.memory import LRU, CompressorRegistry, StorageTier, VMMode, WorkingSetConfig
from proxy.tokens import get_counter

COUNTER = get_counter("gpt-4o")
SMALL = WorkingSetConfig(max_l0_tokens=2_500, reserved_tokens=300)
ROOMY = WorkingSetConfig(max_l0_tokens=6_000, reserved_tokens=300)  # a fault begins no epoch
TOPICS = "harbour violin orchard glacier saddle lantern compass meadow anvil pottery".split()


def size(messages: list[dict[str, Any]]) -> int:
    return sum(COUNTER.message(m) for m in messages)


def text_of(messages: list[dict[str, Any]]) -> str:
    return json.dumps(messages, ensure_ascii=False)


async def fault(session: SessionManager, page_id: str, level: int = 2) -> dict[str, Any]:
    asked = {"page_id": page_id, "target_level": level}
    return await session.handle_tool_call("page_fault", json.dumps(asked))


async def grown(turns: int = 30, **options: Any) -> SessionManager:
    options = {"enable_vm": True, "vm_mode": VMMode.STRICT, "vm_config": SMALL, **options}
    session = SessionManager("s", "Be kind.", **options)
    for turn in range(turns):
        topic = TOPICS[turn % len(TOPICS)]
        await session.user_says(f"Tell me about the {topic} number {turn}. " + "Some filler. " * 12)
        await session.get_messages_for_llm()
        await session.ai_responds(f"The {topic} has code {turn * 31}. " + "More filler. " * 12)
    return session


async def test_without_vm_the_messages_are_the_plain_history() -> None:
    session = SessionManager(system_prompt="Be kind.")
    assert await session.user_says("hello") == session.session_id != SessionManager().session_id
    await session.ai_responds("hi", model="gpt-4o")
    await session.tool_used("add", {"a": 1}, result={"sum": 2})
    messages = await session.get_messages_for_llm()
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "assistant", "tool"]
    assert messages[:3] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
    ]
    assert messages[3]["tool_calls"][0]["function"]["name"] == "add"
    assert messages[4]["tool_call_id"] == messages[3]["tool_calls"][0]["id"]
    assert json.loads(messages[4]["content"]) == {"sum": 2}
    assert await session.get_messages_for_llm(include_system=False) == messages[1:]
    assert session.vm is None and session.get_tools() == []
    assert "error" in await fault(session, "msg_0001")


async def test_while_everything_fits_the_messages_stand_behind_constant_rules() -> None:
    session = SessionManager("s", "Be kind.", enable_vm=True, vm_mode=VMMode.STRICT)
    await session.user_says("What's the best auth approach?")
    first = await session.get_messages_for_llm()
    await session.ai_responds("I recommend JWT tokens...", model="gpt-4o")
    messages = await session.get_messages_for_llm(include_system=True)
    assert messages[: len(first)] == first
    assert messages[0]["content"] == "Be kind." and "<VM:RULES>" in messages[1]["content"]
    assert [m["content"] for m in messages[2:]] == [
        "What's the best auth approach?", "I recommend JWT tokens...",
    ]  # fmt: skip
    assert session.vm is not None
    assert [e.page_id for e in session.vm.page_table] == ["msg_0001", "msg_0002"]
    result = await fault(session, "msg_0001", 0)
    assert result["page"]["content"]["text"] == "What's the best auth approach?"


@pytest.mark.parametrize("mode", list(VMMode))
async def test_invariant_03_a_long_conversation_stays_in_its_window(mode: VMMode) -> None:
    session = SessionManager("s", "Be kind.", enable_vm=True, vm_mode=mode, vm_config=SMALL)
    for turn in range(40):
        await session.user_says(f"Question {turn}: " + "many words " * 40)
        messages, tools = await session.get_messages_for_llm(), COUNTER.tools(session.get_tools())
        assert size(messages) + tools <= 2_200
        assert messages[-1]["role"] == "user" and f"Question {turn}:" in text_of(messages[-1:])
        await session.ai_responds(f"Answer {turn}: " + "more words " * 40)
        assert size(await session.get_messages_for_llm()) + tools <= 2_500
    shown = text_of(await session.get_messages_for_llm())
    assert "<VM:CONTEXT>" in shown and "Be kind." in shown
    assert "Question 0: " + "many words " * 12 not in shown


async def test_evicted_pages_are_listed_and_come_back() -> None:
    session = await grown(60, vm_config=ROOMY)
    await session.user_says("Go on, please.")
    messages = await session.get_messages_for_llm()
    assert "<VM:MANIFEST_JSON>" in text_of(messages) and "has code 31." not in text_of(messages)
    result = await fault(session, "msg_0004", 0)
    assert "has code 31." in result["page"]["content"]["text"]
    found = await session.handle_tool_call("search_pages", '{"query": "lantern number 5 code"}')
    assert "msg_0012" in [r["page_id"] for r in found["results"]]
    after = await session.get_messages_for_llm()
    assert "has code 31." in text_of(after)
    assert after[: len(messages)] == messages  # the window only grows at its end
    assert [m["role"] for m in after[len(messages) :]] == ["assistant", "tool"] * 2
    await session.ai_responds("It was 31.")
    assert session.vm is not None
    entry = session.vm.page_table.lookup("msg_0004")
    assert entry is not None and entry.tier is StorageTier.L0


async def test_pages_come_before_the_call_when_the_user_asks_back() -> None:
    session = await grown(60, vm_mode=VMMode.PASSIVE, vm_config=ROOMY)
    await session.user_says("What was the code of the violin number 1?")
    messages = await session.get_messages_for_llm()
    assert "<VM:CONTEXT>" in messages[-1]["content"] and "(msg_0003" in messages[-1]["content"]
    assert "no more pages" in (await fault(session, "msg_0002"))["error"].lower()


async def test_a_turns_faults_are_limited_and_unknown_pages_told() -> None:
    session = await grown()
    await session.user_says("What now?")
    assert "no page" in (await fault(session, "msg_9999"))["error"]
    results = [await fault(session, f"msg_{n:04d}", 0) for n in range(1, 9)]
    served = [r for r in results if "page" in r]
    assert 1 <= len(served) <= 3 and "error" in results[-1]
    await session.ai_responds("Done.")
    await session.user_says("And again?")
    assert "page" in await fault(session, "msg_0012", 0)


async def test_invariant_07_the_same_conversation_gives_the_same_messages() -> None:
    one, other = await grown(), await grown()
    await one.user_says("next")
    await other.user_says("next")
    once = await one.get_messages_for_llm()
    assert once == await other.get_messages_for_llm() == await one.get_messages_for_llm()


async def test_a_message_that_was_not_answered_leaves_the_table_as_it_was() -> None:
    session = await grown()
    assert session.vm is not None
    other = await grown()
    assert other.vm is not None
    await session.user_says("first thought")
    await session.get_messages_for_llm()
    await session.user_says("second thought")
    messages = await session.get_messages_for_llm()
    assert [m["content"][-14:] for m in messages[-2:]] == ["first thought", "second thought"]
    assert session.vm.page_table.lookup("msg_0062") is not None
    await session.ai_responds("both noted")
    await other.user_says("first thought")
    await other.user_says("second thought")
    await other.ai_responds("both noted")
    assert session.vm.page_table == other.vm.page_table
    assert session.vm.page_table.lookup("msg_0062") is not None


async def test_tool_outputs_are_paged_with_their_calls() -> None:
    session = SessionManager("s", enable_vm=True, vm_mode=VMMode.STRICT, vm_config=SMALL)
    for turn in range(20):
        await session.user_says(f"Look up {turn}")
        await session.get_messages_for_llm()
        await session.tool_used("lookup", {"n": turn}, result="row " * 60 + str(turn))
        messages = await session.get_messages_for_llm()
        calls = [c["id"] for m in messages for c in m.get("tool_calls", ())]
        assert calls == [m["tool_call_id"] for m in messages if m["role"] == "tool"]
        assert size(messages) <= 2_200
        await session.ai_responds(f"Found {turn}")


async def test_options_and_names_are_checked() -> None:
    session = SessionManager(
        enable_vm=True,
        vm_mode=VMMode.STRICT,
        vm_config=WorkingSetConfig(max_l0_tokens=32_000),
        vm_eviction_policy=LRU(),
        vm_compressor_registry=CompressorRegistry.default(),
    )
    assert session.vm is not None and session.vm.config.max_l0_tokens == 32_000
    assert [t["function"]["name"] for t in session.get_tools()] == ["page_fault", "search_pages"]
    assert SessionManager(enable_vm=True, vm_mode=VMMode.PASSIVE).get_tools() == []
    for wrong in ("", "x" * 257):
        with pytest.raises(ValueError, match="session id"):
            SessionManager(wrong)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, proxy; print(sorted(m for m in sys.modules if m.startswith('proxy')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "['proxy']"
    with pytest.raises(ImportError):
        from proxy import Nothing  # type: ignore[attr-defined]  # noqa: F401
