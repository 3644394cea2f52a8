"""Synchronous code that waits, on a real event loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading

import pytest

from proxy.storage.suspend import can_wait, scope, suspendable, suspending, wait


async def later(value: int, turns: int = 3) -> int:
    for _ in range(turns):
        await asyncio.sleep(0)
    return value


def deep(value: int, depth: int = 20) -> int:
    return deep(value, depth - 1) if depth else wait(later(value))


async def test_the_loop_goes_on_while_synchronous_code_waits() -> None:
    order: list[object] = []

    async def asking(number: int) -> int:
        order.append(number)
        await asyncio.sleep(0)
        total = sum(deep(number) for _ in range(3)) + await later(1)
        order.append(-number)
        return total

    got = await asyncio.gather(*(suspendable(asking(n)) for n in (1, 2, 3)))
    assert got == [4, 7, 10] and order == [1, 2, 3, -1, -2, -3]


async def test_a_generator_that_runs_waits_as_well_and_so_does_a_coroutine_inside() -> None:
    def dialogue():
        yield deep(1)
        yield deep(2)

    async def inside() -> list[int]:
        return [*dialogue(), await suspendable(nested())]

    async def nested() -> int:
        return deep(3)

    assert await suspendable(inside()) == [1, 2, 3]


async def test_errors_cross_both_ways_and_a_cancelled_wait_is_cancelled() -> None:
    started, seen = asyncio.Event(), []

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("below")

    async def catching() -> str:
        with pytest.raises(ValueError, match="below"):
            wait(failing())
        raise KeyError("above")

    with pytest.raises(KeyError, match="above"):
        await suspendable(catching())

    async def endless() -> None:
        try:
            started.set()
            wait(asyncio.Event().wait())
        except asyncio.CancelledError:
            seen.append(await later(7))  # it may wait while it cleans up
            raise

    task = asyncio.ensure_future(suspendable(endless()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [7]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await suspendable(endless())


async def test_a_task_s_variables_and_identity_are_its_own() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def asking(number: int) -> bool:
        task = asyncio.current_task()
        variable.set(number)
        wait(later(0))
        await asyncio.sleep(0)
        return variable.get() == number and asyncio.current_task() is task

    assert all(await asyncio.gather(*(suspendable(asking(n)) for n in range(5))))


async def test_who_may_wait() -> None:
    @suspending
    async def asked() -> tuple[bool, bool]:
        return can_wait(), await asyncio.to_thread(can_wait)

    assert not can_wait()
    assert await asked() == (True, False)
    assert not can_wait()


async def test_each_request_has_a_scope_and_work_beside_it_has_none() -> None:
    @suspending
    async def request() -> tuple[object, ...]:
        mine = scope()
        wait(later(0))
        beside = await asyncio.ensure_future(suspendable(asked()))
        return mine, scope(), beside, await asyncio.to_thread(scope)

    async def asked() -> object:
        return scope()

    (a, a2, a_beside, a_thread), (b, *_) = await asyncio.gather(request(), request())
    assert a is not None and a is a2 is a_thread and a is not b and a_beside is None and scope() is None


async def test_a_suspended_coroutine_that_is_dropped_is_closed() -> None:
    closed = threading.Event()

    async def asking() -> None:
        try:
            wait(asyncio.Event().wait())
        finally:
            closed.set()

    running = suspendable(asking())
    running.send(None)
    running.close()
    gc.collect()
    assert closed.is_set()
