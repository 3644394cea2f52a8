"""A store of many conversations, made by the program itself without a socket.

Promises: each conversation is what the proxy stores of one (tests/test_bench.py compares it with one made over HTTP):
the application is the real one, called as its server calls it, with an upstream that answers at once. The same number
gives the same conversation, so whoever asks for one later knows its history.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from proxy.app import App, create_app
from proxy.config import Config
from proxy.upstream import CHAT_PATH, BytesReply, Header, Reply, Upstream
from tests.bench.texts import Texts

MESSAGES = 100  # of a conversation, each a page
SEEN_AT = 95  # messages that it has when it is first seen; the rest comes turn by turn
CHARS = 400  # of a message
TENANTS = 50
MODEL = "gpt-4o"
_AT_ONCE = 8  # requests: their commits share transactions
_ANSWER = b"x-answer"  # the request's header with what upstream says


def message(role: str, text: str) -> bytes:
    return json.dumps({"role": role, "content": text}, separators=(",", ":")).encode()


def completion(said: dict[str, Any], reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": said, "finish_reason": reason, "logprobs": None}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}).encode()


def body(messages: Sequence[bytes]) -> bytes:
    return b'{"model":"%b","messages":[%b]}' % (MODEL.encode(), b",".join(messages))


class Conversation:
    """One of the store's. `texts`: what was said in it, in turns by the user and the model."""

    def __init__(self, number: int) -> None:
        self.number = number
        source = Texts(f"conversation {number}")
        self.texts = [source.text(CHARS) for _ in range(MESSAGES)]
        self.messages = [message("assistant" if i % 2 else "user", text) for i, text in enumerate(self.texts)]
        self.headers: list[Header] = [
            (b"authorization", b"Bearer tenant-%d" % (number % TENANTS)), (b"x-llm-pager-session", b"%d" % number),
        ]  # fmt: skip

    def turns(self, seen_at: int = SEEN_AT) -> list[tuple[bytes, str]]:
        """The requests that make it, with their answers: the first has what was said already, the others what is new."""
        first = [(body(self.messages[:seen_at]), self.texts[seen_at])]
        return first + [(body([self.messages[i]]), self.texts[i + 1]) for i in range(seen_at + 1, MESSAGES, 2)]


class Instant(Upstream):
    """Says what the request's header says that it says."""

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = CHAT_PATH) -> Reply:
        said = {"role": "assistant", "content": json.loads(dict(headers)[_ANSWER])}
        return BytesReply(200, [(b"content-type", b"application/json")], completion(said))

    async def forward(
        self, method: str, path: str, query: bytes, headers: Sequence[Header], body: AsyncIterator[bytes] | None
    ) -> Reply:
        return BytesReply(404, [], b"{}")


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[App]:
    """The application between its server's startup and shutdown."""
    app = create_app(config, upstream=Instant())
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    lifespan = asyncio.ensure_future(app({"type": "lifespan"}, events.get, told.put))  # type: ignore[arg-type]
    try:
        events.put_nowait({"type": "lifespan.startup"})
        assert (await told.get())["type"] == "lifespan.startup.complete"
        yield app
    finally:
        events.put_nowait({"type": "lifespan.shutdown"})
        await lifespan


async def ask(app: App, request: bytes, answer: str, headers: Sequence[Header]) -> None:
    """One chat request, read to the end of its answer."""
    came: list[dict[str, Any]] = [{"type": "http.request", "body": request, "more_body": False}]
    answered = asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if came:
            return came.pop()
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    head = [*headers, (_ANSWER, json.dumps(answer).encode()), (b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
             "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": head,
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1)}  # fmt: skip
    await app(scope, receive, send)  # type: ignore[arg-type]
    if sent[0]["status"] != 200:
        raise RuntimeError(str(sent))


async def make(config: Config, numbers: Sequence[int], seen_at: int = SEEN_AT) -> None:
    """Store these conversations."""
    left = iter(numbers)

    async def some(app: App) -> None:
        for number in left:
            conversation = Conversation(number)
            for request, answer in conversation.turns(seen_at):
                await ask(app, request, answer, conversation.headers)

    async with running(config) as app:
        await asyncio.gather(*(some(app) for _ in range(_AT_ONCE)))
