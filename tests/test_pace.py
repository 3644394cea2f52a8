"""One piece of a burst in each iteration of the event loop."""

from __future__ import annotations

import asyncio

from proxy.pace import Pace


async def test_pace_lets_one_of_a_burst_go_on_in_each_iteration_in_order() -> None:
    pace, log, iterations = Pace(), [], 0

    async def work(number: int) -> None:
        await pace.turn()
        log.append((number, iterations))

    tasks = [asyncio.ensure_future(work(number)) for number in range(20)]
    tasks[3].cancel()  # before it waits
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        iterations += 1
        if iterations == 2:
            tasks[12].cancel()  # while it waits
    assert [number for number, _ in log] == [n for n in range(20) if n not in (3, 12)]
    assert len({iteration for _, iteration in log}) == len(log)


async def test_pace_makes_nobody_wait_who_comes_alone() -> None:
    pace = Pace()
    for _ in range(3):
        turn = pace.turn()
        try:
            turn.send(None)
            raise AssertionError("it waits")
        except StopIteration:
            pass
        await asyncio.sleep(0)
