"""The state behind the request path: the tiers and the caches over them, as the turns need them.

Promises: what is stored is immutable and found by content; everything kept in RAM here is a cache
(invariant 9); a turn is durable before `append` returns (invariant 5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from proxy.config import Config
from proxy.conversation.effects import Append, Search
from proxy.conversation.history import HistoryCache
from proxy.conversation.identify import Library
from proxy.conversation.pathpages import PathPages
from proxy.conversation.tree import Identity, Node, Record, decode_record, load_path, record_key
from proxy.conversation.window import Window, restore
from proxy.memory.mutation_log import decode as decode_mutations
from proxy.memory.page_table import PageTable
from proxy.memory.pages import Hit
from proxy.search.paths import PathIndexes
from proxy.storage.l1 import Cache
from proxy.storage.l2 import DiskStore

_OFF_LOOP_MESSAGES = 64  # indexing or reading more than this leaves the event loop
_TABLE_ENTRY_BYTES = 100
_NODE_BYTES = 200


class Memory:
    """One per process."""

    def __init__(self, config: Config) -> None:
        self.store = DiskStore(config.tiers.l2.path, config.tiers.l2.queue_records)
        self.identity = Identity(self.store.secret("identity"))
        self.cache = Cache(config.tiers.l1.tokens)
        self.histories = HistoryCache(config.server.history_cache_bytes)
        self.indexes = PathIndexes(config.search.index_pages)
        self.library = Library(self.get_record, self.load_path, self.store.get)

    async def close(self) -> None:
        await self.store.close()

    def forget(self) -> None:
        """Drop everything that is only cached."""
        self.cache.clear()
        self.histories.clear()
        self.indexes.clear()

    # -- reading

    def get_record(self, node_id: bytes) -> Record | None:
        found: Record | None = self.cache.get("record", node_id)
        if found is None:
            data = self.store.get(record_key(node_id))
            if data is not None:
                found = decode_record(data)
                self.cache.put("record", node_id, found, len(data))
        return found

    def load_path(self, head: Record) -> list[Node]:
        found: list[Node] | None = self.cache.get("path", head.id)
        if found is None:
            found = load_path(head, self.get_record)
            size = sum(len(node.raw) + _NODE_BYTES for node in found)
            self.cache.put("path", head.id, found, size)
        return found

    def substitutes(self, node_id: bytes) -> Sequence[bytes]:
        record = self.get_record(node_id)
        return record.substitute if record is not None else ()

    async def state_after(self, record: Record) -> tuple[Window | None, PageTable | None]:
        """The window and the page table after a turn. The table is the caller's to change."""
        if not record.window:
            return None, None
        window: Window | None = self.cache.get("window", record.id)
        table: PageTable | None = self.cache.take("table", record.id)
        if window is not None and table is not None:
            return window, table
        if record.turn > _OFF_LOOP_MESSAGES:
            return await asyncio.to_thread(self._fold, record)
        return self._fold(record)

    def _fold(self, head: Record) -> tuple[Window | None, PageTable]:
        logs: list[bytes] = []
        at: Record | None = head
        while at is not None:
            logs.append(at.mutations)
            at = self.get_record(at.base) if at.base else None
        table = PageTable()
        for log in reversed(logs):
            table.replay(decode_mutations(msgspec.msgpack.decode(log)))
        return restore(head, self.get_record), table

    async def search(self, effect: Search, path: Sequence[Node], pages: PathPages) -> list[Hit]:
        """Perform a search over the first `effect.before` messages of this path, and no others."""
        ids = [node.id for node in path[: effect.before]]
        if not ids:
            return []
        work = (ids, pages.pages, effect.query, effect.limit, effect.skip)
        if self.indexes.missing(ids) > _OFF_LOOP_MESSAGES:
            return await asyncio.to_thread(self.indexes.search, *work)
        return self.indexes.search(*work)

    # -- writing

    async def append(self, effect: Append) -> frozenset[bytes]:
        """Store a turn; returns the ids of the records that are new.

        What is already stored stays as it is: others may have built on it.
        """
        keys = {record_key(record.id) for record in effect.records}
        adds = [put for put in effect.puts if put[0] in keys]
        puts = [put for put in effect.puts if put[0] not in keys]
        known = await self.store.commit(puts, effect.joins, adds)
        new = [record for record in effect.records if record_key(record.id) not in known]
        for record in new:
            size = sum(map(len, record.raws)) + len(record.window) + _NODE_BYTES
            self.cache.put("record", record.id, record, size)
        return frozenset(record.id for record in new)

    def keep_state(self, record: Record, window: Window, table: PageTable) -> None:
        """Remember the state after a stored turn, so that the next one need not fold it."""
        size = sum(len(entry.raw) for entry in window.entries) + len(window.developer)
        self.cache.put("window", record.id, window, size)
        self.cache.put("table", record.id, table, len(table) * _TABLE_ENTRY_BYTES)

    # -- what is known of models

    def learned(self, scope: bytes, model: str) -> dict[str, object]:
        """What the upstream behind this key said of a model; one key's refusals bind no other."""
        data = self.store.get(b"m" + scope + model.encode())
        return msgspec.msgpack.decode(data) if data else {}

    async def learn(self, scope: bytes, model: str, facts: dict[str, object]) -> None:
        merged = {**self.learned(scope, model), **facts}
        await self.store.commit([(b"m" + scope + model.encode(), msgspec.msgpack.encode(merged))])
