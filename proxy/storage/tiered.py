"""L2 with L3 and L4 below it: a store like any other, whose values may stand in objects.

Promises: a value is the same wherever it stands, so nothing that goes upstream depends on its tier; what is read from
an object is verified, and `Damaged` where it is not what was stored; a store of objects that does not answer is a
StorageError for who reads and for who would store something that may be there already, never an answer that there is
nothing. What leaves L2 is written below before it is dropped above (demotion.py); what is erased is erased below first.

    L3   a large value's row holds a stub: what its object is called. It stands under its owner's prefix.
    L4   the packs (packs.py) of a conversation that nobody uses. Its row under `ARCHIVE`, a joined set, names the
         newest ones; each knows those before it. A value that L2 has counts, so what is used again is copied back
         there, and the pack stays: next time nothing is written.

That a conversation has no packs, or which, is known for a while (`known_s`). So its rows leave L2 only a longer while
after its packs were told: who does not know of them still finds the rows. Until then no lock is needed between processes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from contextvars import ContextVar
from hashlib import blake2b
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from cachetools import TTLCache

from proxy.errors import ErasedMeanwhile, StorageError
from proxy.keys import ARCHIVE, LARGE, MOVING, OWNER_BYTES, rows_of
from proxy.memory.models import StorageTier
from proxy.storage.l1 import BYTES_PER_TOKEN, Cache
from proxy.storage.packs import HASH_BYTES, Frame, Index, Pack, index_end, read_frame, read_index
from proxy.storage.sqlite import Damaged, Damages, Key, Repaired, packed, unpacked

if TYPE_CHECKING:
    from proxy.config import TiersConfig
    from proxy.storage import Store
    from proxy.storage.objects import Objects

_STUB = b"\xc1\x00L3"  # no value of a kind that moves begins with that byte: msgpack never does, nor does JSON
_STUB_BYTES = len(_STUB) + HASH_BYTES
_KNOWN_ARCHIVES = 65_536
_FIRST_READ_BYTES = 65_536  # of a pack: its index as a rule, and all of a small one
_ROWS_AT_ONCE, _COMMIT_BYTES = 1000, 4 << 20
_CACHED = "pack"
OBJECT, PACK = ".value", ".pack"  # how the names of objects end

_T = TypeVar("_T")


class Reads:
    """What one request has read so far: the coldest tier, how many values of those below L2, how long that took, and
    why some could not be read."""

    def __init__(self) -> None:
        self.coldest = StorageTier.L1
        self.values: dict[StorageTier, int] = {}
        self.seconds: dict[StorageTier, float] = {}
        self.failed: str | None = None

    def count(self, tier: StorageTier, seconds: float = 0.0) -> None:
        if tier is not StorageTier.L2:
            self.values[tier] = self.values.get(tier, 0) + 1
            self.seconds[tier] = self.seconds.get(tier, 0.0) + seconds
        if tier > self.coldest:
            self.coldest = tier


READS: ContextVar[Reads | None] = ContextVar("reads", default=None)


class _Gone(Exception):
    """A pack that was named is not there."""


class Tiered:
    """Around an engine. `l3`, `l4`: None where there is none."""

    def __init__(self, engine: Store, l3: Objects | None, l4: Objects | None, tiers: TiersConfig) -> None:
        self.engine, self.l3, self.l4 = engine, l3, l4
        self.where, self.look, self.secret = engine.where, engine.look, engine.secret
        self.size_bytes, self.check, self.close = engine.size_bytes, engine.check, engine.close
        self._large_bytes = tiers.l3.min_bytes
        self._cache = Cache(tiers.l4.cache_bytes // BYTES_PER_TOKEN)  # of packs' parts
        self._known: TTLCache[bytes, tuple[bytes, ...]] = TTLCache(_KNOWN_ARCHIVES, tiers.demotion_s / 2)
        self._lock = threading.Lock()
        self._cold: set[bytes] = set()  # owners that were read from packs
        self.used_again: set[bytes] = set()  # of them those with a new turn: to be copied back
        self._damaged = Damages()

    # -- the engine's own

    @property
    def trouble(self) -> str | None:
        return self.engine.trouble

    @property
    def damaged(self) -> Mapping[str, int]:
        return Counter(self.engine.damaged) + self._damaged if self._damaged else self.engine.damaged

    @property
    def repaired(self) -> Repaired | None:
        return self.engine.repaired

    @property
    def generation(self) -> int:
        return self.engine.generation

    @property
    def losses(self) -> int:
        return self.engine.losses

    @property
    def suspends(self) -> bool:
        return self.engine.suspends or self.l3 is not None or self.l4 is not None

    def ahead(self, keys: Iterable[Key], alone: bool = False) -> None:
        """With what says where those are that L2 does not have, which is known for a while only: not as long as a
        request may last."""
        keys = list(keys)
        if self.l4 is None or not self.engine.suspends:
            self.engine.ahead(keys, alone)
            return
        from proxy.storage.suspend import scope

        owners = {self._owner(key) for key in keys if isinstance(key, bytes) and key[:1] in MOVING}
        self.engine.ahead([*keys, *(ARCHIVE + owner for owner in owners)], alone)
        for owner in owners:
            self.packs_of(owner, anew=True)
            if (request := scope()) is not None:
                request.found.pop(ARCHIVE + owner, None)

    @property
    def erased(self) -> int:
        return self.engine.erased

    async def scrub(self) -> None:
        await self.engine.scrub()

    def forget(self) -> None:
        """Drop everything that is only cached."""
        self._cache.clear()
        with self._lock:
            self._known.clear()

    # -- reading

    def get(self, key: Key) -> bytes | None:
        """As the engine's, from whichever tier has it; it may wait for objects."""
        value = self.engine.get(key)
        if value is None:
            if self.l4 is None or not isinstance(key, bytes) or key[:1] not in MOVING:
                return None
            if (value := self._timed(StorageTier.L4, self._from_pack, key)) is None:
                return None
        elif (reads := READS.get()) is not None:
            reads.count(StorageTier.L2)
        if is_stub(value) and isinstance(key, bytes):
            value = self._timed(StorageTier.L3, self._from_object, key, value)
        return value

    @staticmethod
    def _timed(tier: StorageTier, read: Callable[..., _T], *arguments: bytes) -> _T:
        began_s = time.perf_counter()
        value = read(*arguments)
        if value is not None and (reads := READS.get()) is not None:
            reads.count(tier, time.perf_counter() - began_s)
        return value

    def scan(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, bytes]]:
        """As the engine's, over all tiers. For a thread."""
        rows = self.engine.scan(prefix, after, limit)
        if self.l4 is not None:
            last = rows[-1][0] if len(rows) == limit else None
            known = {key for key, _ in rows}
            below = (key for key in self._archived_keys(prefix, after) if key not in known)
            keys = list(islice((key for key in below if last is None or key < last), limit))
            cold = ((key, value) for key in keys if (value := self._sound(key)) is not None)
            rows = list(islice(merge(rows, cold), limit))
        return [(key, value) for key, row in rows if (value := self._sound(key) if is_stub(row) else row) is not None]

    def _sound(self, key: bytes) -> bytes | None:
        """None also for what is damaged, as `scan` has it."""
        try:
            return self.get(key)
        except Damaged:
            return None

    def _from_object(self, key: bytes, stub: bytes) -> bytes:
        if self.l3 is None:
            raise self._failed(StorageError("A large value stands in L3, and tiers.l3.url is not set."))
        l3, name = self.l3, object_name(key, stub)
        try:
            data = _waited_for(lambda: l3.get(name))
        except StorageError as error:
            raise self._failed(error) from error
        if data is None:
            raise self._met_damage("object", f"{name} in {l3.url} is not there")
        try:
            value = unpacked(data)
        except Damaged:
            value = b""
        if _hash(value) != stub[len(_STUB) :]:
            raise self._met_damage("object", f"{name} in {l3.url} is not what was stored")
        return value

    def _from_pack(self, key: bytes) -> bytes | None:
        owner = self._owner(key)
        packs = self.packs_of(owner)
        if not packs:
            return None
        try:
            return _waited_for(lambda: self.read_packed(owner, packs, key))
        except _Gone:  # dropped meanwhile, or lost
            return _waited_for(lambda: self._read_again(key))
        except Damaged:
            raise
        except StorageError as error:
            raise self._failed(error) from error

    def _read_again(self, key: bytes) -> bytes | None:
        if (value := self.engine.get(key)) is not None:  # copied back before they went
            return value
        owner = self._owner(key)
        try:
            return self.read_packed(owner, self.packs_of(owner, anew=True), key)
        except _Gone as gone:
            raise self._met_damage("pack", f"{gone} is not there") from None

    def packs_of(self, owner: bytes, anew: bool = False) -> tuple[bytes, ...]:
        """The ids of a conversation's packs that are told, the newest first; () for one that L2 has."""
        with self._lock:
            found = None if anew else self._known.get(owner)
        if found is None:
            joined = self.engine.get(ARCHIVE + owner) or b""
            size = len(owner) + HASH_BYTES
            found = tuple(joined[at + len(owner) : at + size] for at in range(0, len(joined), size))[::-1]
            with self._lock:
                self._known[owner] = found
        return found

    def read_packed(self, owner: bytes, packs: Sequence[bytes], key: bytes) -> bytes | None:
        """From a conversation's packs, the newest that has it. Raises Damaged, StorageError, and _Gone."""
        rest, lost = key[:1] + key[1 + len(owner) :], list[Exception]()
        for index, own in self.indexes(owner, packs, lost):
            if (place := index.values.get(rest)) is not None:
                number, at, size = place
                frame = index.frames[number]
                try:
                    values = self._frame(owner, index.pack_of(frame, own), frame)
                except (Damaged, _Gone) as error:
                    lost.append(error)
                    continue
                if len(self._cold) >= _KNOWN_ARCHIVES:
                    self._cold.clear()
                self._cold.add(owner)
                return values[at : at + size]
        if lost:
            raise lost[0]
        return None

    def indexes(self, owner: bytes, packs: Sequence[bytes], lost: list[Exception]) -> Iterator[tuple[Index, Pack]]:
        """Of the packs, the newest first, but for those that one before names; `lost`: why some cannot be read."""
        covered: set[bytes] = set()
        for pack in packs:
            if pack not in covered:
                try:
                    index, own = self._index(owner, pack)
                except (Damaged, _Gone) as error:
                    lost.append(error)
                    continue
                covered.update(other for other, _ in index.packs)
                yield index, own

    def _index(self, owner: bytes, pack: bytes) -> tuple[Index, Pack]:
        found: tuple[Index, Pack] | None = self._cache.get(_CACHED, pack)
        if found is None:
            data = self._read(owner, pack, 0, _FIRST_READ_BYTES)
            try:
                end = index_end(data)
                if end > len(data):
                    data += self._read(owner, pack, len(data), end)
                index = read_index(data, pack)
            except StorageError as error:
                raise self._met_damage("pack", f"{self.pack_name(owner, pack)}: {error}") from error
            found = index, (pack, end)
            self._cache.put(_CACHED, pack, found, 64 * len(index.values) + end)
            for frame in index.frames:  # of a small pack, all is here
                part = data[end + frame.at : end + frame.at + frame.size]
                if not frame.pack and len(part) == frame.size:
                    self._keep(frame, part)
        return found

    def _frame(self, owner: bytes, pack: Pack, frame: Frame) -> bytes:
        values: bytes | None = self._cache.get(_CACHED, frame.hash)
        if values is None:
            start = pack[1] + frame.at
            try:
                values = self._keep(frame, self._read(owner, pack[0], start, start + frame.size))
            except StorageError as error:
                if isinstance(error, _Unread):
                    raise
                raise self._met_damage("pack", f"{self.pack_name(owner, pack[0])}: {error}") from error
        return values

    def _keep(self, frame: Frame, data: bytes) -> bytes:
        values = read_frame(data, frame)
        self._cache.put(_CACHED, frame.hash, values, len(values))
        return values

    def _read(self, owner: bytes, pack: bytes, start: int, end: int) -> bytes:
        assert self.l4 is not None
        try:
            data = self.l4.get(name := self.pack_name(owner, pack), start, end)
        except StorageError as error:
            raise _Unread(str(error)) from error
        if data is None:
            raise _Gone(f"{name} in {self.l4.url}")
        return data

    def pack_name(self, owner: bytes, pack: bytes) -> str:
        from proxy.storage.objects import owner_path

        return f"{owner_path(owner)}/{pack.hex()}{PACK}"

    def _owner(self, key: bytes) -> bytes:
        return key[1 : 1 + OWNER_BYTES]

    def _failed(self, error: StorageError) -> StorageError:
        if (reads := READS.get()) is not None:
            reads.failed = str(error)
        return error

    def _met_damage(self, kind: str, what: str) -> Damaged:
        return self._damaged.met(kind, f"A {kind} is damaged: {what}; llm-pager check --storage finds all damage.")

    # -- all that is archived, in the order of keys

    def _archived_keys(self, prefix: bytes, after: bytes) -> Iterator[bytes]:
        for letter in sorted(MOVING) if not prefix else [prefix[:1]]:
            if letter in MOVING and letter >= after[:1]:
                start = after[1 : 1 + OWNER_BYTES] if after[:1] == letter else b""
                for owner in self.archived(prefix[1 : 1 + OWNER_BYTES], start):
                    keys = {letter + owner + rest[1:] for rest in self._packed_keys(owner) if rest[:1] == letter}
                    yield from sorted(key for key in keys if key > after and key.startswith(prefix))

    def _packed_keys(self, owner: bytes) -> Iterator[bytes]:
        for index, _ in self.indexes(owner, self.packs_of(owner, anew=True), []):
            yield from index.values

    def archived(self, prefix: bytes, start: bytes = b"") -> Iterator[bytes]:
        """The owners that have packs, from `start` on, in order. For a thread."""
        after = ARCHIVE + start
        if start.startswith(prefix) and self.engine.get(after) is not None:
            yield start
        yield from (key[1:] for key, _ in rows_of(self.engine.scan, ARCHIVE + prefix, _ROWS_AT_ONCE, after))

    # -- writing

    async def commit(
        self, puts: Sequence[tuple[Key, bytes]], joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (), secret: bytes | None = None, erased: int | None = None,
        drops: Sequence[bytes] = (), leaves: Sequence[tuple[bytes, bytes]] = (), erases: bool = False,
    ) -> frozenset[bytes]:  # fmt: skip
        """As the engine's. What is added and stands in a pack is there already. StorageError, too, where it is not
        known whether it does, and for a request that could not read something: it goes on from what it did not see."""
        present: frozenset[bytes] = frozenset()
        if adds and (reads := READS.get()) is not None and reads.failed is not None:
            raise StorageError(reads.failed)
        if self.l4 is not None and (owners := {self._owner(key) for key, _ in adds if key[:1] in MOVING}):
            present = await self._present([key for key, _ in adds], owners)
            adds = [(key, value) for key, value in adds if key not in present]
        replaced = {key for key, _ in puts if isinstance(key, bytes)}.intersection(drops)
        large = await asyncio.to_thread(self.large_at, replaced) if replaced else []
        if drops and (self.l3 is not None or self.l4 is not None):
            await self._drop_below(drops, replaced)
        if self.l3 is not None:
            puts = [*puts, *self._notes((*puts, *adds))]
        stored = await self.engine.commit(puts, joins, adds, secret, erased, drops, leaves, erases)
        await self.delete_large(large)  # not before: a stub without its object is damage
        if self.l4 is not None:
            self.used_again.update(self._cold.intersection(owners))
            self._cold.difference_update(owners)
        return stored | present

    def _notes(self, values: Iterable[tuple[Key, bytes]]) -> list[tuple[bytes, bytes]]:
        """By which the large ones are found, to be moved."""
        end = 1 + OWNER_BYTES
        return [
            (LARGE + key[1:end] + key[:1] + key[end:], b"")
            for key, value in values
            if len(value) >= self._large_bytes and isinstance(key, bytes) and key[:1] in MOVING
        ]

    async def _present(self, keys: Sequence[bytes], owners: set[bytes]) -> frozenset[bytes]:
        with self._lock:
            known = {owner: self._known.get(owner) for owner in owners}
        if not any(packs is None or packs for packs in known.values()):
            return frozenset()
        return await asyncio.to_thread(self._packed_among, keys)

    def _packed_among(self, keys: Sequence[bytes]) -> frozenset[bytes]:
        """Those that stand in a pack, undamaged."""
        present: set[bytes] = set()
        for key in keys:
            if key[:1] in MOVING and (packs := self.packs_of(owner := self._owner(key))):
                try:
                    if self.read_packed(owner, packs, key) is not None:
                        present.add(key)
                except (Damaged, _Gone):
                    pass  # it is stored again
        return frozenset(present)

    async def swap(self, rows: Sequence[tuple[bytes, bytes, bytes]]) -> frozenset[bytes]:
        """As the engine's, in all tiers: what stands below it comes up, and leaves again with the next demotion."""
        done = await self.engine.swap(rows)
        if self.l3 is None and self.l4 is None:
            return done
        left = [row for row in rows if row[0] not in done]
        owners = await asyncio.to_thread(lambda: {self._owner(key) for key, *_ in left if self.engine.get(key) is None})
        for owner in owners:
            await self.bring_back(owner, drop=True)
        for key, old, new in left:
            stub = await asyncio.to_thread(self.engine.get, key)
            if stub is not None and is_stub(stub) and await asyncio.to_thread(self._sound, key) == old:
                if await self.engine.swap([(key, stub, new)]):
                    done |= {key}
                    await self.engine.commit(self._notes([(key, new)]))
                    if self.l3 is not None:
                        await asyncio.to_thread(self.l3.delete, [object_name(key, stub)])
            elif stub == old:
                done |= await self.engine.swap([(key, old, new)])
        return done

    def opened(self, key: bytes, value: bytes) -> bytes | None:
        """A value that was read without `get`: a store of sealed ones opens it here."""
        return value

    async def drop_key(self, owner: bytes) -> None:
        """Of a tenant or a credential, before its erasure: a store of sealed values drops it."""

    # -- erasing

    def objects_of(self, owner: bytes) -> list[str]:
        """The names of all objects of a conversation, a tenant or a credential. For a thread."""
        from proxy.storage.objects import owner_path

        below = [store for store in (self.l3, self.l4) if store is not None]
        return [name for store in below for name, _ in store.names(owner_path(owner))]

    def large_at(self, keys: Iterable[bytes]) -> list[str]:
        """The names of the objects in which the values of these keys stand. For a thread."""
        found = []
        for key in keys if self.l3 is not None else ():
            with suppress(Damaged):
                stub = self.engine.get(key)
                if stub is None and self.l4 is not None:
                    stub = self.packed(key)
                if stub is not None and is_stub(stub):
                    found.append(object_name(key, stub))
        return found

    async def delete_large(self, names: Sequence[str]) -> None:
        """What `large_at` named, and nothing names any more."""
        if self.l3 is not None and names:
            await asyncio.to_thread(self.l3.delete, names)

    async def _drop_below(self, prefixes: Sequence[bytes], replaced: Set[bytes]) -> None:
        """What these begin, in objects, but for the large values that are replaced. A conversation that loses a part is
        copied back first, and then its packs go: nothing of it can stay in them."""
        folders = {kind: [p[1:] for p in prefixes if p[:1] == kind] for kind in (LARGE, ARCHIVE)}
        for kind, store in ((LARGE, self.l3), (ARCHIVE, self.l4)):
            for owner in folders[kind]:
                if store is not None:
                    await store.drop(owner)
        for prefix in prefixes:
            owner = prefix[1 : 1 + OWNER_BYTES]
            if prefix[:1] not in MOVING:
                continue
            if self.l4 is not None and not any(map(owner.startswith, folders[ARCHIVE])):
                for found in await asyncio.to_thread(list, self.archived(owner)):
                    await self.bring_back(found, drop=True)
                await self.l4.drop(owner)  # what was written and never told
            if not any(map(owner.startswith, folders[LARGE])):
                await asyncio.to_thread(self._drop_objects, prefix, replaced)
        self.forget()

    def _drop_objects(self, prefix: bytes, replaced: Set[bytes]) -> None:
        after = b""
        while self.l3 is not None and (rows := self.engine.scan(prefix, after, _ROWS_AT_ONCE)):
            self.l3.delete([object_name(key, value) for key, value in rows if is_stub(value) and key not in replaced])
            after = rows[-1][0]

    async def bring_back(self, owner: bytes, drop: bool = False) -> int:
        """Copy what stands in a conversation's packs to L2, but for what is there; how many values. `drop`: and then
        the packs go."""
        count = 0
        keys: list[bytes] | None = None
        while keys is None or keys:
            erased = self.engine.erased
            if keys is None:
                keys = await asyncio.to_thread(lambda: list(set(self._packed_keys(owner))))
            rows = await asyncio.to_thread(self._unpacked, owner, keys)
            try:
                count += len(rows) - len(await self.engine.commit((), (), rows, erased=erased))
            except ErasedMeanwhile:  # perhaps of this
                await asyncio.to_thread(self.engine.look)
                self.forget()
                keys = None
        if drop and self.l4 is not None:
            await self.engine.commit((), drops=[ARCHIVE + owner])
            await self.l4.drop(owner)
            self.forget()
        return count

    def _unpacked(self, owner: bytes, keys: list[bytes]) -> list[tuple[bytes, bytes]]:
        """Rows of the last of the keys, which are taken, as many as one commit should have."""
        rows: list[tuple[bytes, bytes]] = []
        size = 0
        while keys and size < _COMMIT_BYTES and len(rows) < _ROWS_AT_ONCE:
            rest = keys.pop()
            if (value := self.packed(key := rest[:1] + owner + rest[1:])) is not None:
                rows.append((key, value))
                size += len(value)
        return rows

    def packed(self, key: bytes, packs: Sequence[bytes] | None = None) -> bytes | None:
        """What stands in its conversation's packs, None also where they are damaged."""
        try:
            owner = self._owner(key)
            return self.read_packed(owner, self.packs_of(owner) if packs is None else packs, key)
        except (Damaged, _Gone):
            return None


def _waited_for(work: Callable[[], _T]) -> _T:
    """What `work` returns; an event loop that it is asked on goes on meanwhile."""
    from proxy.storage.suspend import can_wait, wait

    return wait(asyncio.to_thread(work)) if can_wait() else work()


class _Unread(StorageError):
    """A store of objects did not answer."""


def is_stub(value: bytes) -> bool:
    return len(value) == _STUB_BYTES and value.startswith(_STUB)


def object_of(value: bytes) -> tuple[bytes, bytes]:
    """(stub, object) of a large value."""
    return _STUB + _hash(value), packed(value)


def object_name(key: bytes, stub: bytes) -> str:
    """Where the object of a key's stub stands: each key's has its own, so that it can be deleted."""
    from proxy.storage.objects import owner_path

    name = blake2b(key, digest_size=8).hexdigest()
    return f"{owner_path(key[1 : 1 + OWNER_BYTES])}/{stub[len(_STUB) :].hex()}.{name}{OBJECT}"


def named_pack(name: str) -> tuple[bytes, bytes] | None:
    """The owner and the id of a pack by its name; None for another object's."""
    folder, _, file = name.rpartition("/")
    try:
        return (bytes.fromhex(folder.replace("/", "")), bytes.fromhex(file.removesuffix(PACK))) if file.endswith(PACK) else None
    except ValueError:
        return None


def is_whole(name: str, data: bytes) -> bool:
    """Whether an object holds what its name says."""
    try:
        return name.rpartition("/")[2].startswith(f"{_hash(unpacked(data)).hex()}.")
    except Damaged:
        return False


def _hash(value: bytes) -> bytes:
    return blake2b(value, digest_size=HASH_BYTES).digest()
