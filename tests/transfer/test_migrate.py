"""A whole store into another one: the same values, so the same requests upstream; stopped, begun again, refused."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from proxy import keys
from proxy.cli import main
from proxy.storage.l2 import DiskStore
from proxy.storage.sqlite import MARK
from proxy.transfer import migrate
from tests.api.test_chat import client
from tests.api.test_damage import L0, Talk, answer, question
from tests.e2e.processes import free_port

TURNS = 30


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A store with a paged conversation, and what went upstream for it, and for four more turns elsewhere."""
    path = tmp_path_factory.mktemp("talked")

    async def talk() -> list[bytes]:
        async with client(path / "source", **{"tiers.l0": L0}) as one:
            await Talk(one).until(TURNS)
            before = len(one.upstream.bodies)
        await asyncio.to_thread(main, ["migrate", str(path / "source" / "data"), str(path / "beside" / "data")])
        async with client(path / "source", **{"tiers.l0": L0}) as one:
            return await goes_on(one, before)

    bodies = asyncio.run(talk())
    return path / "beside" / "data", bodies


async def goes_on(one: Any, turns: int = TURNS) -> list[bytes]:
    """What goes upstream in the turns that follow."""
    talk = Talk(one)
    for turn in range(turns):
        talk.history += [question(turn), {"role": "assistant", "content": answer(turn)}]
    await talk.until(turns + 4)
    bodies: list[bytes] = one.upstream.bodies
    return bodies


def ran(*arguments: object) -> int:
    return main(["migrate", *map(str, arguments)])


def rows(directory: Path) -> list[Any]:
    with closing(sqlite3.connect(directory / "cache.db")) as database:
        return database.execute("SELECT key, tag, value FROM Cache WHERE typeof(key) = 'blob' ORDER BY key").fetchall()


async def test_a_migrated_store_goes_on_byte_for_byte(talked: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    source, bodies = talked
    assert await asyncio.to_thread(ran, source, tmp_path / "data") == 0
    assert rows(tmp_path / "data") == rows(source)
    async with client(tmp_path, **{"tiers.l0": L0}) as one:
        assert await goes_on(one) == bodies
        assert b"VM:MANIFEST" in bodies[0]


async def test_a_store_goes_to_postgresql_and_back_byte_for_byte(
    talked: tuple[Path, list[bytes]], tmp_path: Path, postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, bodies = talked
    for way in ((source, postgres_url), (postgres_url, tmp_path / "back")):
        assert await asyncio.to_thread(ran, *way, "--json") == 0
    there, back = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert there == back and there["values"] == len(rows(source)) and rows(tmp_path / "back") == rows(source)
    async with client(tmp_path, **{"tiers.l0": L0, "tiers.l2": {"url": postgres_url}}) as one:
        assert await goes_on(one) == bodies
    assert await asyncio.to_thread(ran, source, postgres_url) == 1
    assert "is whole, and may have been used since" in capsys.readouterr().err


def values(where: str, *changed: tuple[bytes | str, bytes]) -> list[tuple[bytes, bytes]]:
    """All that an engine has; `changed` is stored afterwards."""

    async def read() -> list[tuple[bytes, bytes]]:
        store = migrate.engine_at(where)
        found = await asyncio.to_thread(store.scan, b"", b"", 10_000)
        await store.commit(changed)
        await store.close()
        return found

    return asyncio.run(read())


def own(where: str, key: str) -> bytes | None:
    async def read() -> bytes | None:
        store = migrate.engine_at(where)
        found = await asyncio.to_thread(store.get, key)
        await store.close()
        return found

    return asyncio.run(read())


@pytest.mark.parametrize("engine", ["directory", "postgresql"])
def test_a_migration_that_was_stopped_is_begun_again(
    engine: str, talked: tuple[Path, list[bytes]], tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = str(talked[0])
    target = str(tmp_path / "data") if engine == "directory" else request.getfixturevalue("postgres_url")
    before = values(source, (MARK, b"so it is"))
    monkeypatch.setattr(migrate, "_AT_ONCE", 7)
    so_far, made = migrate.so_far, 0

    def dies(after: bytes) -> tuple[str, bytes]:
        nonlocal made
        made += 1
        if made == 5:
            raise KeyboardInterrupt
        return so_far(after)

    with monkeypatch.context() as patch:
        patch.setattr(migrate, "so_far", dies)
        assert ran(source, target) == 130
    # Something is erased in the source meanwhile, and something changes.
    assert values(target, (keys.MODEL + bytes(30), b"erased"), (before[0][0], b"older")) == before[: 3 * 7]
    where = "PATH" if engine == "directory" else "URL"
    monkeypatch.setenv(f"LLM_PAGER_TIERS__L2__{where}", target)
    assert main(["serve", "--port", "0"]) == 1 and "give `llm-pager migrate` once more" in capsys.readouterr().err
    assert ran(source, target, "--json") == 0
    assert json.loads(capsys.readouterr().out)["values"] == len(before)
    assert values(target) == before and own(target, MARK) == b"so it is"
    assert ran(source, target) == 1 and "is whole, and may have been used since" in capsys.readouterr().err


def test_a_target_of_another_store_and_a_source_that_is_none_are_refused(
    talked: tuple[Path, list[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = talked[0], tmp_path / "other"
    store = DiskStore(other, 100)
    asyncio.run(store.commit([(b"n" * 35, b"of others")]))
    asyncio.run(store.close())
    before = rows(other)
    assert ran(source, other) == 1 and "holds another store" in capsys.readouterr().err
    assert rows(other) == before
    assert ran(tmp_path / "nothing", tmp_path / "new") == 2 and not (tmp_path / "new").exists()


def test_a_database_that_does_not_answer_is_a_sentence_and_nothing_is_written(
    talked: tuple[Path, list[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"postgresql://pager@127.0.0.1:{free_port()}/pager"
    for way in ((talked[0], nobody), (nobody, tmp_path / "new")):
        assert ran(*way) == 1 and "127.0.0.1" in capsys.readouterr().err
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__URL", nobody)
    assert main(["export", "--out", str(tmp_path / "out")]) == 1 and "127.0.0.1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


async def test_an_encrypted_store_is_copied_as_it_is_and_exported_as_it_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = {"keys": [base64.b64encode(bytes(range(32))).decode()], "key_store": str(tmp_path / "keys")}
    async with client(tmp_path / "source", **{"storage.encryption": sealed}) as one:
        await Talk(one).until(3)
    source, target = tmp_path / "source" / "data", tmp_path / "new" / "data"
    assert await asyncio.to_thread(ran, source, target) == 0
    assert rows(source) == rows(target) and b"harbour" not in (target / "cache.db").read_bytes()
    async with client(tmp_path / "new", **{"storage.encryption": sealed}) as one:
        assert question(1)["content"].encode() in (await goes_on(one, 3))[0] and one.reports[0].turn == 4
        assert len(one.memory.store.scan(keys.RECORD)) == 3 + 4
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(target))
    assert await asyncio.to_thread(main, ["export", "--out", str(tmp_path / "out")]) == 1  # it is encrypted
    monkeypatch.setenv("LLM_PAGER_STORAGE__ENCRYPTION__KEYS", sealed["keys"][0])
    monkeypatch.setenv("LLM_PAGER_STORAGE__ENCRYPTION__KEY_STORE", str(sealed["key_store"]))
    assert await asyncio.to_thread(main, ["export", "--out", str(tmp_path / "out")]) == 0
    assert question(1)["content"] in (tmp_path / "out").read_text()
