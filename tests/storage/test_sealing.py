"""Sealed values over real stores: what comes back, what does not, and what becomes of keys."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import keys
from proxy.config import Config
from proxy.errors import ConfigError
from proxy.storage import open_store
from proxy.storage.demotion import Demotion
from proxy.storage.l2 import Damaged, DiskStore, StorageError
from proxy.storage.sealing import Sealed, read_masters
from proxy.storage.sqlite import connect, mark_lost
from proxy.storage.tiered import Tiered
from tests.services import Postgres

OLD, NEW = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
A, B = b"scopeA" + b"person", b"scopeA" + b"other1"
WORDS = b"the words of somebody, " * 40


def path(tenant: bytes, n: int = 0) -> bytes:
    return tenant + n.to_bytes(6, "big")


def record(tenant: bytes, n: int = 0) -> bytes:
    return keys.RECORD + path(tenant, n) + b"0123456789abcdef"


def config(directory: Path, *masters: str) -> Config:
    encryption = {"keys": list(masters), "key_store": str(directory / "keys")}
    return Config.model_validate({"tiers": {"l2": {"path": str(directory / "data")}}, "storage": {"encryption": encryption}})


def opened(directory: Path, *masters: str) -> Sealed:
    store = open_store(config(directory, *(masters or (OLD,))))
    assert isinstance(store, Sealed)
    return store


def files(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file())


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Sealed]:
    made = opened(tmp_path)
    yield made
    await made.close()


ROWS = [(record(A), WORDS), (record(A, 1), b""), (record(B), b"short"), (keys.MODEL + A[:6] + b"gpt", b"a fact"),
        (keys.SESSION + A + b"name", b"head"), (keys.CONVERSATION + path(A), b"id and time")]  # fmt: skip


async def test_what_is_sealed_comes_back_and_its_words_stand_nowhere(store: Sealed, tmp_path: Path) -> None:
    large = [(record(A, n), os.urandom(20_000)) for n in range(10, 20)]
    await store.commit(ROWS[:3], [(keys.PAIR + A, b"i" * 34)], ROWS[3:])
    await store.commit(large)
    again = opened(tmp_path)
    for key, value in (*ROWS, *large, (keys.PAIR + A, b"i" * 34)):
        assert store.get(key) == again.get(key) == value
    assert store.scan(keys.RECORD + A)[:2] == sorted(ROWS[:2]) and len(store.scan(b"")) == 17
    assert again.get(record(B, 9)) is None and again.secret() == store.secret()
    await again.close()
    assert not any(part in files(tmp_path) for part in (b"the words of", b"short", b"a fact", large[0][1][:20]))
    assert len(store.inner.get(record(A)) or b"") < len(WORDS) // 4  # compressed before it was sealed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.binary(max_size=700) | st.builds(lambda n: b"x" * n, st.integers(500, 5000)), at=st.integers(0), bit=st.integers(0, 7))
async def test_any_flipped_bit_is_damage_and_so_is_another_row_s_value(store: Sealed, value: bytes, at: int, bit: int) -> None:
    await store.commit([(record(A), value), (record(A, 1), value), (record(B), value)])
    assert store.get(record(A)) == value
    sealed = bytearray(store.inner.get(record(A)) or b"")
    sealed[at % len(sealed)] ^= 1 << bit
    others = [store.inner.get(key) or b"" for key in (record(A, 1), record(B))]
    for wrong in (bytes(sealed), *others[:1], value[:40]):
        await store.inner.commit([(record(A), wrong)])
        with pytest.raises(Damaged):
            store.get(record(A))
    await store.inner.commit([(record(A), others[1])])  # a key's id that this tenant has not
    assert store.get(record(A)) is None and store.scan(keys.RECORD + A) == [(record(A, 1), value)]
    assert await store.commit([], adds=[(record(A), value)]) == frozenset() and store.get(record(A)) == value
    assert await store.commit([], adds=[(record(A), b"other")]) == {record(A)} and store.get(record(A)) == value


async def test_whose_key_is_dropped_is_a_miss_also_in_a_copy_and_begins_anew(store: Sealed, tmp_path: Path) -> None:
    await store.commit(ROWS)
    wrapped = store.ring.store.get(b"K" + A) or b""
    await store.close()
    shutil.copytree(tmp_path / "data", tmp_path / "backup")
    store = opened(tmp_path)
    other = opened(tmp_path)  # another replica, which has the key in RAM
    assert other.get(record(A)) == WORDS
    await store.drop_key(A)
    await store.commit((), drops=[letter + A for letter in keys.OF_CONVERSATION | keys.OF_TENANT], erases=True)
    other.look()
    assert store.get(record(A)) is other.get(record(A)) is None
    assert store.get(record(B)) == other.get(record(B)) == b"short"
    assert wrapped[-60:] not in files(tmp_path)
    with pytest.raises(StorageError, match="erased meanwhile"):
        await other.commit([(record(A), b"began before")], erased=0)
    await other.commit([(record(A, 7), b"new")], erased=other.erased)
    assert store.get(record(A, 7)) == b"new"
    await store.close()
    await other.close()
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(tmp_path / "backup", tmp_path / "data")
    restored = opened(tmp_path)
    assert [restored.get(key) for key, _ in ROWS] == [None, None, b"short", b"a fact", None, b"id and time"]
    assert restored.scan(keys.RECORD) == [(record(B), b"short")]
    # What nobody can read is stored anew, though its row is there.
    assert await restored.commit([], adds=[(record(A), WORDS), (record(B), b"other")]) == {record(B)}
    assert restored.get(record(A)) == WORDS and restored.get(record(B)) == b"short"
    await restored.drop_key(A[:6])
    assert [restored.get(key) for key, _ in ROWS][:5] == [None] * 5
    await restored.close()


async def test_wrong_and_missing_keys_are_refused(store: Sealed, tmp_path: Path) -> None:
    await store.commit(ROWS)
    await store.close()
    with pytest.raises(StorageError, match="is encrypted: set storage.encryption.keys"):
        open_store(Config.model_validate({"tiers": {"l2": {"path": str(tmp_path / "data")}}}))
    with pytest.raises(StorageError, match="wrapped with the master key .*, which is not in storage.encryption.keys"):
        opened(tmp_path, NEW)
    os.rename(tmp_path / "keys", tmp_path / "kept")
    with pytest.raises(StorageError, match="its keys are not in the key store"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "keys")
    await DiskStore(tmp_path / "keys", 10).commit([(b"K" + A, b"\x90")])
    with pytest.raises(StorageError, match="its keys are not in the key store"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "keys")
    os.rename(tmp_path / "kept", tmp_path / "keys")
    again = opened(tmp_path)
    assert again.get(record(A)) == WORDS
    mark_lost(connect(tmp_path / "data"), ["sealed"])  # by which it is known to be encrypted
    await again.close()
    with pytest.raises(StorageError, match="is encrypted: set storage.encryption.keys"):
        open_store(Config.model_validate({"tiers": {"l2": {"path": str(tmp_path / "data")}}}))
    again = opened(tmp_path)
    assert again.get(record(A)) == WORDS
    await again.commit([(record(A, 1), b"new")])
    assert again.inner.get("sealed")
    await again.close()


async def test_a_key_store_that_fails_loses_no_key(store: Sealed) -> None:
    """A tenant whose key cannot be read is not stored for under another one."""
    await store.commit(ROWS)
    store.ring.forget()
    ring = store.ring.store
    assert isinstance(ring, DiskStore)
    row = ring.get(b"K" + A) or b""
    await ring.commit([(b"K" + A, row[:-1] + bytes([row[-1] ^ 1]))])
    with pytest.raises(Damaged):
        store.get(record(A))
    with pytest.raises(StorageError):
        await store.commit([(record(A, 3), b"new")])
    assert store.inner.get(record(A, 3)) is None and store.get(record(B)) == b"short"


async def test_a_key_that_was_read_before_it_was_dropped_is_not_kept(store: Sealed) -> None:
    await store.commit(ROWS)
    ring, get = store.ring, store.ring.store.get

    def slow(key: bytes) -> bytes | None:
        row = get(key)
        ring.forget()  # meanwhile somebody's erasure is learned of
        return row

    ring.forget()
    ring.store.get = slow  # type: ignore[method-assign, assignment]
    assert ring.newest(A) is not None
    ring.store.get = get  # type: ignore[method-assign]
    await ring.store.commit((), drops=[b"K" + A])  # another process's
    assert ring.newest(A) is None


@pytest.mark.parametrize("gone", ["data", "keys", "both"])
async def test_what_is_deleted_under_it_is_noticed_before_anything_is_sealed_for_nobody(
    tmp_path: Path, gone: str
) -> None:
    store = opened(tmp_path)
    await store.commit(ROWS)
    for name in ("data", "keys") if gone == "both" else (gone,):
        shutil.rmtree(tmp_path / name)
    store._checked_s = float("-inf")  # a second later
    told, stored = "", False
    async with asyncio.timeout(30):
        while not stored and "its keys are not in" not in told:  # it is tried again once a second
            try:
                await store.commit([(record(A, 3), WORDS)], secret=store.secret())
                stored = True
            except StorageError as error:
                told = str(error)
                await asyncio.sleep(0.1)
    assert stored is (gone != "keys")
    await store.close()
    if gone == "keys":
        with pytest.raises(StorageError, match="its keys are not in the key store"):
            opened(tmp_path)
        return
    again = opened(tmp_path)
    assert again.get(record(A, 3)) == WORDS and again.get(record(A)) is None
    await again.close()


async def test_rotation_rewraps_every_key_and_seals_again(store: Sealed, tmp_path: Path) -> None:
    await store.commit(ROWS)
    old = store.inner.get(record(A)) or b""
    await store.close()
    both = opened(tmp_path, NEW, OLD)
    assert both.get(record(A)) == WORDS
    count = len([row for page in both.ring.pages() for row in page])
    assert await both.ring.rotate() == count == 4  # A, B, their credential, the installation
    await both.close()
    store = opened(tmp_path, NEW)  # the old one is not needed any more
    assert store.get(record(A)) == WORDS and store.state(record(A), old) == "older"
    await store.commit([(record(A, 5), b"new")])
    assert store.state(record(A, 5), store.inner.get(record(A, 5)) or b"") == "newest"
    async for _ in store.rewrite():
        pass
    states = [store.state(*row) for row in store.inner.scan(b"")]
    assert sorted(states) == ["ids"] + ["newest"] * 6
    assert [store.get(key) for key, _ in ROWS] == [value for _, value in ROWS]
    await store.inner.commit([(record(A), old)])  # of a backup
    assert store.get(record(A)) == WORDS
    await store.close()
    with pytest.raises(StorageError, match="wrapped with the master key"):
        opened(tmp_path, OLD)


async def test_what_was_stored_before_is_read_and_sealed_where_it_was_stopped(tmp_path: Path) -> None:
    plain = DiskStore(tmp_path / "data", 100)
    rows = [(record(A, n), b"plain words %d" % n) for n in range(1200)]
    await plain.commit(rows)
    await plain.close()
    store = opened(tmp_path)
    assert [store.get(key) for key, _ in rows] == [value for _, value in rows]
    await store.commit([(record(A, 1), b"sealed"), (record(B), b"sealed")])
    seen = 0
    async for looked, _ in store.rewrite():
        seen = looked
        break
    await store.close()
    assert b"plain words 7" in files(tmp_path) and seen == 500
    store = opened(tmp_path)
    replaced = False
    async for looked, sealed in store.rewrite():
        if not replaced:
            assert looked == sealed == 500  # from where the other stopped
            await store.commit([(record(A, 1100), b"newer")])
            await store.inner.commit((), drops=[record(A, 1101)])
            replaced = True
    assert store.get(record(A, 1)) == b"sealed" and store.get(record(A, 1100)) == b"newer"
    assert store.get(record(A, 1101)) is None and store.get(record(A, 1102)) == rows[1102][1]
    assert {store.state(*row) for row in store.inner.scan(b"", limit=2000)} == {"newest"}
    await store.close()
    assert b"plain words" not in files(tmp_path)
    store = opened(tmp_path)
    await store.inner.commit([(record(A), b"put there by somebody")])
    with pytest.raises(Damaged):  # from now on
        store.get(record(A))
    await store.close()


async def test_in_postgresql_the_keys_have_tables_of_their_own_that_a_dump_leaves_out(
    postgres: Postgres, postgres_url: str
) -> None:
    def opened(*masters: str) -> Sealed:
        settings = {"tiers": {"l2": {"url": postgres_url}}, "storage": {"encryption": {"keys": list(masters)}}}
        store = open_store(Config.model_validate(settings))
        assert isinstance(store, Sealed)
        return store

    store = opened(NEW, OLD)
    await store.commit(ROWS)
    assert [store.get(key) for key, _ in ROWS] == [value for _, value in ROWS]
    assert len(store.scan(b"")) == len(ROWS)
    dumped = await asyncio.to_thread(postgres.tool, "pg_dump", "--exclude-table=llm_pager_keys*", postgres_url)
    assert (WORDS[:20].hex().encode() in dumped) is (b"llm_pager_keys" in dumped) is False and b"llm_pager_values" in dumped
    assert await store.ring.rotate() == 4
    async for _ in store.rewrite():
        pass
    assert {store.state(*row) for row in store.inner.scan(b"")} == {"newest", "ids"}
    await store.drop_key(A)
    await store.commit((), drops=[letter + A for letter in keys.OF_CONVERSATION | keys.OF_TENANT], erases=True)
    await store.close()
    await asyncio.to_thread(postgres.execute, "DROP TABLE llm_pager_store, llm_pager_values, llm_pager_members", url=postgres_url)
    await asyncio.to_thread(postgres.restore, dumped, postgres_url)
    store = opened(NEW)  # from the backup, which is older than the rotation
    assert [store.get(key) for key, _ in ROWS] == [None, None, b"short", b"a fact", None, b"id and time"]
    await store.close()
    with pytest.raises(StorageError, match="wrapped with the master key"):
        opened(OLD)
    with pytest.raises(StorageError, match="is encrypted: set storage.encryption.keys"):
        open_store(Config.model_validate({"tiers": {"l2": {"url": postgres_url}}}))


async def test_what_had_moved_to_objects_is_sealed_as_well(tmp_path: Path) -> None:
    """Large values in L3, a conversation in L4; what is new leaves again."""

    def tiered(*masters: str) -> Tiered:
        tiers = {"l2": {"path": str(tmp_path / "data")}, "l3": {"url": str(tmp_path / "l3"), "min_bytes": 4096},
                 "l4": {"url": str(tmp_path / "l4")}}  # fmt: skip
        return open_store(Config.model_validate({"tiers": tiers, "storage": {"encryption": {"keys": list(masters)}}}))

    async def demoted(store: Tiered, owner: bytes) -> None:
        await store.commit([(keys.CONVERSATION + owner, owner + bytes(16) + (1).to_bytes(4, "big"))])
        worker = Demotion(store, 60, 0, None, rest=0)
        await worker.run_once()
        await worker.run_once()

    rows = [(record(tenant, 1), b"some words of %s" % tenant) for tenant in (A, B)]
    large = [(record(tenant, 1) + b"large", random.Random(1).randbytes(9000) + b"large words") for tenant in (A, B)]
    store = tiered()
    await store.commit([*rows, *large])
    await demoted(store, path(A, 1))
    assert store.engine.get(rows[0][0]) is None and b"large words" in files(tmp_path / "l3")
    await store.close()
    store = tiered(OLD)
    assert [store.get(key) for key, _ in (*rows, *large)] == [value for _, value in (*rows, *large)]
    async for _ in cast(Sealed, store).rewrite():
        pass
    assert [store.get(key) for key, _ in (*rows, *large)] == [value for _, value in (*rows, *large)]
    assert {cast(Sealed, store).state(*row) for row in cast(Sealed, store).inner.scan(b"")} == {"newest", "ids"}
    assert b"words" not in files(tmp_path)
    await demoted(cast(Sealed, store).inner, path(A, 1))
    assert cast(Sealed, store).inner.engine.get(rows[0][0]) is None and b"words" not in files(tmp_path)
    await store.close()
    store = tiered(OLD)
    assert [store.get(key) for key, _ in (*rows, *large)] == [value for _, value in (*rows, *large)]
    await store.close()


def test_master_keys_come_from_files_and_are_never_shown(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(NEW + "\n")
    assert read_masters([OLD, f"file:{tmp_path / 'key'}"]) == [b"\1" * 32, b"\2" * 32]
    (tmp_path / "key").write_text("c2VjcmV0")
    for wrong, said in ((f"file:{tmp_path / 'key'}", "must be 32 bytes in base64"), ("file:/nowhere", "cannot be read")):
        with pytest.raises(ConfigError, match=said) as caught:
            read_masters([wrong])
        assert "storage.encryption.keys[0]" in str(caught.value) and "c2VjcmV0" not in str(caught.value)
