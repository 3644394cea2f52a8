"""A burst of work in iterations of the event loop, by a clock that the work moves."""

from __future__ import annotations

import asyncio

import pytest

from proxy.pace import Pace


@pytest.mark.parametrize(("takes_s", "at_once"), [(0.01, 1), (0.0, 20)])
async def test_pace_lets_long_pieces_go_on_in_an_iteration_each_in_order(takes_s: float, at_once: int) -> None:
    now_s, log, iterations = [0.0], [], 0
    pace = Pace(lambda: now_s[0])

    async def work(number: int) -> None:
        await pace.turn()
        log.append((number, iterations))
        now_s[0] += takes_s

    tasks = [asyncio.ensure_future(work(number)) for number in range(20)]
    tasks[3].cancel()  # before it waits
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        iterations += 1
        if iterations == 2:
            tasks[12].cancel()  # while it waits
    left = {3, 12} if at_once == 1 else {3}
    assert [number for number, _ in log] == [n for n in range(20) if n not in left]
    most = max(sum(when == iteration for _, when in log) for iteration in range(iterations + 1))
    assert most == min(at_once, len(log))
