"""A burst of work in iterations of the event loop."""

from __future__ import annotations

import asyncio
import time

import uvloop

from proxy.pace import in_turn

MANY, PIECE_S = 20, 0.008


def test_long_pieces_of_a_burst_leave_room_between_them_and_keep_their_order() -> None:
    log: list[int] = []

    async def work(number: int) -> None:
        await in_turn()
        log.append(number)
        until_s = time.monotonic() + PIECE_S
        while time.monotonic() < until_s:
            pass

    async def main() -> None:
        tasks = [asyncio.ensure_future(work(number)) for number in range(MANY)]
        asyncio.get_running_loop().call_later(0.001, log.append, -1)  # what comes meanwhile
        await asyncio.gather(*tasks)

    uvloop.run(main())
    assert log.index(-1) <= 3  # not behind all of them
    log.remove(-1)
    assert log == list(range(MANY))
