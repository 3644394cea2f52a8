"""Work that comes in a burst: no more of it in one iteration of the event loop than takes some milliseconds.

Promises: who comes alone does not wait; of many that come at once those whose iteration has lasted long go on in the
next ones, in their order, so that a small request waits for a piece of work or two and not for all of them.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

_ENOUGH_S: Final = 0.005  # of one iteration


async def in_turn() -> None:
    """Returns when a piece of work may begin: what follows without another wait. uvloop's clock stands still in an
    iteration; where a loop's does not, nobody waits."""
    loop = asyncio.get_running_loop()
    while time.monotonic() - loop.time() > _ENOUGH_S:
        await asyncio.sleep(0)
