"""The routes over a store that a real conversation left: odd turns, a damaged store, and media.

Promises: the application is called as the ASGI server calls it; tests/e2e/test_memory_api.py has the
sockets, the tenants and the restarts.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from proxy import keys
from proxy.api.access import Access
from proxy.api.caller import caller
from proxy.api.endpoints import Draining, own_endpoints
from proxy.api.erasure import Erasures
from proxy.api.memory import Memory
from proxy.api.model_facts import ModelFacts
from proxy.api.renditions import Renditions
from proxy.api.visit import Stats
from proxy.api.writer import Writer
from proxy.config import load_config
from proxy.conversation.records import conversation_name, record_key
from proxy.upstream import make_upstream
from tests.conversation.player import Message, Player, limits_of, says
from tests.conversation.test_derived import talk

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png", "detail": "low"}}
KEY = caller([(b"authorization", b"key")]).credentials


@asynccontextmanager
async def looking_at(folder: Path, player: Player) -> AsyncIterator[tuple[httpx.AsyncClient, Memory]]:
    """The routes over a store with what the player stored."""
    file = folder / "config.yaml"
    file.write_text(json.dumps({"tiers": {"l2": {"path": str(folder / "data")}}}))
    config = load_config(file, {}, {})
    memory, upstream = Memory(config), make_upstream(config)
    memory.identity = player.identity
    await memory.store.commit(list(player.values.items()))
    writer = Writer(config, upstream, Renditions(config, memory))
    capabilities = ModelFacts(config, memory, upstream).table
    erasures = Erasures(memory.store)
    app = own_endpoints(Draining(0), Stats(memory, writer), memory, Access(config, memory), capabilities, erasures)
    transport = httpx.ASGITransport(app=app)
    headers = {"authorization": "key", "x-session-id": "s"}
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            yield client, memory
    finally:
        await writer.close()
        await memory.close()
        await upstream.close()


def told(messages: list[Message], player: Player) -> None:
    """One turn of the session `s`."""
    played = player.ask(messages, lambda _: says("I see a cat."), key=KEY, session="s")
    assert played.answer.refused is None


async def page(client: httpx.AsyncClient, page_id: str) -> Any:
    reply = await client.get("/vm/provenance", params={"page": page_id})
    return reply.json() if reply.status_code == 200 else reply.status_code


async def test_a_turn_that_did_not_page_had_everything_in_front_of_its_answer(tmp_path: Path) -> None:
    player = Player(limits_of(4000))
    old: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    told([*old, {"role": "user", "content": "c"}], player)  # a history that came whole
    async with looking_at(tmp_path, player) as (client, _):
        for turn, pages in ((1, ["msg_0001"]), (2, ["msg_0001", "msg_0002", "msg_0003"])):
            found = (await client.get("/vm/context", params={"turn": turn})).json()
            assert [p["page_id"] for p in found["pages"]] == pages
            assert (found["paged"], found["last_turn"], found["derived"]) == (False, 2, [])


async def test_a_medium_comes_out_of_its_message_and_only_if_it_is_there(tmp_path: Path) -> None:
    player = Player(limits_of(4000))
    told([{"role": "user", "content": [{"type": "text", "text": "Look."}, IMAGE]}], player)
    async with looking_at(tmp_path, player) as (client, _):
        image = await page(client, "img_0001_1")
        assert image["derives_from"] == image["justified_by"] == ["msg_0001"]
        assert (await page(client, "msg_0001"))["derived"] == ["img_0001_1"]
        for missing in ("img_0001_2", "aud_0001_1", "img_0002_1", "msg_0003", "summary_seg_01"):
            assert await page(client, missing) == 404


async def test_a_page_of_a_long_message_is_quoted_by_its_first_part(tmp_path: Path) -> None:
    player = Player(limits_of(1500, page_tokens=40))
    messages: list[Message] = []
    for n in range(16):
        text = f"The port of depot{n} is {8000 + n}. " + "It rained again on our trip. " * 15
        messages.append({"role": "user", "content": text})
        told(messages, player)
        messages.append({"role": "assistant", "content": "I see a cat."})
    async with looking_at(tmp_path, player) as (client, _):
        part, whole = await page(client, "msg_0001.1"), await page(client, "msg_1")
        assert part["derived"] and whole["derived"] == part["derived"] and whole["page_id"] == "msg_0001"


async def test_a_damaged_store_is_said_in_openais_shape(tmp_path: Path) -> None:
    player = Player(limits_of(1500))
    played = [p for p in talk(player, 16) if p.turn.window is not None]
    middle, head = played[0].turn.record, played[-1].turn.record
    assert middle is not None and head is not None
    del player.values[record_key(middle.id)]
    tenant = player.identity.tenant(KEY, "")
    player.values[player.identity.label(tenant, "s")] = head.id
    async with looking_at(tmp_path, player) as (client, _):
        for path in ("/vm/context", "/vm/context?turn=1", "/vm/provenance?page=claim_0001"):
            reply = await client.get(path)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (500, "storage_damaged"), path
            assert "is missing" in error["message"]


async def test_looking_changes_nothing(tmp_path: Path) -> None:
    """What is asked again, with and without what RAM holds, is answered the same."""
    player = Player(limits_of(1500))
    for n in range(1, 12):
        messages = [m for i in range(n) for m in (
            {"role": "user", "content": f"Fact{i} is {i}. " + "It rained again on our trip. " * 20},
            {"role": "assistant", "content": "I see a cat."},
        )][:-1]  # fmt: skip
        told(messages, player)
    async with looking_at(tmp_path, player) as (client, memory):
        first = [(await client.get("/vm/context", params={"turn": t})).json() for t in range(1, 12)]
        assert first[-1]["paged"]
        memory.forget()
        again = [(await client.get("/vm/context", params={"turn": t})).json() for t in range(1, 12)]
        assert first == again


async def test_what_is_held_of_models_is_told_to_the_key_that_taught_it(tmp_path: Path) -> None:
    async with looking_at(tmp_path, Player(limits_of(1500))) as (http, memory):
        scope = memory.identity.tenant(KEY, "")
        await ModelFacts(config := load_config(None, {}, {}), memory, make_upstream(config)).learn(scope, "odd-model", {"tools": False})
        (row,) = (await http.get("/vm/models")).json()["models"]
        assert row["model"] == "odd-model" and row["tools"] == {"value": False, "from": "learned"}
        other = await http.get("/vm/models", headers={"authorization": "another"})
        assert other.json() == {"models": []}


async def test_a_conversation_is_exported_to_its_own_credentials(tmp_path: Path) -> None:
    player = Player(limits_of(4000))
    asked: Message = {"role": "user", "content": "a"}
    told([asked], player)
    told([asked, {"role": "assistant", "content": "I see a cat."}, {"role": "user", "content": "c"}], player)
    (key,) = [key for key in player.values if key.startswith(keys.CONVERSATION)]
    where = f"/vm/conversations/{conversation_name(keys.owner(key))}/export"
    async with looking_at(tmp_path, player) as (client, _):
        reply = await client.get(where)
        header, heading, *lines = map(json.loads, reply.text.splitlines())
        assert (reply.status_code, header["format"], header["tenants"]) == (200, "llm-pager", [heading["tenant"]])
        assert [line["message"]["content"] for line in lines] == ["a", "I see a cat.", "c", "I see a cat."]
        for refused in (
            await client.get(where, headers={"authorization": "other"}), await client.get(where, params={"user": "u"}),
            await client.get("/vm/conversations/0123456789ab/export"), await client.get("/vm/conversations/cat/export"),
        ):  # fmt: skip
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "conversation_not_found")
