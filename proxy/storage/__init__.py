"""The tiers below the window. A `Store` is L2 and what lies under it: values by key (conversation/keys.py has the key space).

Promises: there is one interface, whatever is behind it; `open_store` is the one place that chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from proxy.errors import StorageError
from proxy.storage.l2 import DiskStore
from proxy.storage.sqlite import Key, Repaired

if TYPE_CHECKING:
    from proxy.config import Config

MIGRATING = "migrating"  # while a store is being copied into one: not empty; "": it is whole
_QUEUE_RECORDS = 1024  # of a transaction, where nobody else waits


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

    def get(self, key: Key) -> bytes | None: ...

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
    store = DiskStore(config.tiers.l2.path, config.tiers.l2.queue_records, kinds)
    if store.trouble is None and store.get(MIGRATING):
        raise StorageError("A migration into this storage has not come to its end: give `llm-pager migrate` once more.")
    return store


class Engine(Store, Protocol):
    """What holds the values themselves."""

    async def adopt(self, secret: bytes) -> None: ...


def open_engine(where: str, kinds: Mapping[bytes, str]) -> Engine:
    """The values themselves, as they stand in a directory. Raises StorageError."""
    return DiskStore(Path(where), _QUEUE_RECORDS, kinds)
