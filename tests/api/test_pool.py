"""The pool: whose work comes next, what is given up, what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from proxy.api.pool import Pool, Turns, empty
from proxy.errors import ApiError
from proxy.tokens import load
from tests.api.test_chat import answered, body, client
from tests.bench.texts import Texts

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


async def test_turns_tenants_take_turns_and_too_many_are_not_waited_for() -> None:
    turns, order = Turns(1, 5), list[tuple[bytes, int]]()

    async def work(tenant: bytes, number: int) -> None:
        if await turns.take(tenant):
            order.append((tenant, number))
            await asyncio.sleep(0)
            turns.give(tenant)

    many = [asyncio.ensure_future(work(b"many", n)) for n in range(4)]
    one = asyncio.ensure_future(work(b"one", 0))
    gone = asyncio.ensure_future(work(b"one", 1))
    late = asyncio.ensure_future(work(b"late", 0))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(*many, one, late)
    assert order == [(b"many", 0), (b"many", 1), (b"one", 0), (b"many", 2), (b"many", 3)]
    await work(b"late", 1)
    assert order[-1] == (b"late", 1), "a turn was lost"


def test_what_is_freed_in_slices_is_all_of_it() -> None:
    many, few = list(range(10_000)), [1]
    empty(many, few)
    assert many == few == []


# -- what goes there, by its size


def history(count: int, seed: str) -> list[dict[str, str]]:
    texts = Texts(seed)
    return [{"role": ("user", "assistant")[i % 2], "content": texts.text(120)} for i in range(count)]


async def test_a_first_sight_waits_for_a_thread_and_a_small_request_for_nobody(tmp_path: Path) -> None:
    load()  # what a process reads at its start: else the small one waits for that
    async with client(tmp_path, answered(), answered(), tiers={"l0.tokens": 2000}, pool={"threads": 1}) as one:
        gate = Gate()
        blocked = asyncio.ensure_future(one.memory.pool.run(A, gate))
        await begun(gate)
        long = asyncio.ensure_future(one.ask(body(history(201, "long"))))
        for number in range(2):  # its conversation goes on, too
            small = await asyncio.wait_for(one.ask(body(history(2 * number + 1, "small"))), 20)
            assert small[0] == 200 and not long.done()
            one.upstream.replies.append(answered())
        gate.open.set()
        assert (await long)[0] == 200
        assert [len(json.loads(sent)["messages"]) for sent in one.upstream.bodies[:2]] == [1, 3]
        assert b"VM:RULES" in one.upstream.bodies[2]
        await blocked


async def test_a_first_sight_whose_client_has_left_is_never_begun(tmp_path: Path) -> None:
    async with client(tmp_path, tiers={"l0.tokens": 2000}, pool={"threads": 1}) as one:
        gate, leave = Gate(), asyncio.Event()
        blocked = asyncio.ensure_future(one.memory.pool.run(A, gate))
        await begun(gate)
        whole = json.dumps(body(history(201, "left"))).encode()
        sent = asyncio.ensure_future(one.send([whole], leave=leave))
        for _ in range(10):
            await asyncio.sleep(0)
        leave.set()
        assert (await asyncio.wait_for(sent, 20))[0] == 0  # with all threads taken
        gate.open.set()
        await blocked
        assert one.upstream.bodies == []


async def test_invariant_7_what_several_threads_make_is_what_one_makes(tmp_path: Path) -> None:
    asked = [body(history(301 + 2 * (i % 3), f"h{i // 2}"), user=f"u{i}") for i in range(6)]
    made = []
    for at_once in (False, True):
        replies = [answered() for _ in asked]
        folder = tmp_path / str(at_once)
        async with client(folder, *replies, tiers={"l0.tokens": 3000}) as one:
            if at_once:
                await asyncio.gather(*map(one.ask, asked))
            else:
                for request in asked:
                    await one.ask(request)
            made.append(sorted(json.dumps(json.loads(sent)["messages"]) for sent in one.upstream.bodies))
    assert made[0] == made[1] and len(made[0]) == len(asked)
