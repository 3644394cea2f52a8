"""What is written changes only what has to change."""

from __future__ import annotations

import json

import msgspec

from proxy.conversation.compose import (
    LEAST_ANSWER_TOKENS,
    answer_budget,
    as_input,
    request_body,
    response_body,
    total_usage,
    with_context,
)


def test_fields_keep_their_bytes_and_places() -> None:
    body = b'{"a": 1.50, "messages": [ 1 ], "\\u00e9" :{ "x":null }, "tools" : []}'
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    order = list(fields)
    del fields["messages"]
    out = request_body(fields, order, b"[2]", {"tools": b"[3]", "tool_choice": b'"none"'})
    assert out == '{"a":1.50,"messages":[2],"é":{ "x":null },"tools":[3],"tool_choice":"none"}'.encode()
    assert request_body(fields, order, b"[2]", {"tools": None, "x": None}).endswith(b"null }}")


def test_context_stands_in_front_of_the_users_own_text() -> None:
    assert with_context({"role": "user", "content": "hi", "name": "n"}, "B") == {
        "role": "user", "content": "B\n\nhi", "name": "n"
    }
    part = {"type": "image_url"}
    assert with_context({"content": [part]}, "B")["content"] == [{"type": "text", "text": "B"}, part]
    assert with_context({"content": None}, "B")["content"] == "B\n\n"


def test_answer_becomes_a_message_that_a_request_may_carry() -> None:
    said = {"index": 0, "role": "assistant", "content": None, "refusal": None, "annotations": [], "x": 0}
    assert as_input(said) == {"role": "assistant", "content": "", "x": 0}
    assert as_input({"content": None, "tool_calls": [1]}) == {
        "role": "assistant", "content": None, "tool_calls": [1]
    }


def test_usage_of_several_rounds() -> None:
    one = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    two = {"prompt_tokens": 20, "completion_tokens": 3, "odd": 1}
    assert total_usage([one, None, two], 2) == {
        "prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25, "odd": 1,
        "vm": {"rounds": 3, "faults": 2, "prompt_tokens": 30, "cached_tokens": 4, "completion_tokens": 5},
    }
    assert total_usage([None], 0) is None


def test_last_response_goes_down_under_the_first_ones_identity() -> None:
    last = {"id": "2", "created": 2, "model": "m2", "choices": [{"index": 0, "logprobs": None}], "x": 1}
    body = json.loads(response_body(last, {"id": "1", "created": 1, "model": "m"}, {"a": 1}, "stop", None))
    assert body == {
        "id": "1", "created": 1, "model": "m", "x": 1,
        "choices": [{"index": 0, "logprobs": None, "message": {"a": 1}, "finish_reason": "stop"}],
    }


def test_calls_as_input_have_a_type_and_text_for_arguments() -> None:
    whole = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    loose = [
        {"id": "a", "function": {"name": "f", "arguments": {}}},
        {"id": "a", "type": "function", "function": {"name": "f"}},
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]
    assert as_input({"role": "assistant", "tool_calls": loose})["tool_calls"] == [whole] * 3
    custom = {"id": "c", "custom": {"name": "g", "input": "x"}}
    assert as_input({"tool_calls": [custom]})["tool_calls"] == [{**custom, "type": "custom"}]


def test_later_round_gets_what_the_limit_leaves_but_never_too_little() -> None:
    assert answer_budget({"max_tokens": 500, "max_completion_tokens": None}, 120) == {"max_tokens": b"380"}
    assert answer_budget({"max_tokens": 500}, 499) == {"max_tokens": b"%d" % LEAST_ANSWER_TOKENS}
    assert answer_budget({"max_completion_tokens": 20}, 300) == {"max_completion_tokens": b"20"}
    assert answer_budget({"max_tokens": "many"}, 3) == {}
