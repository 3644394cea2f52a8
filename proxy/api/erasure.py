"""Erasure and retention, performed: what conversation/erasure.py says is to go, goes.

Promises: an erasure is stored before anything is deleted, goes on in steps that hold up nobody, and is finished by whoever
finds it, also after a kill at any point; doing it twice is doing it once. Once its receipt is there no value, file or
object of the store holds the text, and no turn that began before it can bring it back: such a turn is answered and not
stored (`ErasedMeanwhile`), unless the erasure was of another tenant. Each process drops its caches within about a second
(`watch`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from proxy import keys
from proxy.conversation.erasure import (
    Actor,
    Erasure,
    What,
    decode_erasure,
    digests,
    encode_erasure,
    erasing_key,
    number_key,
    pair_of,
    prefixes,
    read_records,
    receipt_key,
    receipts,
    state_prefixes,
    struck,
)
from proxy.conversation.records import (
    LastUse,
    Record,
    block_key,
    conversation_key,
    decode_record,
    encode_record,
    load_path,
    owner_of,
    record_key,
)
from proxy.conversation.tree import ID_BYTES, Identity
from proxy.errors import StorageError
from proxy.memory.ids import parse_page_id
from proxy.storage import Store
from proxy.storage.lease import Lease
from proxy.storage.sqlite import Damaged
from proxy.storage.tiered import Tiered

log = logging.getLogger(__name__)

LISTED = 1000  # receipts that are told at once
_VALUES = 1000  # of one step
_RECORDS = 16  # that are read at once: each may hold media
_LOOK_S = 0.5  # between two looks for erasures of other processes
_OPEN_S = 60  # after which an erasure that another process began is taken to be nobody's
_RETENTION_S = 3600  # between two looks for conversations that are too old, of all processes
_DAY_S = 86_400


class Erasures:
    """One per process. `objects_of`: the names of what is stored of an owner outside L2; what is dropped there is dropped
    below, too. `reads`: is told, from a thread, how many values of an erasure were read so far, which takes the longest."""

    def __init__(
        self, store: Tiered, objects_of: Callable[[bytes], list[str]] = lambda _: [], reads: Callable[[int], None] = lambda _: None
    ) -> None:
        self._store = store
        self._objects_of = objects_of
        self._reads = reads
        self.finished: Counter[str] = Counter()  # by who asked
        self._running: set[bytes] = set()
        self._one = asyncio.Lock()  # at a time: each reads much
        self._scrubbing = asyncio.Lock()
        self._next_scrub: asyncio.Future[None] | None = None  # that has not begun

    async def erase(self, what: What, by: Actor, owners: Iterable[bytes], content: bytes = b"") -> Erasure:
        """Erase all of the owners (`keys.owner`), or what says `content` in them; the receipt. Raises StorageError: what
        has begun is finished later then."""
        (done,) = await self._begin([Erasure(secrets.token_bytes(16), what, by, int(time.time()), sorted(owners), content)])
        return done

    async def finish_open(self, older_s: float = 0.0) -> None:
        """Finish what was begun and not ended, so many seconds ago. Raises StorageError."""
        found = [decode_erasure(value) for _, value in await asyncio.to_thread(self._store.scan, keys.ERASING)]
        left = [one for one in found if one.id not in self._running and time.time() - one.began_s >= older_s]
        if left:
            log.warning("%d erasures that were begun and not ended are finished.", len(left))
            await self._finish(left)

    async def expire(self, before_s: float) -> None:
        """Erase the conversations that nobody has used since then (Unix time). Raises StorageError."""
        after = b""
        while rows := await asyncio.to_thread(self._store.scan, keys.CONVERSATION, after, _VALUES):
            after = rows[-1][0]
            due: dict[bytes, set[bytes]] = {}
            for key, value in rows:
                if LastUse.decode(value).used_s < before_s:
                    linked = await asyncio.to_thread(self._linked, [keys.owner(key)])
                    if all(self._used_s(owner) < before_s for owner in linked):
                        due.setdefault(key[1 : 1 + keys.TENANT_BYTES], set()).update(linked)
            began_s = int(time.time())
            await self._begin([
                Erasure(secrets.token_bytes(16), "conversation", "retention", began_s, sorted(owners))
                for owners in due.values()
            ])  # fmt: skip

    def has(self, owner: bytes) -> bool:
        """Something is stored of it. Blocks; StorageError."""
        return any(self._store.scan(prefix, limit=1) for prefix in prefixes(owner))

    def content_of(self, owner: bytes, page: str) -> bytes | None:
        """What the message of a page says, on the path of the conversation's last answer; None: there is no such message.
        Blocks; StorageError."""
        last, place = self._store.get(conversation_key(owner)), parse_page_id(page)
        head = self._record(LastUse.decode(last).head) if last is not None else None
        if head is None or place is None or place[0] >= head.end:
            return None
        blocks, identity = lambda whose, ref: self._store.get(block_key(whose, ref)), Identity(self._store.secret())
        return load_path(head, self._record, blocks, identity)[place[0]].content

    def conversations(self, owner: bytes) -> Iterator[tuple[bytes, int]]:
        """Those of a tenant or a credential, and when each was last used (Unix time). Blocks; StorageError."""
        for key, value in self._rows(keys.CONVERSATION + owner):
            yield keys.owner(key), LastUse.decode(value).used_s

    def receipts(self, tenant: bytes) -> list[Erasure]:
        """What was erased of a tenant, the newest `LISTED`, and what is under way. Blocks; StorageError."""
        under_way = map(decode_erasure, (value for _, value in self._rows(keys.ERASING)))
        done = deque((value for prefix in receipts(tenant)[::-1] for _, value in self._rows(prefix)), LISTED)
        return [*map(decode_erasure, done), *(erasure for erasure in under_way if erasure.concerns(tenant))]

    async def forget_receipts(self, tenant: bytes) -> None:
        await self._store.commit([], drops=receipts(tenant)[:1])

    # -- the steps

    async def _begin(self, erasures: list[Erasure]) -> list[Erasure]:
        self._running.update(one.id for one in erasures)
        try:
            await self._store.commit([(erasing_key(one), encode_erasure(one)) for one in erasures])
            try:
                return await self._finish(erasures)
            except StorageError as error:
                raise StorageError(f"{error} What is to be erased is known, and goes as soon as that is over.") from error
        finally:
            self._running.difference_update(one.id for one in erasures)

    async def _finish(self, erasures: list[Erasure]) -> list[Erasure]:
        async with self._one:
            done = [await self._delete(erasure) for erasure in erasures]
        if done:
            await self._scrub()
        for erasure in done:
            await self._end(erasure)
            self.finished[erasure.by] += 1
        return done

    async def _scrub(self) -> None:
        """One serves all who ask before it begins."""

        async def scrub() -> None:
            async with self._scrubbing:
                self._next_scrub = None
                await self._store.scrub()

        if self._next_scrub is None:
            self._next_scrub = asyncio.ensure_future(scrub())
        await asyncio.shield(self._next_scrub)

    async def _delete(self, erasure: Erasure) -> Erasure:
        gone: set[bytes] = set()
        while left := set(await asyncio.to_thread(self._linked, erasure.owners)) - gone:
            fresh = sorted(left - set(erasure.read))
            if fresh:
                pairs = await asyncio.to_thread(self._read, erasure, fresh)
                for at in range(0, len(pairs), _VALUES):
                    await self._store.commit([], leaves=pairs[at : at + _VALUES])
                erasure = await asyncio.to_thread(self._newest, erasure)
                await self._store.commit([(erasing_key(erasure), encode_erasure(erasure))])
            await (self._strike(erasure, left) if erasure.content else self._drop(left))
            gone |= left
        erasure.owners = sorted(gone)
        return erasure

    async def _end(self, erasure: Erasure) -> None:
        """Its receipt takes its place, unless another process was first."""
        if await asyncio.to_thread(self._store.get, erasing_key(erasure)) is None:
            return
        drops, leaves = list[bytes](), list[tuple[bytes, bytes]]()
        if not erasure.content:  # what turns that were not done by then have left
            drops, leaves = await asyncio.to_thread(self._named, erasure.owners)
            drops += [keys.LINK + owner for owner in erasure.owners]
        await asyncio.to_thread(self._store.look)
        erasure.ended_s = int(time.time())
        receipt = receipt_key(erasure, self._store.erased), encode_erasure(erasure)
        await self._store.commit([receipt], drops=[*drops, erasing_key(erasure)], leaves=leaves)
        log.info("Erased: %s, by %s, %d messages, receipt %s.", erasure.what, erasure.by, len(erasure.messages), erasure.id.hex())

    def _newest(self, erasure: Erasure) -> Erasure:
        """It, or what another process has read of it meanwhile, before it began to delete."""
        stored = self._store.get(erasing_key(erasure))
        other = decode_erasure(stored) if stored is not None else erasure
        return other if set(other.read) >= set(erasure.read) else erasure

    def _read(self, erasure: Erasure, owners: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        """Enter what is there of them; the sets in which their answers are found by their words, and whose they are."""
        messages, pairs = dict.fromkeys(erasure.messages), dict[tuple[bytes, bytes], None]()
        identity, get = Identity(self._store.secret()), self._record
        for owner in owners:
            kept = [keys.RECORD + owner, *state_prefixes(owner)] if erasure.content else prefixes(owner)
            for prefix in kept:
                kind = keys.KINDS[prefix[:1]]
                for row in keys.rows_of(self._store.scan, prefix, _RECORDS if prefix.startswith(keys.RECORD) else _VALUES):
                    erasure.counts[kind] = count = erasure.counts.get(kind, 0) + 1
                    if not count % _RECORDS:
                        self._reads(sum(erasure.counts.values()))
                    for record in read_records([row]) if prefix.startswith(keys.RECORD) else ():
                        messages.update(dict.fromkeys(digests(record, erasure.content)))
                        if len(owner) == keys.OWNER_BYTES and not erasure.content:
                            pair = pair_of(record, get, identity)
                            pairs.update({(pair, owner): None} if pair is not None else {})
            if not erasure.content:
                erasure.objects += self._objects_of(owner)
            self._reads(sum(erasure.counts.values()))
        erasure.messages = list(messages)
        erasure.read = [*erasure.read, *owners]
        return list(pairs)

    async def _drop(self, owners: Iterable[bytes]) -> None:
        """All of the owners but their links: a turn that began before it and added one is found by it."""
        await self._store.commit([], drops=[kind + owner for owner in owners for kind in (keys.ARCHIVE, keys.LARGE)])
        whole = [prefix for owner in owners for prefix in prefixes(owner)]
        for prefix in whole:
            while len(some := await asyncio.to_thread(self._keys, prefix)) == _VALUES:
                await self._store.commit([], drops=some)
        for owner in owners:
            if len(owner) < keys.OWNER_BYTES:
                await self._store.drop_key(owner)  # what is left, and every copy, is read by nobody any more
        drops, leaves = await asyncio.to_thread(self._named, owners)
        await self._store.commit([], drops=[*whole, *drops], leaves=leaves, erases=True)

    async def _strike(self, erasure: Erasure, owners: Iterable[bytes]) -> None:
        """A message, and all that was made with it, until no turn that began before has left some of it."""
        content, states = erasure.content, [prefix for owner in owners for prefix in state_prefixes(owner)]
        await self._store.delete_large(erasure.objects)  # a process that died had left them
        clean = False
        while not clean:
            clean = True
            for owner in owners:
                after = b""
                while rows := await asyncio.to_thread(self._store.scan, keys.RECORD + owner, after, _RECORDS):
                    after = rows[-1][0]
                    found = [(record, struck(record, content, self._record)) for record in read_records(rows)]
                    if puts := [(record_key(new.id), encode_record(new)) for old, new in found if new != old]:
                        clean, struck_keys = False, [key for key, _ in puts]
                        await self._will_delete(erasure, await asyncio.to_thread(self._store.large_at, struck_keys))
                        await self._store.commit(puts, drops=struck_keys)  # wherever it stands
            await self._store.commit([], drops=states, erases=True)

    async def _will_delete(self, erasure: Erasure, objects: list[str]) -> None:
        """Tell of objects before nothing names them: who goes on after a kill deletes them."""
        if objects:
            stored = await asyncio.to_thread(self._store.get, erasing_key(erasure))
            known = decode_erasure(stored).objects if stored is not None else []
            erasure.objects = [*dict.fromkeys([*known, *erasure.objects, *objects])]
            await self._store.commit([(erasing_key(erasure), encode_erasure(erasure))])

    # -- reading, in a thread

    def _rows(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return keys.rows_of(self._store.scan, prefix)

    def _keys(self, prefix: bytes) -> list[bytes]:
        return [key for key, _ in islice(keys.rows_of(self._store.scan, prefix, _RECORDS), _VALUES)]

    def _record(self, node_id: bytes) -> Record | None:
        with suppress(Damaged, ValueError, LookupError):  # what cannot be read is as if it were not there
            data = self._store.get(record_key(node_id))
            return decode_record(data) if data is not None else None
        return None

    def _used_s(self, owner: bytes) -> int:
        data = self._store.get(conversation_key(owner))
        return LastUse.decode(data).used_s if data is not None else 0

    def _linked(self, owners: Iterable[bytes]) -> list[bytes]:
        """The owners, and the conversations that are one with them."""
        found = dict.fromkeys(owners)
        new = [owner for owner in found if len(owner) == keys.OWNER_BYTES]
        while new:
            prefix = keys.LINK + new.pop()
            others = [key[len(prefix) :] for key, _ in self._rows(prefix)]
            new += [other for other in others if other not in found]
            found.update(dict.fromkeys(others))
        return list(found)

    def _named(self, owners: Iterable[bytes]) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
        """The sessions whose head is theirs, and the labels that have answers of theirs, with whose these are."""
        known = {owner for owner in owners if len(owner) == keys.OWNER_BYTES}
        heads: list[bytes] = []
        labels: list[tuple[bytes, bytes]] = []
        for tenant in {owner[: keys.TENANT_BYTES] for owner in known}:
            heads += [key for key, value in self._rows(keys.SESSION + tenant) if owner_of(value) in known]
            for key, value in self._rows(keys.LABEL + tenant):
                named = {owner_of(value[at : at + ID_BYTES]) for at in range(0, len(value), ID_BYTES)}
                labels += [(key, owner) for owner in named & known]
        return heads, labels


def erased_since(store: Store, tenant: bytes, number: int) -> bool:
    """Something of the tenant was, or is being, erased since there were so many erasures. Blocks; StorageError."""
    if any(decode_erasure(value).concerns(tenant) for _, value in store.scan(keys.ERASING)):
        return True
    return any(store.scan(prefix, number_key(prefix, number), 1) for prefix in receipts(tenant))


async def watch(erasures: Erasures, store: Store, renew: Callable[[], None], retention_days: float | None) -> None:
    """Until it is cancelled: drop this process's caches when something was erased, finish what others left, and erase what
    is too old. `renew` looks for the first."""
    looked_s, older_s, told, expired = float("-inf"), 0.0, "", 0
    lease = Lease(store, keys.LEASE + b"retention", _RETENTION_S)
    while True:
        try:
            await asyncio.to_thread(store.look)
            renew()
            if time.monotonic() - looked_s > _OPEN_S:
                await erasures.finish_open(older_s)
                looked_s, older_s = time.monotonic(), _OPEN_S
                hour = int(time.time() // _RETENTION_S)
                if retention_days is not None and await lease.held() and hour != expired:
                    await erasures.expire(time.time() - retention_days * _DAY_S)
                    expired = hour
            told = ""
        except StorageError as error:
            if told != (told := str(error)):
                log.warning("Erasures wait: %s", error)
        except Exception:
            log.exception("Erasures wait, for a reason of our own")
            await asyncio.sleep(_OPEN_S)
        await asyncio.sleep(_LOOK_S)

