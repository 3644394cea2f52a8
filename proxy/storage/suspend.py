"""Synchronous code that may wait: a coroutine that whatever it calls, however deep, can suspend.

The core asks for what is stored by a plain call, from deep inside synchronous code on the event loop. Where the
answer comes over a network, that call has to let the event loop go on meanwhile. A coroutine that was made
`suspendable` runs in a greenlet of its own; `wait`, called anywhere below it, gives what it waits for to the event
loop and continues when that is done (as SQLAlchemy's asyncio does it).

Promises: `await suspendable(c)` is `await c`: the same task, context variables, result, exceptions and
cancellation; who never waits is never suspended. Only stores that may wait need it (`Store.suspends`): nothing of
this is imported for others.

What a caller has to keep: a task that waits holds nothing that another one on the same thread would block for (a
`threading.Lock`: that thread would wait for itself): such work goes to a thread of the pool, where a call simply
blocks (`can_wait` is False there). And what a coroutine changes stands half changed while what it calls waits, as it
does while a thread of the pool is interrupted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import ContextVar
from functools import wraps
from types import coroutine
from typing import Any, ParamSpec, TypeVar

from greenlet import getcurrent, greenlet

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Scope:
    """One request, for the store that it reads: what was asked for ahead, when it last read (by the store's clock), and
    whether something could not be read."""

    __slots__ = ("failed", "found", "read_us")

    def __init__(self) -> None:
        self.found: dict[Any, Any] = {}
        self.read_us: int | None = None
        self.failed = False


_SCOPE: ContextVar[Scope | None] = ContextVar("scope", default=None)


class _Suspended(greenlet):
    """What a coroutine runs in; its parent is whoever drives it: the task's own stack."""


async def suspendable(awaitable: Awaitable[_T]) -> _T:
    """What it returns or raises; synchronous code that it calls may `wait`. For work beside the requests."""
    _SCOPE.set(None)
    return await _driven(awaitable)


def suspending(function: Callable[_P, Awaitable[_T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The same coroutine function, each of whose calls is one request, and `suspendable`."""

    @wraps(function)
    async def made(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        token = _SCOPE.set(Scope())
        try:
            return await _driven(function(*args, **kwargs))
        finally:
            _SCOPE.reset(token)

    return made


def scope() -> Scope | None:
    """The request that this code works for: also in a thread that runs in its context."""
    return _SCOPE.get()


def can_wait() -> bool:
    """Whether this code runs below a `suspendable`, in its thread."""
    return isinstance(getcurrent(), _Suspended)


def wait(awaitable: Awaitable[_T]) -> _T:
    """What it returns or raises. Only where `can_wait`; may be cancelled, as the task itself."""
    return _run(awaitable)


@coroutine
def _driven(awaitable: Awaitable[_T]) -> Generator[Any, Any, _T]:
    """Hand the greenlet's futures to the event loop, and what came of them back."""
    inner = _Suspended(_run, getcurrent())
    inner.gr_context = getcurrent().gr_context
    result = inner.switch(awaitable)
    while not inner.dead:
        try:
            sent = yield result
        except BaseException as error:  # noqa: BLE001 - the coroutine's to handle
            result = inner.throw(error)
        else:
            result = inner.switch(sent)
    done: _T = result
    return done


def _run(awaitable: Awaitable[_T]) -> _T:
    """Perform it in this greenlet; each future that it waits for goes to whoever drives the greenlet."""
    steps = awaitable.__await__()
    try:
        future = next(steps)
        while True:
            driver = getcurrent().parent
            assert driver is not None
            try:
                sent = driver.switch(future)
            except BaseException as error:  # noqa: BLE001 - thrown into it from outside
                future = steps.throw(error)
            else:
                future = steps.send(sent)
    except StopIteration as end:
        result: _T = end.value
        return result
