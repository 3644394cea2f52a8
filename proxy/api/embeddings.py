"""Vectors of pages from the provider's /v1/embeddings: asked off the request path, kept with the tenant's pages.

Promises: they are asked for after the answer, with the caller's own credentials, a bounded number at once,
and what fails is tried again later, each time after a longer wait; a page's vector is found by tenant,
model and text, so nobody sees another's (invariant 6); a search waits for its query's vector
`embeddings_wait_ms` at most, and only while the endpoint is known to work; without it, it is by words.
What a search found by meaning is stored before it is used, and so is whether the endpoint works: the same
search finds the same, on any replica and after a restart, whatever has arrived since (invariant 7).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import islice

import msgspec
from cachetools import LRUCache

from proxy.api.memory import Memory
from proxy.api.writer import CREDENTIALS
from proxy.config import Config
from proxy.conversation.effects import Search
from proxy.conversation.pages import PathPages
from proxy.conversation.tree import Identity, TenantKey
from proxy.errors import ApiError
from proxy.memory.ids import Hit
from proxy.search.vectors import NO_VECTOR, Vector, page_text, vector_of, whole
from proxy.storage.l2 import StorageError
from proxy.upstream import Header, Upstream, UpstreamBroken, once, read_whole

log = logging.getLogger(__name__)

_PATH = "/embeddings"
_ANSWER_LIMIT_BYTES = 64 << 20
_CALLERS = 1024  # tenants whose credentials, waits and places are remembered
_PLACES = 4096  # of histories whose pages were looked up, per tenant
_TRIES = 5  # in a row, before a tenant's pages leave the queue
_LONGEST_WAIT_S = 600.0
_MOST_LATE = 8  # 2 ** 8 calls owed
_FAILURES = (ApiError, UpstreamBroken, ValueError)
_TOO_MUCH = (400, 413, 422)  # statuses that a smaller batch may not get


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class _Answer(msgspec.Struct):
    data: list[_Embedding]


_read_answer = msgspec.json.Decoder(_Answer).decode
_read_hits = msgspec.msgpack.Decoder(list[Hit]).decode


class _Refused(ValueError):
    """The endpoint answered, and not with vectors."""

    def __init__(self, status: int) -> None:
        super().__init__(f"/v1/embeddings answered {status}")
        self.status = status


class _Health(msgspec.Struct, array_like=True, frozen=True):
    """How the endpoint serves a tenant; stored. `version`: another one whenever vectors arrived; `late`:
    queries in a row without a vector in time; `owed`: calls in the background that have to succeed before
    a search waits again."""

    version: bytes = b""
    late: int = 0
    owed: int = 1


_read_health = msgspec.msgpack.Decoder(_Health).decode


class _Caller:
    """One tenant: its newest credentials and the pages that wait."""

    def __init__(self, tenant: TenantKey) -> None:
        self.tenant = tenant
        self.headers: tuple[Header, ...] = ()
        self.identity: Identity | None = None  # what the pages that wait were read with
        self.waiting: OrderedDict[bytes, str] = OrderedDict()  # storage key -> text
        self.places: LRUCache[bytes, bool] = LRUCache(_PLACES)
        self.failures = 0  # in a row, in the background
        self.rests_until_s = 0.0
        self.task: asyncio.Task[None] | None = None


class _Stored:
    """The vectors of a conversation's pages that have arrived: what an index of a path reads."""

    def __init__(self, embedder: Embedder, owner: bytes, version: bytes) -> None:
        self._embedder = embedder
        self._owner = owner
        self.version = version

    def encode(self, texts: Sequence[str]) -> list[Vector | None]:
        return [self._embedder.find(self._owner, text) if text.strip() else NO_VECTOR for text in texts]


class Embedder:
    """One per process, where `search.embeddings` is `upstream`."""

    def __init__(self, config: Config, upstream: Upstream, memory: Memory) -> None:
        self._config = config.search
        self._model = config.search.embeddings_model or ""
        self._upstream = upstream
        self._memory = memory
        self._callers: LRUCache[TenantKey, _Caller] = LRUCache(_CALLERS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = asyncio.Semaphore(config.search.embeddings_calls)
        self.waiting = 0
        self._free_s = 0.0  # when the next batch may go

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- what is stored

    def find(self, owner: bytes, text: str) -> Vector | None:
        data = self._memory.get(self._memory.identity.vector(owner, self._model, text))
        return None if data is None else vector_of(data)

    def _health(self, tenant: TenantKey) -> _Health:
        data = self._memory.get(self._memory.identity.vectors(tenant, self._model))
        return _Health() if data is None else _read_health(data)

    def _health_put(self, tenant: TenantKey, health: _Health) -> tuple[bytes, bytes]:
        return self._memory.identity.vectors(tenant, self._model), msgspec.msgpack.encode(health)

    # -- in a request

    async def near(
        self, tenant: TenantKey, headers: Sequence[Header], effect: Search, pages: PathPages,
        identity: Identity | None = None,
    ) -> list[Hit]:  # fmt: skip
        """The pages of a search by meaning, best first; [] where that is not known in time. `identity`: its turn's.
        StorageError when it cannot be stored."""
        ids = pages.index_keys(effect.before)
        if not ids:
            return []
        memory = self._memory
        key = memory.identity.near(self._model, ids[-1], repr(list(effect.queries)))
        stored = memory.get(key)
        if stored is None:
            found, puts = await self._found(self._caller(tenant, headers), effect, ids, pages)
            stored = msgspec.msgpack.encode(found)
            if await memory.keep(pages.owner, identity or memory.identity, puts, [(key, stored)]):  # another replica was first
                stored = memory.get(key) or stored
        return _read_hits(stored)

    async def _found(
        self, caller: _Caller, effect: Search, ids: Sequence[bytes], pages: PathPages
    ) -> tuple[list[Hit], list[tuple[bytes, bytes]]]:
        """The pages, and what is learned of the endpoint."""
        health = self._health(caller.tenant)
        if health.owed:
            return [], []
        indexes, wait_s = self._memory.indexes, self._config.embeddings_wait_ms / 1000
        pool = self._memory.pool
        texts = await pool.run(caller.tenant, indexes.asked, ids, pages.docs, effect.queries)
        try:
            async with asyncio.timeout(wait_s):
                vectors = await self._embed(texts, caller.headers)
        except (*_FAILURES, TimeoutError) as error:
            log.warning("a search is by words only: %s", str(error) or f"no vector within {wait_s:g} s")
            late = min(health.late + 1, _MOST_LATE)
            return [], [self._health_put(caller.tenant, _Health(health.version, late, 2**late))]
        puts = [self._health_put(caller.tenant, _Health(health.version, 0, 0))] if health.late else []
        stored = _Stored(self, pages.owner, health.version)
        work = (ids, pages.docs, effect.queries, vectors, stored)
        return await pool.run(caller.tenant, indexes.nearest, *work), puts

    # -- after the answer

    def submit(self, tenant: TenantKey, headers: Sequence[Header], pages: PathPages) -> None:
        """Have the pages of that path embedded which are not yet."""
        caller = self._caller(tenant, headers)
        if caller.identity is not self._memory.identity:
            self._give_up(caller, 0.0)
            caller.identity = self._memory.identity
        if caller.rests_until_s > asyncio.get_running_loop().time():
            return
        if self.waiting < self._config.embeddings_queue_pages and len(self._tasks) < _CALLERS:
            self._start(self._look(caller, pages))

    def _caller(self, tenant: TenantKey, headers: Sequence[Header]) -> _Caller:
        caller = self._callers.get(tenant)
        if caller is None:
            caller = self._callers[tenant] = _Caller(tenant)
        caller.headers = tuple(header for header in headers if header[0] in CREDENTIALS)
        return caller

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(self._memory.beside(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _look(self, caller: _Caller, pages: PathPages) -> None:
        ids = pages.index_keys(len(pages.path))
        known = next((at for at in range(len(ids), 0, -1) if ids[at - 1] in caller.places), 0)
        try:
            missing = await self._memory.pool.run(caller.tenant, self._missing, pages, known)
        except (StorageError, ApiError) as error:  # or too many wait for a thread
            log.warning("pages are not embedded: %s", error)
            return
        if caller.identity is not self._memory.identity:  # something was erased since, perhaps of this
            return
        for key, text in missing.items():
            if key not in caller.waiting:
                if self.waiting >= self._config.embeddings_queue_pages:
                    break
                caller.waiting[key] = text
                self.waiting += 1
        else:
            caller.places[ids[-1]] = True
        if caller.waiting and (caller.task is None or caller.task.done()):
            caller.task = self._start(self._work(caller))

    def _missing(self, pages: PathPages, first: int) -> dict[bytes, str]:
        identity, get = self._memory.identity, self._memory.get
        texts = [page_text(doc) for doc in pages.docs(first, len(pages.path))]
        by_key = {identity.vector(pages.owner, self._model, text): text for text in texts if text.strip()}
        return {key: text for key, text in by_key.items() if get(key) is None}

    async def _work(self, caller: _Caller) -> None:
        """Embed what waits, a batch after the other."""
        most = size = self._config.embeddings_batch_pages
        while caller.waiting:
            identity = self._memory.identity
            if caller.identity is not identity:
                self._give_up(caller, 0.0)
                return
            keys = list(islice(caller.waiting, size))
            await self._turn(len(keys))
            try:
                async with self._calls, asyncio.timeout(self._config.embeddings_timeout_s):
                    vectors = await self._embed([caller.waiting[key] for key in keys], caller.headers)
                await self._keep(caller.tenant, identity, keys, vectors)
                size, caller.failures = min(most, 2 * size), 0
            except (*_FAILURES, TimeoutError, StorageError) as error:
                log.warning("%d pages are not embedded yet: %s", len(keys), str(error) or "no answer in time")
                too_much = isinstance(error, _Refused) and error.status in _TOO_MUCH
                wait_s = min(_LONGEST_WAIT_S, 2.0**min(caller.failures, 10))
                caller.failures += 1
                if caller.failures >= _TRIES and not too_much:
                    self._give_up(caller, wait_s)
                    return
                await asyncio.sleep(wait_s)
                if not too_much:
                    continue
                if size > 1:
                    size //= 2
                    continue
                with suppress(StorageError):  # refused by itself: it is found by its words
                    await self._keep(caller.tenant, identity, keys, [NO_VECTOR])
            for key in keys:
                self.waiting -= caller.waiting.pop(key, None) is not None

    def _give_up(self, caller: _Caller, wait_s: float) -> None:
        """Leave the queue to others: a turn of its own after so many seconds looks its pages up again."""
        self.waiting -= len(caller.waiting)
        caller.waiting.clear()
        caller.places.clear()
        caller.rests_until_s = asyncio.get_running_loop().time() + wait_s

    async def _turn(self, pages: int) -> None:
        """Wait until so many pages may be sent."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_s)
        self._free_s = start + 60.0 * pages / self._config.embeddings_pages_per_minute
        if start > now:
            await asyncio.sleep(start - now)

    async def _keep(
        self, tenant: TenantKey, identity: Identity, keys: Sequence[bytes], vectors: Sequence[Vector]
    ) -> None:
        health = self._health(tenant)
        version = blake2b(health.version + b"".join(keys), digest_size=16).digest()
        adds = [(key, vector.tobytes()) for key, vector in zip(keys, vectors, strict=True)]
        now = _Health(version, health.late, max(0, health.owed - 1))
        await self._memory.keep(tenant, identity, [self._health_put(tenant, now)], adds)

    async def _embed(self, texts: Sequence[str], headers: Sequence[Header]) -> list[Vector]:
        """A vector for each text. Raises ValueError for an answer that has none."""
        plain = [text.encode("utf-8", "replace").decode() for text in texts]  # it may carry lone surrogates
        body = msgspec.json.encode({"model": self._model, "input": plain})
        sent = [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        status, data = await read_whole(self._upstream.forward("POST", _PATH, b"", sent, once(body)), _ANSWER_LIMIT_BYTES)
        if status >= 400:
            raise _Refused(status)
        return await asyncio.to_thread(_vectors, data, len(texts))


def _vectors(data: bytes, count: int) -> list[Vector]:
    found = sorted(_read_answer(data).data, key=lambda one: one.index)  # msgspec's errors are ValueErrors
    if [one.index for one in found] != list(range(count)):
        raise ValueError("the answer has not one vector for each text")
    return [whole(one.embedding) for one in found]
