"""What the commands have in common: a store for a thread, and how they end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from proxy.config import Config
from proxy.conversation.tree import Identity
from proxy.storage import Store, opened_store
from proxy.storage.l2 import Damaged

DONE, LEFT_OUT = 0, 3  # exit statuses
_COMMIT_BYTES = 4 << 20  # about


class Desk:
    """A store for one command's thread."""

    def __init__(self, store: Store, identity: Identity, loop: asyncio.AbstractEventLoop) -> None:
        self.store, self.identity = store, identity
        self._loop = loop
        self.stopped = threading.Event()

    def get(self, key: bytes) -> bytes | None:
        """The value; None also where it is damaged: the store says so in the log."""
        with suppress(Damaged):
            return self.store.get(key)
        return None

    def commit(self, **what: Any) -> frozenset[bytes]:
        """As the store's. Raises StorageError."""
        if self.stopped.is_set():
            raise KeyboardInterrupt
        done = asyncio.run_coroutine_threadsafe(self.store.commit(**what), self._loop)
        return done.result()


def with_store(config: Config, work: Callable[[Desk], int]) -> int:
    """Run it, in a thread beside the store's event loop."""

    async def main() -> int:
        async with opened_store(config) as store:
            desk = Desk(store, Identity(store.secret(), store.erased), asyncio.get_running_loop())
            try:
                return await asyncio.to_thread(work, desk)
            finally:
                desk.stopped.set()

    return asyncio.run(main())


def batches(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """For one commit each."""
    batch: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in rows:
        batch.append((key, value))
        size += len(value)
        if size > _COMMIT_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
