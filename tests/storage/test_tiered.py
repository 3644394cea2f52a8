"""L2 with L3 and L4 below: whatever moves where, and whatever ends in the middle, each value is what was stored."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy import keys
from proxy.config import Config
from proxy.errors import StorageError
from proxy.storage import open_store
from proxy.storage.demotion import Demotion
from proxy.storage.l2 import Damaged
from proxy.storage.lease import Lease
from proxy.storage.packs import values_of
from proxy.storage.suspend import suspending
from proxy.storage.tiered import OBJECT, PACK, READS, Reads, Tiered, named_pack
from tests.services import S3, buckets

DAY_S = 86_400
NOW_S = 1_700_000_000.0
LARGE_BYTES = 65_536


def owner_of(number: int) -> bytes:
    """Of a conversation of one of two tenants."""
    return bytes(11) + bytes([number % 2]) + bytes(5) + bytes([number])


def key_of(number: int, value: int, letter: bytes = keys.RECORD) -> bytes:
    owner = owner_of(number)
    return letter + owner + owner + value.to_bytes(16, "big")


def last_use(number: int, at_s: float) -> tuple[bytes, bytes]:
    return keys.CONVERSATION + owner_of(number), bytes(34) + int(at_s).to_bytes(4, "big")


def opened(
    path: Path, l3: str | None = None, l4: str | None = None, options: dict[str, str] | None = None, url: str | None = None
) -> Tiered:
    """Where nobody knows anything for longer than a moment."""
    below = {"options": options or {}, "timeout_s": 5.0}
    tiers = {"l2": {"path": path / "data", "url": url}, "l3": {"url": l3, **below}, "l4": {"url": l4, **below}, "demotion_s": 1e-6}
    return open_store(Config.model_validate({"tiers": tiers}))


def demotion(store: Tiered, days: float | None = 1, tokens: int | None = None, now_s: float = NOW_S) -> Demotion:
    return Demotion(store, 60, days, tokens, lambda: now_s, rest=0)


async def demoted(store: Tiered, **more: Any) -> None:
    worker = demotion(store, **more)
    await worker.run_once()
    await worker.run_once()


def conversation(number: int, values: int = 12, seed: int = 0) -> dict[bytes, bytes]:
    chance = random.Random(1000 * number + seed)
    letters = sorted(keys.MOVING)
    return {
        key_of(number, i, letters[i % len(letters)]): f"{number} says {i} ".encode() * chance.randint(1, 2000)
        for i in range(values)
    }


def files(path: Path, ending: str) -> list[Path]:
    return sorted(path.rglob(f"*{ending}"))


@pytest.fixture(params=["file", "s3", "gs", "az", "file below PostgreSQL"])
def below(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Where L3 and L4 are, and where L2 is."""
    store, _, engine = request.param.partition(" below ")
    url = request.getfixturevalue("postgres_url") if engine else None
    l3, l4 = buckets(request, tmp_path, store, store)
    return {"l3": l3["url"], "l4": l4["url"], "options": l3.get("options", {}), "url": url}


# -- the way down and up


async def test_an_unused_conversation_goes_to_packs_and_comes_back_when_it_is_used(tmp_path: Path, below: dict[str, Any]) -> None:
    store = opened(tmp_path, **below)
    old, used = conversation(1), conversation(2)
    await store.commit([last_use(1, NOW_S - 2 * DAY_S), last_use(2, NOW_S)], adds=[*old.items(), *used.items()])
    await demoted(store)
    assert {key[1:19] for key, _ in store.engine.scan(b"") if key[:1] in keys.MOVING} == {owner_of(2)}
    for again in (False, True):
        reads = Reads()
        READS.set(reads)
        assert all(store.get(key) == value for key, value in {**old, **used}.items()), again
        assert reads.coldest.value == "L4" and set(reads.values) <= {"L3", "L4"} and reads.failed is None
        assert store.get(key_of(1, 99)) is None
        assert dict(store.scan(keys.RECORD)) == {k: v for k, v in {**old, **used}.items() if k[:1] == keys.RECORD}
        store.forget()
    READS.set(None)
    known = await store.commit([last_use(1, NOW_S)], adds=[(key_of(1, 0, min(keys.MOVING)), b"other"), (key_of(1, 99), b"new")])
    assert known == {key_of(1, 0, min(keys.MOVING))}, "what stands in a pack is there"
    await demotion(store).bring_back()
    above = dict(store.engine.scan(b""))
    assert all(above[key] == value for key, value in old.items() if len(value) < LARGE_BYTES)
    packs = [name for name, _ in store.l4.names()]  # type: ignore[union-attr]
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)])
    await demoted(store)
    assert len([name for name, _ in store.l4.names()]) == len(packs) + 1, "only what is new is written again"  # type: ignore[union-attr]
    store.forget()
    assert all(store.get(key) == value for key, value in {**old, key_of(1, 99): b"new"}.items())
    await store.close()


async def test_a_large_value_becomes_an_object_and_a_stub(tmp_path: Path, below: dict[str, Any]) -> None:
    store = opened(tmp_path, **below)
    large = {key_of(1, 0): b"large " * 50_000, key_of(1, 1): os.urandom(LARGE_BYTES), key_of(1, 2): bytes(LARGE_BYTES - 1)}
    await store.commit([last_use(1, NOW_S), (key_of(1, 3), os.urandom(100))], adds=list(large.items()))
    await demotion(store).run_once()
    assert all(store.get(key) == value for key, value in large.items())
    assert [len(value) < 100 for _, value in store.engine.scan(keys.RECORD)] == [True, True, False, False]
    assert store.engine.scan(keys.LARGE) == [] and dict(store.scan(keys.RECORD)).items() >= large.items()
    ((name, size), _) = sorted(store.l3.names(), key=lambda named: named[1])  # type: ignore[union-attr]
    assert size < 1000, "it is compressed where that pays"
    assert await store.commit((), adds=[(key_of(1, 0), b"other")]) == {key_of(1, 0)}
    store.l3.put(name, b"\0scribbled")  # type: ignore[union-attr]
    with pytest.raises(Damaged, match="not what was stored"):
        store.get(key_of(1, 0))
    store.l3.delete([name])  # type: ignore[union-attr]
    with pytest.raises(Damaged, match="is not there"):
        store.get(key_of(1, 0))
    await store.commit((), drops=[key_of(1, 1)])
    assert list(store.l3.names()) == []  # type: ignore[union-attr]
    await store.close()


async def test_the_oldest_leave_first_and_only_so_many(tmp_path: Path, below: dict[str, Any]) -> None:
    store = opened(tmp_path, **below)
    for number in range(10):
        value = os.urandom(50_000)
        await store.commit([last_use(number, NOW_S - 1000 * (10 - number))], adds=[(key_of(number, 0), value)])
    held = store.engine.size_bytes()
    await demoted(store, days=None, tokens=held // 4 + 1)
    assert len(store.engine.scan(keys.RECORD)) == 10, "it is not too much"
    await demoted(store, days=None, tokens=(held - 100_000) // 4)
    left = [key[18] for key, _ in store.engine.scan(keys.RECORD)]
    assert sorted(left) == list(range(10 - len(left), 10)) and 4 <= len(left) <= 7
    assert store.engine.size_bytes() < held - 100_000
    await demoted(store, days=None, tokens=1)
    assert [key[18] for key, _ in store.engine.scan(keys.RECORD)] == [], "all are idle"
    await store.close()


async def test_a_turn_between_copy_and_drop_keeps_what_it_stores(tmp_path: Path) -> None:
    store = opened(tmp_path, l4=str(tmp_path / "l4"))
    old = conversation(1)
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items()))
    worker = demotion(store)
    await worker.run_once()
    await store.commit([last_use(1, NOW_S)], adds=[(key_of(1, 50), b"new")])
    await worker.run_once()
    assert len(store.engine.scan(keys.RECORD)) == len(store.scan(keys.RECORD)) == 3, "it is used: it stays"
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)])
    worker = demotion(store)
    await worker.run_once()
    await store.commit((), adds=[(key_of(1, 51), b"newer")])  # as a rendition, which is no use
    await worker.run_once()
    assert [value for _, value in store.engine.scan(keys.RECORD)] == [b"newer"]
    assert store.get(key_of(1, 50)) == b"new" and all(store.get(key) == value for key, value in old.items())
    await store.close()


async def test_a_conversation_used_in_the_second_of_a_look_leaves_too(tmp_path: Path) -> None:
    """The look would have had the other one, of the same second, in its queue: behind that one nothing is looked for."""
    store, now_s = opened(tmp_path, l4=str(tmp_path / "l4")), NOW_S
    for number, used_s in ((1, NOW_S - 1), (3, NOW_S)):
        await store.commit([last_use(number, used_s)], adds=list(conversation(number).items()))
    worker = Demotion(store, 60, 0, None, lambda: now_s, rest=0)
    await worker.run_once()
    await store.commit([last_use(1, NOW_S)])
    now_s = NOW_S + 2
    passes = 0
    while any(store.engine.scan(letter) for letter in keys.MOVING) and passes < 1000:  # a look rests for as long as it took
        await worker.run_once()
        passes += 1
    assert passes < 1000, "one of them stays"
    await store.close()


async def test_two_workers_at_once_lose_nothing(tmp_path: Path, below: dict[str, Any]) -> None:
    stores = [opened(tmp_path, **below) for _ in range(2)]
    old = conversation(1)
    await stores[0].commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items())[:-2])
    workers = [demotion(store) for store in stores]
    await workers[0].run_once()
    await stores[1].commit((), adds=list(old.items())[-2:])
    await workers[1].run_once()
    await asyncio.gather(*(worker.run_once() for worker in workers))
    for store in stores:
        store.forget()
        assert store.engine.scan(keys.RECORD) == [] and all(store.get(key) == value for key, value in old.items())
        await store.close()


# -- what is damaged, away, erased


@pytest.mark.parametrize("where", ["index", "frame", "all"])
async def test_a_damaged_pack_is_a_miss_and_is_stored_again(tmp_path: Path, where: str) -> None:
    store = opened(tmp_path, l4=str(tmp_path / "l4"))
    old = {key_of(1, i): os.urandom(100_000) for i in range(6)}
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items()))
    await demoted(store)
    store.forget()
    (pack,) = files(tmp_path, PACK)
    data = bytearray(pack.read_bytes())
    data[20 if where == "index" else -9] ^= 1
    pack.write_bytes(data) if where != "all" else pack.unlink()
    found = dict[bytes, bytes | None]()
    for key in old:
        try:
            found[key] = store.get(key)
        except Damaged:
            assert store.damaged["pack"] > 0
    assert len(found) == (3 if where == "frame" else 0) and all(old[key] == value for key, value in found.items())
    assert await store.commit((), adds=list(old.items())) == found.keys()
    assert all(store.get(key) == value for key, value in old.items())
    await store.close()


async def test_a_store_that_is_away_is_never_an_empty_one(tmp_path: Path, s3: S3) -> None:
    store = opened(tmp_path, l4=s3.new_bucket(), options=s3.options)
    old, new = conversation(1), conversation(2)
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items()))
    await demoted(store)
    away = opened(tmp_path, l4="s3://test/pager", options={**s3.options, "endpoint": "http://127.0.0.1:1"})
    READS.set(reads := Reads())
    with pytest.raises(StorageError, match="Cannot read"):
        away.get(next(iter(old)))
    assert reads.failed is not None and "Cannot read" in reads.failed
    with pytest.raises(StorageError, match="Cannot read"):
        await away.commit((), adds=list(new.items()))  # of a request that goes on from what it did not see
    READS.set(None)
    with pytest.raises(StorageError, match="Cannot read"):
        await away.commit((), adds=[(key_of(1, 99), b"perhaps it is there")])
    await away.commit([last_use(2, NOW_S - 2 * DAY_S)], adds=list(new.items()))
    with pytest.raises(StorageError, match="Cannot (read|write)"):
        away.l4._again_s = 0.0  # type: ignore[union-attr]
        await demoted(away)
    assert all(away.get(key) == value for key, value in new.items())
    assert all(store.get(key) == value for key, value in old.items())
    await store.close()
    await away.close()


@pytest.mark.parametrize("beginning", [6, 12, 18])
async def test_what_is_erased_is_in_no_object(tmp_path: Path, below: dict[str, Any], beginning: int) -> None:
    store = opened(tmp_path, **below)
    gone, other = conversation(1), conversation(2)
    gone[key_of(1, 70)] = b"large " * 50_000
    uses = [last_use(number, NOW_S - 2 * DAY_S) for number in (1, 2)]
    await store.commit(uses, adds=[*gone.items(), *other.items()])
    await demoted(store)
    await store.commit((), drops=[kind + owner_of(1)[:beginning] for kind in keys.OF_CONVERSATION], erases=True)
    folder = "/".join(owner_of(1)[at : at + 6].hex() for at in range(0, beginning, 6))
    for objects in (store.l3, store.l4):
        assert objects is not None and list(objects.names(folder)) == []
    assert not any(store.get(key) for key in gone)
    assert beginning == 6 or all(store.get(key) == value for key, value in other.items())
    await store.close()


async def test_a_part_that_is_erased_is_in_no_pack(tmp_path: Path) -> None:
    store = opened(tmp_path, l3=str(tmp_path / "l3"), l4=str(tmp_path / "l4"))
    old = conversation(1) | {key_of(1, 70): b"large " * 50_000}
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items()))
    await demoted(store)
    gone = key_of(1, 70)
    await store.commit((), drops=[gone], erases=True)
    assert files(tmp_path, PACK) == [] and files(tmp_path, OBJECT) == []
    assert store.get(gone) is None and all(store.get(key) == old[key] for key in old.keys() - {gone})
    await demoted(store)
    assert store.get(gone) is None and len(files(tmp_path, PACK)) == 1
    await store.close()


async def test_what_a_pass_began_before_an_erasure_is_not_told(tmp_path: Path) -> None:
    store, other = (opened(tmp_path, l4=str(tmp_path / "l4")) for _ in range(2))
    old = conversation(1)
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items()))
    written = Demotion._written

    def erased_meanwhile(self: Demotion, owner: bytes) -> Any:
        made = written(self, owner)
        drops = [kind + owner for kind in keys.OF_CONVERSATION]
        threading.Thread(target=asyncio.run, args=(other.commit((), drops=drops, erases=True),)).run()
        return made

    worker = demotion(store)
    worker._written = erased_meanwhile.__get__(worker)  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="erased meanwhile"):
        await worker.run_once()
    assert store.packs_of(owner_of(1), anew=True) == () and not any(store.get(key) for key in old)
    assert files(tmp_path, PACK) == []
    await store.close()
    await other.close()


async def test_what_a_kill_left_of_an_erased_conversation_is_swept(tmp_path: Path) -> None:
    store = opened(tmp_path, l3=str(tmp_path / "l3"), l4=str(tmp_path / "l4"))
    old = conversation(1) | {key_of(1, 70): b"large " * 50_000}
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items()))
    commit, puts = store.engine.commit, store.l4.put  # type: ignore[union-attr]

    def killed(*args: Any) -> None:
        puts(*args)
        raise KeyboardInterrupt

    store.l4.put = killed  # type: ignore[union-attr, method-assign]
    with pytest.raises(KeyboardInterrupt):
        await demotion(store).run_once()
    store.l4.put = puts  # type: ignore[union-attr, method-assign]
    assert len(files(tmp_path, PACK)) == 1
    await commit((), drops=[kind + owner_of(1) for kind in keys.OF_CONVERSATION], erases=True)  # of one that saw no objects
    await demotion(store).run_once()
    assert files(tmp_path, PACK) == files(tmp_path, OBJECT) == []
    await store.close()


async def test_a_cold_read_does_not_hold_the_event_loop(tmp_path: Path) -> None:
    store = opened(tmp_path, l4=str(tmp_path / "l4"))
    old = conversation(1)
    await store.commit([last_use(1, NOW_S - 2 * DAY_S)], adds=list(old.items()))
    await demoted(store)
    store.forget()
    asked, may_go = asyncio.Event(), threading.Event()
    loop, read = asyncio.get_running_loop(), store.l4.get  # type: ignore[union-attr]

    def slow(*args: Any) -> bytes | None:
        loop.call_soon_threadsafe(asked.set)
        assert may_go.wait(10)
        return read(*args)

    store.l4.get = slow  # type: ignore[union-attr, method-assign]

    async def request() -> bytes | None:
        return store.get(next(iter(old)))

    work = asyncio.ensure_future(suspending(request)())
    await asyncio.wait_for(asked.wait(), 10)
    may_go.set()
    assert await work == next(iter(old.values()))
    await store.close()


# -- one of all processes


@pytest.mark.parametrize("engine", ["SQLite", "PostgreSQL"])
async def test_one_of_all_has_the_lease_and_who_dies_is_succeeded(
    tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    now_s = 1000.0
    url = request.getfixturevalue("postgres_url") if engine == "PostgreSQL" else None
    stores = [opened(tmp_path, url=url) for _ in range(3)]
    leases = [Lease(store, keys.LEASE + b"work", 100, lambda: now_s) for store in stores]
    held = [await lease.held() for lease in leases]
    assert held == [True, False, False]
    for now_s in (1060.0, 1100.0, 1160.0, 1199.0):
        assert [await lease.held() for lease in reversed(leases)] == [False, False, True], now_s
    assert [await lease.held() for lease in leases[1:]] == [False, False]  # it died, with the next slot in its hand
    now_s = 1301.0
    assert [await lease.held() for lease in leases] == [True, False, False]
    now_s = 1401.0
    assert [await lease.held() for lease in leases[1:]] == [True, False]
    holders = []
    for slot in range(60):
        now_s = 2000.0 + 100 * slot
        holders.append((await asyncio.gather(*(lease.held() for lease in leases))).count(True))
    # Of two that ask at once PostgreSQL may show one its own entry before that of the other, which counts as earlier.
    assert min(holders) == 1 and max(holders) <= (2 if url else 1) and holders.count(2) < 10
    for store in stores:
        await store.close()


# -- a kill at any point


class _Points:
    """Kills this process before or behind the nth thing that it does below or above."""

    def __init__(self, store: Tiered, end: int) -> None:
        self._count, self._end = 0, end
        for objects in (store.l3, store.l4):
            objects.put = self._around(objects.put)  # type: ignore[union-attr, method-assign]
        commit = store.engine.commit

        async def committed(*args: Any, **more: Any) -> Any:
            self._point()
            done = await commit(*args, **more)
            self._point()
            return done

        store.engine.commit = committed  # type: ignore[method-assign]

    def _around(self, put: Any) -> Any:
        def counted(name: str, data: bytes) -> None:
            self._point()
            put(name, data)
            self._point()

        return counted

    def _point(self) -> None:
        self._count += 1
        if self._count == self._end:
            os.kill(os.getpid(), signal.SIGKILL)


def _demote_and_die(path: str, end: int) -> None:
    store = opened(Path(path), l3=f"{path}/l3", l4=f"{path}/l4")
    _Points(store, end)
    asyncio.run(demoted(store))


def test_invariant_04_a_kill_at_any_point_of_a_demotion_loses_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.storage.test_tiered"])
    values = {**conversation(1, 6), **conversation(2, 6), key_of(1, 70): b"large " * 50_000}

    async def begin(path: Path) -> None:
        store = opened(path)
        uses = [last_use(number, NOW_S - 2 * DAY_S) for number in (1, 2)]
        await store.commit(uses, adds=list(values.items()))
        await store.close()

    async def end(path: Path) -> None:
        store = opened(path, l3=f"{path}/l3", l4=f"{path}/l4")
        assert all(store.get(key) == value for key, value in values.items())
        await demoted(store)
        assert not any(key[:1] in keys.MOVING for key, _ in store.engine.scan(b"")), "and all of it goes on"
        store.forget()
        assert all(store.get(key) == value for key, value in values.items())
        await store.close()

    asyncio.run(begin(tmp_path / "begun"))
    point, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        point += 1
        path = tmp_path / str(point)
        shutil.copytree(tmp_path / "begun", path)
        child = context.Process(target=_demote_and_die, args=(str(path), point))
        child.start()
        child.join()
        status = child.exitcode
        asyncio.run(end(path))
        shutil.rmtree(path)
    assert status == 0 and point > 12, "the last one was not killed: all points were met"


# -- anything in any order


class Moves(RuleBasedStateMachine):
    """Against a dict: values in L2, L3 or L4, two replicas that know of each other only by the store."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.stores = [opened(self.path, l3=f"{self.path}/l3", l4=f"{self.path}/l4") for _ in range(2)]
        self.values: dict[bytes, bytes] = {}
        self.uses: dict[int, float] = {}
        self.now_s = NOW_S

    def teardown(self) -> None:
        for store in self.stores:
            self.runner.run(store.close())
        self.runner.close()
        shutil.rmtree(self.path)

    @rule(at=st.integers(0, 1), number=st.integers(0, 2), value=st.integers(0, 5), large=st.booleans())
    def add(self, at: int, number: int, value: int, large: bool) -> None:
        key = key_of(number, value)
        data = key * (2000 if large else 20)
        self.uses[number] = self.now_s
        known = self.runner.run(self.stores[at].commit([last_use(number, self.now_s)], adds=[(key, data)]))
        assert known == ({key} if key in self.values else set())
        self.values.setdefault(key, data)

    @rule(at=st.integers(0, 1), later_days=st.integers(0, 2), passes=st.integers(1, 3))
    def demote(self, at: int, later_days: int, passes: int) -> None:
        self.now_s += later_days * DAY_S
        worker = demotion(self.stores[at], now_s=self.now_s)
        for _ in range(passes):
            self.runner.run(worker.run_once())

    @rule(at=st.integers(0, 1))
    def bring_back(self, at: int) -> None:
        self.runner.run(demotion(self.stores[at]).bring_back())

    @rule(at=st.integers(0, 1))
    def forget(self, at: int) -> None:
        self.stores[at].forget()

    @rule(at=st.integers(0, 1), number=st.integers(0, 2), value=st.none() | st.integers(0, 5))
    def erase(self, at: int, number: int, value: int | None) -> None:
        drops = [kind + owner_of(number) for kind in keys.OF_CONVERSATION] if value is None else [key_of(number, value)]
        self.runner.run(self.stores[at].commit((), drops=drops, erases=True))
        self.values = {key: data for key, data in self.values.items() if not key.startswith(tuple(drops))}
        for store in self.stores:  # as `Memory.renew` does
            store.look()
            store.forget()

    @invariant()
    def each_value_is_what_was_stored(self) -> None:
        for store in self.stores:
            for number in range(3):
                for value in range(6):
                    key = key_of(number, value)
                    assert store.get(key) == self.values.get(key)
            assert store.scan(keys.RECORD, limit=100) == sorted(self.values.items())

    @invariant()
    def nothing_that_was_erased_stands_in_an_object(self) -> None:
        for objects in (self.stores[0].l4,):
            for name, _ in objects.names():  # type: ignore[union-attr]
                owner, pack = named_pack(name) or (b"", b"")
                for rest in values_of(pack, objects.get(name) or b"")[0]:  # type: ignore[union-attr]
                    assert rest[:1] + owner + rest[1:] in self.values


Moves.TestCase.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
TestMoves = Moves.TestCase


@pytest.fixture(autouse=True)
def no_reads() -> Iterator[None]:
    """Each test has a context of its own: what one reads is no other's."""
    token = READS.set(None)
    yield
    del token
    assert copy_context() is not None
