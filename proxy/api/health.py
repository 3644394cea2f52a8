"""Two questions of an orchestrator: is the process alive, and can it serve?

`/health` touches nothing, so that a slow disk never gets the process killed; `/ready` asks the
storage. Neither speaks to the upstream: its failure is the client's to see, not ours to hide.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse


def health_router(check: Callable[[], Awaitable[None]]) -> APIRouter:
    """GET /health and GET /ready; `check` raises an exception whose text is the reason."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> JSONResponse:
        try:
            await check()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
            reason = str(error) or type(error).__name__
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready"})

    return router
