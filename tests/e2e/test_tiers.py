"""A conversation that left L2 for objects goes on as one that never did: the same bytes go upstream after a restart,
a fault says where its page came from, and a store of objects that is away costs memory, never an answer.

Its client sends only what is new, so all that the model sees of the past comes from below.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from proxy import keys
from tests.e2e.harness import ServerProcess, in_process_server, message_of, together
from tests.e2e.script import (
    SYSTEM,
    Chat,
    Script,
    complete,
    developer,
    fault,
    paged_config,
    search,
    talk,
)
from tests.e2e.story import assert_same
from tests.services import S3, buckets

SESSION = {"x-llm-pager-session": "notes"}
TURNS = 14
MOVING = tuple(keys.MOVING)


def tiers(script: Script, path: Path, l3: Any, l4: Any, **more: Any) -> dict[str, Any]:
    made = paged_config(script.upstream)
    below = {"l2": {"path": str(path / "data"), "url": None, "days": 0}, "l3": l3, "l4": l4, "demotion_s": 0.02, **more}
    return {**made, "tiers": {**made["tiers"], **below}}


def held(path: Path) -> dict[bytes, int]:
    """How many values of each kind, which leaves, stand in L2."""
    with closing(sqlite3.connect(f"file:{path}/data/cache.db?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT substr(key, 1, 1), count(*) FROM Cache WHERE typeof(key) = 'blob' GROUP BY 1")
        return {kind: count for kind, count in rows if kind in MOVING}


async def until(holds: Callable[[], bool]) -> None:
    """Another process works beside the requests: there is no event to wait for."""
    end_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end_s, "it does not come to that"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def client_of(base_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="k", base_url=base_url, max_retries=0, timeout=60) as client:
        yield client


async def talk_of(chat: Chat, script: Script, marks: list[str]) -> None:
    await talk(chat, script, "first", TURNS, marks)
    script.plan("large", message_of("A long list."))
    await chat.say("Keep this: " + " ".join(f"item{n}" for n in range(900)), "large")
    await talk(chat, script, "second", 3, marks)


@pytest.mark.parametrize(("l3", "l4"), [("file", "s3"), ("s3", "gs"), ("az", "az")])
async def test_invariants_4_and_7_what_comes_back_from_objects_goes_upstream_as_if_it_had_never_left(
    tmp_path: Path, l3: str, l4: str, request: pytest.FixtureRequest
) -> None:
    where = buckets(request, tmp_path, l3, l4)
    one, two = Script(), Script()
    async with one.upstream, two.upstream:
        config = tiers(one, tmp_path, {**where[0], "min_bytes": 2048}, where[1])
        with together(ServerProcess(config), ServerProcess(paged_config(two.upstream))) as (server, quiet):
            async with client_of(server.base_url) as a, client_of(quiet.base_url) as b:
                chats = [Chat(client, [SYSTEM], keep=1, headers=SESSION) for client in (a, b)]
                marks: list[str] = []
                await asyncio.gather(talk_of(chats[0], one, marks), talk_of(chats[1], two, []))
                assert developer(one.calls["second/2"][0]), "the talk is too short to be paged"
                await until(lambda: not held(tmp_path))
                server.kill()
                await asyncio.to_thread(server.restart)
                for script in (one, two):
                    script.plan("back", fault("msg_0002", "msg_0029"), search(*marks[:4]), message_of("So it was."))
                await asyncio.gather(*(chat.say("What was it?", "back", stream=True) for chat in chats))
                assert_same(one, two)
                assert marks[1].encode() in one.bodies("back")[1], "the fault brought nothing"
                await until(lambda: "came back from L4" in server.log)
                (line,) = [line for line in server.log.splitlines() if "fault_tiers" in line]
                assert "fault_tiers=L4:" in line and "L4_reads=" in line and "L4_ms=" in line and "L3_reads=" in line, line
                async with httpx.AsyncClient(base_url=server.base_url.removesuffix("/v1")) as http:
                    stats = (await http.get("/vm/stats")).json()
                    metrics = (await http.get("/metrics")).text
                assert stats["faults"]["L4"]["count"] >= 1 and stats["faults"]["L4"]["ms"] > 0
                assert 'llm_pager_fault_seconds_count{tier="L4"}' in metrics and 'llm_pager_values_read_total{tier="L3"}' in metrics
                for name in ("again", "and again"):
                    for script in (one, two):
                        script.plan(name, fault("msg_0004", prefix=name[:3]), message_of("And that."))
                    await asyncio.gather(*(chat.say("And that?", name) for chat in chats))
                assert_same(one, two)
    one.check()
    two.check()


async def test_invariant_6_objects_that_are_away_cost_memory_never_an_answer(
    tmp_path: Path, s3: S3, caplog: pytest.LogCaptureFixture
) -> None:
    script, marks = Script(), list[str]()
    l4 = {"url": s3.new_bucket(), "options": s3.options, "timeout_s": 2}
    away = {**l4, "options": {**s3.options, "endpoint": "http://127.0.0.1:1"}}
    async with script.upstream:
        with in_process_server(tiers(script, tmp_path, {}, l4)) as base_url:
            async with client_of(base_url) as client:
                delta = Chat(client, [SYSTEM], keep=1, headers=SESSION)
                await talk(delta, script, "delta", TURNS, marks)
                whole = Chat(client, [SYSTEM])
                await talk(whole, script, "whole", TURNS, [])
            await until(lambda: not held(tmp_path))
        with in_process_server(tiers(script, tmp_path, {}, away, demotion_s=60)) as base_url:
            async with client_of(base_url) as client:
                script.plan("new", message_of("New."))
                said = await client.chat.completions.with_raw_response.create(
                    model="gpt-4o", messages=[*whole.messages, {"role": "user", "content": "More?"}], extra_headers={"x-turn-tag": "new"}
                )  # type: ignore[call-overload]
                assert said.status_code == 200 and said.headers["x-llm-pager-memory"] == "lost"
                assert "Cannot read" in caplog.text and "127.0.0.1:1" in caplog.text
                before = len(script.upstream.calls)
                with pytest.raises(openai.InternalServerError) as refused:
                    await complete(client, [{"role": "user", "content": "And?"}], "refused", headers=SESSION)
                assert refused.value.status_code == 503 and refused.value.code == "storage_unavailable"
                assert "s3://" in refused.value.message and len(script.upstream.calls) == before
                script.plan("other", message_of("Another one."))
                other = await client.chat.completions.with_raw_response.create(
                    model="gpt-4o", messages=[{"role": "user", "content": "Something else."}], extra_headers={"x-turn-tag": "other"}
                )
                assert other.status_code == 200 and "x-llm-pager-memory" not in other.headers, "it was never below"
        with in_process_server(tiers(script, tmp_path, {}, l4, demotion_s=60)) as base_url:
            async with client_of(base_url) as delta.client:
                script.plan("back", fault("msg_0002"), message_of("So it was."))
                await delta.say("And now?", "back")
            assert marks[1].encode() in script.bodies("back")[1]
    script.check()
