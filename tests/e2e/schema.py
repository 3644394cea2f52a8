"""OpenAI's published schema of chat completions, as a judge of what we send and answer.

Promises: the schema is read from the shared data, not vendored; `needs_schema()` skips with the reason
where it is absent. OpenAPI's `nullable` is understood. What the schema does not know (fields of
other providers) it does not forbid. A request or an answer takes some 10 µs (jsonschema-rs), so
tests need no sample of what they judge. What is exempt says why where it is: films in requests, and
pieces of a custom tool's call in chunks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import lru_cache
from typing import Any

import httpx
import pytest

from tests.e2e.recording import Recorded
from tests.e2e.rules import SCHEMA

REQUEST = "CreateChatCompletionRequest"
RESPONSE = "CreateChatCompletionResponse"
CHUNK = "CreateChatCompletionStreamResponse"
_SHOWN = 5  # problems of one value
_EXCERPT_CHARS = 160
_DATA = "data: {"
HAS_SCHEMA = SCHEMA.exists()


def needs_schema() -> None:
    """Skip the test that calls it where there is no schema."""
    if not HAS_SCHEMA:
        pytest.skip(f"no schema of the API at {SCHEMA}")


def problems(name: str, value: Any) -> list[str]:
    """What the schema `name` says against a value, a few sentences; empty: it is valid."""
    try:
        found = list(_validator(name).iter_errors(value))
    except UnicodeEncodeError:  # half a surrogate pair is JSON, but no text: the judge sees a `?`
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        found = list(_validator(name).iter_errors(value))
    return [_sentence(error) for error in found[:_SHOWN]]


def request_problems(request: Any) -> list[str]:
    """What is wrong with a request to upstream. The published user messages have no films, which
    servers behind gateways take: those parts are left out."""
    if isinstance(request, dict) and isinstance(request.get("messages"), list):
        request = {**request, "messages": [_without_films(m) for m in request["messages"]]}
    return problems(REQUEST, request)


def check_requests(calls: Iterable[Recorded]) -> None:
    """All of these requests to upstream are valid. Where the schema is absent none is judged."""
    for recorded in calls if HAS_SCHEMA else ():
        found = request_problems(recorded.json)
        assert not found, f"call {recorded.index}: {found}"


def stream_problems(text: str) -> list[str]:
    """What is wrong with the chunks of a stream; one without any is wrong too."""
    chunks = list(chunks_of(text))
    found = [p for chunk in chunks for p in problems(CHUNK, chunk)]
    return found[:_SHOWN] if chunks else [f"no chunk: {text[:_EXCERPT_CHARS]!r}"]


def chunks_of(text: str) -> Iterator[dict[str, Any]]:
    """The chunks of a stream; an error in place of one is none, nor is an event that was cut."""
    for event in text.split("\n\n")[:-1]:
        for line in event.split("\n"):
            if line.startswith(_DATA):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" not in chunk:
                    yield chunk


class Judge(httpx.AsyncHTTPTransport):
    """A client's transport that judges every chat answer with status 200 that it has carried.

    `answers` and `chunks` count what was judged, `problems` are sentences. Where the schema is absent
    nothing is judged: test_schema.py is skipped there and says why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers = self.chunks = 0
        self.problems: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        chat = request.url.path.endswith("/chat/completions")
        if chat and response.status_code == 200 and HAS_SCHEMA:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _Overheard(response.stream, self)
        return response

    def hear(self, text: str) -> None:
        """Judges one answer: a whole one, or a stream's chunks up to where it broke."""
        self.answers += 1
        if text.lstrip().startswith("{"):
            self.problems += problems(RESPONSE, json.loads(text))
            return
        for chunk in chunks_of(text):
            self.chunks += 1
            self.problems += problems(CHUNK, chunk)

    def check(self) -> None:
        """Every answer was valid."""
        assert not self.problems, "\n".join(self.problems[:_SHOWN])


class _Overheard(httpx.AsyncByteStream):
    """An answer's bytes on their way to the client, judged when it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, judge: Judge) -> None:
        self._stream, self._judge = stream, judge
        self._heard = bytearray()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in self._stream:
            self._heard += data
            yield data

    async def aclose(self) -> None:
        await self._stream.aclose()
        heard, self._heard = bytes(self._heard), bytearray()
        if heard:
            self._judge.hear(heard.decode("utf-8", "replace"))


@contextlib.asynccontextmanager
async def judged(judge: Judge | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client for the official one to use. At its end every chat answer has to have been
    valid; a test that asks its own `judge` is not asked again."""
    heard = Judge() if judge is None else judge
    async with httpx.AsyncClient(transport=heard, timeout=30) as client:
        yield client
    if judge is None:
        heard.check()


def _without_films(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("role") != "user":
        return message
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    kept = [part for part in parts if not isinstance(part, dict) or part.get("type") != "video_url"]
    return {**message, "content": kept or "A film."}


def _sentence(error: Any) -> str:
    path = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in error.instance_path)
    shown = json.dumps(error.instance, ensure_ascii=False)[:_EXCERPT_CHARS]
    return f"${path} {error.message}: {shown}"


@lru_cache(maxsize=8)
def _validator(name: str) -> Any:
    from jsonschema_rs import Draft202012Validator  # late: only tests that use it need it

    whole = _with_null(json.loads(SCHEMA.read_text()))
    # Chunks of a custom tool's call: the API streams them, the schema has forgotten them
    # (https://github.com/openai/openai-openapi/issues/576).
    piece = whole["components"]["schemas"]["ChatCompletionMessageToolCallChunk"]["properties"]
    piece["type"]["enum"] = ["function", "custom"]
    schema = {"$ref": f"#/components/schemas/{name}", **whole}
    return Draft202012Validator(schema, mask="this")  # the sentence shows an excerpt itself


def _with_null(schema: Any) -> Any:
    """The schema with `nullable` in the words of JSON Schema."""
    if isinstance(schema, list):
        return [_with_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _with_null(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [out, {"type": "null"}]} if schema.get("nullable") is True else out
