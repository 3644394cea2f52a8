"""The pool: whose work comes next, what is given up, what is refused."""

from __future__ import annotations

import asyncio
import threading

import pytest

from proxy.api.pool import Pool
from proxy.errors import ApiError

A, B = b"tenant a", b"tenant b"


class Gate:
    """Work that begins, is seen to have begun, and goes on when it is told to."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.open.wait(20)
        return "done"


async def begun(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.begun.wait, 20)


async def test_pool_tenants_take_turns_and_each_has_its_own_order() -> None:
    pool, gate, order = Pool(1, 100), Gate(), list[str]()
    running = asyncio.ensure_future(pool.run(A, gate))
    await begun(gate)
    asked = [asyncio.ensure_future(pool.run(A, order.append, f"a{i}")) for i in range(3)]
    await asyncio.sleep(0)
    asked += [asyncio.ensure_future(pool.run(B, order.append, f"b{i}")) for i in range(2)]
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(running, *asked)
    pool.close()
    assert order == ["a0", "b0", "a1", "b1", "a2"]


async def test_pool_one_tenant_leaves_half_of_the_threads_to_others() -> None:
    pool, gates = Pool(2, 100), [Gate(), Gate()]
    first, second = (asyncio.ensure_future(pool.run(A, gate)) for gate in gates)
    await begun(gates[0])
    assert await pool.run(B, lambda: "at once") == "at once"
    assert not gates[1].begun.is_set()
    for gate in gates:
        gate.open.set()
    assert await asyncio.gather(first, second) == ["done", "done"]
    pool.close()


async def test_pool_work_that_was_given_up_before_it_began_is_not_done() -> None:
    pool, gate, done = Pool(1, 100), Gate(), list[int]()
    running = asyncio.ensure_future(pool.run(A, gate))
    await begun(gate)
    waiting = asyncio.ensure_future(pool.run(B, done.append, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open.set()
    assert await running == "done"
    await pool.run(B, done.append, 2)
    pool.close()
    assert done == [2]


async def test_pool_work_that_has_begun_is_waited_for() -> None:
    """Nobody closes a turn that a thread is still in."""
    pool, gate = Pool(1, 100), Gate()
    running = asyncio.ensure_future(pool.run(A, gate))
    await begun(gate)
    for _ in range(2):
        running.cancel()
        await asyncio.sleep(0)
        assert not running.done()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    pool.close()


async def test_pool_queue_is_bounded_for_one_tenant_and_for_all() -> None:
    pool, gate = Pool(1, 4), Gate()
    running = asyncio.ensure_future(pool.run(A, gate))
    await begun(gate)
    waiting = [asyncio.ensure_future(pool.run(A, int)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as refused:
        await pool.run(A, int)
    assert (refused.value.status, refused.value.headers) == (503, {"retry-after": "1"})
    waiting += [asyncio.ensure_future(pool.run(B, int)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError):
        await pool.run(b"tenant c", int)
    gate.open.set()
    assert await asyncio.gather(running, *waiting) == ["done", 0, 0, 0, 0]
    pool.close()


async def test_pool_an_error_reaches_who_waits_and_no_one_else() -> None:
    pool = Pool(1, 4)
    with pytest.raises(KeyError):
        await pool.run(A, {}.__getitem__, "absent")
    assert await pool.run(A, int) == 0
    pool.close()
