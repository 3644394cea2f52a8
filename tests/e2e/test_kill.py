"""Figure 4: SIGKILL and restart, or everything in RAM dropped, and the next upstream request is the
one that an undisturbed server sends, byte for byte (invariants 5, 7 and 9).

One story is told to two servers, each with a directory, an installation secret and an upstream of
its own; only one of them is disturbed. The story has a client's tool, faults, a search, a mixed
call and an epoch that begins in the middle of a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from proxy.app import App, create_app
from tests.e2e.harness import (
    Hang,
    Recorded,
    ServerProcess,
    Stream,
    in_process_server,
    message_of,
    sse_chunks,
    together,
)
from tests.e2e.script import MODEL, TAG, Chat, Script, developer, fault, paged_config
from tests.e2e.story import Teller, assert_same, chat_of, nothing, reread


@contextlib.asynccontextmanager
async def scripted(**sections: Any) -> AsyncIterator[tuple[Script, dict[str, Any]]]:
    script = Script()
    async with script.upstream:
        yield script, paged_config(script.upstream, **sections)
    script.check()


@contextlib.asynccontextmanager
async def client_of(base_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="k", base_url=base_url, max_retries=0, timeout=20) as client:
        yield client


async def test_invariants_5_and_7_sigkill_between_turns_changes_nothing() -> None:
    points: list[str] = []
    async with scripted() as (one, config_one), scripted() as (two, config_two):
        with together(ServerProcess(config_one), ServerProcess(config_two)) as (server, quiet):

            async def kill(point: str) -> None:
                points.append(point)
                server.kill()
                await asyncio.to_thread(server.restart)

            async with client_of(server.base_url) as a, client_of(quiet.base_url) as b:
                told = Teller(one, chat_of(a), kill)
                other = Teller(two, chat_of(b), nothing)
                await asyncio.gather(told.story(), other.story())
                await kill("the end")
                assert told.chat.messages == other.chat.messages
                found = [await reread(teller) for teller in (told, other)]
    assert len(points) == 6
    assert_same(one, two)
    missing = [mark for mark in told.marks if mark not in found[0]]
    assert not missing, f"answered turns are missing after SIGKILL: {missing}"


HALF = "This is halfsaid and goes on for a while, so that the hold is over and more of it. " * 3


@pytest.mark.parametrize(
    ("paged", "moment"), [(False, "half"), (True, "half"), (True, "end")], ids=str
)
async def test_invariant_5_sigkill_in_a_stream_remembers_nothing_of_it(
    paged: bool, moment: str
) -> None:
    """The client saw half an answer, or upstream has just sent the last of it, so that the turn may
    or may not be stored; when paged, a fault was served before it."""
    async with scripted() as (one, config_one), scripted() as (two, config_two):
        with together(ServerProcess(config_one), ServerProcess(config_two)) as (server, quiet):
            async with client_of(server.base_url) as a, client_of(quiet.base_url) as b:
                tellers = [Teller(one, chat_of(a), nothing), Teller(two, chat_of(b), nothing)]
                turns = 14 if paged else 2
                await asyncio.gather(*(t.turns("before", turns) for t in tellers))
                await cut_by_sigkill(one, tellers[0].chat, server, paged, moment)
                await asyncio.gather(*(same_again(t) for t in tellers))
                found = await reread(tellers[0]) if paged else ""
    assert_same(one, two)
    assert bool(developer(one.calls["again"][0])) is paged
    for tag in ("again", "after/0", "after/1"):
        assert b"halfsaid" not in b"".join(one.bodies(tag))
    assert "halfsaid" not in found
    assert not paged or all(mark in found for mark in tellers[0].marks)


async def cut_by_sigkill(
    script: Script, chat: Chat, server: ServerProcess, paged: bool, moment: str
) -> None:
    """A turn in whose stream the server is killed, and the server's restart."""
    killed = False

    def kill() -> None:
        nonlocal killed
        if not killed:
            killed = True
            server.kill()

    def said(request: dict[str, Any]) -> Stream:
        chunks = sse_chunks(request, message_of(HALF))
        return Stream([*chunks[:-4], Hang()] if moment == "half" else [*chunks, kill])

    script.plan("cut", *([fault("msg_0002")] if paged else []), said)
    history: Any = [*chat.messages, {"role": "user", "content": "Tell me."}]
    text = ""
    try:
        stream = await chat.client.chat.completions.create(
            model=MODEL, messages=history, stream=True, extra_headers={TAG: "cut"}, **chat.fields
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if moment == "half" and "halfsaid" in text:
                kill()
    except (httpx.HTTPError, openai.APIError):
        pass  # the connection broke; at the end it may also have got through
    else:
        assert moment == "end"
    assert killed
    assert moment == "end" or "halfsaid" in text
    assert len(script.calls["cut"]) == (2 if paged else 1)
    await asyncio.to_thread(server.restart)


async def same_again(teller: Teller) -> None:
    """The client asks again and goes on."""
    teller.script.plan("again", message_of("A whole answer, wholemark."))
    await teller.chat.say("Tell me.", "again", stream=True)
    teller.marks.append("wholemark")
    await teller.turns("after", 2)


# -- everything in RAM is a cache


@contextlib.contextmanager
def app_server(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, App]]:
    """A server in this process, with its application in hand."""
    made: list[App] = []

    def keep(*args: Any, **fields: Any) -> App:
        made.append(create_app(*args, **fields))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr("proxy.app.create_app", keep)
        with in_process_server(config) as base_url:
            yield base_url, made[0]


@pytest.mark.parametrize("moment", ["between turns", "between rounds"])
async def test_invariant_9_dropping_all_of_l1_changes_no_prompt(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with an L1 of one token, where nearly everything is always gone."""
    tiny = {"l0": {"tokens": 4000, "reserve_tokens": 1000}, "l1": {"tokens": 1}}
    sections = {"tiers": tiny} if moment == "between rounds" else {}
    dropped = 0
    async with scripted(**sections) as (one, config_one), scripted() as (two, config_two):
        with (
            app_server(config_one, monkeypatch) as (url, app),
            app_server(config_two, monkeypatch) as (quiet_url, _),
        ):

            def forget(*_: Recorded) -> None:
                nonlocal dropped
                dropped += 1
                app.memory.forget()

            if moment == "between rounds":  # the server waits for its upstream
                one.on_call = forget
            else:
                one.on_plan = forget
            async with client_of(url) as a, client_of(quiet_url) as b:
                await Teller(one, chat_of(a), nothing).story()
                await Teller(two, chat_of(b), nothing).story()
    assert dropped > 20
    assert_same(one, two)


async def test_invariant_9_a_turn_told_twice_is_remembered_as_it_was_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that lost the answer asks again; the model looks elsewhere and says the same. What
    RAM holds after the second time has to be what storage holds."""
    async with scripted() as (one, config_one), scripted() as (two, config_two):
        with (
            app_server(config_one, monkeypatch) as (url, app),
            app_server(config_two, monkeypatch) as (quiet_url, _),
        ):
            async with client_of(url) as a, client_of(quiet_url) as b:
                for script, client, forget in ((one, a, app.memory.forget), (two, b, None)):
                    teller = Teller(script, chat_of(client), nothing)
                    await teller.turns("before", 14)
                    twin = teller.chat.fork()
                    script.plan("first", fault("msg_0002"), message_of("The same answer."))
                    script.plan("second", fault("msg_0004"), message_of("The same answer."))
                    await teller.chat.say("The question.", "first")
                    await twin.say("The question.", "second")
                    assert twin.messages == teller.chat.messages
                    if forget is not None:
                        forget()
                    await teller.turns("after", 3)
    assert developer(one.calls["after/0"][0])
    assert_same(one, two)
