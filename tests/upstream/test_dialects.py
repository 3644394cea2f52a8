"""What litellm is given and what its answers and errors become, on the shapes that its translation
produces; that real ones look like these is shown in tests/e2e/test_providers.py."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.conversation.chunks import MessageBuilder
from proxy.conversation.refusals import learn
from proxy.upstream.dialects import (
    ANTHROPIC,
    GEMINI,
    Chunks,
    caused_by,
    error_headers,
    error_object,
    prepare,
    provider_status,
    relayed,
    reply_headers,
    request_headers,
    whole_answer,
    wire_of,
)
from tests.conversation.player import limits_of
from tests.upstream.test_anthropic import ASK, ASSISTANT, CLIENTS, MEMORY

CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("provider", "model", "wire"),
    [
        ("anthropic", "claude-x", ANTHROPIC),
        ("bedrock", "anthropic.claude-x", ANTHROPIC),
        ("vertex_ai", "claude-sonnet-4", ANTHROPIC),
        ("gemini", "gemini-3-pro-preview", GEMINI),
        ("gemini", "gemma-3", GEMINI),
        ("vertex_ai", "gemini-2.5-pro", GEMINI),
        ("openai", "claude-shaped", None),
        ("openrouter", "google/gemini-3-pro", None),
    ],
)
def test_the_wire_is_that_of_the_models_house(provider: str, model: str, wire: Any) -> None:
    assert wire_of(provider, model) is wire


def test_a_request_without_the_memory_is_the_clients() -> None:
    request = {"model": "m", "messages": [CLIENTS, ASSISTANT, ASK]}
    assert prepare(request, ANTHROPIC) == request and prepare(request, None) is request
    quoted = {"messages": [CLIENTS, {"role": "user", "content": "What is <VM:RULES>?"}]}
    assert prepare(quoted, ANTHROPIC) == quoted, "only the system message tells a paged request"


@pytest.mark.parametrize("wire", [ANTHROPIC, GEMINI, None])
def test_a_window_that_begins_with_an_answer_gets_a_user_first(wire: Any) -> None:
    for messages in ([CLIENTS, MEMORY, ASSISTANT, ASK], [MEMORY, ASK]):
        out = prepare({"messages": messages}, wire)["messages"]
        assert next(m["role"] for m in out if m["role"] != "system") == "user"
        assert [m for m in out if m in messages] == messages or wire is ANTHROPIC  # but for its markers


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


# ---------------------------------------------------------------- errors


class _Told(Exception):
    def __init__(self, message: str, status: int | None = None, **more: object) -> None:
        super().__init__(message)
        self.message = message
        if status is not None:
            self.status_code = status
        self.__dict__.update(more)


class ContextWindowExceededError(_Told):
    """Named like litellm's."""


def behind(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


QUOTED = "litellm.X: AnthropicException - b'{\"type\":\"error\",\"error\":{\"type\":\"%s\",\"message\":\"%s\"}}'"


def test_the_providers_own_status_and_sentence() -> None:
    error = behind(_Told(QUOTED % ("overloaded_error", "Overloaded"), 500), _Told("x", 529))
    assert provider_status(error) == 529
    assert error_object(error) == {
        "message": "Overloaded", "type": "api_error", "param": None, "code": "overloaded_error",
    }  # fmt: skip


def test_a_wrapped_error_is_unwrapped() -> None:
    inner = _Told(QUOTED % ("rate_limit_error", "Slow."), 429, headers={"retry-after": "7"})
    error = _Told("litellm.MidStreamFallbackError", 503, original_exception=inner)
    assert provider_status(error) == 429
    assert error_object(error)["code"] == "rate_limit_exceeded"
    assert error_object(error)["message"] == "Slow."
    assert error_headers(error) == [(b"retry-after", b"7")]


@pytest.mark.parametrize("message", ["prompt is too long: 9 tokens", "it's \\\\ \"too\" long"])
def test_too_small_a_window_has_openais_code(message: str) -> None:
    error = ContextWindowExceededError(message, 400)
    assert error_object(error) == {
        "message": message, "type": "invalid_request_error", "param": None,
        "code": "context_length_exceeded",
    }  # fmt: skip


def test_geminis_status_becomes_a_code() -> None:
    text = 'GeminiException - {"error": {"code": 400, "message": "Bad.", "status": "INVALID_ARGUMENT"}}'
    assert error_object(_Told(text, 400)) == {
        "message": "Bad.", "type": "invalid_request_error", "param": None, "code": "invalid_argument",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "(no words)"),
        ("{", "{"),
        ("b'{\\xff'", "{\ufffd"),
        ('b"{\'a\': 1}"', "{'a': 1}"),
        ("{} {}", "{} {}"),
        ("b'\\x'", "b'\\x'"),
        ("litellm.BadGatewayError: AnthropicException BadGatewayError - <p>No.</p>\n", "<p>No.</p>"),
        ("litellm.ServiceUnavailableError: XException - . Handle with `litellm.ServiceUnavailableError`.",
         "(no words)"),
        ("litellm.APIConnectionError: 'function'\nTraceback (most recent call last):\n  File \"a.py\"",
         "'function'"),
    ],
)  # fmt: skip
def test_odd_messages_are_told_without_litellms_frame(text: str, told: str) -> None:
    assert error_object(_Told(text, 418))["message"] == told


def test_fields_that_a_provider_does_not_have_are_named_with_what_to_do() -> None:
    said = (
        "litellm.UnsupportedParamsError: anthropic does not support parameters: ['seed', 'n'], for model=m."
        " To drop these, set `litellm.drop_params=True` or for proxy:\n\n`litellm_settings:\n drop_params: true`"
    )
    assert error_object(_Told(said, 400)) == {
        "message": "anthropic does not support ['seed', 'n']. Remove them from the request, or set"
        " upstream.drop_params: true, so that what a provider does not have is left out.",
        "type": "invalid_request_error", "param": "seed", "code": "unsupported_parameter",
    }  # fmt: skip


def test_an_endless_chain_ends() -> None:
    one, two = _Told("one"), _Told("two")
    one.original_exception, two.original_exception = two, one  # type: ignore[attr-defined]
    assert provider_status(one) is None
    assert caused_by(one, _Told) and not caused_by(one, KeyError)


def test_a_model_without_tools_is_learned_from_litellms_own_refusal() -> None:
    said = "litellm.UnsupportedParamsError: x does not support parameters: ['tools', 'tool_choice'], for model=m."
    body = json.dumps({"error": error_object(_Told(said, 400))}).encode()
    assert learn(body, limits_of(1500)) == {"tools": False}


# ---------------------------------------------------------------- headers


def test_tracing_betas_and_custom_headers_go_up_and_credentials_never() -> None:
    sent = [
        (b"authorization", b"Bearer sk"), (b"x-api-key", b"sk"), (b"x-goog-api-key", b"sk"),
        (b"x-amz-security-token", b"s"), (b"x-forwarded-for", b"10.0.0.1"), (b"cookie", b"a=b"),
        (b"x-llm-pager-session", b"s"), (b"traceparent", b"00-1"), (b"idempotency-key", b"k"),
        (b"anthropic-beta", b"b"), (b"x-my-own", b"caf\xe9"), (b"content-length", b"3"),
        (b"host", b"h"), (b"openai-organization", b"org"),
    ]  # fmt: skip
    assert request_headers(sent) == {
        "traceparent": "00-1", "idempotency-key": "k", "anthropic-beta": "b", "x-my-own": "café",
    }  # fmt: skip


def test_hops_end_here_with_the_headers_that_they_name() -> None:
    sent = [(b"connection", b"close, X-Per-Hop"), (b"x-per-hop", b"1"), (b"te", b"trailers"), (b"x-a", b"1")]
    assert request_headers(sent) == {"x-a": "1"}


def test_the_providers_headers_come_back_also_under_openais_names() -> None:
    said = {
        "Request-Id": "req_1", "anthropic-ratelimit-tokens-remaining": 12, "content-type": "text/html",
        "transfer-encoding": "chunked", "Connection": "x-hop", "x-hop": "1", "x-litellm-cost": "0",
        "retry-after": "7", "odd": None,
    }  # fmt: skip
    assert dict(relayed(said.items())) == {
        b"request-id": b"req_1", b"x-request-id": b"req_1", b"retry-after": b"7",
        b"anthropic-ratelimit-tokens-remaining": b"12", b"x-ratelimit-remaining-tokens": b"12",
    }  # fmt: skip


def test_no_credential_ever_comes_back() -> None:
    """Were the headers of an exception those of the request."""
    ours = {"Authorization": "Bearer sk", "x-api-key": "sk", "x-goog-api-key": "sk", "api-key": "sk",
            "x-amz-security-token": "s", "cookie": "a=b", "retry-after": "7"}  # fmt: skip
    assert dict(relayed(ours.items())) == {b"retry-after": b"7"}


def test_litellms_prefix_is_taken_off_and_no_headers_are_none() -> None:
    result = SimpleNamespace(_hidden_params={"additional_headers": {"llm_provider-x-request-id": "r"}})
    assert reply_headers(result, {}) == [(b"x-request-id", b"r")]
    assert reply_headers(SimpleNamespace(), {}) == []
    assert reply_headers(SimpleNamespace(_hidden_params={"additional_headers": None}), {}) == []
