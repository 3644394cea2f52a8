"""/vm/conversations and all below it, as JSON; /vm/events, what happens as it happens. Documented at /vm/openapi.json.

Promises: fields are only ever added; who asks is told by `access.py`; what takes long runs in the pool, fair between tenants, so a
dashboard holds up no request; a change (pin, unpin) is a mutation with its actor, in the log from the next turn on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse

from proxy.api.access import Access
from proxy.api.memory import Memory
from proxy.api.views import Turns, Views, Who, hits_told
from proxy.errors import ApiError

_LOOK_S = 0.4  # between two looks for a new turn, and
_REST_S = 0.7  # after one was told: the next is still seen within a second,
_LOOK_SHARE = 20  # and at most 1/20 of a processor for them, and, once this much was used up,
_CREDIT_S = 0.1  # for the page that is loaded anew after each turn
_BEAT_S = 15.0  # of silence, then a comment: a connection that is gone is noticed

P = ParamSpec("P")
T = TypeVar("T")
Name = Annotated[str, Query(description="The branch whose path is meant: see `branches`; none: that of the last answer.")]


def _who(request: Request) -> Who:
    vm: Vm = request.app.state.vm
    return vm.who(request)


Asker = Annotated[Who, Depends(_who)]


class Vm:
    """The routes; one per process. `ends`: this process has been asked to end."""

    def __init__(self, views: Views, access: Access, memory: Memory, streams: int, ends: Callable[[], bool]) -> None:
        self.views, self.access, self.memory = views, access, memory
        self.page_s = {False: 0.0, True: 0.0}  # of CPU, that the last page of a conversation (True), or of all, took
        self._streams, self._ends = asyncio.Semaphore(streams), ends
        self.router = APIRouter(prefix="/vm", tags=["conversations"])
        self._add_routes()

    def mount(self, app: FastAPI) -> None:
        app.state.vm = self
        app.include_router(self.router)

        @app.exception_handler(RequestValidationError)
        async def invalid(request: Request, error: RequestValidationError) -> Response:
            first = error.errors()[0]
            name = str(first["loc"][-1])
            told = ApiError(400, f"{name}: {first['msg']}.", param=name, code="invalid_value")
            return Response(told.body(), told.status, media_type="application/json")

    def who(self, request: Request) -> Who:
        self.memory.renew()
        return self.access.who(request)

    async def run(self, who: Who, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In a thread of the pool."""
        return await self.memory.pool.run(who.tenant, lambda: work(*args, **kwargs))

    async def of(self, who: Who, name: str, branch: str, work: Callable[[Turns], T]) -> T:
        """What a view says of a conversation."""
        return await self.run(who, lambda: work(self.views.turns(who, name, branch)))

    async def search(self, who: Who, name: str, branch: str, query: str, limit: int = 20) -> list[dict[str, Any]]:
        """The pages of a conversation that a query is about, best first."""
        pages, asked = await self.of(who, name, branch, lambda at: self.views.search(at, query, limit))
        hits = await self.memory.search(who.tenant, asked, pages) if query.strip() else []
        return await self.run(who, hits_told, hits, pages, query)

    async def pin(self, who: Who, name: str, branch: str, page: str, pinned: bool) -> None:
        """StorageError when it cannot be stored."""
        put = await self.of(who, name, branch, lambda at: self.views.pin(at, page, pinned, int(time.time())))
        identity = self.memory.identity
        await self.memory.store.commit([put], secret=identity.secret, erased=identity.erased)

    async def events(self, who: Who, name: str) -> AsyncIterator[bytes]:
        """`turn` whenever one was answered, by any process: in the conversation, or in any of the asker's."""
        owner = who.owner(name) if name else None
        known = await self.run(who, self.views.version, who, owner)
        said_s, credit_s = time.monotonic(), _CREDIT_S
        yield b": open\n\n"
        while not self._ends():
            began_s = time.monotonic()
            version = await asyncio.to_thread(self.views.version, who, owner)
            took_s = time.monotonic() - began_s
            anew = version != known
            if anew or time.monotonic() - said_s > _BEAT_S:
                yield b"event: turn\ndata: {}\n\n" if anew else b": still here\n\n"
                known, said_s = version, time.monotonic()
            await asyncio.sleep(rest_s := max(_REST_S if anew else _LOOK_S, took_s * _LOOK_SHARE))
            credit_s = min(_CREDIT_S, credit_s + rest_s / _LOOK_SHARE - anew * self.page_s[owner is not None])
            if credit_s < 0:
                await asyncio.sleep(-credit_s * _LOOK_SHARE)
                credit_s = 0.0

    def streamed(self, who: Who, name: str) -> Response:
        if self._streams.locked():
            raise ApiError(503, "Too many dashboards are open here (server.event_streams).", "api_error", "too_many_streams",
                           headers={"retry-after": "30"})  # fmt: skip

        async def told() -> AsyncIterator[bytes]:
            async with self._streams:
                async for piece in self.events(who, name):
                    yield piece

        return StreamingResponse(told(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    def _add_routes(self) -> None:
        views, router = self.views, self.router

        @router.get("/conversations", summary="List conversations, the last used first")
        async def conversations(
            who: Asker,
            q: Annotated[str, Query(description="Words that a conversation begins with.")] = "",
            sort: Annotated[str, Query(description="used, began or title")] = "used",
            cursor: Annotated[str, Query(description="`next_cursor` of the page before.")] = "",
            limit: Annotated[int, Query(description="Rows of a page, at most 200.")] = 50,
        ) -> dict[str, Any]:
            """What they begin with, when they were last used (Unix seconds), their turns, their tokens in the window and in all,
            and what they were billed so far beside a sliding window and the whole history, in tokens at the full price."""
            return await self.run(who, views.conversations, who, q, sort, cursor, limit)

        @router.get("/conversations/{name}", summary="A conversation: its branches, and its turns, the newest first")
        async def conversation(who: Asker, name: str, branch: Name = "", before: int = 0, limit: int = 50) -> dict[str, Any]:
            """Of each turn the tokens of the window and of the history, the epoch that began in it, faults, evidence shown and
            used, pages that left, what was billed, and why the provider's cache was not used, where it was not."""
            return await self.of(who, name, branch, lambda at: views.conversation(at, before, limit))

        @router.get("/conversations/{name}/map", summary="Which pages were in the window of which turns")
        async def memory_map(who: Asker, name: str, branch: Name = "", first: int = 0, last: int = 0) -> dict[str, Any]:
            """`runs` of a page: [first turn, last turn, native | evidence | fault | kept0 ... kept3 (a line, by its level)]; from the
            turn `since` on it was there, and outside the window where it has no run."""
            return await self.of(who, name, branch, lambda at: views.map(at, first, last))

        @router.get("/conversations/{name}/timeline", summary="Tokens of the window beside those of the history")
        async def timeline(who: Asker, name: str, branch: Name = "") -> dict[str, Any]:
            return {"turns": await self.of(who, name, branch, views.timeline)}

        @router.get("/conversations/{name}/bill", summary="What it was billed, and would have been otherwise")
        async def bill(who: Asker, name: str, branch: Name = "") -> dict[str, Any]:
            return await self.of(who, name, branch, views.bill)

        @router.get("/conversations/{name}/turns/{turn}", summary="What upstream was sent in a turn, and why")
        async def turn(who: Asker, name: str, turn: int, branch: Name = "") -> dict[str, Any]:
            """The exact request of its last round (`exact`: its bytes are those that upstream got), each message with what was
            added to it; what it shares with the turn before; each page in the window and the newest outside, and why."""
            return await self.of(who, name, branch, lambda at: views.turn(at, turn))

        @router.get("/conversations/{name}/turns/{turn}/request", summary="The upstream request of a turn, byte for byte")
        async def request(who: Asker, name: str, turn: int, branch: Name = "") -> Response:
            sent = await self.of(who, name, branch, lambda at: views.request(at, turn))
            exact = {"x-llm-pager-exact": "true" if sent.exact else "false"}
            return Response(sent.body, headers={**exact, "x-content-type-options": "nosniff"}, media_type="application/json")

        @router.get("/conversations/{name}/turns/{turn}/diff/{other}", summary="What turn `other` was sent that `turn` was not")
        async def diff(who: Asker, name: str, turn: int, other: int, branch: Name = "") -> dict[str, Any]:
            return await self.of(who, name, branch, lambda at: views.diff(at, turn, other))

        @router.get("/conversations/{name}/explain", summary="Why a page was in the window of a turn, or was not")
        async def explain(who: Asker, name: str, page: str, turn: int = 0, branch: Name = "") -> dict[str, Any]:
            """`why` is one sentence; `turn` 0 is the last one."""
            return await self.of(who, name, branch, lambda at: views.explain(at, page, turn))

        @router.get("/conversations/{name}/search", summary="Search a conversation")
        async def search(who: Asker, name: str, q: str, branch: Name = "", limit: int = 20) -> dict[str, Any]:
            return {"results": await self.search(who, name, branch, q, limit)}

        @router.get("/conversations/{name}/pages/{page}", summary="A page: its text, where it is, what happened to it")
        async def page_(who: Asker, name: str, page: str, branch: Name = "") -> dict[str, Any]:
            return await self.of(who, name, branch, lambda at: views.page(at, page))

        @router.post("/conversations/{name}/pages/{page}/pin", summary="Keep a page in the window, from the next turn on")
        async def pin(who: Asker, name: str, page: str, branch: Name = "") -> dict[str, Any]:
            await self.pin(who, name, branch, page, True)
            return {"page": page, "pinned": True}

        @router.post("/conversations/{name}/pages/{page}/unpin", summary="Take a pin back, from the next turn on")
        async def unpin(who: Asker, name: str, page: str, branch: Name = "") -> dict[str, Any]:
            await self.pin(who, name, branch, page, False)
            return {"page": page, "pinned": False}

        @router.get("/events", summary="Server-sent events: `turn` whenever one was answered")
        async def events(who: Asker, conversation: str = "") -> Response:
            return self.streamed(who, conversation)
