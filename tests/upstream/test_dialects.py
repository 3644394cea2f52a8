"""What litellm is given and what its answers become, on the shapes that its translation produces."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.sse import MessageBuilder
from proxy.memory.models import VMMode
from proxy.memory.vm_tools import build_vm_developer_message
from proxy.upstream.anthropic import is_claude
from proxy.upstream.dialects import Chunks, prepare, whole_answer

CLIENTS = {"role": "system", "content": "Be kind."}
MEMORY = {"role": "system", "content": build_vm_developer_message(VMMode.RELAXED, "{}", "")}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
MARK = {"type": "ephemeral"}


def user(content: Any = "Hi.") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(text: str = "Hello.") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def prepared(messages: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    request = {"model": "m", "messages": messages, **fields}
    before = copy.deepcopy(request)
    out = prepare(request, claude=True)
    assert request == before, "the caller's request is not changed"
    messages_out: list[dict[str, Any]] = out["messages"]
    return messages_out


def marked(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if "cache_control" in json.dumps(message)]


def test_a_request_without_the_memory_is_the_clients() -> None:
    request = {"model": "m", "messages": [CLIENTS, assistant(), user()]}
    assert prepare(request, claude=True) is request
    assert prepare({"messages": "odd"}, claude=True) == {"messages": "odd"}
    quoted = {"messages": [CLIENTS, user("What is <VM:RULES>?")]}
    assert prepare(quoted, claude=True) is quoted, "only the system message tells a paged request"


def test_a_window_that_begins_with_an_answer_gets_a_user_first() -> None:
    out = prepared([CLIENTS, MEMORY, assistant(), user()])
    assert [message["role"] for message in out] == ["system", "system", "user", "assistant", "user"]
    assert [message["role"] for message in prepared([MEMORY, user()])] == ["system", "user"]


def test_markers_at_the_stable_prefix_and_the_last_two_turns() -> None:
    first = [CLIENTS, MEMORY, user("1")]
    assert marked(prepared(first)) == [1, 2]
    second = [*first, assistant(), user("2")]
    assert marked(prepared(second)) == [1, 2, 4]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    third = [*second, called, {"role": "tool", "tool_call_id": "c", "content": "r"}]
    assert marked(prepared(third)) == [1, 4, 6]
    assert marked(prepare({"messages": third}, claude=False)["messages"]) == []


def test_the_marker_stands_on_the_last_part() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]
    *_, last = prepared([MEMORY, user(parts)])
    assert last["content"] == [parts[0], {**parts[1], "cache_control": MARK}]
    *_, odd = prepared([MEMORY, user([{"type": "video_url", "video_url": {}}])])
    assert "cache_control" not in json.dumps(odd)


@pytest.mark.parametrize(
    "where",
    [
        {"messages": [MEMORY, user([{"type": "text", "text": "x", "cache_control": MARK}])]},
        {"messages": [MEMORY, {**user(), "cache_control": MARK}]},
        {"messages": [MEMORY, user()], "tools": [{"type": "function", "cache_control": MARK}]},
        {"messages": [MEMORY, user()], "tools": [{"function": {"cache_control": MARK}}]},
    ],
)
def test_a_clients_own_markers_win(where: dict[str, Any]) -> None:
    assert prepare(where, claude=True)["messages"] == where["messages"]


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=12))
def test_markers_are_few_and_change_nothing_else(roles: list[str]) -> None:
    messages = [CLIENTS, MEMORY, *({"role": role, "content": f"{i}"} for i, role in enumerate(roles))]
    out = prepared(messages)
    assert len(marked(out)) <= 3
    plain = [{k: v for k, v in m.items() if k != "cache_control"} for m in out]
    assert plain in (messages, [*messages[:2], plain[2], *messages[2:]])


@pytest.mark.parametrize(
    ("provider", "model", "expected"),
    [
        ("anthropic", "claude-x", True),
        ("bedrock", "anthropic.claude-x", True),
        ("vertex_ai", "gemini-3", False),
        ("openai", "claude-shaped", False),
    ],
)
def test_who_is_claude(provider: str, model: str, expected: bool) -> None:
    assert is_claude(provider, model) is expected


def test_a_tool_round_whose_thinking_is_lost_goes_on_without() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c", "content": "r"}
    asks = {"model": "m", "reasoning_effort": "low", "thinking": {"type": "enabled"}}
    lost = {**asks, "messages": [user(), called, result]}
    assert prepare(lost, claude=True) == {"model": "m", "messages": lost["messages"]}
    assert prepare(lost, claude=False) is lost
    block = {"type": "thinking", "thinking": "t", "signature": "s"}
    kept = {**asks, "messages": [user(), {**called, "thinking_blocks": [block]}, result]}
    over = {**asks, "messages": [user(), called, result, assistant(), user()]}
    assert prepare(kept, claude=True) is kept and prepare(over, claude=True) is over


# ---------------------------------------------------------------- answers


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    chunks, builder = Chunks(), MessageBuilder()
    for delta in deltas:
        chunk = chunks.chunk({"choices": [{"index": 0, "delta": delta}]})
        builder.add(chunk["choices"][0]["delta"])
    return builder.build()


def thinking(text: str, signature: str | None = None) -> dict[str, Any]:
    block = {"type": "thinking", "thinking": text, **({"signature": signature} if signature else {})}
    return {
        "content": "",
        "reasoning_content": text,
        "thinking_blocks": [block],
        "provider_specific_fields": {"thinking_blocks": [block]},
    }


def test_pieces_of_thinking_become_the_blocks_that_were_signed() -> None:
    redacted = {"type": "redacted_thinking", "data": "x"}
    message = joined(
        [
            thinking("One "),
            thinking("thought."),
            thinking("", "sig1"),
            {"thinking_blocks": [redacted]},
            thinking("Two."),
            thinking("", "sig2"),
            {"tool_calls": [{"index": 0, **CALL}]},
        ]
    )
    assert message["thinking_blocks"] == [
        {"type": "thinking", "thinking": "One thought.", "signature": "sig1"},
        redacted,
        {"type": "thinking", "thinking": "Two.", "signature": "sig2"},
    ]
    assert message["reasoning_content"] == "One thought.Two."
    assert message["content"] is None and "provider_specific_fields" not in message


def test_thinking_that_is_never_signed_is_no_block() -> None:
    assert "thinking_blocks" not in joined([thinking("Half a th")])


def test_usage_stands_on_a_chunk_without_choices() -> None:
    chunks = Chunks()
    last = chunks.chunk({"choices": [{"index": 0, "delta": {}}], "usage": {"prompt_tokens": 1}})
    assert last["choices"] == [] and last["usage"] == {"prompt_tokens": 1}
    finish = chunks.chunk({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"a": 1}})
    assert finish["choices"][0]["finish_reason"] == "stop"


def test_a_whole_answer_is_openais() -> None:
    block = {"type": "thinking", "thinking": "t", "signature": "s"}
    message = {
        "role": "assistant",
        "tool_calls": [{**CALL, "index": 2}],
        "thinking_blocks": [block],
        "provider_specific_fields": {"thinking_blocks": [block], "citations": None},
    }
    out = whole_answer({"choices": [{"index": 0, "message": message}]})
    assert out["choices"][0] == {
        "index": 0,
        "finish_reason": "tool_calls",
        "logprobs": None,
        "message": {
            "role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL],
            "thinking_blocks": [block],
        },
    }  # fmt: skip
