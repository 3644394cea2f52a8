"""The upstream's own list of models: asked once per key beside the requests, and believed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.e2e.harness import Recorded, RecordingUpstream, ServerProcess, answer, error, message_of

MODEL = "house-model"
LONG = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " + "word " * 900} for i in range(11)]
SHORT = [{"role": "user", "content": "Hello."}]


class Lists(RecordingUpstream):
    """Says what `stated` holds; waits for `gate` before it does."""

    def __init__(self) -> None:
        super().__init__(lambda request, _: answer(request, message_of("ok")), other=self._list)
        self.stated: Any = {"object": "list", "data": [{"id": MODEL, "max_model_len": 4096}, {"id": "other"}]}
        self.asked = asyncio.Event()

    def _list(self, recorded: Recorded) -> Any:
        self.asked.set()
        return self.stated

    @property
    def lists(self) -> list[Recorded]:
        return [r for r in self.others if r.target.partition("?")[0] == "/v1/models"]


@pytest.fixture
async def upstream() -> AsyncIterator[Lists]:
    async with Lists() as started:
        yield started


def config_of(upstream: Lists, **more: Any) -> dict[str, Any]:
    return {"upstream": {"provider": "openai", "base_url": upstream.base_url}, **more}


async def say(server: ServerProcess, messages: Any, key: str = "k1", **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30, headers={"authorization": f"Bearer {key}"}) as http:
        url = f"{server.base_url}/chat/completions"
        return await http.post(url, json={"model": MODEL, "messages": messages, **fields})


async def facts(server: ServerProcess, key: str = "k1") -> dict[str, Any]:
    root = server.base_url.removesuffix("/v1")
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}) as http:
        rows = (await http.get(f"{root}/vm/models")).json()["models"]
    return next((row for row in rows if row["model"] == MODEL), {})


async def learned(server: ServerProcess, key: str = "k1") -> dict[str, Any]:
    """The facts once the window is among them: the list is read beside the requests."""
    async with asyncio.timeout(20):
        while "window_tokens" not in (row := await facts(server, key)):
            await asyncio.sleep(0.02)
    return row


async def test_a_stated_window_is_used_from_the_next_turn_on(upstream: Lists) -> None:
    with ServerProcess(config_of(upstream)) as server:
        first = await say(server, SHORT)
        assert first.status_code == 200 and (await learned(server))["window_tokens"] == {"value": 4096, "from": "upstream"}
        assert (await say(server, LONG)).headers["x-llm-pager-channel"] == "tools"
        sent = upstream.calls[-1].json["messages"]
        assert 0 < len(str(sent)) < 4096 * 5 < len(str(LONG))
        for _ in range(3):
            await say(server, SHORT)
        assert len(upstream.lists) == 1
        assert upstream.lists[0].header("authorization") == "Bearer k1"
        await say(server, SHORT, "k2")
        await learned(server, "k2")
        assert [r.header("authorization") for r in upstream.lists] == ["Bearer k1", "Bearer k2"]


@pytest.mark.parametrize(
    "more", [{"models": {MODEL: {"window_tokens": 64_000}}}, {"tiers": {"l0": {"tokens": 64_000}}}]
)
async def test_a_configured_window_asks_nobody(upstream: Lists, more: dict[str, Any]) -> None:
    with ServerProcess(config_of(upstream, **more)) as server:
        await say(server, SHORT)
        assert "x-llm-pager-channel" not in (await say(server, LONG)).headers or (
            len(upstream.calls[-1].json["messages"]) == len(LONG)
        )
        assert upstream.lists == []


async def test_a_list_is_known_after_a_kill(upstream: Lists) -> None:
    with ServerProcess(config_of(upstream)) as server:
        await say(server, SHORT)
        before = await learned(server)
        server.kill()
        server.start()
        assert await facts(server) == before
        for _ in range(2):
            await say(server, SHORT)
        assert len(upstream.lists) == 1


@pytest.mark.parametrize("stated", [error(401, "no"), error(500, "no"), {"data": "odd"}, []])
async def test_a_list_that_says_nothing_is_asked_for_once(upstream: Lists, stated: Any) -> None:
    upstream.stated = stated
    with ServerProcess(config_of(upstream)) as server:
        for _ in range(3):
            assert (await say(server, SHORT)).status_code == 200
        await asyncio.wait_for(upstream.asked.wait(), 20)
        assert (await say(server, SHORT)).status_code == 200
        assert len(upstream.lists) == 1 and await facts(server) == {}


async def test_a_list_that_never_comes_delays_nobody(upstream: Lists) -> None:
    from tests.e2e.harness import Hang

    upstream.stated = Hang()
    with ServerProcess(config_of(upstream)) as server:
        async with asyncio.timeout(20):
            for stream in (False, True, False):
                assert (await say(server, SHORT, stream=stream)).status_code == 200
        assert len(upstream.lists) == 1
