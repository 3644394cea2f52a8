"""What an upstream of the tests can answer, and helpers that build it.

Promises: a body depends on the request and the message only (its id is a hash of the request), so
two servers that send the same request get the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.e2e.rules import count_request_tokens, count_text

CREATED = 1_700_000_000
JSON_HEADERS = ((b"content-type", b"application/json"),)
SSE_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"),)
Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Response:
    """A whole answer with a content-length."""

    body: bytes
    status: int = 200
    headers: Headers = JSON_HEADERS


class Break:
    """A stream's step: cut the connection here, without the closing chunk."""


class Hang:
    """Never go on. As a whole answer: no status at all; as a stream's step: silence from here."""


class Drop:
    """A whole answer: cut the connection before any status."""


Step = bytes | asyncio.Event | Break | Hang | Callable[[], object]


@dataclass(frozen=True)
class Stream:
    """A chunked answer. Steps: bytes are sent as one chunk, an Event is waited for, a callable is
    called (for example `reached.set`), Break and Hang end it."""

    steps: Sequence[Step]
    status: int = 200
    headers: Headers = SSE_HEADERS


Answer = Response | Stream | Hang | Drop | dict[str, Any]
Respond = Callable[[dict[str, Any], int], "Answer | Awaitable[Answer]"]


def call(call_id: str, name: str, arguments: dict[str, Any] | str) -> dict[str, Any]:
    """One entry of an assistant message's tool_calls."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def message_of(text: str | None = None, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """An assistant message: final text, tool calls, or both."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = list(calls)
    return message


def _finish_reason(message: dict[str, Any]) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def _identity(request: dict[str, Any]) -> str:
    return "chatcmpl-" + hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]


def _usage(request: dict[str, Any], message: dict[str, Any], factor: float) -> dict[str, Any]:
    prompt = round(count_request_tokens(request) * factor)
    out = count_text(message.get("content") or "")
    for c in message.get("tool_calls") or ():
        out += count_text(c["function"]["arguments"])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": out,
        "total_tokens": prompt + out,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def completion(request: dict[str, Any], message: dict[str, Any], factor: float = 1.0) -> Response:
    """A chat.completion around a message. Its id depends on the request only. The prompt is billed at
    `factor` tokens for one of the request's."""
    payload = {
        "id": _identity(request),
        "object": "chat.completion",
        "created": CREATED,
        "model": request.get("model"),
        "choices": [
            {
                "index": 0,
                "message": {"refusal": None, **message},
                "logprobs": None,
                "finish_reason": _finish_reason(message),
            }
        ],
        "usage": _usage(request, message, factor),
        "system_fingerprint": "fp_test",
    }
    return Response(json.dumps(payload, ensure_ascii=False).encode())


def sse_chunks(
    request: dict[str, Any], message: dict[str, Any], piece_chars: int = 12, factor: float = 1.0
) -> list[bytes]:
    """The server-sent events of a message: role, text pieces, tool call deltas, finish, usage when
    the client asked for it, [DONE]. One event per item, each ending in a blank line."""
    head = {
        "id": _identity(request),
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": request.get("model"),
        "system_fingerprint": "fp_test",
    }
    with_usage = bool((request.get("stream_options") or {}).get("include_usage"))

    def event(delta: dict[str, Any] | None, finish: str | None = None) -> bytes:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
        body = {**head, "choices": choices}
        if with_usage:
            body["usage"] = _usage(request, message, factor) if delta is None else None
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        return b"data: " + text.encode() + b"\n\n"

    events = [event({"role": "assistant", "content": "", "refusal": None})]
    text = message.get("content") or ""
    for i in range(0, len(text), piece_chars):
        events.append(event({"content": text[i : i + piece_chars]}))
    for i, c in enumerate(message.get("tool_calls") or ()):
        opening = {**c["function"], "arguments": ""}
        first = {"index": i, "id": c["id"], "type": "function", "function": opening}
        events.append(event({"tool_calls": [first]}))
        arguments = c["function"]["arguments"]
        for j in range(0, len(arguments), piece_chars):
            part = {"index": i, "function": {"arguments": arguments[j : j + piece_chars]}}
            events.append(event({"tool_calls": [part]}))
    events.append(event({}, _finish_reason(message)))
    if with_usage:
        events.append(event(None))
    events.append(b"data: [DONE]\n\n")
    return events


def answer(
    request: dict[str, Any], message: dict[str, Any], piece_chars: int = 12, factor: float = 1.0
) -> Response | Stream:
    """The message as the request asked for it: one JSON body, or a stream in small chunks."""
    if request.get("stream"):
        return Stream(sse_chunks(request, message, piece_chars, factor))
    return completion(request, message, factor)


def error(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: Headers = (),
) -> Response:
    """An error in OpenAI's shape, for example `error(429, "slow", headers=HEADERS)`."""
    body = {"error": {"message": message, "type": type, "param": param, "code": code}}
    return Response(json.dumps(body).encode(), status, (*JSON_HEADERS, *headers))
