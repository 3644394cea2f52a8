"""Chat Completions requests in the words of Responses, and its answers back: a stream says what the
whole answer says. Shapes are checked with OpenAI's types in tests/e2e/test_responses_bridge.py."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.conversation.chunks import MessageBuilder
from proxy.upstream.responses_translation import ChatStream, failure, to_chat, to_responses
from tests.e2e.providers import Call, Said
from tests.e2e.providers.responses import ResponsesServer, response_events, response_of
from tests.e2e.recording import Recorded

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


# ---------------------------------------------------------------- answers


def given(said: Said) -> dict[str, Any]:
    """The response that the tests' server would give."""
    body = {"model": "m", "input": [], "include": ["reasoning.encrypted_content"]}
    request = Recorded(3, "POST", "/v1/responses", [], b"", b"", b"", body)
    output = list(ResponsesServer().output(request, said))
    return response_of(request, output, said.stop)


def streamed(response: dict[str, Any], include_usage: bool = True) -> list[dict[str, Any]]:
    stream = ChatStream(include_usage)
    events = response_events(response, response["output"])
    chunks = [chunk for event in events for chunk in stream.feed(event)]
    assert stream.ended
    return chunks


TWO = [Call("a", "look", {"at": 1}), Call("b", "look", {"at": 2})]


@pytest.mark.parametrize(
    "said",
    [
        Said("Hello there, you."),
        Said("Hello.", thinking="Hm."),
        Said(calls=TWO, thinking="Hm."),
        Said("Looking.", TWO, thinking="Hm."),
        Said("Cut", stop="max_output_tokens"),
    ],
)
def test_a_stream_says_what_the_whole_answer_says(said: Said) -> None:
    response = given(said)
    whole, chunks = to_chat(response), streamed(response)
    builder = MessageBuilder()
    for chunk in chunks:
        for choice in chunk["choices"]:
            builder.add(choice["delta"])
            builder.finish_reason = choice["finish_reason"] or builder.finish_reason
    message = whole["choices"][0]["message"]
    assert builder.build() == {k: v for k, v in message.items() if k != "refusal"}
    assert builder.finish_reason == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    assert {chunk["id"] for chunk in chunks} == {whole["id"]}


def test_who_only_refuses_has_no_content() -> None:
    item = {"type": "message", "id": "m", "content": [{"type": "refusal", "refusal": "No."}]}
    response = {**given(Said("Yes.")), "output": [item]}
    message = to_chat(response)["choices"][0]["message"]
    assert (message["content"], message["refusal"]) == (None, "No.")
    item["content"] = [{"type": "output_text", "text": ""}]
    assert to_chat(response)["choices"][0]["message"]["content"] == ""


def test_reasoning_of_calls_comes_back_where_it_was_and_that_of_an_answer_does_not() -> None:
    response = given(Said("Looking.", TWO, thinking="Hm."))
    message = to_chat(response)["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": c.id, "content": "r"} for c in TWO]
    body = to_responses({"model": "m", "messages": [message, *results]})
    assert body is not None
    [item] = [item for item in response["output"] if item["type"] == "reasoning"]
    assert body["input"][0] == item
    assert [i["type"] for i in body["input"][1:4]] == ["message", "function_call", "function_call"]
    assert "reasoning_items" not in to_chat(given(Said("A.", thinking="Hm.")))["choices"][0]["message"]


def test_reasoning_that_would_have_to_be_looked_up_is_not_kept() -> None:
    response = given(Said(calls=TWO, thinking="Hm."))
    del response["output"][0]["encrypted_content"]
    assert "reasoning_items" not in to_chat(response)["choices"][0]["message"]


def test_what_else_an_answer_may_hold() -> None:
    note = {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}
    text = {"type": "output_text", "text": "One.", "annotations": [note]}
    response = {
        "id": "resp_1", "created_at": 5.5, "model": "m", "status": "completed",
        "output": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Why."}]},
            {"type": "message", "phase": "commentary", "content": [text]},
            {"type": "message", "content": [{"type": "output_text", "text": "Two."}]},
            {"type": "message", "content": [{"type": "refusal", "refusal": "No."}]},
            {"type": "custom_tool_call", "call_id": "c", "name": "run", "input": "go"},
            {"type": "web_search_call", "id": "w"},
        ],
        "usage": None,
    }  # fmt: skip
    answer = to_chat(response)
    message = answer["choices"][0]["message"]
    assert message["content"].startswith("One.\n\nTwo.") and message["refusal"] == "No."
    assert message["annotations"][0]["url_citation"]["url"] == "u"
    assert message["reasoning_content"] == "Why." and message["phase"] == "commentary"
    assert message["tool_calls"][0]["custom"] == {"name": "run", "input": "go"}
    assert answer["created"] == 5 and "usage" not in answer


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ({"status": "failed", "error": {"code": "rate_limit_exceeded", "message": "m"}}, 429),
        ({"status": "failed", "error": {"code": "server_error", "message": "m"}}, 500),
        ({"status": "failed", "error": {"code": "invalid_prompt", "message": "m"}}, 400),
        ({"status": "failed", "error": None}, 500),
    ],
)
def test_failures(response: dict[str, Any], status: int) -> None:
    failed = failure(response)
    assert failed is not None and failed[0] == status and failed[1]["error"]["message"]
    assert failure({"status": "completed", "error": None}) is None


def test_the_tier_that_served_it_comes_with_the_end() -> None:
    stream = ChatStream(True)
    response = given(Said("Yes."))
    begun = {"type": "response.created", "response": {**response, "service_tier": "auto"}}
    done = {"type": "response.completed", "response": {**response, "service_tier": "flex"}}
    list(stream.feed(begun))
    assert [chunk["service_tier"] for chunk in stream.feed(done)] == ["flex", "flex"]


def test_an_error_event_is_an_error_and_no_end() -> None:
    stream = ChatStream(False)
    event = {"type": "error", "code": "c", "message": "Broken.", "param": None}
    [told] = stream.feed(event)
    assert told["error"]["message"] == "Broken." and told["error"]["code"] == "c"
    assert told["error"]["type"] == "server_error"
    said = {"type": "too_many_requests", "code": "c", "message": "Slow down.", "param": "p"}
    assert list(ChatStream(True).feed({"type": "error", "error": said})) == [{"error": said}]
    assert not stream.ended
    assert list(stream.feed({"type": "response.some_new_event"})) == []
