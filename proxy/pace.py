"""Pieces of work that come in a burst, one in each iteration of the event loop.

Promises: who comes alone does not wait; of many that come at once each goes on in an iteration of its own, in the
order in which they came, so that a small request waits for one piece of work and not for all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Pace:
    """One per process and event loop."""

    def __init__(self) -> None:
        self._taken = False  # this iteration has its piece
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        """Returns when a piece of work may begin."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
            return
        mine: asyncio.Future[None] = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _next(self) -> None:
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():  # else its task was cancelled
                first.set_result(None)
                asyncio.get_running_loop().call_soon(self._next)
                return
        self._taken = False
