"""Pieces of work that come in a burst: no more in one iteration of the event loop than take some milliseconds.

Promises: who comes alone, and with little to do, does not wait; of many that come at once each goes on in an iteration
of its own as soon as those before it took long, in the order in which they came, so that a small request waits for one
piece of work and not for all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

_ENOUGH_S: Final = 0.002  # of one iteration: some ten short turns, or one long one


class Pace:
    """One per process and event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun_s: float | None = None  # when the first piece of this iteration began
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        """Returns when a piece of work may begin."""
        if self._begun_s is None:
            self._begun_s = self._clock()
            asyncio.get_running_loop().call_soon(self._next)
        elif self._waiting or self._clock() - self._begun_s > _ENOUGH_S:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            await mine

    def _next(self) -> None:
        """A new iteration."""
        self._begun_s = None
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():  # else its task was cancelled
                first.set_result(None)
                self._begun_s = self._clock()
                asyncio.get_running_loop().call_soon(self._next)
                return
