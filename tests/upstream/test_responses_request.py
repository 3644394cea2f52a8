"""Chat Completions requests in the words of Responses; the shapes are checked with OpenAI's types
in tests/e2e/test_responses_bridge.py."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.upstream.responses_request import to_responses

USER = {"role": "user", "content": "Hi."}


def request(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = to_responses({"model": "m", "messages": list(messages or (USER,)), **fields})
    assert body is not None
    return body


def items(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = request(*messages)["input"]
    return found


def call(call_id: str, name: str = "look") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def reasoned(name: str, before: str) -> dict[str, Any]:
    item = {"type": "reasoning", "id": name, "summary": [], "encrypted_content": "e"}
    return {"before": before, "item": item}


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"stop": "x"},
        {"logprobs": True},
        {"logit_bias": {"1": 2}},
        {"presence_penalty": 0.5},
        {"prediction": {"type": "content", "content": "x"}},
        {"functions": [{"name": "f"}]},
        {"web_search_options": {}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "a", "format": "wav"}},
        {"tools": [{"type": "hosted"}]},
        {"messages": [{"role": "function", "name": "f", "content": "x"}]},
        {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
        {"messages": [{"role": "assistant", "audio": {"id": "a"}}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": "odd"},
        {"messages": [{"content": "no role"}]},
    ],
)
def test_what_it_cannot_say_is_not_said(fields: dict[str, Any]) -> None:
    assert to_responses({"model": "m", "messages": [USER], **fields}) is None


def test_settings_that_mean_nothing_are_left_out() -> None:
    meaningless = {"n": 1, "stop": None, "logprobs": False, "presence_penalty": 0, "seed": 5}
    assert request(**meaningless, logit_bias={}, modalities=["text"]) == request()
    assert request() == {
        "model": "m",
        "input": [{"type": "message", **USER}],
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }


def test_unknown_fields_pass() -> None:
    assert request(some_field=[1], user="u", store=True) == {
        **request(), "some_field": [1], "user": "u", "store": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 100}, 100),
        ({"max_tokens": 5, "max_completion_tokens": 200}, 200),
        ({"max_completion_tokens": 1}, 16),
    ],
)
def test_token_limits(fields: dict[str, Any], expected: int) -> None:
    body = request(**fields)
    assert body["max_output_tokens"] == expected and not {"max_tokens"} & set(body)


def test_tools_and_choices() -> None:
    custom = {
        "type": "custom",
        "custom": {
            "name": "run",
            "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "d"}},
        },
    }
    bare = {"type": "function", "function": {"name": "look"}}
    strict = {"type": "function", "function": {"name": "s", "parameters": {"a": 1}, "strict": True}}
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "s"}}],
        },
    }
    body = request(tools=[bare, strict, custom], tool_choice=allowed)
    assert body["tools"] == [
        {
            "type": "function", "name": "look", "strict": False,
            "parameters": {"type": "object", "properties": {}},
        },
        {"type": "function", "name": "s", "parameters": {"a": 1}, "strict": True},
        {
            "type": "custom", "name": "run",
            "format": {"type": "grammar", "syntax": "lark", "definition": "d"},
        },
    ]  # fmt: skip
    tools = [{"type": "function", "name": "s"}]
    assert body["tool_choice"] == {"type": "allowed_tools", "mode": "required", "tools": tools}
    assert request(tools=[custom], tool_choice="none")["tool_choice"] == "none"
    named = {"type": "custom", "custom": {"name": "run"}}
    chosen = request(tools=[custom], tool_choice=named)["tool_choice"]
    assert chosen == {"type": "custom", "name": "run"}


def test_media_and_files() -> None:
    parts = [
        {"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}},
        {"type": "image_url", "image_url": {"url": "u"}},
        {"type": "image_url", "image_url": "bare"},
        {"type": "file", "file": {"file_data": "d", "filename": "f"}},
    ]
    [message] = items({"role": "user", "content": parts})
    assert message["content"] == [
        {"type": "input_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}},
        {"type": "input_image", "image_url": "u", "detail": "auto"},
        {"type": "input_image", "image_url": "bare", "detail": "auto"},
        {"type": "input_file", "file_data": "d", "filename": "f"},
    ]


def test_calls_and_their_results_of_both_kinds() -> None:
    custom = {"id": "b", "type": "custom", "custom": {"name": "run", "input": "go"}}
    said = {"role": "assistant", "content": "", "tool_calls": [call("a"), custom]}
    results = [
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "r"}]},
        {"role": "tool", "tool_call_id": "b", "content": "done"},
    ]
    assert items(USER, said, *results)[1:] == [
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "b", "name": "run", "input": "go"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "r"}]},
        {"type": "custom_tool_call_output", "call_id": "b", "output": "done"},
    ]


def test_reasoning_stands_before_what_it_led_to() -> None:
    said = {
        "role": "assistant",
        "content": "Text.",
        "phase": "commentary",
        "tool_calls": [call("a"), call("b")],
        "reasoning_items": [reasoned("rs_1", "message"), reasoned("rs_2", "b"), reasoned("rs_3", "c")],
    }
    assert [item.get("id") or item.get("call_id") or item.get("phase") for item in items(said)] == [
        "rs_1", "commentary", "a", "rs_2", "b",
    ]  # fmt: skip


def test_a_refusal_stays_a_refusal() -> None:
    [item] = items({"role": "assistant", "content": None, "refusal": "No."})
    assert item["content"] == [{"type": "refusal", "refusal": "No."}]
    assert items({"role": "assistant", "content": None}) == []
