"""Vectors from the provider: asked after the answer, in batches, again after a failure, never in the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy", reason="needs the extra [semantic]")

from proxy.api.embeddings import Embedder
from proxy.api.memory import Memory
from proxy.config import load_config
from proxy.conversation.effects import Search
from proxy.conversation.pages import PathPages
from proxy.conversation.tree import Identity, TenantKey
from proxy.errors import ApiError
from proxy.memory.ids import Hit
from proxy.tokens import get_counter
from proxy.upstream import BytesReply, Header, Reply, UpstreamBroken
from tests.search.test_vectors import Topics

ONE, OTHER = TenantKey(b"one"), TenantKey(b"other")
HEADERS: list[Header] = [(b"authorization", b"Bearer sk-client"), (b"cookie", b"a=1"), (b"content-length", b"9")]
TALK = [f"Nothing is said in {number}" for number in range(20)]
TALK[4] = "A kitten"


def vectors(texts: Sequence[str]) -> list[list[float]]:
    return [[float(x) for x in Topics()._one(text)] or [0.0] * 5 for text in texts]


def embedded(body: dict[str, Any]) -> Reply:
    rows = [{"index": i, "embedding": v} for i, v in enumerate(vectors(body["input"]))]
    return BytesReply(200, [], json.dumps({"object": "list", "data": rows[::-1]}).encode())


Answers = Callable[[dict[str, Any]], Reply]


class Endpoint:
    """/v1/embeddings: `answers` says what it answers, `gate` holds it back until it is set."""

    def __init__(self, answers: Answers = embedded) -> None:
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Header] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.now = self.most = 0

    async def forward(
        self, method: str, path: str, query: bytes, headers: Sequence[Header],
        body: AsyncIterator[bytes] | None,
    ) -> Reply:  # fmt: skip
        assert (method, path) == ("POST", "/embeddings") and body is not None
        self.bodies.append(json.loads(b"".join([data async for data in body])))
        self.headers = list(headers)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.gate.wait()
        finally:
            self.now -= 1
        return self.answers(self.bodies[-1])

    @property
    def texts(self) -> list[list[str]]:
        return [body["input"] for body in self.bodies]


class Room:
    def __init__(self, path: Path, endpoint: Endpoint, **settings: Any) -> None:
        flags: dict[str, object] = {"tiers.l2.path": str(path / "data")}
        settings = {"embeddings": "upstream", "embeddings_model": "small", "embeddings_wait_ms": 5000, **settings}
        flags |= {f"search.{key}": value for key, value in settings.items()}
        config = load_config(None, {}, flags)
        self.endpoint = endpoint
        self.memory = Memory(config)
        self.embedder = Embedder(config, endpoint, self.memory)  # type: ignore[arg-type]

    def pages(self, tenant: TenantKey, texts: Sequence[str]) -> PathPages:
        raws = [(json.dumps(m).encode(), m) for m in ({"role": "user", "content": text} for text in texts)]
        return PathPages(Identity(bytes(32)).extend(tenant, [], raws), get_counter("gpt-4o"), 1024)

    def submit(self, tenant: TenantKey = ONE, texts: Sequence[str] = TALK) -> None:
        self.embedder.submit(tenant, HEADERS, self.pages(tenant, texts))

    async def idle(self) -> None:
        """Until nothing is on its way."""
        async with asyncio.timeout(20):
            while self.embedder._tasks:
                await asyncio.wait(set(self.embedder._tasks))

    async def near(
        self, query: str = "Where is the feline?", tenant: TenantKey = ONE, texts: Sequence[str] = TALK
    ) -> list[Hit]:
        search = Search([query], 3, len(texts), lambda position, part: False)
        return await self.embedder.near(tenant, HEADERS, search, self.pages(tenant, texts))


@asynccontextmanager
async def room(path: Path, endpoint: Endpoint | None = None, **settings: Any) -> AsyncIterator[Room]:
    found = Room(path, endpoint or Endpoint(), **settings)
    try:
        yield found
    finally:
        await found.embedder.close()
        await found.memory.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits after a failure, none of which is waited."""
    found: list[float] = []
    sleep = asyncio.sleep

    def at_once(seconds: float) -> Awaitable[None]:
        found.append(seconds)
        return sleep(0)

    monkeypatch.setattr("proxy.api.embeddings.asyncio.sleep", at_once)
    return found


async def test_pages_are_embedded_once_in_batches_with_the_callers_own_key(tmp_path: Path) -> None:
    async with room(tmp_path, embeddings_batch_pages=8) as here:
        here.submit()
        await here.idle()
        assert [len(texts) for texts in here.endpoint.texts] == [8, 8, 4] and here.endpoint.bodies[0]["model"] == "small"
        assert dict(here.endpoint.headers)[b"authorization"] == b"Bearer sk-client"
        assert b"cookie" not in dict(here.endpoint.headers)
        here.submit()
        here.submit(texts=[*TALK, "A boat", "", TALK[0]])
        await here.idle()
        assert here.endpoint.texts[3:] == [["A boat"]]


async def test_invariant_06_a_search_has_its_own_tenants_vectors(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.submit()
        await here.idle()
        assert (await here.near())[0].position == 4
        calls = len(here.endpoint.bodies)
        assert await here.near(tenant=OTHER) == [] and len(here.endpoint.bodies) == calls
        here.submit(OTHER, TALK[5:])
        await here.idle()
        assert here.endpoint.texts[-1] == TALK[5:]  # none was shared ...
        assert await here.near("And the cat?", OTHER) == []  # ... nor is the one that it has not
        assert here.endpoint.texts[-1] == ["And the cat?"]


async def test_invariant_07_a_search_finds_what_it_found_whatever_came_since(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        assert await here.near() == [] and here.endpoint.bodies == []  # nothing is known to work
        here.submit()
        await here.idle()
        assert await here.near() == []
        found = await here.near("A feline!")
        assert found[0].position == 4
    broken = Endpoint(lambda body: BytesReply(500, [], b""))
    async with room(tmp_path, broken) as here:
        assert await here.near() == [] and await here.near("A feline!") == found
        assert broken.bodies == []


async def test_invariant_07_after_a_restart_a_new_search_is_as_it_would_have_been(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.submit()
        await here.idle()
        there = await here.near("The cat?")
    async with room(tmp_path / "other") as here:
        here.submit()
        await here.idle()
    async with room(tmp_path / "other") as here:
        assert await here.near("The cat?") == there != []
        assert len(here.endpoint.bodies) == 1  # the question


async def test_a_late_query_is_by_words_and_the_next_does_not_wait(tmp_path: Path) -> None:
    async with room(tmp_path, embeddings_wait_ms=20) as here:
        here.submit()
        await here.idle()
        here.endpoint.gate.clear()
        assert await here.near() == [] and here.endpoint.now == 0  # the call was given up
        calls = len(here.endpoint.bodies)
        assert await here.near("Another cat?") == [] and len(here.endpoint.bodies) == calls
        here.endpoint.gate.set()
        for number in range(2):  # what it owes: two calls that succeed
            assert await here.near(f"{number}, a cat?") == []
            here.submit(texts=[*TALK, f"more {number}"])
            await here.idle()
        assert (await here.near("And the cat?"))[0].position == 4


@pytest.mark.parametrize(
    "failure",
    [
        BytesReply(500, [], b"{}"),
        BytesReply(200, [], b"no JSON"),
        BytesReply(200, [], b'{"data":[{"index":1,"embedding":[1]}]}'),
        BytesReply(200, [], b'{"data":[{"index":0,"embedding":"AAAA"}]}'),
        ApiError(502, "unreachable"),
        UpstreamBroken("cut"),
    ],
)
async def test_what_fails_is_tried_again_after_longer_and_longer(
    tmp_path: Path, waits: list[float], failure: Reply | Exception
) -> None:
    def answers(body: dict[str, Any]) -> Reply:
        if len(endpoint.bodies) > 4:
            return embedded(body)
        if isinstance(failure, Exception):
            raise failure
        return failure

    endpoint = Endpoint(answers)
    async with room(tmp_path, endpoint, embeddings_pages_per_minute=10**9) as here:
        here.submit(texts=TALK[:5])
        await here.idle()
        assert waits == [1, 2, 4, 8] and endpoint.texts == [TALK[:5]] * 5
        assert (await here.near(texts=TALK[:5]))[0].position == 4


async def test_a_tenant_whose_calls_all_fail_leaves_the_queue_to_others(tmp_path: Path, waits: list[float]) -> None:
    refusing = Endpoint(lambda body: BytesReply(401, [], b"{}"))
    async with room(tmp_path, refusing, embeddings_pages_per_minute=10**9) as here:
        here.submit()
        await here.idle()
        assert here.embedder.waiting == 0 and waits == [1, 2, 4, 8] and len(here.endpoint.bodies) == 5
        here.submit()  # it rests
        await here.idle()
        assert len(here.endpoint.bodies) == 5
        here.endpoint.answers = embedded
        here.submit(OTHER, ["A cat"])
        await here.idle()
        assert here.endpoint.texts[5:] == [["A cat"]]


async def test_a_page_that_is_refused_by_itself_costs_the_others_nothing(
    tmp_path: Path, waits: list[float]
) -> None:
    def answers(body: dict[str, Any]) -> Reply:
        return BytesReply(400, [], b"{}") if TALK[2] in body["input"] else embedded(body)

    async with room(tmp_path, Endpoint(answers), embeddings_pages_per_minute=10**9) as here:
        here.submit()
        await here.idle()
        assert [TALK[2]] in here.endpoint.texts and len(here.endpoint.bodies) < 16
        assert (await here.near())[0].position == 4
        assert here.embedder.waiting == 0


async def test_invariant_10_calls_pages_and_the_queue_are_bounded(tmp_path: Path, waits: list[float]) -> None:
    bounds = {"embeddings_queue_pages": 6, "embeddings_batch_pages": 2, "embeddings_calls": 2, "embeddings_pages_per_minute": 60}
    async with room(tmp_path, **bounds) as here:
        here.endpoint.gate.clear()
        for number in range(4):
            here.submit(TenantKey(b"%d" % number))
        async with asyncio.timeout(10):
            while here.endpoint.now < 1 or len(here.embedder._tasks) > 2:
                await asyncio.wait(set(here.embedder._tasks), timeout=0.01)
        assert here.embedder.waiting <= 6
        here.endpoint.gate.set()
        await here.idle()
        assert here.endpoint.most <= 2 and sum(map(len, here.endpoint.texts)) == 6
        assert sum(waits) > 0 and max(waits) <= 4.1  # two pages in two seconds
        for _ in range(4):  # what was left out comes with later turns
            here.submit(TenantKey(b"0"))
            await here.idle()
        assert {text for texts in here.endpoint.texts for text in texts} == set(TALK)


async def test_a_call_that_hangs_ends_in_time(tmp_path: Path, waits: list[float]) -> None:
    async with room(tmp_path, embeddings_timeout_s=0.02, embeddings_pages_per_minute=10**9) as here:
        here.endpoint.gate.clear()
        here.submit()
        async with asyncio.timeout(10):
            while len(waits) < 2:
                await asyncio.wait(set(here.embedder._tasks), timeout=0.01)
        assert here.endpoint.most == 1 and waits[:2] == [1, 2]
