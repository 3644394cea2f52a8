"""Work that would hold the event loop: a few threads, and a queue that is fair between tenants.

Promises: what is handed in runs in the order in which its tenant handed it in; the tenants take turns, whoever has
more waiting; one tenant has at most half of the threads, so that another's work begins while it computes for
seconds; what waits is bounded, in all and for one tenant, and beyond that a request is answered with 503; work
whose request was given up before it began is never done, and what has begun is waited for.

Threads share one interpreter: `process.tune` says how soon one of them gives way to the event loop. What holds the
interpreter's lock in one long call into C is cut where it is made, not here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from proxy.errors import ApiError

_T = TypeVar("_T")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]
_SHARE = 2  # one tenant has at most 1/2 of the threads, and of the queue
_RETRY_S = 1
_FREED_AT_ONCE = 4096


class Turns:
    """`running` at once and `waiting` more, each tenant's in their order, tenants in turn; 1/`share` of either at most is one
    tenant's. Of one event loop."""

    def __init__(self, running: int, waiting: int, share: int = 1) -> None:
        self._free, self._most_waiting = running, waiting
        self._own_running, self._own_waiting = max(1, running // share), max(1, waiting // share)
        self._running: Counter[bytes] = Counter()
        self._waiting: OrderedDict[bytes, deque[asyncio.Future[None]]] = OrderedDict()  # next tenant first

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def take(self, whose: bytes) -> bool:
        """Wait for a turn; False when too many do."""
        if self._free and self._running[whose] < self._own_running:
            self._free -= 1
            self._running[whose] += 1
            return True
        if self.waiting >= self._most_waiting or len(self._waiting.get(whose, ())) >= self._own_waiting:
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(whose, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(whose, turn)
            else:  # it was given, and goes to the next
                self.give(whose)
            raise
        return True

    def give(self, whose: bytes) -> None:
        """Pass a turn on, to the tenant whose turn it is and who may have one more."""
        self._running -= Counter((whose,))
        for tenant, turns in self._waiting.items():
            turn = next((turn for turn in turns if not turn.done()), None)  # else it was given up just now
            if turn is not None and self._running[tenant] < self._own_running:
                self._running[tenant] += 1
                turn.set_result(None)
                self._waiting.move_to_end(tenant)
                self._leave(tenant, turn)
                return
        self._free += 1

    def _leave(self, tenant: bytes, turn: asyncio.Future[None]) -> None:
        self._waiting[tenant].remove(turn)
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def close(self) -> None:
        """Who waits is given up."""
        for turn in [turn for turns in self._waiting.values() for turn in turns]:
            turn.cancel()


class Pool:
    """One per process. Its threads start when there is work for them, and end with `close`."""

    def __init__(self, threads: int, queue_jobs: int) -> None:
        self._turns = Turns(threads, queue_jobs, _SHARE)
        self._threads, self._started = threads, 0
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None: a thread ends

    @property
    def waiting(self) -> int:
        return self._turns.waiting

    async def run(self, whose: bytes, work: Callable[..., _T], *arguments: Any) -> _T:
        """What `work`, with the caller's context variables, returns or raises (StopIteration excepted: it cannot cross).
        ApiError 503 when too many wait."""
        turns = self._turns
        if not await turns.take(whose):
            raise _too_many()
        try:
            if self._started < self._threads:
                self._started += 1
                threading.Thread(target=self._work, name=f"pool-{self._started}", daemon=True).start()
            answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
            self._jobs.put((partial(copy_context().run, work, *arguments), answer))
            try:
                return await asyncio.shield(answer)
            except asyncio.CancelledError:
                await _ended(answer)
                raise
        finally:
            turns.give(whose)

    def close(self) -> None:
        """What waits is given up. Returns at once: a thread ends with what it is doing."""
        self._turns.close()
        self._turns = Turns(0, 0)
        for _ in range(self._started):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            (call, answer), result, failure = job, None, None
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                failure = error
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                answer.get_loop().call_soon_threadsafe(_tell, answer, result, failure)
            del job, call, answer, result, failure


def _tell(answer: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if failure is not None:
        answer.set_exception(failure)
    else:
        answer.set_result(result)


def empty(*many: list[Any]) -> None:
    """Take all out of long lists that nobody looks at any more, some thousand at a time: what is freed in one call,
    all threads wait for."""
    for some in many:
        while some:
            del some[-_FREED_AT_ONCE:]


async def _ended(answer: asyncio.Future[Any]) -> None:
    """Waits, however often the waiting is given up."""
    while not answer.done():
        try:
            await asyncio.wait((answer,))
        except asyncio.CancelledError:
            continue
    answer.exception()  # it is nobody's any more


def _too_many() -> ApiError:
    return ApiError(
        503, "llm-pager has too many large requests of yours, or of all, in its queue (pool.queue_jobs); send this"
        " one again in a moment.", "api_error", "server_busy", headers={"retry-after": str(_RETRY_S)},
    )  # fmt: skip
