"""What OpenAI's API takes and Anthropic's refuses: said in other words, left out, or refused; and the cache markers of a window."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ApiError
from proxy.memory.models import VMMode
from proxy.memory.vm_tools import build_vm_developer_message
from proxy.upstream.dialects import ANTHROPIC, prepare

Json = dict[str, Any]
ASK: Json = {"role": "user", "content": "Hi."}
CLIENTS: Json = {"role": "system", "content": "Be kind."}
MEMORY: Json = {"role": "system", "content": build_vm_developer_message(VMMode.RELAXED, "{}", "")}
ASSISTANT: Json = {"role": "assistant", "content": "Hello."}
MARK = {"type": "ephemeral"}


def right(messages: list[Json], **fields: Any) -> list[Json]:
    request = {"model": "m", "messages": messages, **fields}
    before = copy.deepcopy(request)
    out: list[Json] = prepare(request, ANTHROPIC)["messages"]
    assert request == before, "the caller's request is not changed"
    return out


def calling(*ids: str) -> Json:
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(id: str, content: str = "found") -> Json:
    return {"role": "tool", "tool_call_id": id, "content": content}


def ids(messages: list[Json]) -> list[Any]:
    """Of calls and results in their order."""
    out: list[Any] = []
    for message in messages:
        out += [call["id"] for call in message.get("tool_calls") or ()]
        out += [message["tool_call_id"]] if "tool_call_id" in message else []
    return out


def test_what_is_right_is_the_callers() -> None:
    request = {"model": "m", "messages": [ASK, calling("a", "b"), result("a"), result("b")], "n": 2}
    assert prepare(request, ANTHROPIC) == request


def test_a_repeated_call_id_becomes_one_of_its_own_with_its_result() -> None:
    turn = [calling("call_0"), result("call_0")]
    assert ids(right([ASK, *turn, *turn, *turn])) == [
        "call_0", "call_0", "call_0_2", "call_0_2", "call_0_3", "call_0_3",
    ]  # fmt: skip


def test_the_same_id_twice_in_one_message_is_answered_in_order() -> None:
    out = right([ASK, calling("c", "c"), result("c", "first"), result("c", "second")])
    assert ids(out) == ["c", "c_2", "c", "c_2"]
    assert [m["content"] for m in out[2:]] == ["first", "second"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), max_size=6), st.integers(0, 6))
def test_ids_are_unique_answered_and_the_same_however_the_conversation_goes_on(
    turns: list[list[str]], upto: int
) -> None:
    """The last is what keeps the provider's cache."""
    def messages(count: int) -> list[Json]:
        made = [ASK]
        for named in turns[:count]:
            made += [calling(*named), *(result(id) for id in named), ASK]
        return made

    whole = right(messages(len(turns)))
    called = [call["id"] for m in whole for call in m.get("tool_calls") or ()]
    answered = [m["tool_call_id"] for m in whole if m["role"] == "tool"]
    assert len(called) == len(set(called)) and sorted(called) == sorted(answered)
    before = right(messages(upto))
    assert whole[: len(before)] == before


def test_a_refusal_is_said_as_text() -> None:
    by_key = {"role": "assistant", "content": None, "refusal": "I cannot."}
    by_part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I must not."}]}
    out = right([ASK, by_key, ASK, by_part, ASK])
    assert out[1]["content"] == "I cannot."
    assert out[3]["content"] == [{"type": "text", "text": "I must not."}]


def test_empty_texts_are_left_out() -> None:
    empty = {"role": "assistant", "content": ""}
    parts = [{"type": "text", "text": ""}, {"type": "text", "text": "a"}]
    out = right([ASK, empty, {"role": "user", "content": parts}])
    assert out == [ASK, {"role": "user", "content": parts[1:]}]


def test_system_messages_alone_get_a_user_to_begin() -> None:
    system = {"role": "system", "content": "Say hello."}
    assert right([system]) == [system, {"role": "user", "content": "(begin)"}]


@pytest.mark.parametrize(
    ("field", "idle", "meant"),
    [("n", 1, 2), ("logprobs", False, True), ("logit_bias", {}, {"1": 5}), ("store", False, True),
     ("presence_penalty", 0, 0.5), ("frequency_penalty", 0.0, -1), ("service_tier", "auto", "flex"),
     ("verbosity", "medium", "low")],
)  # fmt: skip
def test_a_field_at_its_default_says_nothing_and_any_other_stays(field: str, idle: Any, meant: Any) -> None:
    assert field not in prepare({"messages": [ASK], field: idle}, ANTHROPIC)
    assert prepare({"messages": [ASK], field: meant}, ANTHROPIC)[field] == meant


def test_hints_for_openais_own_house_are_left_out() -> None:
    hints = {"prompt_cache_key": "k", "safety_identifier": "u", "prediction": {"type": "content", "content": "x"}}
    assert prepare({"messages": [ASK], **hints, "user": "u"}, ANTHROPIC) == {"messages": [ASK], "user": "u"}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [ASK], "tools": [{"type": "custom", "custom": {"name": "sql"}}]},
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "custom", "custom": {"name": "sql", "input": "x"}}]}]},
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_with_a_sentence(fields: Json) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(fields, ANTHROPIC)
    assert caught.value.status == 400 and caught.value.message.startswith("Anthropic's models do not take")


def test_anthropics_own_tools_go_by() -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    assert prepare({"messages": [ASK], "tools": tools}, ANTHROPIC)["tools"] == tools


def test_a_tool_round_whose_thinking_is_lost_goes_on_without() -> None:
    called = calling("c")
    asks = {"model": "m", "reasoning_effort": "low", "thinking": {"type": "enabled"}}
    lost = {**asks, "messages": [ASK, called, result("c")]}
    assert prepare(lost, ANTHROPIC) == {"model": "m", "messages": lost["messages"]}
    block = {"type": "thinking", "thinking": "t", "signature": "s"}
    kept = {**asks, "messages": [ASK, {**called, "thinking_blocks": [block]}, result("c")]}
    over = {**asks, "messages": [ASK, called, result("c"), ASSISTANT, ASK]}
    assert prepare(kept, ANTHROPIC) == kept and prepare(over, ANTHROPIC) == over


# ---------------------------------------------------------------- answers


# ---------------------------------------------------------------- markers


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def marked(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if "cache_control" in json.dumps(message)]


def test_markers_where_a_later_request_shares_the_prefix() -> None:
    """In front of the newest user message, whose evidence leaves at the next, and of the one before."""
    first = [CLIENTS, MEMORY, user("1")]
    assert marked(right(first)) == [1, 2]
    second = [*first, ASSISTANT, user("2")]
    assert marked(right(second)) == [1, 3, 4]
    third = [*second, calling("c"), result("c")]
    assert marked(right(third)) == [1, 3, 4, 6]
    fourth = [*third, calling("d"), result("d")]
    assert marked(right(fourth)) == [1, 3, 6, 8]
    fifth = [*fourth, ASSISTANT, user("3")]
    assert marked(right(fifth)) == [1, 3, 9, 10]
    assert marked(right([*first, user("2")])) == [1, 2, 3]
    assert marked(prepare({"messages": fifth}, None)["messages"]) == []


def test_the_marker_stands_on_the_last_part() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]
    *_, last = right([MEMORY, user(parts)])
    assert last["content"] == [parts[0], {**parts[1], "cache_control": MARK}]
    *_, odd = right([MEMORY, user([{"type": "video_url", "video_url": {}}])])
    assert "cache_control" not in json.dumps(odd)


@pytest.mark.parametrize(
    "where",
    [
        {"messages": [MEMORY, user([{"type": "text", "text": "x", "cache_control": MARK}])]},
        {"messages": [MEMORY, {**ASK, "cache_control": MARK}]},
        {"messages": [MEMORY, ASK], "tools": [{"type": "function", "cache_control": MARK}]},
        {"messages": [MEMORY, ASK], "tools": [{"function": {"cache_control": MARK}}]},
    ],
)
def test_a_clients_own_markers_win(where: dict[str, Any]) -> None:
    assert prepare(where, ANTHROPIC)["messages"] == where["messages"]


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=12))
def test_markers_are_few_and_change_nothing_else(roles: list[str]) -> None:
    messages = [CLIENTS, MEMORY, *({"role": role, "content": f"{i}"} for i, role in enumerate(roles))]
    out = right(messages)
    assert len(marked(out)) <= 4
    plain = [{k: v for k, v in m.items() if k != "cache_control"} for m in out]
    assert plain in (messages, [*messages[:2], plain[2], *messages[2:]])
