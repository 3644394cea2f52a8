"""`provider: demo`: an upstream in this process that needs no key, no network and no model.

Promises: the Chat Completions wire format, streamed in small chunks or whole; the answer is that
of `reader.read`, and its ids come from the request's hash, so that the same request gets the
same answer. Usage has prompt, completion and cached tokens. It never sleeps.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

from proxy.demo.bill import PromptCache
from proxy.demo.reader import read, request_hash
from proxy.errors import ApiError
from proxy.tokens import get_counter
from proxy.upstream import CHAT_PATH, BytesReply, Header, Reply, Upstream

MODEL: Final = "demo"
_CREATED: Final = 1_700_000_000  # a constant: answers are deterministic
_JSON: Final[list[Header]] = [(b"content-type", b"application/json")]
_SSE: Final[list[Header]] = [(b"content-type", b"text/event-stream; charset=utf-8")]
_PIECE: Final = re.compile(r"\s*\S{1,12}|\s+$")
_ARGUMENTS_PIECE_CHARS: Final = 16
_MAX_CHOICES: Final = 128  # OpenAI's own limit of `n`

Json = dict[str, Any]


class _StreamReply(Reply):
    """Server-sent events, each a chunk of its own."""

    def __init__(self, events: Sequence[bytes]) -> None:
        self.status, self.headers = 200, list(_SSE)
        self._events = events

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for event in self._events:
            await asyncio.sleep(0)  # lets others run, so that a client sees chunks
            yield event


class DemoUpstream(Upstream):
    """The built-in provider. `heard` is told of every chat request."""

    def __init__(self, heard: Callable[[Json], None] = lambda _: None) -> None:
        self._heard = heard
        self._counter = get_counter(MODEL)
        self._cache = PromptCache(self._counter)

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = CHAT_PATH) -> Reply:
        """Answers one chat completion. A body that is no chat request gets OpenAI's 400."""
        try:
            request = _checked(body)
        except ApiError as error:
            return BytesReply(error.status, _JSON, error.body())
        self._heard(request)
        message = read(request)
        choices = request.get("n") or 1
        prompt, cached = self._cache.tokens(request)
        completion = self._counter.message(message) * choices
        usage = {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip
        head = {
            "id": f"chatcmpl-{request_hash(request)[:24]}",
            "created": _CREATED,
            "model": str(request.get("model") or MODEL),
        }
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        if request.get("stream"):
            options = request.get("stream_options")
            wanted = isinstance(options, dict) and options.get("include_usage") is True
            chunks = _chunks(head, message, finish, choices, usage if wanted else None)
            events = [b"data: " + _dumps(chunk) + b"\n\n" for chunk in chunks]
            return _StreamReply([*events, b"data: [DONE]\n\n"])
        choice = {"message": {**message, "refusal": None}, "logprobs": None, "finish_reason": finish}
        answer = {**head, "object": "chat.completion", "usage": usage}
        answer["choices"] = [{"index": i, **choice} for i in range(choices)]
        return BytesReply(200, _JSON, _dumps(answer))

    async def forward(
        self, method: str, path: str, query: bytes, headers: Sequence[Header], body: AsyncIterator[bytes] | None
    ) -> Reply:
        """`GET /models` lists the one model; everything else is a 404 in OpenAI's shape."""
        model = {"id": MODEL, "object": "model", "created": _CREATED, "owned_by": "llm-pager"}
        if method == "GET" and path == "/models":
            return BytesReply(200, _JSON, _dumps({"object": "list", "data": [model]}))
        if method == "GET" and path == f"/models/{MODEL}":
            return BytesReply(200, _JSON, _dumps(model))
        error = ApiError(404, f"the demo provider has no {method} {path}", code="unknown_url")
        return BytesReply(404, _JSON, error.body())


def _checked(body: bytes) -> Json:
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


def _chunks(head: Json, message: Json, finish: str, choices: int, usage: Json | None) -> Iterator[Json]:
    chunk = {**head, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}
    for delta, reason in [*((delta, None) for delta in _deltas(message)), ({}, finish)]:
        for i in range(choices):
            choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield {**chunk, "choices": [choice]}
    if usage:
        yield {**chunk, "choices": [], "usage": usage}


def _deltas(message: Json) -> Iterator[Json]:
    calls = message.get("tool_calls") or []
    yield {"role": "assistant", "content": None if calls else ""}
    for piece in _PIECE.findall(message.get("content") or ""):
        yield {"content": piece}
    for i, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        opening = {"name": name, "arguments": ""}
        yield {"tool_calls": [{"index": i, "id": call["id"], "type": "function", "function": opening}]}
        for at in range(0, len(arguments), _ARGUMENTS_PIECE_CHARS):
            part = {"arguments": arguments[at : at + _ARGUMENTS_PIECE_CHARS]}
            yield {"tool_calls": [{"index": i, "function": part}]}


def _dumps(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
