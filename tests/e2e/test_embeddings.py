"""Search by meaning over real sockets: vectors from the provider arrive later and stay; a provider that fails
or hangs changes no answer and holds nobody up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

import pytest

pytest.importorskip("numpy", reason="needs the extra [semantic]")

from tests.e2e.harness import (
    Answer,
    Hang,
    Recorded,
    Response,
    ServerProcess,
    message_of,
)
from tests.e2e.script import (
    Chat,
    Script,
    Stand,
    filler,
    paged_config,
    search,
    talk,
)
from tests.search.test_vectors import Topics

UPSTREAM = {"embeddings": "upstream", "embeddings_model": "small-embed", "embeddings_batch_pages": 8}
TURNS = 12  # then the first ones have left the window
FACT = f"My kitten is named Biscuit. {filler('fact', 60)}"


def vectors(recorded: Recorded) -> Answer:
    """The endpoint: it knows what a cat is."""
    found = [[float(x) for x in Topics()._one(text)] or [0.0] * 5 for text in recorded.json["input"]]
    return {"data": [{"index": i, "embedding": vector} for i, vector in enumerate(found)]}


def embedded(script: Script) -> list[str]:
    """All texts that were sent to the endpoint."""
    calls = [call for call in script.upstream.others if call.target == "/v1/embeddings"]
    return [text for call in calls for text in call.json["input"]]


@asynccontextmanager
async def served(search_config: dict[str, Any], endpoint: Any = vectors) -> AsyncIterator[Stand]:
    script = Script()
    script.upstream.other = endpoint
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream, search=search_config)) as server:
            stand = Stand(script, server)
            yield stand
            await stand.close()
        script.check()


async def told(stand: Stand, key: str) -> Chat:
    """A chat whose beginning has left the window."""
    chat = Chat(stand.client(key))
    stand.script.plan(f"{key}/fact", message_of(f"Noted. {filler('answer', 60)}"))
    await chat.say(FACT, f"{key}/fact")
    await talk(chat, stand.script, key, TURNS, [])
    return chat


async def finds(stand: Stand, chat: Chat, query: str) -> bool:
    """Whether the model's search brings the fact, of which it has no word, as its first page."""
    stand.script.plan(query, search(query))
    await chat.fork().say("Look it up.", query)
    (_, second) = stand.script.calls[query]
    (result,) = [m for m in second.json["messages"] if m["role"] == "tool"][-1:]
    found = [row["page_id"] for row in json.loads(result["content"])["results"]]
    return found[:1] == ["msg_0001"]


async def test_vectors_arrive_after_the_answer_stay_and_are_nobody_elses() -> None:
    async with served(UPSTREAM) as stand:
        chat = await told(stand, "one")
        async with asyncio.timeout(30):
            tries = 0
            while not await finds(stand, chat, f"feline {tries}"):  # each one asks anew
                tries += 1
        texts = embedded(stand.script)
        assert texts.count(FACT) == 1
        stand.server.kill()
        stand.server.restart()
        stand.script.upstream.others.clear()
        assert await finds(stand, chat, "feline after the restart")
        assert FACT not in embedded(stand.script)
        stand.script.upstream.other = lambda recorded: Response(b"{}", 503)
        other = await told(stand, "other")
        assert not await finds(stand, other, "feline of another")
        sent = {call.header("authorization") for call in stand.script.upstream.others}
        assert len(sent) == 2 and all(value and value.startswith("Bearer test") for value in sent)


async def test_invariant_07_a_search_that_is_repeated_finds_what_it_found() -> None:
    async with served(UPSTREAM) as stand:
        chat = Chat(stand.client("k"))
        script, fork = stand.script, chat.fork
        gate: list[Answer] = [Response(b"{}", 500)]
        script.upstream.other = lambda recorded: gate[0] if gate else vectors(recorded)
        await chat.say(FACT, "fact")
        await talk(chat, script, "t", TURNS, [])
        assert not await finds(stand, chat, "feline")
        first = script.bodies("feline")
        gate.clear()
        async with asyncio.timeout(30):
            tries = 0
            while not await finds(stand, fork(), f"feline {tries}"):
                await talk(chat, script, f"more{tries}", 1, [])
                tries += 1
        stand.server.kill()
        stand.server.restart()
        chat.messages = chat.messages[: 1 + 2 * (1 + TURNS)]
        assert not await finds(stand, chat, "feline")
        assert script.bodies("feline") == first


async def test_an_endpoint_that_hangs_and_fails_changes_no_request_and_holds_nobody_up() -> None:
    # A search would wait for longer than the client does.
    settings = {**UPSTREAM, "embeddings_wait_ms": 60_000, "embeddings_timeout_s": 0.2}
    answers = cycle((Hang(), Response(b"no", 500)))
    async with (
        served(settings, lambda recorded: next(answers)) as stand,
        served({"embeddings": "none"}) as plain,
    ):
        for here in (stand, plain):
            chat = await told(here, "k")
            assert not await finds(here, chat, "feline")
        assert embedded(stand.script) and not embedded(plain.script)
        assert "feline" not in embedded(stand.script)
        sent, bare = ([call.body for call in here.script.upstream.calls] for here in (stand, plain))
        assert sent == bare


async def test_static_vectors_need_no_call_and_find_it_at_once() -> None:
    pytest.importorskip("wordllama", reason="needs the extra [semantic]")
    async with served({"embeddings": "static"}) as stand:
        chat = await told(stand, "k")
        assert await finds(stand, chat, "What is the cat called?")
        assert not stand.script.upstream.others
