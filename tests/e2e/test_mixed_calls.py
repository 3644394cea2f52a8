"""The model calls a memory tool and a client's tool in one message.

The client sees its own call alone; when it returns the result, upstream gets the message as the
model made it, with all calls and all results, also after a restart and in another worker.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.e2e.harness import ServerProcess, call, message_of, messages_span, together
from tests.e2e.script import (
    LOOKUP,
    SYSTEM,
    Chat,
    Got,
    Message,
    Script,
    Workers,
    developer,
    fault,
    filler,
    paged_config,
    search,
    talk,
)

TURNS = 17  # an epoch has just begun
TIERS = {"l0": {"tokens": 6000, "reserve_tokens": 1000}}
VM_TOOLS = ("page_fault", "search_pages")


def page(number: int, call_id: str) -> Message:
    return call(call_id, "page_fault", {"page_id": f"msg_{number:04d}"})


def look(word: str, call_id: str) -> Message:
    return call(call_id, "lookup", {"word": word})


ORDERS = {
    "memory first": [page(2, "call_v1"), look("one", "call_c1")],
    "client first": [look("one", "call_c1"), page(2, "call_v1")],
    "interleaved": [
        look("one", "call_c1"),
        page(2, "call_v1"),
        look("two", "call_c2"),
        call("call_v2", "search_pages", {"query": "openinga1q"}),
    ],
}


def owned(calls: list[Message]) -> list[Message]:
    return [c for c in calls if c["function"]["name"] not in VM_TOOLS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand() -> AsyncIterator[tuple[Script, ServerProcess]]:
    script = Script()
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream, tiers=TIERS)) as server:
            yield script, server
    script.check()


async def paged(client: AsyncOpenAI, script: Script) -> Chat:
    """A conversation with pages outside its window."""
    chat = Chat(client, [SYSTEM], tools=[LOOKUP])
    await talk(chat, script, "opening", TURNS, [])
    assert developer(script.calls[f"opening/{TURNS - 1}"][0])
    return chat


def assert_whole(request: Message, made: Message, own_results: dict[str, str]) -> int:
    """The message as the model made it stands in the request, with one result for each call right
    after it; returns its position."""
    messages = request["messages"]
    positions = [i for i, m in enumerate(messages) if m.get("tool_calls") == made["tool_calls"]]
    assert len(positions) == 1, [m.get("tool_calls") for m in messages]
    at = positions[0]
    assert (messages[at]["content"] or None) == made["content"]
    results = messages[at + 1 : at + 1 + len(made["tool_calls"])]
    assert {m["role"] for m in results} == {"tool"}
    ids = [m["tool_call_id"] for m in results]
    calls = [c["id"] for c in made["tool_calls"]]
    assert sorted(ids) == sorted(calls)
    for owner in (own_results.keys(), set(calls) - own_results.keys()):
        assert [i for i in ids if i in owner] == [i for i in calls if i in owner], "out of order"
    given = {m["tool_call_id"]: m["content"] for m in results}
    for i, text in own_results.items():
        assert given[i] == text
    if "already loaded" in given["call_v1"]:  # then it is
        given["call_v1"] = "".join(str(m["content"]) for m in messages[:at])
    assert "openinga0q" in given["call_v1"]  # msg_0002 is the opening's first answer
    return at


def assert_client_sees_its_own(got: Got, made: Message) -> None:
    assert got.calls == owned(made["tool_calls"])
    assert got.finish == "tool_calls"
    assert not any(name in json.dumps(got.message) for name in VM_TOOLS)
    if not got.chunks:
        return
    deltas = [d for c in got.chunks for ch in c.choices for d in ch.delta.tool_calls or ()]
    opened = [d.index for d in deltas if d.id]
    assert opened == list(range(len(owned(made["tool_calls"]))))
    assert {d.index for d in deltas} == set(opened)
    assert len({c.id for c in got.chunks}) == 1
    assert sum(bool(ch.finish_reason) for c in got.chunks for ch in c.choices) == 1


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("text", [None, "Let me see."], ids=["bare", "with text"])
async def test_the_client_sees_only_its_call_and_upstream_gets_all_of_it_back(
    stand: tuple[Script, ServerProcess], stream: bool, order: str, text: str | None
) -> None:
    script, server = stand
    made = message_of(text, ORDERS[order])
    key = f"{order}/{stream}/{text}"
    async with AsyncOpenAI(api_key=key, base_url=server.base_url, max_retries=0) as client:
        chat = await paged(client, script)
        script.plan("mixed", search("openingu3q", prefix="inner"), made)
        got = await chat.say("Do both.", "mixed", stream=stream)
        assert len(script.calls["mixed"]) == 2  # a mixed message after a round of memory calls
        assert_client_sees_its_own(got, made)
        results = {c["id"]: f"result of {c['id']}" for c in got.calls}
        chat.messages += [tool(i, r) for i, r in list(results.items())[:-1]]
        script.plan("result", message_of("Done."))
        await chat.result(*list(results.items())[-1], "result", stream=stream)
        (recorded,) = script.calls["result"]
        at = assert_whole(recorded.json, made, results)
        assert developer(recorded) == developer(script.calls["mixed"][0])
        inner = recorded.json["messages"][at - 2]["tool_calls"]
        assert inner[0]["id"] == "call_inner_0", "the turn's earlier round stands before it"
        script.plan("next", message_of("Later."))
        await chat.say("And now?", "next", stream=not stream)
        (following,) = script.calls["next"]
        assert messages_span(following.body).startswith(messages_span(recorded.body)[:-1])
        assert_whole(following.json, made, results)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_epoch_between_call_and_result_keeps_the_message_whole(
    stand: tuple[Script, ServerProcess], stream: bool
) -> None:
    """Invariant 8: the group of a mixed message goes into the new window as one."""
    script, server = stand
    async with AsyncOpenAI(api_key=f"epoch/{stream}", base_url=server.base_url) as client:
        chat = await paged(client, script)
        made = message_of(None, ORDERS["client first"])
        script.plan("mixed", search("openingu3q", prefix="inner"), made)
        await chat.say("Do both.", "mixed", stream=stream)
        script.plan("result", message_of("Done."))
        long = f"The result. {filler('result', 900)}"
        await chat.result("call_c1", long, "result", stream=stream)
        (recorded,) = script.calls["result"]
        assert developer(recorded) != developer(script.calls["mixed"][-1]), "no epoch began"
        assert_whole(recorded.json, made, {"call_c1": long})


def tool(call_id: str, text: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


async def test_the_result_comes_after_a_restart_or_to_another_worker() -> None:
    """Invariants 5 and 7: the request with the result has the bytes of a single server's, left
    alone."""
    one, two = Script(), Script()
    async with one.upstream, two.upstream:
        with together(
            ServerProcess(paged_config(one.upstream, tiers=TIERS), workers=2),
            ServerProcess(paged_config(two.upstream, tiers=TIERS)),
        ) as (server, quiet):
            workers = Workers(server)
            async with AsyncOpenAI(api_key="k", base_url=quiet.base_url) as client:
                chat = await paged(client, two)
                await mixed(chat, two, "first", stream=True)
                await chat.result("call_c1", "The result.", "first/result")
                await mixed(chat, two, "second", stream=False)
                await chat.result("call_c1", "The result.", "second/result", stream=True)
                await chat.say("And now?", "last")
            told = Chat(client, [SYSTEM], tools=[LOOKUP])
            async with workers.client(0) as told.client:
                await talk(told, one, "opening", TURNS, [])
                await mixed(told, one, "first", stream=True)
            async with workers.client(1) as told.client:
                await told.result("call_c1", "The result.", "first/result")
                await mixed(told, one, "second", stream=False)
            server.kill()
            await asyncio.to_thread(server.restart)
            async with workers.client(0) as told.client:
                await told.result("call_c1", "The result.", "second/result", stream=True)
            async with workers.client(1) as told.client:
                await told.say("And now?", "last")
    for tag in two.calls:
        assert one.bodies(tag) == two.bodies(tag), tag
    request = json.loads(one.bodies("second/result")[0])
    assert_whole(request, MADE, {"call_c1": "The result."})
    one.check()
    two.check()


MADE = message_of(None, [*ORDERS["memory first"]])


async def mixed(chat: Chat, script: Script, tag: str, *, stream: bool) -> None:
    """A turn that ends with the client's call open. Both turns make the same calls; the second
    result must not be taken for the first."""
    made: Any = MADE if tag == "second" else message_of("Well.", ORDERS["client first"])
    script.plan(tag, fault("msg_0003"), made)
    got = await chat.say(f"Do both, {tag}.", tag, stream=stream)
    assert got.calls == owned(made["tool_calls"])
