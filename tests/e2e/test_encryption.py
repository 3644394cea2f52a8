"""Encryption at rest under the server: nothing that was said stands in any file, everything is known after a restart,
and nothing, here or in a backup, once a tenant's key was dropped."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from proxy import keys
from proxy.api.erasure import Erasures
from proxy.cli import main
from proxy.config import Config
from proxy.storage import open_store
from proxy.storage.sealing import Sealed
from proxy.storage.tiered import Tiered
from tests.e2e.harness import RecordingUpstream, answer, free_port, in_process_server, message_of
from tests.e2e.talk import CHAT, ask, body, config, history, raw

PORT = free_port()
MASTER, NEWER = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=", "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="
WHO = ("sk-anna", "sk-bert")
TURNS = 5


def mark(who: str, turn: int) -> str:
    return f"mark-{who[3:]}-{turn}"


def settings(directory: Path, *masters: str) -> dict[str, Any]:
    encryption = {"keys": list(masters or (MASTER,)), "key_store": str(directory / "keys")}
    return config(PORT, tiers={"l2": {"path": str(directory / "data"), "url": None}}, storage={"encryption": encryption})


@asynccontextmanager
async def served(directory: Path, *masters: str) -> AsyncIterator[tuple[RecordingUpstream, str]]:
    upstream = RecordingUpstream(lambda request, _: answer(request, message_of("noted")))
    upstream.port = PORT
    async with upstream:
        with in_process_server(settings(directory, *masters)) as base_url:
            yield upstream, base_url
    assert not upstream.failures, upstream.failures


async def say(base_url: str, who: str, text: str) -> httpx.Response:
    """A session that sends only what is new."""
    async with raw(base_url, who) as client:
        return await client.post(CHAT, json=body([{"role": "user", "content": text}]), headers={"x-llm-pager-session": "s"})


async def known(upstream: RecordingUpstream, base_url: str, who: str) -> set[str]:
    """The marks that the model is shown when somebody says something more."""
    response = await say(base_url, who, "What did I say?")
    assert response.status_code == 200, response.text
    shown = json.dumps(upstream.calls[-1].json)
    return {one for name in WHO for turn in range(TURNS) if (one := mark(name, turn)) in shown}


def all_of(who: str) -> set[str]:
    return {mark(who, turn) for turn in range(TURNS)}


async def talk(directory: Path) -> None:
    async with served(directory) as (_, base_url):
        for turn in range(TURNS):
            for who in WHO:
                assert (await say(base_url, who, mark(who, turn))).status_code == 200
        async with raw(base_url, WHO[0]) as client:  # a long conversation: pages, windows, an index
            for pairs in (18, 19, 20):
                assert (await client.post(CHAT, json=body(ask(pairs=pairs)))).status_code == 200


def files(directory: Path) -> bytes:
    """Every file's bytes, and what of them a row holds that is compressed and not encrypted."""
    found = [file.read_bytes() for file in directory.rglob("*") if file.is_file()]
    found += [value for path in ("data", "keys") for _, value in rows(directory / path)]
    return b"\n".join(found)


def rows(path: Path) -> list[tuple[Any, bytes]]:
    import sqlite3
    from contextlib import closing

    from proxy.storage.sqlite import unpacked

    with closing(sqlite3.connect(path / "cache.db")) as database:
        return [(key, unpacked(value)) for key, value in database.execute("SELECT key, value FROM Cache")]


@pytest.fixture(scope="module")
def before() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as kept:
        asyncio.run(talk(Path(kept)))
        yield Path(kept)


@pytest.fixture
def directory(before: Path, tmp_path: Path) -> Path:
    shutil.copytree(before, tmp_path / "all")
    return tmp_path / "all"


def opened(directory: Path) -> Sealed:
    store = open_store(Config.model_validate(settings(directory)))
    assert isinstance(store, Sealed)
    return store


def tenants(directory: Path) -> dict[str, bytes]:
    """Whose records hold whose marks."""
    store = opened(directory)
    found = {who: keys.sealer(key) for key, value in store.scan(keys.RECORD) for who in WHO if mark(who, 0).encode() in value}
    asyncio.run(store.close())
    return found


async def test_nothing_that_was_said_stands_in_a_file_and_all_is_known_after_a_restart(directory: Path) -> None:
    said = [*all_of(WHO[0]), *all_of(WHO[1]), *(one["content"] for one in history()), "noted"]
    stored = files(directory)
    assert not [one for one in said if one.encode() in stored or json.dumps(one).encode() in stored]
    async with served(directory) as (upstream, base_url):
        assert await known(upstream, base_url, WHO[0]) == all_of(WHO[0])
        assert await known(upstream, base_url, WHO[1]) == all_of(WHO[1])


async def test_after_a_rewrite_nothing_stands_in_a_store_that_was_not_encrypted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other test's search finds what it looks for; encryption is switched on, the rest sealed, the master rotated."""
    plain = config(PORT, tiers={"l2": {"path": str(tmp_path / "data"), "url": None}})
    upstream = RecordingUpstream(lambda request, _: answer(request, message_of("noted")))
    upstream.port = PORT
    async with upstream:
        with in_process_server(plain) as base_url:
            for turn in range(TURNS):
                assert (await say(base_url, WHO[0], mark(WHO[0], turn))).status_code == 200
    async with served(tmp_path) as (upstream, base_url):
        assert await known(upstream, base_url, WHO[0]) == all_of(WHO[0])
        stored = files(tmp_path)
        assert all(one.encode() in stored for one in all_of(WHO[0])) and b"What did I say" not in stored
    async with served(tmp_path, NEWER, MASTER) as (upstream, base_url):
        (tmp_path / "config.yaml").write_text(json.dumps(settings(tmp_path, NEWER, MASTER)))
        arguments = ["--config", str(tmp_path / "config.yaml")]
        assert await asyncio.to_thread(main, ["keys", "rotate", "--rewrite", *arguments]) == 0  # while it runs
        assert await known(upstream, base_url, WHO[0]) == all_of(WHO[0])
    assert await asyncio.to_thread(main, ["keys", "list", "--values", *arguments]) == 0
    told = capsys.readouterr().out
    assert "wraps 6 keys; it is the first" in told and told.count("\nmaster ") == 1 and "0 not encrypted" in told, told
    stored = files(tmp_path)
    assert not [one for one in all_of(WHO[0]) if one.encode() in stored]
    async with served(tmp_path, NEWER) as (upstream, base_url):
        assert await known(upstream, base_url, WHO[0]) == all_of(WHO[0])


async def test_a_dropped_key_erases_its_tenant_here_and_in_backups(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory / "data", tmp_path / "backup")
    async with served(directory) as (upstream, base_url):
        assert await known(upstream, base_url, WHO[0]) == all_of(WHO[0])
        async with raw(base_url, WHO[0]) as client:
            assert (await client.delete("/vm/tenants/self")).status_code == 200
        assert (await say(base_url, WHO[0], mark(WHO[0], 1))).status_code == 200
        assert await known(upstream, base_url, WHO[0]) == {mark(WHO[0], 1)}  # begun anew
        assert await known(upstream, base_url, WHO[1]) == all_of(WHO[1])
    shutil.rmtree(directory / "data")
    shutil.copytree(tmp_path / "backup", directory / "data")
    async with served(directory) as (upstream, base_url):
        assert await known(upstream, base_url, WHO[0]) == set()
        assert await known(upstream, base_url, WHO[1]) == all_of(WHO[1])
        async with raw(base_url, WHO[0]) as client:  # one that sends all of it is answered, and remembered
            for pairs in (20, 21):
                assert (await client.post(CHAT, json=body(ask(pairs=pairs)))).headers["x-llm-pager-channel"] == "tools"


async def test_an_erasure_that_was_stopped_behind_its_key_is_finished(directory: Path) -> None:
    anna = (await asyncio.to_thread(tenants, directory))[WHO[0]]
    store = opened(directory)
    dropped, drop_key = asyncio.Event(), store.drop_key

    async def drop(owner: bytes) -> None:
        await drop_key(owner)
        dropped.set()
        await asyncio.Event().wait()

    store.drop_key = drop  # type: ignore[method-assign]
    erasing = asyncio.ensure_future(Erasures(cast(Tiered, store)).erase("user", "operator", [anna]))
    await dropped.wait()
    erasing.cancel()
    await asyncio.gather(erasing, return_exceptions=True)
    await store.close()
    again = opened(directory)
    assert again.inner.scan(keys.RECORD + anna) and not again.scan(keys.RECORD + anna)
    erasures = Erasures(cast(Tiered, again))
    await erasures.finish_open()
    (receipt,) = erasures.receipts(anna)
    assert len(receipt.messages) >= 2 * TURNS and receipt.ended_s
    left = [key for key, _ in again.inner.scan(b"", limit=10_000) if key[1:].startswith(anna)]
    assert [key[:1] for key in left if key[:1] not in keys.OF_SCOPE] == [keys.RECEIPT] and again.ring.store.get(b"K" + anna) is None
    await again.close()


async def test_a_server_with_wrong_or_no_keys_does_not_start(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = directory / "config.yaml"
    for encryption, said in (
        ({"keys": []}, "is encrypted: set storage.encryption.keys to its master key"),
        ({"keys": [NEWER], "key_store": str(directory / "keys")}, "which is not in storage.encryption.keys"),
        ({"keys": [MASTER], "key_store": str(directory / "none")}, "its keys are not in the key store"),
    ):
        file.write_text(json.dumps({**settings(directory), "storage": {"encryption": encryption}}))
        assert await asyncio.to_thread(main, ["serve", "--config", str(file), "--port", "0"]) == 1
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1 and MASTER not in told, told
