"""PostgreSQL under `llm-pager serve`: as a directory, byte for byte, and what is said while the database is away."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.storage.postgres import PostgresStore
from tests.e2e.harness import ServerProcess
from tests.e2e.script import TAG, Recorded, Script
from tests.e2e.story import Teller, assert_same, chat_of, nothing
from tests.e2e.talk import CHAT, body, config, raw
from tests.e2e.test_kill import app_server, client_of, scripted
from tests.e2e.test_storage_trouble import PORT, SAID, Clients, clients
from tests.services import PgBouncer, Postgres, Tap

MESSAGES = 61


async def test_invariants_7_and_9_a_database_and_no_cache_change_no_prompt(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an L1 of one token, so that nearly everything is read again; and no read holds the event loop."""
    tiers = {"l0": {"tokens": 4000, "reserve_tokens": 1000}, "l1": {"tokens": 1}, "l2": {"url": postgres_url}}
    async with scripted(tiers=tiers) as (one, config_one), scripted() as (two, config_two):
        config_two["tiers"]["l2"] = {"url": None}
        with (
            app_server(config_one, monkeypatch) as (url, app),
            app_server(config_two, monkeypatch) as (quiet_url, _),
        ):

            def forget(*_: Recorded) -> None:
                app.memory.forget()

            one.on_call = forget
            store = app.memory.store.engine
            assert isinstance(store, PostgresStore)
            opening = store.blocked  # before there is a request
            async with client_of(url) as a, client_of(quiet_url) as b:
                await Teller(one, chat_of(a), nothing).story()
                await Teller(two, chat_of(b), nothing).story()
            assert store.blocked == opening and store.trouble is None
    assert_same(one, two)


async def test_a_replica_that_never_met_a_conversation_goes_on_from_it_in_a_few_round_trips(
    postgres: Postgres, postgres_url: str
) -> None:
    script = Script()
    with Tap(postgres.port) as tap:
        async with script.upstream:
            settings = config(script.upstream, tiers={"l2": {"url": tap.url(postgres_url)}})
            with ServerProcess(settings) as one, ServerProcess(settings) as other:
                history: list[dict[str, str]] = []

                async def turn(server: ServerProcess, tag: str, messages: list[dict[str, str]]) -> str:
                    async with raw(server.base_url, "sk-cold") as client:
                        r = await client.post(CHAT, json=body(messages), headers={TAG: tag})
                    assert r.status_code == 200 and "x-llm-pager-memory" not in r.headers
                    return str(r.json()["choices"][0]["message"]["content"])

                for n in range(30):
                    history.append({"role": "user", "content": f"turn {n}: " + f"word{n} " * 60})
                    history.append({"role": "assistant", "content": await turn(one, f"t{n}", history)})
                await turn(other, "warm", [{"role": "user", "content": "Statements are prepared now."}])
                await turn(other, "warm", [{"role": "user", "content": "And what follows a first answer is over."}])
                await asyncio.sleep(0.2)
                before, asked = tap.trips, [*history, {"role": "user", "content": "turn 30"}]
                assert await turn(other, "cold", asked) == "Answer to cold."
                cold = tap.trips - before
                assert await turn(one, "warm", asked) == "Answer to warm."
    assert cold <= 5
    there, here = (script.calls[tag][-1].body for tag in ("cold", "warm"))
    assert there == here and len(json.loads(here)["messages"]) < MESSAGES


@pytest.mark.parametrize("way", ["direct", "pooled"])
async def test_a_database_that_is_away_loses_memory_and_no_answer(
    postgres: Postgres, postgres_url: str, way: str, request: pytest.FixtureRequest
) -> None:
    url = postgres_url
    if way == "pooled":
        pooler: PgBouncer = request.getfixturevalue("pgbouncer")
        url = pooler.url(url)
    with ServerProcess(config(PORT, tiers={"l2": {"url": url}})) as server:
        async with clients(server.base_url, []) as both:
            for n in range(8):
                assert await both.whole() == ""
                assert (await both.delta(n)).status_code == 200
            await asyncio.to_thread(postgres.stop, "immediate")
            try:
                assert [await both.whole(), await both.whole(stream=True)] == ["lost", "lost"]
                refused = await both.delta(8)
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "storage_unavailable"
                ready = await both.client.get("/ready")
                assert ready.status_code == 503 and "PostgreSQL's database" in ready.json()["reason"]
                assert "s3cret" not in ready.text + refused.text + server.log
                assert (await both.client.get("/health")).status_code == 200
            finally:
                await asyncio.to_thread(postgres.start)
            await recovered(both)
            assert await both.whole() == ""
            assert (await both.delta(8)).status_code == 200
            heard = json.dumps(both.upstream.calls[-1].json)
            assert all(said in heard for said in SAID[:9])


async def recovered(both: Clients) -> None:
    async with asyncio.timeout(20):
        while (await both.client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)
