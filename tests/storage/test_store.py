"""What every store promises, on each: a directory, PostgreSQL, and PostgreSQL behind a pooler in transaction mode."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proxy.storage import Store
from proxy.storage.l2 import JOIN_KEEP, Damaged, DiskStore, StorageError
from proxy.storage.postgres import PostgresStore
from proxy.storage.sqlite import ERASED
from tests import services
from tests.storage.test_l2 import node, nodes, start


def reopen(where: str) -> Store:
    """The store in a directory, or behind a URL."""
    return PostgresStore(where) if "://" in where else DiskStore(Path(where), 100)


def damage(where: str) -> None:
    """All values stand there changed."""
    if "://" in where:
        services.execute(where, "UPDATE llm_pager_values SET value = value || '\\x00' WHERE tenant <> '' OR path = ''")
        services.execute(where, "UPDATE llm_pager_members SET sum = sum + 1")
        return
    with closing(sqlite3.connect(Path(where) / "cache.db", isolation_level=None)) as database:
        database.execute("UPDATE Cache SET value = zeroblob(length(value)) WHERE typeof(key) = 'blob'")


@pytest.fixture(params=["directory", "postgres", "pooled"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What `reopen` opens, empty."""
    if request.param == "directory":
        return str(tmp_path / "l2")
    url: str = request.getfixturevalue("postgres_url")
    if request.param == "pooled":
        pooler: services.PgBouncer = request.getfixturevalue("pgbouncer")
        return pooler.url(url)
    return url


@pytest.fixture
async def store(where: str):
    opened = reopen(where)
    yield opened
    await opened.close()


async def test_puts_replace_and_unknown_keys_are_none(store: Store) -> None:
    await store.commit([(b"a", b"1"), (b"b", b"\x00\xff"), (b"a", b"2")])
    assert (store.get(b"a"), store.get(b"b"), store.get(b"c")) == (b"2", b"\x00\xff", None)
    await store.commit([(b"a", b"")])
    assert store.get(b"a") == b""
    await store.commit([])


async def test_joins_keep_order_without_doubles_and_the_newest(store: Store) -> None:
    await store.commit([], [(b"k", node(n)) for n in (1, 2, 1, 3)])
    await store.commit([], [(b"k", node(2)), (b"other", node(9))])
    assert nodes(store.get(b"k")) == [node(1), node(2), node(3)]
    assert nodes(store.get(b"other")) == [node(9)]
    await store.commit([], [(b"k", node(n)) for n in range(100, 140)])
    assert nodes(store.get(b"k")) == [node(n) for n in range(140 - JOIN_KEEP, 140)]
    with pytest.raises(ValueError, match="34 bytes"):
        await store.commit([], [(b"k", b"short")])


async def test_get_from_other_threads(store: Store) -> None:
    await store.commit([(b"a", b"1")])
    assert (
        await asyncio.gather(*[asyncio.to_thread(store.get, b"a") for _ in range(8)]) == [b"1"] * 8
    )


async def test_close_drains_and_refuses_what_comes_after(where: str) -> None:
    store = reopen(where)
    commits = [asyncio.create_task(store.commit([(b"%d" % n, b"v")])) for n in range(200)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*commits)
    await store.close()
    for call in (
        store.commit([(b"x", b"v")]),
        asyncio.to_thread(store.get, b"1"),
        asyncio.to_thread(store.secret),
    ):
        with pytest.raises(StorageError, match="closed"):
            await call
    again = reopen(where)
    assert all(again.get(b"%d" % n) == b"v" for n in range(200))
    await again.close()


async def test_a_cancelled_commit_does_not_stop_the_writer(store: Store) -> None:
    task = asyncio.create_task(store.commit([(b"c1", b"v"), (b"c2", b"v")]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.commit([(b"after", b"v")])
    assert (store.get(b"c1") is None) == (store.get(b"c2") is None)
    assert store.get(b"after") == b"v"


async def test_one_store_serves_several_event_loops(store: Store) -> None:
    def other_loop(n: int) -> None:
        asyncio.run(store.commit([(b"loop%d" % n, b"v")]))

    await asyncio.gather(*[asyncio.to_thread(other_loop, n) for n in range(4)])
    assert all(store.get(b"loop%d" % n) == b"v" for n in range(4))


COMMIT_AND_PRINT = """
    import asyncio, sys
    from tests.storage.test_store import reopen
    async def worker(store, w):
        n = 0
        while True:
            key = b"%d:%d" % (w, n)
            await store.commit([(key, b"a" * 300), (key + b"'", b"b" * 300)],
                               [(key, bytes(34)), (b"j" + key, bytes(34))])
            print(w, n, flush=True)
            n += 1
    async def main():
        store = reopen(sys.argv[1])
        await asyncio.gather(*[worker(store, w) for w in range(8)])
    asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["directory", "postgres"], indirect=True)
async def test_invariant_5_what_was_committed_survives_sigkill(where: str) -> None:
    child = start(COMMIT_AND_PRINT.replace("(key, bytes(34)), ", ""), where)
    assert child.stdout is not None
    printed = [child.stdout.readline() for _ in range(400)]
    child.send_signal(signal.SIGKILL)
    printed += child.stdout.readlines()
    child.wait()
    store = reopen(where)
    told = [tuple(map(int, line.split())) for line in printed if line.endswith("\n")]
    assert len(told) >= 400
    for w, n in told:
        key = b"%d:%d" % (w, n)
        assert store.get(key) == b"a" * 300 and store.get(key + b"'") == b"b" * 300
        assert store.get(b"j" + key) == bytes(34)
    await store.commit([], erases=True)  # what a server still has on its way ends before it
    # Commits that nobody was told about are there whole or not at all.
    for w in range(8):
        for n in range(max(m for v, m in told if v == w), max(m for v, m in told if v == w) + 3):
            key = b"%d:%d" % (w, n)
            assert len({store.get(k) is None for k in (key, key + b"'", b"j" + key)}) == 1
    await store.close()


@pytest.mark.parametrize("where", ["directory", "postgres"], indirect=True)
async def test_three_processes_write_together(where: str) -> None:
    children = [
        start(
            """
            import asyncio, sys
            from tests.storage.test_store import reopen
            me = int(sys.argv[2])
            async def main():
                store = reopen(sys.argv[1])
                secret = store.secret()
                for n in range(60):
                    mine = (me * 1000 + n).to_bytes(34, "big")
                    await store.commit([(mine, bytes([me]) * 500)],
                                       [(b"set%d" % (n % 10), mine), (b"all", mine)])
                await store.close()
                print(secret.hex())
            asyncio.run(main())
            """,
            where,
            me,
        )
        for me in range(3)
    ]
    outputs = [child.communicate(timeout=60)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    store = reopen(where)
    assert set(outputs) == {store.secret().hex()} and len(outputs[0]) == 64
    for me in range(3):
        assert all(store.get(node(me * 1000 + n)) == bytes([me]) * 500 for n in range(60))
    for s in range(10):  # 18 joins in each: none lost to another process
        expected = {node(me * 1000 + n) for me in range(3) for n in range(s, 60, 10)}
        joined = nodes(store.get(b"set%d" % s))
        assert len(joined) == 18 and set(joined) == expected
    assert len(nodes(store.get(b"all"))) == JOIN_KEEP
    await store.close()


async def test_a_damaged_value_is_told_once_and_stored_again_by_who_has_it(
    store: Store, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    await store.commit([(b"_put", b"1")], [(b"_join", node(1))], [(b"_add", b"1")])
    damage(where)
    for _ in range(3):
        for key in (b"_put", b"_join", b"_add"):
            with pytest.raises(Damaged, match="check --storage"):
                store.get(key)
    assert store.damaged == {"value": 9} and len(caplog.records) == 1
    assert await store.commit([(b"put", b"2")], [(b"join", node(2))], [(b"add", b"2")]) == frozenset()
    assert [store.get(key) for key in (b"put", b"join", b"add")] == [b"2", node(2), b"2"]


async def test_adds_keep_what_is_there_and_say_so(where: str) -> None:
    store = reopen(where)
    try:
        assert await store.commit([], adds=[(b"a", b"1"), (b"b", b"1")]) == frozenset()
        assert await store.commit([(b"c", b"1")], adds=[(b"a", b"2"), (b"d", b"2")]) == {b"a"}
        assert [store.get(k) for k in (b"a", b"b", b"c", b"d")] == [b"1", b"1", b"1", b"2"]
    finally:
        await store.close()


async def test_scan_goes_through_the_keys_of_a_prefix_in_their_order(store: Store) -> None:
    await store.commit([(b"n%d" % n, b"%d" % n) for n in range(10)] + [(b"m9", b""), (b"o", b""), ("n", b"")])
    assert store.scan(b"n", limit=3) == [(b"n0", b"0"), (b"n1", b"1"), (b"n2", b"2")]
    assert [key for key, _ in store.scan(b"n", b"n7")] == [b"n8", b"n9"]
    assert store.scan(b"x") == [] and len(store.scan(b"")) == 12 and store.scan(b"n5", b"n5") == []
    await store.commit([(b"\xff\xff1", b"x"), (b"\xfe", b"y")])
    assert store.scan(b"\xff") == [(b"\xff\xff1", b"x")] and store.scan(b"\xff\xff") == [(b"\xff\xff1", b"x")]


async def test_scan_begins_anywhere_in_the_order_of_the_keys(store: Store) -> None:
    chance = random.Random(1)
    owners = [chance.choice((bytes(12), b"\xff" * 12, b"tenant------")) + b"%06d" % n for n in range(12)]
    known = {letter + owner + b"%d" % n: b"%d" % n for letter in (b"c", b"n", b"z") for owner in owners for n in range(4)}
    await store.commit([*known.items()], [(b"a" + owner, node(1)) for owner in owners])
    known |= {b"a" + owner: node(1) for owner in owners}
    for _ in range(150):
        one, other = (chance.choice([*known]) for _ in range(2))
        prefix, after = one[: chance.choice((0, 1, 5, 13, 16, 19, 20))], chance.choice((b"", one, other, other[:9]))
        wanted = sorted((k, v) for k, v in known.items() if k.startswith(prefix) and k > after)[:9]
        assert store.scan(prefix, after, 9) == wanted, (prefix, after)


async def test_leaves_take_a_conversations_ids_out_of_a_set(store: Store) -> None:
    ids = [owner + node(n)[2:] for n, owner in enumerate((b"o1", b"o2", b"o1", b"o3"))]
    await store.commit([], [(b"set", i) for i in ids] + [(b"only", ids[0])])
    await store.commit([], [(b"set", b"o2" + node(9)[2:])], leaves=[(b"set", b"o1"), (b"only", b"o1"), (b"none", b"o1")])
    assert nodes(store.get(b"set")) == [ids[1], ids[3], b"o2" + node(9)[2:]] and store.get(b"only") is None


async def test_what_began_before_an_erasure_is_not_stored(store: Store, where: str) -> None:
    other = reopen(where)
    await store.commit([(b"a", b"text")], erased=0)
    await other.commit([], drops=[b"a"], erases=True)
    assert (other.erased, store.erased) == (1, 0)
    with pytest.raises(StorageError, match="erased meanwhile"):
        await store.commit([(b"a", b"text")], erased=0)
    assert store.get(b"a") is None and store.erased == 1 and store.trouble is None
    await store.commit([(b"a", b"new")], erased=1)
    await other.close()
    again = reopen(where)
    again.look()
    assert again.erased == 1 and again.get(ERASED) is not None
    await again.close()
