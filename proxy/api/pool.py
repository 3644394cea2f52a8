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
from typing import Any, TypeVar

from proxy.errors import ApiError

_T = TypeVar("_T")
_SHARE = 2  # one tenant has at most 1/2 of the threads, and of the queue
_RETRY_S = 1
_FREED_AT_ONCE = 4096


class _Job:
    """One call on its way; `answer` belongs to the event loop that waits for it."""

    __slots__ = ("answer", "begun", "loop", "whose", "work")

    def __init__(self, whose: bytes, work: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.whose = whose
        self.work = work
        self.loop = loop
        self.begun = False
        self.answer: asyncio.Future[Any] = loop.create_future()


class Pool:
    """One per process. Its threads start when there is work for them, and end with `close`."""

    def __init__(self, threads: int, queue_jobs: int) -> None:
        self._threads = threads
        self._most_running = max(1, threads // _SHARE)
        self._queue_jobs = queue_jobs
        self._turns: OrderedDict[bytes, deque[_Job]] = OrderedDict()  # tenants with waiting jobs, next one first
        self._waiting = 0
        self._running: Counter[bytes] = Counter()
        self._started = 0
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        return self._waiting

    async def run(self, whose: bytes, work: Callable[..., _T], *arguments: Any) -> _T:
        """What `work`, with the caller's context variables, returns or raises (StopIteration excepted: it cannot cross).
        ApiError 503 when too many wait."""
        job = _Job(whose, partial(copy_context().run, work, *arguments), asyncio.get_running_loop())
        self._add(job)
        try:
            found: _T = await asyncio.shield(job.answer)
        except asyncio.CancelledError:
            if not self._withdrawn(job):
                await _ended(job.answer)
            raise
        return found

    def close(self) -> None:
        """What waits is given up. Returns at once: a thread ends with what it is doing."""
        with self._changed:
            self._closed = True
            for job in (job for mine in self._turns.values() for job in mine):
                job.answer.cancel()
            self._turns.clear()
            self._changed.notify_all()

    # -- the queue

    def _add(self, job: _Job) -> None:
        with self._changed:
            mine = self._turns.get(job.whose)
            here = len(mine) if mine is not None else 0
            if self._closed or self._waiting >= self._queue_jobs or here >= max(1, self._queue_jobs // _SHARE):
                raise _too_many()
            if mine is None:
                mine = self._turns[job.whose] = deque()
            mine.append(job)
            self._waiting += 1
            if not self._idle and self._started < self._threads:
                self._started += 1
                number = self._started
                threading.Thread(target=self._work, name=f"pool-{number}", daemon=True).start()
            self._changed.notify()

    def _withdrawn(self, job: _Job) -> bool:
        """Whether it had not begun: now it never will."""
        with self._changed:
            if job.begun:
                return False
            if (mine := self._turns.get(job.whose)) is not None:  # else the pool was closed
                mine.remove(job)
                self._waiting -= 1
                if not mine:
                    del self._turns[job.whose]
            return True

    def _next(self) -> _Job | None:
        """The first job of the tenant whose turn it is and who has a thread left."""
        for whose, mine in self._turns.items():
            if self._running[whose] >= self._most_running:
                continue
            job = mine.popleft()
            job.begun = True
            self._waiting -= 1
            if mine:
                self._turns.move_to_end(whose)
            else:
                del self._turns[whose]
            self._running[whose] += 1
            return job
        return None

    # -- a thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while (job := self._next()) is None:
                    if self._closed:
                        return
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
            result, failure = None, None
            try:
                result = job.work()
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                failure = error
            with self._changed:
                self._running[job.whose] -= 1
                if not self._running[job.whose]:
                    del self._running[job.whose]
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                job.loop.call_soon_threadsafe(_tell, job.answer, result, failure)
            del job, result, failure


def _tell(answer: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if answer.done():
        return
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
