"""Looking into the memory from outside: counts for operators, and a session's window at any turn.

Promises: `/vm/stats` holds numbers only; `/vm/context` answers for a session of the tenant whose
credentials come with the request, and for no other (invariant 6); page ids, never texts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from proxy.api.archive import Archive
from proxy.api.caller import presented
from proxy.api.memory import Memory
from proxy.api.stats import Stats
from proxy.conversation.state import history, restore_state
from proxy.conversation.tree import Record
from proxy.errors import ApiError


def vm_router(
    stats: Stats, memory: Memory, archive: Archive, session_headers: Collection[str]
) -> APIRouter:
    """GET /vm/stats and GET /vm/context?turn=N (default: the last turn)."""
    router = APIRouter(prefix="/vm")

    @router.get("/stats")
    async def read_stats() -> JSONResponse:
        return JSONResponse(stats.snapshot())

    @router.get("/context")
    async def read_context(request: Request) -> Response:
        try:
            head = _head(request, memory, session_headers)
            return JSONResponse(await _context(request, head, memory, archive))
        except ApiError as error:
            return Response(error.body(), error.status, media_type="application/json")

    return router


def _head(request: Request, memory: Memory, session_headers: Collection[str]) -> Record:
    """The last answered turn of the session that the request names."""
    key, session = presented(request.scope["headers"], session_headers)
    session = session or request.query_params.get("session")
    if not session:
        raise ApiError(400, "Name the session in its header or in ?session=.", param="session")
    tenant = memory.identity.tenant(key, request.query_params.get("user", ""))
    node = memory.store.get(memory.identity.session(tenant, session))
    head = memory.get_record(node) if node else None
    if head is None:
        raise ApiError(404, "There is no such session for these credentials.", param="session",
                       code="session_not_found")  # fmt: skip
    return head


async def _context(
    request: Request, head: Record, memory: Memory, archive: Archive
) -> dict[str, Any]:
    asked = request.query_params.get("turn", str(head.turn))
    if not asked.isascii() or not asked.isdigit() or len(asked) > 9:
        raise ApiError(400, "turn must be a whole number.", param="turn")
    log = history(head, memory.get_record)
    levels = log.get_levels_at_turn(int(asked))
    answer: dict[str, Any] = {
        "last_turn": head.turn,
        "turn": int(asked),
        "paged": bool(head.window),
        "pages": [{"page_id": page_id, "level": int(level)} for page_id, level in levels],
        "segments": [],
        "checkpoint": None,
    }
    if head.window:
        derived = restore_state(head, memory.get_record, memory.get_block).derived
        answer["segments"] = [
            {"page_id": i, "provenance": page.provenance, "superseded_by": derived.superseded.get(i)}
            for i, page in derived.pages.items()
        ]
        closing = head.id if head.closing else head.closed
        answer["checkpoint"] = await archive.checkpoint_of(closing) if closing else None
    return answer
