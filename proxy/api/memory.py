"""The state behind the request path: the tiers and the caches over them, as the turns need them.

Promises: what is stored is immutable and found by content; everything kept in RAM here is a cache
(invariant 9); a turn is durable before `append` returns (invariant 5).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ParamSpec

import msgspec

from proxy import keys
from proxy.api.erasure import erased_since
from proxy.api.pool import Pool, empty
from proxy.config import Config
from proxy.conversation.body import HistoryCache
from proxy.conversation.calibration import Calibration
from proxy.conversation.derived import Derived
from proxy.conversation.effects import Append, Search
from proxy.conversation.identify import Library
from proxy.conversation.pages import PathPages, forget_lines
from proxy.conversation.pins import pins_key
from proxy.conversation.records import (
    LastUse,
    Record,
    SessionNames,
    State,
    Stored,
    block_key,
    blocks_of,
    conversation_key,
    decode_record,
    load_path,
    owner_of,
    record_key,
    replayed,
    restore_derived,
    restore_state,
    restore_table,
    tip_key,
)
from proxy.conversation.tree import Identity, KeyScope, Node, NodeId, TenantKey
from proxy.conversation.window import Window
from proxy.errors import ApiError, ErasedMeanwhile
from proxy.memory.ids import Hit
from proxy.memory.table import PageTable
from proxy.search.paths import PathIndexes, make_encoder, piece_version
from proxy.storage import open_store, start_demotion
from proxy.storage.l1 import BYTES_PER_TOKEN, Cache
from proxy.storage.l2 import RETRY_S, Damaged, StorageError
from proxy.storage.tiered import READS

if TYPE_CHECKING:  # an extra
    from proxy.storage.demotion import Demotion

LONG_MESSAGES = 4096  # of a path: with more, a search in it and what is made of its hits leave the event loop, too
_OFF_LOOP_MESSAGES = 64  # indexing or reading more than this leaves the event loop
_STORED_AT_ONCE = 256  # records of a long history; the last ones, twice as many, are the turn's, with all states
_STORED_SOONER = (keys.BLOCK, keys.CONVERSATION)  # with the first of them: they refer to the one, the other lists them
_KEPT_RECORDS = 64  # of a turn's that are in RAM afterwards, the newest: a first sight's would drive out everybody else's
_AT_ONCE_BYTES = 65_536  # so does indexing more than this
_NEWEST, _ANSWERS = 8, 2  # messages among which the newest answers are looked for, and how many
_LOOK_S = 0.5  # between two looks for what other processes erased
_ENCODE_AT_ONCE = 8  # so does encoding more than this
# or ranking the vectors of more; those of upstream's are read from the store while others wait for the index
_RANK_AT_ONCE = {"none": LONG_MESSAGES, "static": 2048, "upstream": 0}
_TABLE_ENTRY_BYTES = 300
_TABLE_SHARE = 4  # of L1, 1/4 at most is the cold part of one table: its window has room beside it
_NODE_BYTES = 200
_DERIVED_BYTES = 8  # of a page that other states of the conversation refer to as well

_RAW = attrgetter("raw")

log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def as_api_error(error: StorageError | LookupError) -> ApiError:
    """What a caller is told who cannot be served without what is stored: nothing that would pass by itself was done."""
    if isinstance(error, LookupError) and (reads := READS.get()) is not None and reads.failed is not None:
        error = StorageError(reads.failed)  # it is there, and cannot be read now
    if isinstance(error, Damaged | LookupError):
        message = f"{str(error).rstrip('.')}. The storage is damaged: send the whole history, or begin another session."
        return ApiError(500, message, "api_error", "storage_damaged")
    wait = {"retry-after": f"{RETRY_S:.0f}"}
    return ApiError(503, str(error), "api_error", "storage_unavailable", headers=wait)


class Memory:
    """One per process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._demotion: Demotion | None = None
        self.store = open_store(config)
        self.store.look()
        self._looked_s = 0.0
        self._generation = self.store.generation
        self.identity = Identity(self.store.secret(), self.store.erased)
        self.cache = Cache(config.tiers.l1.tokens)
        self._table_entries = config.tiers.l1.tokens * BYTES_PER_TOKEN // (_TABLE_SHARE * _TABLE_ENTRY_BYTES)
        self.pool = Pool(config.pool.threads, config.pool.queue_jobs)
        self.histories = HistoryCache(config.server.history_cache_bytes)
        encoder = make_encoder(config.search.embeddings)
        self.indexes = PathIndexes(config.search.index_pages, encoder, self._piece)
        self._pieces = piece_version(config.pages.max_tokens)
        self._at_once = _OFF_LOOP_MESSAGES if encoder is None else _ENCODE_AT_ONCE
        self._ranked_at_once = _RANK_AT_ONCE[config.search.embeddings]
        self.library = Library(self.identity, self.get_record, self.load_path, self.get, self.store.get)

    def start(self) -> None:
        """Begin what is done beside the requests, on this event loop."""
        self._demotion = start_demotion(self.store, self._config)

    async def close(self) -> None:
        self.pool.close()
        if self._demotion is not None:
            await self._demotion.close()
        await self.store.close()

    def forget(self) -> None:
        """Drop everything that is only cached, as invariant 9 is proved."""
        self.cache.clear()
        self.store.forget()
        self.histories.clear()
        self.indexes.clear()
        forget_lines()

    def renew(self) -> None:
        """Forget what is known of a store that is not there any more, or of which something was erased. (A turn that
        began before is not stored.)"""
        if (now_s := time.monotonic()) - self._looked_s > _LOOK_S:
            self._looked_s = now_s
            self.store.look()
        if self._generation == self.store.generation and self.identity.erased == self.store.erased:
            return
        self._generation, secret, erased = self.store.generation, self.store.secret(), self.store.erased
        self.forget()
        if self.identity.secret != secret or self.identity.erased != erased:
            self.identity = Identity(secret, erased)
            self.library = Library(self.identity, self.get_record, self.load_path, self.get, self.store.get)

    # -- a store that may be waited for

    def requests(self, function: Callable[_P, Awaitable[None]]) -> Callable[_P, Awaitable[None]]:
        """What serves requests, each call of it one: below it, what is stored may be read by plain calls."""
        if not self.store.suspends:
            return function
        from proxy.storage.suspend import suspending

        return suspending(function)

    def beside(self, work: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
        """The same for a task beside the requests."""
        if not self.store.suspends:
            return work
        from proxy.storage.suspend import suspendable

        return suspendable(work)

    def ahead(self, nodes: Sequence[Node], tenant: TenantKey, names: SessionNames, facts: bytes) -> None:
        """Ask at once for what placing a request is going to read (identify.py), and for what is known of its model."""
        wanted, newest = [facts], range(len(nodes) - 1, max(-1, len(nodes) - 1 - _NEWEST), -1)
        answers = [at for at in newest if nodes[at].role == "assistant"][:_ANSWERS]
        if answers and self.cache.get("record", nodes[answers[0]].id) is None:
            first = next((at for at in range(min(_NEWEST, len(nodes))) if nodes[at].role == "assistant"), answers[0])
            wanted += dict.fromkeys(record_key(nodes[at].id) for at in (*answers, first))
            wanted += [self.identity.pair(tenant, nodes[at - 1].content, nodes[at].content) for at in answers if at]
        if answers:
            wanted.append(pins_key(owner_of(nodes[0].id)))
        if names.delta is not None:
            wanted.append(names.delta)
        self.store.ahead(wanted)

    # -- reading

    def get(self, key: bytes) -> bytes | None:
        """The value, or None: what cannot be read is a miss (invariant 6). The store says so in the log."""
        try:
            return self.store.get(key)
        except StorageError:
            return None

    def get_record(self, node_id: bytes) -> Record | None:
        found: Record | None = self.cache.get("record", node_id)
        if found is None:
            data = self.get(record_key(node_id))
            if data is not None:
                found = decode_record(data)
                self.cache.put("record", node_id, found, len(data))
        return found

    def conversation(self, tenant: TenantKey, name: str) -> Record | None:
        """The last answer given in the tenant's conversation of that name (`records.conversation_name`)."""
        owner = owner_named(tenant, name)
        found = self.store.get(conversation_key(owner)) if owner is not None else None
        return self.get_record(LastUse.decode(found).head) if found is not None else None

    def load_path(self, head: Record) -> Sequence[Node]:
        return load_path(head, self.get_record, self.get_block, self.identity)

    def substitutes(self, node_id: bytes) -> Sequence[bytes]:
        record = self.get_record(node_id)
        return record.substitute if record is not None else ()

    async def state_after(self, record: Record, tenant: TenantKey) -> State | None:
        """The state after a turn; None for a conversation that never left its window."""
        if not record.window:
            return None
        window: Window | None = self.cache.get("window", record.id)
        kept: tuple[PageTable, Derived] | None = self.cache.take("table", record.id)
        if window is not None and kept is not None:
            return State(window, *kept)
        derived: Derived | None = self.cache.get("derived", record.id)
        off_loop = record.turn > _OFF_LOOP_MESSAGES
        if window is not None and derived is not None:
            work = partial(restore_table, record, self.get_record, self.get_block)
            table = await self.pool.run(tenant, work) if off_loop else work()
            return State(window, table, derived)
        if off_loop:
            return await self.pool.run(tenant, restore_state, record, self.get_record, self.get_block)
        return restore_state(record, self.get_record, self.get_block)

    def get_block(self, owner: bytes, ref: bytes) -> bytes | None:
        """A block of a conversation's page table, or of its path's index."""
        key = block_key(owner, ref)
        found: bytes | None = self.cache.get("block", key)
        if found is None:
            found = self.get(key)
            if found is not None:
                self.cache.put("block", key, found, len(found))
        return found

    async def search(
        self, tenant: TenantKey, effect: Search, pages: PathPages, near: Sequence[Hit] = (),
        identity: Identity | None = None,
    ) -> list[Hit]:
        """Perform a search over the first `effect.before` messages of this path, and no others; `near`:
        the pages by meaning, where they are found otherwise; `identity`: what its turn began with."""
        ids = pages.index_keys(effect.before)
        if not ids:
            return []
        work = (ids, pages.docs, effect.queries, effect.limit, effect.skip, effect.seen_s, near, effect.least)
        missing = self.indexes.missing(ids)
        new = pages.path[effect.before - min(missing, self._at_once) : effect.before]
        is_large = missing > self._at_once or sum(len(node.raw) for node in new) > _AT_ONCE_BYTES
        if is_large or len(ids) > self._ranked_at_once or self.store.suspends:  # an index is locked while it is read
            hits = await self.pool.run(tenant, self.indexes.search, *work)
        else:
            hits = self.indexes.search(*work)
        due = self.indexes.due(pages.owner)
        if identity not in (None, self.identity):  # something was erased since, perhaps of this
            self.indexes.clear()
            return hits
        with suppress(StorageError):  # what is not stored is made again when it is asked for
            for key, piece in due:  # one after the other: others commit meanwhile
                await self.keep(pages.owner, self.identity, [(self._piece_key(key), piece)])
        return hits

    def _piece_key(self, key: bytes) -> bytes:
        return keys.INDEX + owner_of(key) + hashlib.blake2b(self._pieces + key, digest_size=16).digest()

    def _piece(self, key: bytes) -> bytes | None:
        """A piece of a search index; None where it is not there, or damaged: it is made again."""
        return self.get(self._piece_key(key))

    # -- writing

    async def append(
        self, tenant: TenantKey, effect: Append, identity: Identity, more: Sequence[tuple[bytes, bytes]] = ()
    ) -> frozenset[bytes]:
        """Store a turn, and `more` with it; returns the ids of the records that are new.

        What is already stored stays as it is: others may have built on it. `identity`: whose ids it has; StorageError
        when the store that it belongs to is not there any more.

        One commit holds the turn. Of a long history that was not seen before, what stands long before it is stored
        sooner, some records at a time, so that no other turn waits for a commit of seconds: what is there of it when
        the process dies is a shorter history, which is whole as well.
        """
        records, many = effect.records, len(effect.records) > _OFF_LOOP_MESSAGES
        puts, adds = await self.pool.run(tenant, _parted, effect) if many else _parted(effect)
        puts += self._left_behind(records)
        known: frozenset[bytes] = frozenset()
        sooner = [put for put in puts if put[0][:1] in _STORED_SOONER]
        while len(adds) > 2 * _STORED_AT_ONCE:
            first, adds = adds[:_STORED_AT_ONCE], adds[_STORED_AT_ONCE:]
            known |= await self.keep(tenant, identity, sooner, first)
            sooner = []
        known |= await self.keep(tenant, identity, [*puts, *more], adds, effect.joins)
        for record in records[-_KEPT_RECORDS:]:
            if record_key(record.id) not in known:
                size = sum(map(len, record.raws)) + len(record.window) + _NODE_BYTES
                self.cache.put("record", record.id, record, size)
        for key, value in () if many else puts:  # the next turn looks at them, as a rule
            if key[:1] == keys.BLOCK:
                self.cache.put("block", key, value, len(value))
        new = frozenset([record.id for record in records if record_key(record.id) not in known])
        if many:
            await self.pool.run(tenant, empty, effect.puts, records, adds)
        return new

    def _left_behind(self, records: Sequence[Record]) -> list[tuple[bytes, bytes]]:
        """The end of the branch that a conversation leaves with these records, if it does."""
        if not records:
            return []
        owner, parent = owner_of(records[-1].id), records[0].parent
        known: bytes | None = self.cache.get("head", owner)
        self.cache.put("head", owner, records[-1].id, _NODE_BYTES)
        if known == parent and parent:
            return []
        stored = self.get(conversation_key(owner))
        head = LastUse.decode(stored).head if stored is not None else NodeId(parent)
        if head in (parent, *(record.id for record in records)):
            return []
        return [(tip_key(head), LastUse(head, records[-1].seen_s).encode())]

    async def keep(
        self, owner: bytes, identity: Identity, puts: Sequence[tuple[bytes, bytes]],
        adds: Sequence[tuple[bytes, bytes]] = (), joins: Sequence[tuple[bytes, bytes]] = (),
    ) -> frozenset[bytes]:  # fmt: skip
        """Store what was made with these ids, all of one tenant's; the keys of `adds` that are there. StorageError when
        their store is not there any more; ErasedMeanwhile when something of the tenant was erased since."""
        erased = identity.erased
        while True:
            try:
                return await self.store.commit(puts, joins, adds, identity.secret, erased)
            except ErasedMeanwhile:
                await asyncio.to_thread(self.store.look)
                now = self.store.erased
                if await asyncio.to_thread(erased_since, self.store, owner, erased):
                    raise
                erased = now

    def keep_state(self, record: Record, state: State) -> None:
        """Remember the state after a stored turn, so that the next one need not restore it."""
        window, table, derived = state
        assert window is not None
        self.keep_window(record, window)
        table.rest(blocks_of(owner_of(record.id), self.get_block), partial(replayed, record, self.get_record), self._table_entries)
        self.cache.put("table", record.id, (table, derived), table.loaded * _TABLE_ENTRY_BYTES)

    def keep_settled(self, record: Record, state: Stored) -> None:
        """Remember the state before a stored turn's newest messages: where the client goes on when it
        says these otherwise. The table, which the turn has changed since, is read again."""
        self.keep_window(record, state.window)
        self._keep_derived(record, state.derived)

    def derived_after(self, record: Record) -> Derived:
        """What the segments left that are closed after a turn."""
        derived: Derived | None = self.cache.get("derived", record.id)
        if derived is None:
            derived = restore_derived(record, self.get_record)
            self._keep_derived(record, derived)
        return derived

    def _keep_derived(self, record: Record, derived: Derived) -> None:
        self.cache.put("derived", record.id, derived, _DERIVED_BYTES * (1 + len(derived.pages)))

    def keep_window(self, record: Record, window: Window) -> None:
        size = sum(map(len, map(_RAW, window.entries))) + len(window.developer)
        self.cache.put("window", record.id, window, size)

    # -- what is known of models

    def learned(self, scope: KeyScope, model: str) -> dict[str, object]:
        """What the upstream behind this key said of a model; one key's refusals bind no other."""
        data = self.get(keys.MODEL + scope + model.encode())
        return msgspec.msgpack.decode(data) if data else {}

    def learned_put(
        self, scope: KeyScope, model: str, facts: Mapping[str, object]
    ) -> tuple[bytes, bytes]:
        """What is stored when these facts are learned (None: such a fact is no more)."""
        merged = {**self.learned(scope, model), **facts}
        kept = {name: fact for name, fact in merged.items() if fact is not None}
        return keys.MODEL + scope + model.encode(), msgspec.msgpack.encode(kept)

    def calibration(self, scope: KeyScope, model: str, counter: str, exact: bool) -> Calibration:
        """What the bills of a key's model taught: as it is stored, so the same in every process."""
        data = self.get(calibration_key(scope, model, counter))
        try:
            return Calibration(exact) if data is None else Calibration.decode(data)
        except ValueError:  # another version's
            return Calibration(exact)


def _parted(effect: Append) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """What is stored over what is there, and the records, of which those that are there stay."""
    ours = {record_key(record.id) for record in effect.records}
    puts: list[tuple[bytes, bytes]] = []
    adds: list[tuple[bytes, bytes]] = []
    for put in effect.puts:
        (adds if put[0] in ours else puts).append(put)
    return puts, adds


def owner_named(tenant: TenantKey, name: str) -> bytes | None:
    """Whose a tenant's conversation is, by the name that people know it by; None for what is no such name."""
    try:
        path = bytes.fromhex(name)
    except ValueError:
        return None
    return tenant[: keys.TENANT_BYTES] + path if len(path) == keys.OWNER_BYTES - keys.TENANT_BYTES else None


def calibration_key(scope: KeyScope, model: str, counter: str) -> bytes:
    return keys.CALIBRATION + scope + counter.encode() + b"/" + model.encode()


def lesson_keys(scope: KeyScope, model: str, counter: str) -> list[bytes]:
    """What an answer may change of what is known of its model."""
    return [calibration_key(scope, model, counter), keys.MODEL + scope + model.encode(), keys.MODELS + scope]
