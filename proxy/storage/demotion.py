"""What leaves L2, and when: large values for L3, unused conversations for L4; and what comes back. In the background.

Promises: one process of all does it at a time (lease.py), and whatever a kill or a second one does in the middle,
nothing is lost: what is below is whole and told in L2 before anything above it is dropped, and only what was copied
is dropped, key by key, so that a turn that comes meanwhile keeps what it stores. The oldest leave first. A pass does
so much and then rests; all that takes time is done in a thread.

A pass copies conversations to packs, and drops from L2 what the pass before has copied, when everybody knows of the
packs (tiered.py), of conversations that nobody has used meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from heapq import nsmallest
from typing import NamedTuple

from proxy.errors import StorageError
from proxy.keys import ARCHIVE, CONVERSATION, LARGE, LEASE, MOVING, OWNER_BYTES, rows_of
from proxy.storage.l1 import BYTES_PER_TOKEN
from proxy.storage.lease import Lease
from proxy.storage.packs import EMPTY, build
from proxy.storage.sqlite import Damaged
from proxy.storage.tiered import Tiered, is_stub, object_name, object_of

_DAY_S = 86_400
_LEAST_S = 2.0  # since a conversation's last use: another turn of the same second would not be seen
_IDLE_S = 600.0  # since a conversation's last use, before a full L2 is a reason
_LOW = 0.9  # of tiers.l2.tokens: so far down, once they are reached
_QUEUE = 1000  # conversations, the oldest, of one look at all of them
_AGAIN_S = _DAY_S  # and then all of them again: what was imported is older than what is gone already
_KEYS_A_PASS = 50_000
_DROPS_AT_ONCE = 2000  # keys: others wait for the lock meanwhile
_ROWS_AT_ONCE = 32  # each may be some megabytes
_LARGE_AT_ONCE = 16
_LEASE_PASSES = 10
_LOOK_REST = 20  # times that a look through all of L2 took, before the next one
_REST = 3  # times that a conversation took, before the next one
_TIME_BYTES = 4  # at the end of a conversation's value: its last use, Unix time

log = logging.getLogger(__name__)


class _Used(NamedTuple):
    at_s: int
    owner: bytes


class _Copied(NamedTuple):
    used: _Used
    keys: list[bytes]  # that packs have and L2 has
    generation: int  # of the store that was told so


class Demotion:
    """One per process. `every_s`: between two passes; `days`, `tokens`: what L2 keeps (None: all)."""

    def __init__(
        self, store: Tiered, every_s: float, days: float | None, tokens: int | None,
        clock: Callable[[], float] = time.time, rest: float = _REST,
    ) -> None:  # fmt: skip
        self._store, self._every_s, self._days, self._tokens = store, every_s, days, tokens
        self._clock, self._rest = clock, rest
        self._writing = LEASE + b"demotion writes"
        self._lease = Lease(store.engine, LEASE + b"demotion", _LEASE_PASSES * every_s, clock)
        self._began_s = 0.0
        self._look_s = self._size_s = self._move_s = 0.0  # when all of L2 is looked through again
        self._task: asyncio.Task[None] | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        """What is not known any more stands in the store."""
        self._copied: list[_Copied] = []
        self._queue: list[_Used] = []
        self._done = _Used(-1, b"")  # all up to it were copied
        self._swept = False

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.bring_back()
                if await self._lease.held():
                    await self.run_once()
                else:
                    self._begin_anew()
            except StorageError as error:
                log.warning("What has to leave L2 stays there for now: %s", error)
                self._begin_anew()
            except Exception:  # a worker that ended would never be replaced
                log.exception("What has to leave L2 stays there for now.")
                self._begin_anew()

    async def bring_back(self) -> None:
        """What this process read from packs and goes on with. (Each process its own.)"""
        while self._store.used_again:
            owner = self._store.used_again.pop()
            count = await self._store.bring_back(owner)
            log.info("A conversation is used again: %d values came back from L4.", count)

    async def run_once(self) -> None:
        """A pass. Raises StorageError."""
        if not self._swept:
            await self._sweep()
        if self._store.l3 is not None and (began_s := time.monotonic()) >= self._move_s:
            notes = await self._large()
            self._move_s = time.monotonic() + _LOOK_REST * (time.monotonic() - began_s)
            await self._move(notes)
        if self._store.l4 is not None:
            await self._drop_copied()
            await self._copy_unused()

    async def _writes(self, owners: list[bytes]) -> None:
        """Note whose objects are written next: who dies before they are told of in L2 leaves what an erasure may miss."""
        await self._store.engine.commit([(self._writing, b"".join(owners))])

    async def _sweep(self) -> None:
        """Delete what a holder of the lease that died has left of conversations that were erased since. (One that still
        lives is refused: it began before.)"""
        left = await asyncio.to_thread(self._store.engine.get, self._writing) or b""
        for owner in {left[at : at + OWNER_BYTES] for at in range(0, len(left), OWNER_BYTES)}:
            if await asyncio.to_thread(self._last_use, owner) is None:
                for objects in filter(None, (self._store.l3, self._store.l4)):
                    await objects.drop(owner)
        self._swept = True

    # -- L3

    async def _large(self) -> list[tuple[bytes, bytes]]:
        """The notes of some large values."""
        return await asyncio.to_thread(self._store.engine.scan, LARGE, b"", _LARGE_AT_ONCE)

    async def _move(self, notes: list[tuple[bytes, bytes]]) -> None:
        """These and all others."""
        engine = self._store.engine
        assert self._store.l3 is not None
        moved = moved_bytes = 0
        while notes:
            erased, puts = engine.erased, list[tuple[bytes, bytes]]()
            await self._writes([note[1 : 1 + OWNER_BYTES] for note, _ in notes])
            for note, _ in notes:
                end = 1 + OWNER_BYTES
                key = note[end : end + 1] + note[1:end] + note[end + 1 :]
                if (stub := await asyncio.to_thread(self._moved, key)) is not None:
                    puts.append((key, stub[0]))
                    moved_bytes += stub[1]
            try:
                await engine.commit(puts, erased=erased, drops=[note for note, _ in notes])
            except StorageError:  # something was erased meanwhile
                await asyncio.to_thread(self._store.l3.delete, [object_name(*put) for put in puts])
                raise
            moved += len(puts)
            notes = await self._large()
        if moved:
            log.info("%d large values went to L3: %.1f MB.", moved, moved_bytes / 1e6)

    def _moved(self, key: bytes) -> tuple[bytes, int] | None:
        """The stub of a value that stands in an object now, and the value's size; None where there is nothing to move."""
        assert self._store.l3 is not None
        try:
            value = self._store.engine.get(key)
        except Damaged:
            return None
        if value is None or is_stub(value):
            return None
        stub, data = object_of(value)
        self._store.l3.put(object_name(key, stub), data)
        return stub, len(value)

    # -- L4

    async def _drop_copied(self) -> None:
        copied, self._copied = self._copied, []
        dropped = 0
        for used, keys, generation in copied:
            is_unused = await asyncio.to_thread(self._last_use, used.owner) == used.at_s
            if is_unused and generation == self._store.generation:
                for at in range(0, len(keys), _DROPS_AT_ONCE):
                    await self._store.engine.commit((), drops=keys[at : at + _DROPS_AT_ONCE])
                dropped += 1
        if dropped:
            log.info("%d conversations that nobody uses stand in L4 alone.", dropped)

    async def _copy_unused(self) -> None:
        keys = copied_bytes = 0
        excess = await asyncio.to_thread(self._excess_bytes)
        while keys < _KEYS_A_PASS and (used := await self._next()) is not None:
            now_s = self._clock()
            is_old = self._days is not None and used.at_s <= now_s - max(self._days * _DAY_S, _LEAST_S)
            if not is_old and (copied_bytes >= excess or used.at_s > now_s - _IDLE_S):
                break
            self._queue.pop()
            began_s, generation = time.monotonic(), self._store.generation
            if await asyncio.to_thread(self._last_use, used.owner) == used.at_s:
                copied, size = await self.copy(used.owner)
                if copied:
                    self._copied.append(_Copied(used, copied, generation))
                keys += len(copied)
                copied_bytes += size
            self._done = used
            await asyncio.sleep(self._rest * (time.monotonic() - began_s))

    def _excess_bytes(self) -> int:
        """What has to go because L2 holds too much."""
        if self._tokens is None or (began_s := time.monotonic()) < self._size_s:
            return 0
        held, limit = self._store.engine.size_bytes(), self._tokens * BYTES_PER_TOKEN
        self._size_s = time.monotonic() + _LOOK_REST * (time.monotonic() - began_s)
        return max(0, held - int(limit * _LOW)) if held > limit else 0

    def _last_use(self, owner: bytes) -> int | None:
        value = self._store.engine.get(CONVERSATION + owner)
        return int.from_bytes(value[-_TIME_BYTES:], "big") if value else None

    async def _next(self) -> _Used | None:
        """The conversation that was not used for longest, of those that are not done."""
        if not self._queue:
            if self._clock() - self._began_s > _AGAIN_S:
                self._began_s, self._done = self._clock(), _Used(-1, b"")
            if (began_s := time.monotonic()) >= self._look_s:
                self._queue = await asyncio.to_thread(lambda: nsmallest(_QUEUE, self._conversations())[::-1])
                self._look_s = time.monotonic() + _LOOK_REST * (time.monotonic() - began_s)
        return self._queue[-1] if self._queue else None

    def _conversations(self) -> Iterator[_Used]:
        """Not those of this moment: one of them that is used again could come before `_done`, and wait for `_AGAIN_S`."""
        until_s = self._clock() - _LEAST_S
        for key, value in rows_of(self._store.engine.scan, CONVERSATION):
            used = _Used(int.from_bytes(value[-_TIME_BYTES:], "big"), key[1:])
            if self._done < used and used.at_s <= until_s:
                yield used

    async def copy(self, owner: bytes) -> tuple[list[bytes], int]:
        """Write what L2 has of a conversation to packs, and tell of them in L2: the keys that may be dropped, and the
        bytes of their values."""
        engine, erased = self._store.engine, self._store.engine.erased
        if not await asyncio.to_thread(lambda: any(engine.scan(letter + owner, b"", 1) for letter in MOVING)):
            return [], 0
        await self._writes([owner])
        copied, size, written = await asyncio.to_thread(self._written, owner)
        if written:
            try:
                await engine.commit((), joins=[(ARCHIVE + owner, owner + written[-1])], erased=erased)
            except StorageError:  # something was erased meanwhile
                assert self._store.l4 is not None
                names = [self._store.pack_name(owner, pack) for pack in written]
                await asyncio.to_thread(self._store.l4.delete, names)
                raise
            await asyncio.to_thread(self._store.packs_of, owner, True)
        return copied, size

    def _written(self, owner: bytes) -> tuple[list[bytes], int, list[bytes]]:
        """And the ids of the new packs."""
        store = self._store
        assert store.l4 is not None
        packs = store.packs_of(owner, anew=True)
        index, own = next(store.indexes(owner, packs, []), (EMPTY, (b"", 0)))
        keys: list[bytes] = []
        size = 0

        def rows() -> Iterator[tuple[bytes, bytes]]:
            nonlocal size
            for letter in sorted(MOVING):
                for key, value in rows_of(store.engine.scan, letter + owner, _ROWS_AT_ONCE):
                    keys.append(key)
                    size += len(value)
                    if store.packed(key, packs) != value:
                        yield key[:1] + key[1 + len(owner) :], value

        written: list[bytes] = []
        for pack, data in build(rows(), index, own):
            store.l4.put(store.pack_name(owner, pack), data)
            written.append(pack)
        return keys, size, written
