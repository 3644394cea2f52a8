"""Who of all processes on all machines does a work that one is enough for: a lease in the store.

Promises: time is cut into slots, and the first who joins a slot's set has it, so the store's own atomic append elects; a
holder keeps it from slot to slot while it lives, and one that died is succeeded with the next slot. A lease saves
work: two machines whose clocks differ may both have one for a while, so what is done under it must be right twice.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.storage.l2 import JOIN_VALUE_BYTES

if TYPE_CHECKING:
    from proxy.storage import Store

_EARLY = 0.5  # of a slot: from then on its holder takes the next one, too
_SLOT_BYTES = 8


class Lease:
    """`key`: the work's. `slot_s`: for which it is given; who wants to keep it asks several times in that. `clock`:
    Unix seconds."""

    def __init__(self, store: Store, key: bytes, slot_s: float, clock: Callable[[], float] = time.time) -> None:
        self._store, self._key, self._slot_s, self._clock = store, key, slot_s, clock
        self._me = os.urandom(JOIN_VALUE_BYTES - _SLOT_BYTES)

    async def held(self) -> bool:
        """Whether this process has it now; it tries to get it. Raises StorageError."""
        now = self._clock() / self._slot_s
        mine = await self._taken(int(now))
        if mine and now % 1 > _EARLY:
            await self._taken(int(now) + 1)
        return mine

    async def _taken(self, slot: int) -> bool:
        begins = slot.to_bytes(_SLOT_BYTES, "big")
        for asked in (False, True):
            joined = await asyncio.to_thread(self._store.get, self._key) or b""
            for at in range(0, len(joined), JOIN_VALUE_BYTES):
                if joined[at : at + _SLOT_BYTES] == begins:
                    return joined[at : at + JOIN_VALUE_BYTES] == begins + self._me
            if not asked:
                await self._store.commit((), joins=[(self._key, begins + self._me)])
        return False
