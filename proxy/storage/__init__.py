"""The tiers below the window. A `Store` is L2 and what lies under it: values by key (conversation/keys.py has the key space).

Promises: there is one interface, whatever is behind it; `open_store` is the one place that chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from proxy.errors import StorageError
from proxy.storage.l2 import DiskStore
from proxy.storage.sqlite import MARK, Damaged, Key, Repaired

if TYPE_CHECKING:
    from proxy.config import Config


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

    def opened(self, key: bytes, value: bytes) -> bytes | None: ...

    async def drop_key(self, owner: bytes) -> None: ...

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


class Engine(Store, Protocol):
    """What the wrappers are around."""

    async def swap(self, rows: Sequence[tuple[bytes, bytes, bytes]]) -> frozenset[bytes]: ...


class KeySpace(Protocol):
    """conversation/keys.py, as far as it is asked here."""

    @property
    def KINDS(self) -> Mapping[bytes, str]: ...
    @property
    def IDS_ONLY(self) -> Collection[bytes]: ...
    @property
    def tenant(self) -> Callable[[bytes], bytes]: ...


def open_store(config: Config, keys: KeySpace) -> Store:
    """What `tiers` and `storage.encryption` say. Raises ConfigError and StorageError."""
    l2, encryption = config.tiers.l2, config.storage.encryption
    engine: Engine = DiskStore(l2.path, l2.queue_records, keys.KINDS, l2.durability)
    if encryption.keys:
        from proxy.storage.sealing import sealed

        return cast(Store, sealed(engine, config, keys))
    if engine.trouble is None and _is_sealed(engine):
        raise StorageError(f"The storage in {l2.path} is encrypted: set storage.encryption.keys to its master key.")
    return engine


def _is_sealed(engine: Engine) -> bool:
    try:
        return engine.get(MARK) is not None
    except Damaged:
        return True
