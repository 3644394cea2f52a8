"""Prompts too large for a model whose window nobody knows: never stuck, whatever upstream says.

Promises: the whole handler with its storage; upstream is a function of the request's size. Whoever asks
three times is answered three times, and what was found out is paid for once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from proxy.upstream import BytesReply, Header
from tests.api.test_chat import JSON, Client, answered, body, client
from tests.conversation.player import count_tokens, sse_of
from tests.conversation.scenario import text_of

SSE = [(b"content-type", b"text/event-stream")]
MODEL = "a-model-of-the-house"
Refusal = Callable[[int], BytesReply]


class Upstream:
    """Answers what has at most `limit` tokens; of more it says `refusal(tokens)`."""

    def __init__(self, limit: int, refusal: Refusal) -> None:
        self.limit = limit
        self.refusal = refusal
        self.sizes: list[int] = []

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"") -> BytesReply:
        request = json.loads(body)
        self.sizes.append(tokens := count_tokens(request))
        if tokens > self.limit:
            return self.refusal(tokens)
        if request.get("stream"):
            chunks = sse_of({"role": "assistant", "content": "fits"}, "stop")
            return BytesReply(200, SSE, b"".join(chunks))
        return answered("fits")

    def take(self) -> list[int]:
        """The sizes since the last time."""
        sizes, self.sizes = self.sizes, []
        return sizes


def plain(status: int, text: bytes = b"") -> Refusal:
    return lambda _: BytesReply(status, JSON, text)


def event(text: bytes) -> Refusal:
    return lambda _: BytesReply(200, SSE, text)


def history(turns: int, words: int = 90) -> list[dict[str, Any]]:
    rng = random.Random(turns)
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text_of(rng, words, f"m{i}x")} for i in range(2 * turns)]
    return [*said, {"role": "user", "content": "And now?"}]


LONG = history(60)


async def asked(one: Client, messages: Any = LONG, **fields: Any) -> tuple[int, bytes]:
    request = body(messages, model=MODEL, **fields)
    status, _, out = await one.send([json.dumps(request).encode()], [(b"authorization", b"Bearer k")])
    return status, out


def using(one: Client, upstream: Upstream) -> Upstream:
    one.api._upstream = upstream  # type: ignore[assignment]
    return upstream


REFUSALS: dict[str, Refusal] = {
    "numbers": lambda n: BytesReply(400, JSON, b'{"error": {"message": "%d / 8192"}}' % n),
    "no body": plain(400),
    "another language": plain(422, '{"error": {"message": "请求失败"}}'.encode()),
    "a page": plain(413, b"<html><h1>413</h1></html>"),
    "rights": plain(403, b'{"error": {"message": "This plan has 8K of context", "type": "forbidden"}}'),
    "trouble": plain(500, b"Internal Server Error"),
    "a gateway": plain(502),
    "in a 200": plain(200, b'{"error": {"message": "job failed", "code": 400}}'),
    "in a 200, beside choices": plain(200, b'{"choices": [], "error": "job failed"}'),
}
EVENTS: dict[str, Refusal] = {
    "an event": event(b'data: {"error": {"message": "job failed"}}\n\ndata: [DONE]\n\n'),
    "a line": event(b'error: {"message": "job failed"}\n\n'),
    "a finish reason": event(b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}\n\n'),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("refusal", [*REFUSALS.values(), *EVENTS.values()], ids=[*REFUSALS, *EVENTS])
async def test_the_same_request_is_answered_three_times(
    tmp_path: Path, refusal: Refusal, stream: bool
) -> None:
    if refusal in EVENTS.values() and not stream:
        return
    async with client(tmp_path) as one:
        upstream = using(one, Upstream(8192, refusal))
        calls = []
        for _ in range(3):
            status, out = await asked(one, stream=stream)
            assert status == 200 and b"fits" in out.replace(b'"}', b"") and b"failed" not in out
            calls.append(len(upstream.take()))
        assert calls[0] == 2 and calls[2] == 1, "a refusal of the moment teaches when it comes twice"


@pytest.mark.parametrize("mode", ["relaxed", "passive"])
async def test_a_growing_conversation_is_answered_in_every_turn(tmp_path: Path, mode: str) -> None:
    """It outgrows 8,192 tokens, where 32,000 are assumed."""
    async with client(tmp_path, memory={"mode": mode}) as one:
        upstream = using(one, Upstream(8192, plain(400)))
        further = 0
        for turns in range(12, 60, 2):
            status, _ = await asked(one, LONG[: 2 * turns + 1])
            assert status == 200
            further += len(upstream.take()) - 1
        assert 1 <= further <= 4


async def test_nothing_helps_and_the_client_reads_upstreams_first_words(tmp_path: Path) -> None:
    async with client(tmp_path) as one:
        numbered = iter(range(100))
        upstream = using(one, Upstream(0, lambda _: BytesReply(400, JSON, b"no %d" % next(numbered))))
        assert await asked(one, history(30)) == (400, b"no 0")
        assert len(upstream.take()) == 2, "the client's own bytes, and less"
        assert await asked(one, history(160)) == (400, b"no 2")
        assert len(upstream.take()) == 3, "a window, a smaller one, and the client's own bytes"


async def test_a_request_of_a_size_that_passed_is_not_made_smaller(tmp_path: Path) -> None:
    """The refusal is about something else; after three of them nobody can be sure of that any more."""
    async with client(tmp_path) as one:
        upstream = using(one, Upstream(100_000, plain(400, b"nein")))
        assert (await asked(one, history(30)))[0] == 200
        upstream.take()
        upstream.limit = 3000
        for _ in range(3):
            assert await asked(one, history(30)) == (400, b"nein")
            assert len(upstream.take()) == 1
        assert (await asked(one, history(30)))[0] == 200


async def test_one_moment_of_trouble_costs_no_memory(tmp_path: Path) -> None:
    async with client(tmp_path) as one:
        upstream = using(one, Upstream(5000, plain(503)))
        assert (await asked(one, history(30)))[0] == 200
        assert len(upstream.take()) == 2
        upstream.limit = 100_000  # it was busy
        assert (await asked(one, history(31)))[0] == 200
        assert upstream.take() == [count_tokens(body(history(31)))]


async def test_a_configured_window_is_believed(tmp_path: Path) -> None:
    async with client(tmp_path, models={MODEL: {"window_tokens": 64_000}}) as one:
        upstream = using(one, Upstream(3000, plain(400, b"nein")))
        assert await asked(one, history(30)) == (400, b"nein")
        assert len(upstream.take()) == 1


async def test_a_limit_per_minute_makes_room_also_where_the_window_is_known(tmp_path: Path) -> None:
    def too_large(tokens: int) -> BytesReply:
        said = f"Request too large for gpt-4o on tokens per min (TPM): Limit 6000, Requested {tokens}."
        return BytesReply(429, JSON, json.dumps({"error": {"message": said}}).encode())

    async with client(tmp_path) as one:
        upstream = using(one, Upstream(6000, too_large))
        request = json.dumps(body(LONG)).encode()
        for calls in (2, 1):
            status, _, _ = await one.send([request])
            assert status == 200 and len(upstream.take()) == calls
        upstream.limit, upstream.refusal = 0, plain(429, b"Rate limit reached on tokens per min: Limit 6000, "
                                                         b"Used 6000, Requested 900. Try again in 9s.")  # fmt: skip
        assert (await one.send([request]))[0] == 429 and len(upstream.take()) == 1


@pytest.mark.parametrize("seed", range(12))
async def test_any_refusal_ends_within_two_further_calls(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    texts = [rng.randbytes(rng.choice((0, 5, 400))), text_of(rng, 30, "e").encode(), b"%d" % rng.randrange(10**6)]
    said = [BytesReply(rng.choice((200, *range(400, 600))), JSON, rng.choice(texts)) for _ in range(9)]
    left = iter(said)
    stream = rng.random() < 0.5
    async with client(tmp_path) as one:
        upstream = using(one, Upstream(rng.randrange(1000, 20_000), lambda _: next(left)))
        status, out = await asked(one, stream=stream)
        assert len(upstream.take()) <= 3
        assert b"fits" in out.replace(b'"}', b"") or any((status, out) == (r.status, r.body) for r in said)
