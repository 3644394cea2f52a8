"""The tiers below the window. A `Store` is L2 and what lies under it: values by key (conversation/keys.py has the key space).

Promises: there is one interface, whatever is behind it; `open_store` is the one place that chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from proxy.errors import ConfigError, StorageError
from proxy.storage.l2 import DiskStore
from proxy.storage.sqlite import Key, Repaired

if TYPE_CHECKING:
    from proxy.config import Config
    from proxy.storage.postgres import PostgresStore

MIGRATING = "migrating"  # while a store is being copied into one: not empty; "": it is whole
_QUEUE_RECORDS = 1024  # of a transaction, where nobody else waits
_PATIENT_S = 60.0


class Store(Protocol):
    """`get` and `scan` from any thread, the rest from any event loop. Every failure is a StorageError of one sentence;
    `DiskStore` says what each method and field promises."""

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

    def ahead(self, keys: Iterable[Key]) -> None:
        """Where it `suspends`: a request is going to `get` these keys; they are asked for at once, and anew."""

    def scan(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, bytes]]: ...

    def look(self) -> None: ...

    def secret(self) -> bytes: ...

    async def commit(
        self,
        puts: Sequence[tuple[Key, bytes]],
        joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (),
        secret: bytes | None = None,
        erased: int | None = None,
        drops: Sequence[bytes] = (),
        leaves: Sequence[tuple[bytes, bytes]] = (),
        erases: bool = False,
    ) -> frozenset[bytes]: ...

    async def check(self, proved_s: float = 0.0) -> None: ...

    async def close(self) -> None: ...


def open_store(config: Config, kinds: Mapping[bytes, str]) -> Store:
    """What `tiers` say. `kinds`: what the values under the first byte of a key are, for people. Raises ConfigError and
    StorageError."""
    l2 = config.tiers.l2
    store: Store
    if l2.url is None:
        store = DiskStore(l2.path, l2.queue_records, kinds)
    else:
        store = _postgres(l2.url, kinds, connections=l2.connections, timeout_s=l2.timeout_s)
    if store.trouble is None and store.get(MIGRATING):
        raise StorageError("A migration into this storage has not come to its end: give `llm-pager migrate` once more.")
    return store


def _postgres(url: str, kinds: Mapping[bytes, str], **settings: Any) -> PostgresStore:
    try:
        from proxy.storage.postgres import PostgresStore
    except ImportError as error:
        raise ConfigError(f"tiers.l2.url needs an extra that is not installed ({error}): pip install 'llm-pager[postgres]'.") from None
    return PostgresStore(url, kinds, **settings)


class Engine(Store, Protocol):
    """What holds the values themselves."""

    async def adopt(self, secret: bytes) -> None: ...


def is_url(where: str) -> bool:
    """Whether it is PostgreSQL's, and no directory."""
    return where.startswith(("postgresql://", "postgres://"))


def open_engine(where: str, kinds: Mapping[bytes, str]) -> Engine:
    """What stands in a directory or behind a URL, for a command. Raises ConfigError and StorageError."""
    engine = _postgres(where, kinds, timeout_s=_PATIENT_S) if is_url(where) else DiskStore(Path(where), _QUEUE_RECORDS, kinds)
    if engine.trouble is not None:  # its secret is not known
        raise StorageError(engine.trouble)
    return engine
