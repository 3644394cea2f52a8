"""`provider: demo`: an upstream in this process that needs no key, no network and no model.

Promises: the Chat Completions wire format, streamed in small chunks or whole; the answer is that
of `demo_reader.read`, and its ids come from the request's hash, so that the same request gets the
same answer. Usage has prompt, completion and cached tokens. It never sleeps unless told to.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from proxy.errors import ApiError
from proxy.tokens import get_counter
from proxy.upstream import CHAT_PATH, BytesReply, Header, Reply, join_chunks
from proxy.upstream.demo_cache import PromptCache
from proxy.upstream.demo_reader import read, request_hash

if TYPE_CHECKING:
    from proxy.config import Config

MODEL = "demo"
_CREATED = 1_700_000_000  # a constant: answers are deterministic
_JSON: list[Header] = [(b"content-type", b"application/json")]
_SSE: list[Header] = [(b"content-type", b"text/event-stream; charset=utf-8")]
_PIECE = re.compile(r"\s*\S{1,12}|\s+$")
_MAX_CHOICES = 128  # OpenAI's own limit of `n`

Listener = Callable[[dict[str, Any]], None]
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hands every chat request that reaches a demo upstream of this process to `listener`."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class StreamReply:
    """A server-sent event stream made of ready events, one chunk each."""

    def __init__(self, events: Sequence[bytes], pause_s: float) -> None:
        self.status = 200
        self.headers = list(_SSE)
        self._events, self._pause_s, self._closed = events, pause_s, False

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        for event in self._events:
            await asyncio.sleep(self._pause_s)  # 0 lets others run, so that a client sees chunks
            if self._closed:
                return
            yield event

    def chunks(self) -> AsyncIterator[bytes]:
        return self._chunks()

    async def read(self, limit_bytes: int) -> bytes:
        return await join_chunks(self._chunks(), limit_bytes)

    async def close(self) -> None:
        self._closed = True


class DemoUpstream:
    """The built-in provider; `pause_s` slows a stream down for people who watch it."""

    def __init__(self, config: Config | None = None, pause_s: float = 0.0) -> None:
        self._counter = get_counter(MODEL)
        self._cache = PromptCache(self._counter)
        self._pause_s = pause_s

    async def chat(
        self,
        body: bytes,
        headers: Sequence[Header],
        query: bytes = b"",
        path: str = CHAT_PATH,
    ) -> Reply:
        """Answers one chat completion. A body that is no chat request gets OpenAI's 400."""
        try:
            request = _checked(body)
        except ApiError as error:
            return BytesReply(error.status, _JSON, error.body())
        for listener in _listeners:
            listener(request)
        message, bill = read(request), self._cache.bill(request)
        choices = min(max(1, int(request.get("n") or 1)), _MAX_CHOICES)
        completion = self._counter.message(message) * choices
        usage = {
            "prompt_tokens": bill.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": bill.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": bill.cached_tokens},
        }
        head = {
            "id": f"chatcmpl-{request_hash(request)[:24]}",
            "created": _CREATED,
            "model": str(request.get("model") or MODEL),
        }
        if request.get("stream"):
            options = request.get("stream_options")
            wanted = isinstance(options, dict) and options.get("include_usage") is True
            events = list(_events(head, message, choices, usage if wanted else None))
            return StreamReply(events, self._pause_s)
        answer = {**head, "object": "chat.completion", "usage": usage}
        answer["choices"] = [
            {"index": i, "message": {**message, "refusal": None}, "logprobs": None, "finish_reason": _finish(message)}
            for i in range(choices)
        ]  # fmt: skip
        return BytesReply(200, _JSON, _dumps(answer))

    async def forward(
        self,
        method: str,
        path: str,
        query: bytes,
        headers: Sequence[Header],
        body: AsyncIterator[bytes] | None,
    ) -> Reply:
        """`GET /models` lists the one model; everything else is a 404 in OpenAI's shape."""
        model = {"id": MODEL, "object": "model", "created": _CREATED, "owned_by": "llm-pager"}
        if method == "GET" and path == "/models":
            return BytesReply(200, _JSON, _dumps({"object": "list", "data": [model]}))
        if method == "GET" and path == f"/models/{MODEL}":
            return BytesReply(200, _JSON, _dumps(model))
        error = ApiError(404, f"the demo provider has no {method} {path}", code="unknown_url")
        return BytesReply(404, _JSON, error.body())

    async def start(self) -> None:
        """Nothing takes long."""

    async def close(self) -> None:
        """Nothing is open."""


def _checked(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ApiError(400, "the body must be a JSON object")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise ApiError(400, "each message must be an object with a role", param="messages")
    n = request.get("n")
    if n is not None and (not isinstance(n, int) or not 1 <= n <= _MAX_CHOICES):
        raise ApiError(400, f"n must be a whole number from 1 to {_MAX_CHOICES}", param="n")
    return request


def _finish(message: dict[str, Any]) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def _deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": None if message.get("tool_calls") else ""}
    for piece in _PIECE.findall(message.get("content") or ""):
        yield {"content": piece}
    for i, call in enumerate(message.get("tool_calls") or []):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        opening = {"name": name, "arguments": ""}
        yield {"tool_calls": [{"index": i, "id": call["id"], "type": "function", "function": opening}]}
        for at in range(0, len(arguments), 16):
            part = {"arguments": arguments[at : at + 16]}
            yield {"tool_calls": [{"index": i, "function": part}]}


def _events(
    head: dict[str, Any], message: dict[str, Any], choices: int, usage: dict[str, Any] | None
) -> Iterator[bytes]:
    chunk = {**head, "object": "chat.completion.chunk"}
    extra: dict[str, Any] = {"usage": None} if usage else {}
    ends = [*((d, None) for d in _deltas(message)), ({}, _finish(message))]
    for delta, finish in ends:
        for i in range(choices):
            choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": finish}
            yield _event({**chunk, "choices": [choice], **extra})
    if usage:
        yield _event({**chunk, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _dumps(value) + b"\n\n"


def _dumps(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
