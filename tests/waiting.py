"""How a test waits for something, so that its not happening is a failed assertion.

Promises: a wait is bounded, and returns as soon as what it waits for has happened.
"""

from __future__ import annotations

import asyncio


async def happens(event: asyncio.Event, within_s: float) -> bool:
    """Whether `event` is set before `within_s` seconds are over."""
    try:
        return await asyncio.wait_for(event.wait(), within_s)
    except TimeoutError:
        return False
