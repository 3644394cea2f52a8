"""The tiers below the window. A `Store` is L2 and what lies under it: values by key (keys.py has the key space).

Promises: there is one interface, whatever is behind it; `open_store` is the one place that chooses.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol, cast

from proxy.errors import ConfigError, StorageError
from proxy.keys import ARCHIVE
from proxy.storage.l2 import DiskStore
from proxy.storage.sqlite import MARK, Damaged, Key, Repaired
from proxy.storage.tiered import Tiered

if TYPE_CHECKING:
    from proxy.config import Config, L2Config
    from proxy.storage.demotion import Demotion
    from proxy.storage.objects import Objects

log = logging.getLogger(__name__)
MIGRATING = "migrating"  # while a store is being copied into one: not empty; "": it is whole


class Store(Protocol):
    """`get` and `scan` from any thread, the rest from any event loop. Every failure is a StorageError of one sentence;
    `DiskStore` says what each method and field promises."""

    @property
    def where(self) -> str: ...
    @property
    def trouble(self) -> str | None: ...
    @property
    def damaged(self) -> Mapping[str, int]: ...
    @property
    def repaired(self) -> Repaired | None: ...
    @property
    def generation(self) -> int: ...
    @property
    def losses(self) -> int: ...
    @property
    def erased(self) -> int: ...

    @property
    def suspends(self) -> bool:
        """Whether `get` may wait for another machine: the event loop's callers are `suspendable` (suspend.py) then, and
        no lock that the event loop takes is held over a `get`."""

    def get(self, key: Key) -> bytes | None: ...

    def ahead(self, keys: Iterable[Key], alone: bool = False) -> None:
        """Where it `suspends`: a request is going to `get` these keys; they are asked for at once, and anew. `alone`: and not
        what a turn would read next."""

    def scan(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, bytes]]: ...

    def look(self) -> None: ...

    def secret(self) -> bytes: ...

    async def commit(
        self, puts: Sequence[tuple[Key, bytes]], joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (), secret: bytes | None = None, erased: int | None = None,
        drops: Sequence[bytes] = (), leaves: Sequence[tuple[bytes, bytes]] = (), erases: bool = False,
    ) -> frozenset[bytes]: ...  # fmt: skip

    async def scrub(self) -> None: ...

    def size_bytes(self) -> int: ...

    async def swap(self, rows: Sequence[tuple[bytes, bytes, bytes]]) -> frozenset[bytes]: ...

    async def check(self, proved_s: float = 0.0) -> None: ...

    async def close(self) -> None: ...


class Engine(Store, Protocol):
    """L2 alone."""

    async def adopt(self, secret: bytes) -> None: ...


def open_store(config: Config) -> Tiered:
    """What `tiers` and `storage.encryption` say; a `Sealed` is what is around it, too. Raises ConfigError and
    StorageError."""
    tiers = config.tiers
    l3 = open_objects("tiers.l3", tiers.l3.url, tiers.l3.options, tiers.l3.timeout_s)
    l4 = open_objects("tiers.l4", tiers.l4.url, tiers.l4.options, tiers.l4.timeout_s)
    engine = open_engine(tiers.l2)
    if _there(engine, MIGRATING):
        raise StorageError("A migration into this storage has not come to its end: give `llm-pager migrate` once more.")
    if l4 is None:
        with suppress(StorageError):
            if engine.scan(ARCHIVE, limit=1):
                log.error("Conversations stand in L4, and tiers.l4.url is not set: what was said in them is not remembered.")
    tiered = Tiered(engine, l3, l4, tiers)
    if config.storage.encryption.keys:
        from proxy.storage.sealing import sealed

        return cast(Tiered, sealed(tiered, config))
    if _there(engine, MARK):
        raise StorageError(f"The storage in {engine.where} is encrypted: set storage.encryption.keys to its master key.")
    return tiered


@asynccontextmanager
async def opened_store(config: Config) -> AsyncIterator[Tiered]:
    """The same for a command, which ends with it. Raises StorageError, too, where it cannot be used now."""
    store = open_store(config)
    try:
        if store.trouble is not None:  # its secret is not known
            raise StorageError(store.trouble)
        store.look()
        yield store
    finally:
        await store.close()


def _there(engine: Engine, key: Key) -> bool:
    """Whether something stands under it, as far as can be known now: a store that is away for a moment ends no start."""
    try:
        return engine.trouble is None and bool(engine.get(key))
    except Damaged:
        return True
    except StorageError:
        if engine.trouble is None:
            raise
        return False


def open_engine(l2: L2Config, tables: str = "llm_pager") -> Engine:
    """L2 alone. `tables`: what PostgreSQL's begin with. Raises ConfigError and StorageError."""
    if l2.url is None:
        return DiskStore(l2.path, l2.queue_records, l2.durability)
    try:
        from proxy.storage.postgres import PostgresStore
    except ImportError as error:
        raise ConfigError(f"tiers.l2.url needs an extra that is not installed ({error}): pip install 'llm-pager[postgres]'.") from None
    return PostgresStore(l2.url, connections=l2.connections, timeout_s=l2.timeout_s, tables=tables,
                         synchronous_commit="on" if l2.durability == "power" else None)  # fmt: skip


def open_objects(name: str, url: str | None, options: Mapping[str, str], timeout_s: float) -> Objects | None:
    """A tier's; None where it has no URL. Raises ConfigError."""
    if url is None:
        return None
    from proxy.storage.objects import Objects  # an extra

    return Objects(url, options, timeout_s, name)


def start_demotion(store: Tiered, config: Config) -> Demotion | None:
    """The work in the background that moves values between the tiers; None where there is nothing below L2."""
    if store.l3 is None and store.l4 is None:
        return None
    from proxy.storage.demotion import Demotion

    demotion = Demotion(store, config.tiers.demotion_s, config.tiers.l2.days, config.tiers.l2.tokens)
    demotion.start()
    return demotion
