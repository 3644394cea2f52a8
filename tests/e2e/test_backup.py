"""A backup that is taken while people talk, and the restore of it (docs/backups.md).

Promises: what was answered before the backup goes on from it byte for byte; what came later is a miss, and is answered;
the server says from when its storage is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.cli import main
from tests.e2e.harness import RecordingUpstream, ServerProcess, answer, free_port, message_of
from tests.e2e.talk import CHAT, assert_paged, body, config, history, raw
from tests.services import Postgres

PORT = free_port()
ENCRYPTED = {"encryption": {"keys": ["AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="]}}
STORES = ["directory", "encrypted directory", "encrypted PostgreSQL"]


class Directory:
    """`llm-pager backup`, of the data and, where there is one, of the key store."""

    def __init__(self, server: ServerProcess, kept: Path, encrypted: bool) -> None:
        self._server, self._kept, self._encrypted = server, kept, encrypted

    def take(self) -> None:
        arguments = ["--config", str(self._server._config_file)]
        assert main(["backup", str(self._kept / "copy"), *arguments]) == 0
        assert main(["backup", str(self._kept / "keys"), "--keys", *arguments]) == (0 if self._encrypted else 2)

    def restore(self) -> None:
        data = self._server.dir / "data"
        shutil.rmtree(data)
        shutil.copytree(self._kept / "copy", data)
        if self._encrypted:
            shutil.copytree(self._kept / "keys", data / "keys")


class Database:
    """`pg_dump` without the keys' tables, which stay."""

    def __init__(self, postgres: Postgres, url: str) -> None:
        self._postgres, self._url, self._dumped = postgres, url, b""

    def take(self) -> None:
        self._dumped = self._postgres.tool("pg_dump", "--exclude-table=llm_pager_keys*", self._url)

    def restore(self) -> None:
        self._postgres.execute("DROP TABLE llm_pager_store, llm_pager_values, llm_pager_members", url=self._url)
        self._postgres.restore(self._dumped, self._url)


@contextlib.asynccontextmanager
async def upstreamed() -> AsyncIterator[RecordingUpstream]:
    upstream = RecordingUpstream(lambda request, _: answer(request, message_of("noted")))
    upstream.port = PORT
    async with upstream:
        yield upstream
    assert not upstream.failures, upstream.failures


async def ask(client: httpx.AsyncClient, key: str, messages: list[dict[str, Any]], session: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", **({"x-llm-pager-session": session} if session else {})}
    response = await client.post(CHAT, json=body(messages), headers=headers)
    assert response.status_code == 200, response.text
    return response


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def asked(pairs: int) -> list[dict[str, Any]]:
    return [*history(pairs), *said(f"Which code has depot {pairs}?")]


async def everybody(client: httpx.AsyncClient, turns: range) -> None:
    """Five conversations at once, each with a key of its own."""

    async def one(who: int) -> None:
        for turn in turns:
            await ask(client, f"sk-crowd-{who}", said(f"said by {who} in turn {turn}"), session="crowd")

    await asyncio.gather(*map(one, range(5)))


@pytest.mark.parametrize("storage", STORES)
async def test_a_backup_that_was_taken_under_traffic_is_restored(
    tmp_path: Path, storage: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    in_directory, encrypted = "directory" in storage, "encrypted" in storage
    url = None if in_directory else request.getfixturevalue("postgres_url")
    server = ServerProcess(config(PORT, storage=ENCRYPTED if encrypted else {}, tiers={"l2": {"url": url}}))
    backup = Directory(server, tmp_path, encrypted) if url is None else Database(request.getfixturevalue("postgres"), url)
    async with upstreamed() as upstream:
        async with contextlib.AsyncExitStack() as running:
            running.enter_context(server)
            client = await running.enter_async_context(raw(server.base_url))
            for pairs in (18, 19, 20):
                await ask(client, "sk-long", asked(pairs))
            await ask(client, "sk-delta", said("the lighthouse is red"), session="s")
            await everybody(client, range(3))
            await asyncio.gather(asyncio.to_thread(backup.take), everybody(client, range(3, 12)))  # in the middle of it
            await ask(client, "sk-long", asked(21))
            undisturbed = upstream.calls[-1]
            assert_paged(undisturbed)
            await ask(client, "sk-long", asked(22))
            await ask(client, "sk-delta", said("and the boat is green"), session="s")
            await ask(client, "sk-later", said("nobody copied this"), session="s")
            server.kill()
            await asyncio.to_thread(backup.restore)
            await asyncio.to_thread(server.restart)
            assert not in_directory or ("is a backup of" in server.log and "what was remembered since is gone" in server.log)
            await ask(client, "sk-long", asked(21))
            assert upstream.calls[-1].body == undisturbed.body
            response = await ask(client, "sk-long", asked(22))
            assert_paged(upstream.calls[-1])
            assert response.headers.get("x-llm-pager-memory") is None
            await ask(client, "sk-delta", said("What did I say?"), session="s")
            shown = json.dumps(upstream.calls[-1].json)
            assert "lighthouse is red" in shown and "boat is green" not in shown
            await ask(client, "sk-later", said("What did I say?"), session="s")
            assert "nobody copied this" not in json.dumps(upstream.calls[-1].json)
            for who in range(5):  # each up to some turn of its own, without a hole
                await ask(client, f"sk-crowd-{who}", said("What did I say?"), session="crowd")
                shown = json.dumps(upstream.calls[-1].json)
                known = [f"said by {who} in turn {turn}" in shown for turn in range(12)]
                assert known == sorted(known, reverse=True) and known[2], known
            server.stop()
            await asyncio.to_thread(server.restart)
            assert server.log.count(f"{server.dir / 'data'} is a backup of") == in_directory  # it is told once
    told = capsys.readouterr()
    assert ("keys       not in it" in told.out) is (in_directory and encrypted)


async def test_what_a_backup_may_not_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["backup", "copy"]) == 1
    assert "There is no storage in data" in capsys.readouterr().err
    async with upstreamed():
        with ServerProcess(config(PORT, tiers={"l2": {"url": None}})) as server:
            async with raw(server.base_url) as client:
                await ask(client, "sk-a", said("hello"))
            assert main(["backup", str(server.dir / "data"), "--config", str(server._config_file)]) == 1
    assert "is a storage that is in use" in capsys.readouterr().err
    assert main(["backup", "copy", "--keys"]) == 2
    assert "there are no keys to copy" in capsys.readouterr().err
