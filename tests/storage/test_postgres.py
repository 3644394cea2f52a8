"""What PostgreSQL's store promises beyond `test_store.py`: round trips, many starts, cut connections, crashes, poolers."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from urllib.parse import urlsplit

import asyncpg
import pytest

from proxy import keys
from proxy.config import Config
from proxy.storage import open_store
from proxy.storage import postgres as module
from proxy.storage.l2 import StorageError
from proxy.storage.postgres import PostgresStore
from proxy.storage.sqlite import FORMAT, SECRET_BYTES
from proxy.storage.suspend import scope, suspendable, suspending
from proxy.storage.tiered import Tiered
from tests.services import PgBouncer, Postgres, Tap, execute
from tests.storage.test_l2 import ROOT, node

OWNER = bytes(range(18))


def record(n: int) -> bytes:
    return keys.RECORD + OWNER + n.to_bytes(16, "big")


@pytest.fixture
def empty_url(postgres: Postgres) -> str:
    """Of a database in which nobody has made tables."""
    return postgres.new_database()


@pytest.fixture
async def store(postgres_url: str):
    opened = PostgresStore(postgres_url)
    yield opened
    await opened.close()


async def commits(store: PostgresStore, count: int, first: int = 0) -> None:
    for n in range(first, first + count):
        await store.commit(
            [(keys.CONVERSATION + OWNER, b"%d" % n)], [(keys.PAIR + OWNER[:12] + bytes(16), node(n))],
            [(record(n), os.urandom(600))], store.secret(), store.erased,
        )  # fmt: skip


# -- one round trip


async def test_a_commit_and_a_read_are_a_round_trip_each(
    postgres: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PRUNED", 0.0)
    with Tap(postgres.port) as tap:
        store = PostgresStore(tap.url(postgres_url), connections=1)
        await commits(store, 1)  # its statements are prepared
        await asyncio.to_thread(store.get, b"c" + OWNER)
        before = tap.trips
        await commits(store, 10, 1)
        assert tap.trips - before == 10
        for _ in range(10):
            assert await asyncio.to_thread(store.get, keys.CONVERSATION + OWNER) == b"10"
        assert tap.trips - before == 20
        await store.close()


async def test_a_record_brings_what_was_stored_before_it_once(postgres: Postgres, postgres_url: str) -> None:
    writer = PostgresStore(postgres_url)
    await commits(writer, 40)
    with Tap(postgres.port) as tap:
        store = PostgresStore(tap.url(postgres_url), connections=1)

        async def read(*numbers: int) -> int:
            """How many round trips it takes."""
            before = tap.trips
            for n in numbers:
                assert await asyncio.to_thread(store.get, record(n)) is not None
            return tap.trips - before

        await asyncio.to_thread(store.get, record(99))
        assert await read(*range(39, -1, -1)) == 1
        await commits(writer, 3, 40)
        assert await read(42, 41, 40) == 1
        assert len(store._kept) == 0  # what was known is not sent again
        assert await read(20, 19, 18, 17) == 1  # it was forgotten since: it, and what stood before it
        await store.close()
    await writer.close()


async def test_a_set_is_pruned_behind_its_readers(
    store: PostgresStore, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PRUNED", 1.0)
    for n in range(40):
        await store.commit([], [(b"set", node(n))])
        await asyncio.gather(*store._tasks)
    assert execute(postgres_url, "SELECT count(*) AS n FROM llm_pager_members")[0]["n"] == 32
    assert await asyncio.to_thread(store.get, b"set") == b"".join(map(node, range(8, 40)))


async def test_many_records_asked_for_alone_are_one_round_trip_and_bring_nothing_else(
    postgres: Postgres, postgres_url: str
) -> None:
    """As a list of conversations reads them; a turn that comes next finds what it goes on from as if nobody had."""
    writer = PostgresStore(postgres_url)
    await commits(writer, 40)
    with Tap(postgres.port) as tap:
        store = PostgresStore(tap.url(postgres_url), connections=1)

        @suspending
        async def asked(numbers: Sequence[int], ahead: Sequence[int], alone: bool) -> int:
            before = tap.trips
            store.ahead([record(n) for n in ahead], alone)
            assert all(store.get(record(n)) for n in numbers)
            return tap.trips - before

        await asked((), (99,), True)  # prepared
        assert await asked(range(0, 40, 4), range(0, 40, 4), True) == 1
        assert len(store._kept) == 0
        await asked((), (99,), False)
        assert await asked(range(40), (39,), False) == 1
        await store.close()
    await writer.close()


async def test_what_is_read_ahead_is_named_as_the_keys_are() -> None:
    assert module._AHEAD == (keys.RECORD, keys.BLOCK)
    assert {*module._MANY} == keys.MOVING | {keys.PAIR, keys.LABEL}
    assert (module._TENANT - module._LETTER, module._PATH - module._LETTER) == (keys.TENANT_BYTES, keys.OWNER_BYTES)


async def test_a_list_of_conversations_reads_no_turns(store: PostgresStore, postgres_url: str) -> None:
    owners = [OWNER[:12] + n.to_bytes(6, "big") for n in range(20)]
    records = [(keys.RECORD + owner + n.to_bytes(16, "big"), b"r") for owner in owners for n in range(200)]
    lists = [(letter + owner, b"v") for letter in (keys.CONVERSATION, keys.TITLE) for owner in owners]
    await store.commit(lists, [(keys.PAIR + owner + b"%d" % n, node(n)) for owner in owners for n in range(50)], records)
    connection = await asyncpg.connect(postgres_url, server_settings={"plan_cache_mode": "force_generic_plan"})
    for prefix, after in ((b"c", b""), (b"c", b"c" + owners[10]), (b"c" + owners[0][:12], b"c" + owners[10])):
        where, values = module._within(prefix, after)
        for scan in (module._SCAN_VALUES, module._SCAN_SETS):
            await connection.execute(f"PREPARE scan ({', '.join(['bytea'] * len(values))}) AS {scan % (where, 1000)}")
            given = ", ".join(f"'\\x{value.hex()}'" for value in values)
            (told,) = await connection.fetchrow(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE scan ({given})")
            await connection.execute("DEALLOCATE scan")
            assert json.loads(told)[0]["Plan"]["Actual Rows"] == (scan is module._SCAN_VALUES) * (9 if after else 20)
            assert "_pkey" not in told and told.count("substr_tenant_path_key_idx") == module.PARTITIONS, told
    await connection.close()


# -- the event loop


async def test_a_plain_get_below_a_request_lets_the_event_loop_go_on(store: PostgresStore, postgres_url: str) -> None:
    await store.commit([(b"a", b"1")])
    ticks: list[float] = []

    async def ticking() -> None:
        while True:
            ticks.append(time.perf_counter())
            await asyncio.sleep(0.005)

    @suspending
    async def request() -> bytes | None:
        return store.get(b"a")

    ticker = asyncio.ensure_future(ticking())
    blocker = asyncio.ensure_future(_locked(postgres_url))
    await asyncio.sleep(0.1)
    assert await asyncio.gather(*(request() for _ in range(5))) == [b"1"] * 5
    await blocker
    ticker.cancel()
    assert max(b - a for a, b in pairwise(ticks)) < 0.5 and store.blocked == 0


async def _locked(url: str) -> None:
    """Nobody reads for a while."""
    connection = await asyncpg.connect(url)
    async with connection.transaction():
        await connection.execute("LOCK llm_pager_values IN ACCESS EXCLUSIVE MODE")
        await asyncio.sleep(1.0)
    await connection.close()


async def test_what_a_request_asked_for_ahead_is_as_it_was_then(store: PostgresStore, postgres_url: str) -> None:
    await store.commit([(b"a", b"1"), (b"b", b"1")])
    before = store.erased

    @suspending
    async def request() -> list[bytes | None]:
        store.ahead([b"a", b"none"])
        await store.commit([(b"a", b"2"), (b"b", b"2")])
        read = [store.get(b"a"), store.get(b"none"), store.get(b"b")]
        store.ahead([b"a"])
        return [*read, store.get(b"a"), await asyncio.to_thread(store.get, b"a")]

    assert await request() == [b"1", None, b"2", b"2", b"2"]
    assert store.get(b"a") == b"2" and store.erased == before


async def test_a_get_from_a_loop_that_is_no_request_s_is_counted(store: PostgresStore) -> None:
    await store.commit([(b"a", b"1")])
    assert store.get(b"a") == b"1" and store.blocked == 1
    assert await suspendable(_got(store)) == b"1" and store.blocked == 1


async def _got(store: PostgresStore) -> bytes | None:
    assert scope() is None
    return store.get(b"a")


# -- starting


START = """
import sys
from proxy.storage.postgres import PostgresStore
print("ready", flush=True)
sys.stdin.readline()
print(PostgresStore(sys.argv[1]).secret().hex(), flush=True)
"""


def test_five_processes_that_start_at_once_make_one_store(empty_url: str) -> None:
    command = [sys.executable, "-c", START, empty_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    children = [subprocess.Popen(command, **pipes) for _ in range(5)]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    secrets = {child.communicate(timeout=60)[0].strip() for child in children}
    assert len(secrets) == 1 and len(bytes.fromhex(secrets.pop())) == SECRET_BYTES
    names = execute(empty_url, "SELECT count(*) AS n FROM pg_class WHERE relname LIKE 'llm_pager_%' AND relkind IN ('r', 'p')")
    assert names[0]["n"] == 3 + 2 * module.PARTITIONS


@pytest.mark.parametrize("column", ["schema", "format"])
def test_tables_of_another_version_are_refused(postgres_url: str, column: str) -> None:
    asyncio.run(PostgresStore(postgres_url).close())
    execute(postgres_url, f"UPDATE llm_pager_store SET {column} = 99")
    with pytest.raises(StorageError, match="written by another version of llm-pager .*tiers.l2.url") as caught:
        PostgresStore(postgres_url)
    assert "s3cret" not in str(caught.value) and FORMAT != 99


def test_what_somebody_has_to_change_is_said_at_the_start(postgres: Postgres, empty_url: str) -> None:
    with pytest.raises(StorageError, match='database "nowhere" does not exist'):
        PostgresStore(postgres.url("nowhere"))
    execute(empty_url, "CREATE ROLE guest LOGIN")
    try:
        with pytest.raises(StorageError, match="permission denied"):
            PostgresStore(empty_url.replace("pager:", "guest:"))
    finally:
        execute(empty_url, "DROP ROLE guest")


async def test_a_server_that_is_not_there_yet_is_waited_for_by_those_who_ask(postgres: Postgres, postgres_url: str) -> None:
    postgres.stop()
    try:
        store = PostgresStore(postgres_url)
        assert store.trouble is not None and "Connect" in store.trouble and "s3cret" not in store.trouble
        early, generation = store.secret(), store.generation
    finally:
        postgres.start()
    await store.check()
    assert store.trouble is None and store.secret() != early and store.generation == generation + 1 and store.losses == 0
    await store.close()


@pytest.mark.parametrize("key", [None, base64.b64encode(bytes(32)).decode()], ids=["plain", "sealed"])
async def test_a_server_that_goes_away_in_the_middle_of_a_start_ends_none(
    postgres: Postgres, postgres_url: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.0)
    encryption = {"keys": [key], "key_store": postgres_url.replace(urlsplit(postgres_url).path, "/postgres")} if key else {}

    def opened(url: str) -> Tiered:
        return open_store(Config.model_validate({"tiers": {"l2": {"url": url}}, "storage": {"encryption": encryption}}))

    await opened(postgres_url).close()
    with Tap(postgres.port) as tap:
        await opened(tap.url(postgres_url)).close()
        for last in range(0, tap.trips, 2):  # a statement is two: it is prepared, then it runs
            left = iter(range(last))
            tap.on = lambda commit, left=left: "" if next(left, None) is not None else "before"
            store = opened(tap.url(postgres_url))
            assert store.trouble is not None, "the server was away"
            tap.on = lambda commit: ""
            await store.check()
            assert store.trouble is None
            await store.close()


async def test_a_server_that_became_a_standby_is_left_for_another(store: PostgresStore, postgres_url: str) -> None:
    await commits(store, 1)
    async with (await store._pools[asyncio.get_running_loop()]).acquire() as connection:
        await connection.execute("SET default_transaction_read_only = on")
    await commits(store, 1, 1)
    assert store.trouble is None


# -- what breaks


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_commit_whose_connection_is_cut_is_found_out(postgres: Postgres, postgres_url: str, when: str) -> None:
    cuts: list[str] = []
    with Tap(postgres.port, lambda commit: cuts.pop() if commit and cuts else "") as tap:
        store = PostgresStore(tap.url(postgres_url))
        await commits(store, 1)
        for n in range(1, 6):
            cuts.append(when)
            known = await store.commit([], [(b"set", node(n))], [(record(n), b"%d" % n)])
            assert known == frozenset(), "what it said the first time is its own"
        assert await store.commit([], [], [(record(1), b"another")]) == {record(1)}
        assert not cuts and store.trouble is None
        assert [store.get(record(n)) for n in range(1, 6)] == [b"%d" % n for n in range(1, 6)]
        assert store.get(b"set") == b"".join(map(node, range(1, 6)))
        await store.close()


async def test_a_commit_that_is_performed_late_replaces_nothing_newer(store: PostgresStore) -> None:
    """Its sender was killed, or has made it again; since then the conversation went on elsewhere."""
    began, go = asyncio.Event(), asyncio.Event()

    @suspending
    async def late() -> None:
        store.ahead([b"head"])
        began.set()
        await go.wait()
        await store.commit([(b"head", b"1"), (b"other", b"1")], [], [(b"record1", b"1")])

    @suspending
    async def turn(value: bytes) -> None:
        store.ahead([b"head"])
        await store.commit([(b"head", value)])

    work = asyncio.ensure_future(late())
    await began.wait()
    for value in (b"1", b"2"):
        await turn(value)
    go.set()
    await work
    read = [await asyncio.to_thread(store.get, key) for key in (b"head", b"other", b"record1")]
    assert read == [b"2", b"1", b"1"]
    await turn(b"3")
    assert await asyncio.to_thread(store.get, b"head") == b"3"


async def test_a_server_that_crashes_loses_nothing_that_was_answered(postgres: Postgres, postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    told: list[int] = []
    failed: list[int] = []

    async def committing(worker: int) -> None:
        for n in range(worker, 400, 8):
            try:
                await store.commit([(b"a%d" % n, b"x" * 500), (b"b%d" % n, b"y")])
                told.append(n)
            except StorageError:
                failed.append(n)

    work = [asyncio.ensure_future(committing(worker)) for worker in range(8)]
    while len(told) < 40:
        await asyncio.sleep(0)
    await asyncio.to_thread(postgres.restart, "immediate")
    await asyncio.gather(*work)
    await store.check()
    for n in range(400):
        there = {await asyncio.to_thread(store.get, key) is not None for key in (b"a%d" % n, b"b%d" % n)}
        assert len(there) == 1 and (there == {True} or n in failed)
    assert len(told) > 40 and store.losses == 0
    await store.close()


async def test_trouble_is_told_at_once_and_over_when_it_is(postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    store = PostgresStore(postgres_url)
    await commits(store, 1)
    await asyncio.to_thread(postgres.stop, "immediate")
    with pytest.raises(StorageError, match="Cannot use PostgreSQL's database"):
        await commits(store, 1, 1)
    began_s = time.monotonic()
    for _ in range(50):
        with pytest.raises(StorageError):
            await commits(store, 1, 1)
        with pytest.raises(StorageError):
            await asyncio.to_thread(store.get, record(0))
    assert time.monotonic() - began_s < 1.5 and store.trouble
    await asyncio.to_thread(postgres.start)
    await store.check()
    await commits(store, 1, 1)
    assert store.trouble is None and store.losses == 0
    told = [r.levelname for r in caplog.records if r.name == "proxy.storage.postgres"]
    assert told == ["ERROR", "WARNING"] and "s3cret" not in caplog.text
    await store.close()


async def test_what_began_while_nothing_could_be_read_is_not_stored(postgres: Postgres, postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    await commits(store, 1)
    stopped, again = asyncio.Event(), asyncio.Event()

    @suspending
    async def request() -> None:
        await stopped.wait()
        with pytest.raises(StorageError):
            store.get(record(0))
        await again.wait()
        with pytest.raises(StorageError, match="could not be read when this began"):
            await store.commit([(b"a", b"1")])

    work = asyncio.ensure_future(request())
    await asyncio.to_thread(postgres.stop)
    stopped.set()
    await asyncio.sleep(0)
    while store.trouble is None:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(postgres.start)
    await store.check()
    again.set()
    await work
    assert store.get(b"a") is None
    await store.close()


@pytest.mark.parametrize("kept", ["an older copy", "another store"])
async def test_a_database_that_is_another_is_noticed(postgres: Postgres, postgres_url: str, kept: str) -> None:
    store = PostgresStore(postgres_url)
    await commits(store, 3)
    secret, generation = store.secret(), store.generation
    if kept == "an older copy":
        execute(postgres_url, "DELETE FROM llm_pager_values WHERE stored IS NOT NULL")
    else:
        execute(postgres_url, "UPDATE llm_pager_store SET secret = $1", bytes(32))
        with pytest.raises(StorageError, match="replaced meanwhile"):
            await commits(store, 1, 3)
    execute(postgres_url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    assert await asyncio.to_thread(store.get, record(2)) == (None if kept == "an older copy" else store.get(record(2)))
    assert store.losses == 1 and store.generation == generation + 1
    assert (store.secret() == secret) == (kept == "an older copy")
    await store.close()


# -- poolers


async def test_a_pooler_that_is_killed_is_gone_round(pgbouncer: PgBouncer, postgres_url: str) -> None:
    store = PostgresStore(pgbouncer.url(postgres_url))
    await commits(store, 3)
    await asyncio.to_thread(pgbouncer.restart)
    await commits(store, 3, 3)
    assert store.trouble is None and await asyncio.to_thread(store.get, record(5)) is not None
    await store.close()


async def test_statements_of_two_processes_are_never_taken_for_each_other(
    postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler that lets named statements through to whichever connection is free."""
    settings = {"ignore_startup_parameters": "plan_cache_mode,statement_timeout"}
    with PgBouncer(postgres, settings=settings) as pooler:
        stores = [PostgresStore(pooler.url(postgres_url)) for _ in range(2)]

        async def work(store: PostgresStore, n: int) -> None:
            await store.commit([(b"k%d" % n, b"%d" % n)])
            assert await asyncio.to_thread(store.get, b"k%d" % n) == b"%d" % n

        for first in range(0, 40, 20):
            await asyncio.gather(*(work(store, n) for n in range(first, first + 20) for store in stores))
        if pooler.version < (1, 21):
            assert "keeps them from 1.21 on" in caplog.text
        assert all(store.trouble is None for store in stores)
        for store in stores:
            await store.close()


# -- kill -9


async def test_invariant_5_a_backend_killed_in_mid_commit_stores_all_or_nothing(postgres: Postgres, postgres_url: str) -> None:
    """SIGKILL to one backend: the server takes it for a crash, ends all connections and recovers."""
    store = PostgresStore(postgres_url, connections=4)
    large = [(b"l%d" % n, os.urandom(200_000)) for n in range(40)]
    work = asyncio.ensure_future(store.commit(large))
    pid = None
    while pid is None and not work.done():
        rows = await asyncio.to_thread(
            execute, postgres_url,
            "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%FOR SHARE%' AND pid <> pg_backend_pid()",
        )  # fmt: skip
        pid = rows[0]["pid"] if rows else None
    if pid is not None:
        os.kill(pid, 9)
    failed = False
    try:
        await work
    except StorageError:
        failed = True
    async with asyncio.timeout(20):
        while True:
            try:
                await store.check()
                break
            except StorageError:
                await asyncio.sleep(0.05)
    there = {await asyncio.to_thread(store.get, key) is not None for key, _ in large}
    assert len(there) == 1 and (failed or there == {True})
    await store.close()
