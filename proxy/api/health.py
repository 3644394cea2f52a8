"""Two questions of an orchestrator: is the process alive, and can it serve?

`/health` touches nothing, so that a slow disk never gets the process killed; `/ready` asks the
storage, and is false from SIGTERM on, while everything else is served for `server.drain_s` as before,
so that no load balancer sends a request to a closed port. Neither speaks to the upstream: its failure is the client's to see, not ours to hide.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

from fastapi import APIRouter
from fastapi.responses import JSONResponse


class Draining:
    """Whether this process has been asked to end. `seconds`: how long it goes on serving then."""

    def __init__(self, seconds: float) -> None:
        self.begun = False
        self._seconds = seconds

    def watch(self) -> None:
        """Stand in front of the server's own handler of SIGTERM, which stops it at once."""
        if threading.current_thread() is not threading.main_thread():
            return  # of a test: signals are the main thread's
        stop = signal.getsignal(signal.SIGTERM)
        if not callable(stop):
            return
        loop = asyncio.get_running_loop()

        def asked(number: int, frame: FrameType | None) -> None:
            first, self.begun = not self.begun, True
            if first and self._seconds > 0:
                loop.call_soon_threadsafe(loop.call_later, self._seconds, stop, number, None)
            else:
                stop(number, frame)

        signal.signal(signal.SIGTERM, asked)


def health_router(draining: Draining, check: Callable[[], Awaitable[None]]) -> APIRouter:
    """GET /health and GET /ready; `check` raises an exception whose text is the reason."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> JSONResponse:
        if draining.begun:
            return JSONResponse({"status": "draining"}, status_code=503)
        try:
            await check()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
            reason = str(error) or type(error).__name__
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready"})

    return router
