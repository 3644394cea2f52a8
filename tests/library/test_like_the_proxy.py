"""What the library builds is what the proxy sends: the same history through both, compared by request."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import SessionManager
from proxy.config import load_config
from proxy.library import MemoryManager
from proxy.memory import VMMode, WorkingSetConfig
from proxy.model_limits import limits_of
from proxy.tokens import model_card
from proxy.upstream import BytesReply
from tests.api.test_chat import JSON, Client, client
from tests.e2e.data import load_locomo

MODEL = "gpt-4o"
Message = dict[str, Any]


def said(message: Message) -> BytesReply:
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    choice = {"index": 0, "message": message, "finish_reason": reason}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
    return BytesReply(200, JSON, json.dumps(body).encode())


def calls(number: int, *asked: tuple[str, Any]) -> Message:
    made = [
        {"id": f"call_{number}_{i}", "type": "function",
         "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(asked)
    ]  # fmt: skip
    return {"role": "assistant", "content": None, "tool_calls": made}


def sent(body: bytes) -> tuple[bytes, bytes]:
    """The messages and the tools of a request."""
    found = msgspec.json.decode(body)
    return as_bytes(found["messages"]), as_bytes(found.get("tools"))


def as_bytes(value: Any) -> bytes:
    """The order of keys counts, too."""
    return msgspec.json.encode(value)


async def proxy_bodies(one: Client, history: Sequence[Message], *replies: Message) -> list[bytes]:
    one.upstream.replies, one.upstream.bodies = [said(message) for message in replies], []
    status, _ = await one.ask(msgspec.json.encode({"model": MODEL, "messages": history}))
    assert status == 200
    return one.upstream.bodies


def talk(turns: int) -> list[Message]:
    """Pairs of a question and an answer, from a real conversation."""
    texts = [message["content"] for message in load_locomo()[0].messages][: 2 * turns]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("mode", "window"), [(VMMode.STRICT, 3_000), (VMMode.RELAXED, 6_000), (VMMode.PASSIVE, 3_000)]
)
async def test_a_real_conversation_is_sent_as_the_proxy_sends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: VMMode, window: int
) -> None:
    now_s = 1_790_000_000.0
    monkeypatch.setattr(time, "time", lambda: now_s)  # both have the same clock
    l0 = {"tiers.l0.tokens": window, "tiers.l0.reserve_tokens": 700, "memory.mode": mode.value}
    memory = MemoryManager(
        "s", WorkingSetConfig(max_l0_tokens=window, reserved_tokens=700), mode=mode, system_prompt="Be kind."
    )
    history: list[Message] = [{"role": "system", "content": "Be kind."}]
    paged = faulted = 0
    async with client(tmp_path, **sections(l0)) as one:
        for number, message in enumerate(talk(100)):
            now_s += 20_000
            if message["role"] == "user":
                history.append(message)
                await memory.add_user_message(message["content"])
                continue
            asked: list[Message] = []
            if mode is not VMMode.PASSIVE and memory.paged and number % 5 == 0:
                asked = [
                    calls(number, ("search_pages", {"query": history[3]["content"][:60]})),
                    calls(number + 1, ("page_fault", {"page_id": "msg_0002", "target_level": 0}),
                          ("page_fault", {"page_id": "msg_0005", "target_level": 1})),
                ]  # fmt: skip
            bodies = await proxy_bodies(one, history, *asked, message)
            for i, body in enumerate(bodies):
                request = memory.request()
                assert (as_bytes(request["messages"]), as_bytes(request.get("tools"))) == sent(body), (number, i)
                if i < len(asked):
                    told = await memory.process_response({"choices": [{"message": asked[i]}]})
                    assert isinstance(told, dict) and len(told["tool_results"]) == len(asked[i]["tool_calls"])
                    faulted += 1
            paged += memory.paged
            history.append(message)
            await memory.add_assistant_message(message["content"])
    assert paged > 25 and (faulted > 5 or mode is VMMode.PASSIVE)


def sections(flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted flags by their first name."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in flags.items():
        section, _, rest = name.partition(".")
        found.setdefault(section, {})[rest] = value
    return found


def test_the_bounds_are_the_configurations() -> None:
    """Without a `config` of the caller's the window is the model's, as the proxy has it."""
    settings = load_config(None, {}, {"tiers.l0.tokens": 5_000, "pages.max_tokens": 300})
    memory = MemoryManager("s", mode=VMMode.RELAXED, settings=settings)
    assert memory.limits == limits_of(settings, MODEL, {})
    assert MemoryManager(model=MODEL).config.max_l0_tokens == model_card(MODEL).window_tokens


async def test_what_is_said_of_a_model_holds_for_the_library_too(tmp_path: Path) -> None:
    """Its template takes no system message; its tokens are counted by another encoding."""
    override = {"system_role": False, "tokenizer": "cl100k_base", "window_tokens": 3_000}
    flags = {"memory.mode": "relaxed", "memory.eviction": "lru", f"models.{MODEL}": override}
    settings = load_config(None, {}, flags)
    memory = MemoryManager("s", mode=VMMode.RELAXED, settings=settings)
    history: list[Message] = []
    async with client(tmp_path, **sections(flags)) as one:
        for message in talk(60):
            if message["role"] == "user":
                history.append(message)
                await memory.add_user_message(message["content"])
                continue
            (body,) = await proxy_bodies(one, history, message)
            request = memory.request()
            assert (as_bytes(request["messages"]), as_bytes(request.get("tools"))) == sent(body)
            history.append(message)
            await memory.add_assistant_message(message["content"])
    assert memory.paged and request["messages"][0]["role"] == "user"


async def test_a_session_sends_the_same_behind_its_rules(tmp_path: Path) -> None:
    window = WorkingSetConfig(max_l0_tokens=4_000, reserved_tokens=700)
    session = SessionManager("s", enable_vm=True, vm_mode=VMMode.RELAXED, vm_config=window)
    assert session.vm is not None
    history: list[Message] = []
    l0 = {"tiers.l0.tokens": 4_000, "tiers.l0.reserve_tokens": 700}
    async with client(tmp_path, **sections(l0)) as one:
        for message in talk(80):
            if message["role"] == "user":
                history.append(message)
                await session.user_says(message["content"])
                continue
            (body,) = await proxy_bodies(one, history, message)
            messages, tools = await session.get_messages_for_llm(), session.get_tools()
            if session.vm.paged:
                assert (as_bytes(messages), as_bytes(tools)) == sent(body)
            else:  # the seeds' VM:CONTEXT, as long as it fits
                assert as_bytes([m for m in messages if "<VM:RULES>" not in m["content"]]) == sent(body)[0]
            history.append(message)
            await session.ai_responds(message["content"])
    assert session.vm.paged
