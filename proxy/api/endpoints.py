"""Our own endpoints: is the process well, what has it done, and a session's memory for its owner.

Promises: `/health` touches nothing, so that a slow disk never gets the process killed; `/ready` asks the
storage, and is false from SIGTERM on, while everything else is served for `server.drain_s` as before, so
that no load balancer sends a request to a closed port. Neither speaks to the upstream: its failure is the
client's to see, not ours to hide. `/metrics`, `/vm/stats` and the process's `/vm/bill` hold numbers only; `/vm/context`,
`/vm/provenance` and a conversation's `/vm/bill` answer for a session of the tenant whose credentials come with the request, and for no
other (invariant 6); page ids, never texts, but for `/vm/conversations/ID/export`, which has all that was said (conversation/exported.py); what is long to read is read beside the event loop; errors are
in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from proxy.api.access import Access
from proxy.api.bill import conversation_bill
from proxy.api.caller import Caller
from proxy.api.erasure import Erasures
from proxy.api.memory import Memory, as_api_error, owner_named
from proxy.api.visit import CONTENT_TYPE, Stats
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.exported import exported, header
from proxy.conversation.pages import PathPages
from proxy.conversation.records import (
    GetRecord,
    Record,
    conversation_key,
    owner_of,
    record_at,
    restore_state,
)
from proxy.conversation.tree import ID_BYTES, KeyScope, NodeId, TenantKey
from proxy.errors import ApiError
from proxy.keys import TENANT_BYTES
from proxy.memory.ids import make_page_id, parse_page_id
from proxy.memory.models import MEDIA_PART
from proxy.storage.l2 import StorageError
from proxy.tokens import get_counter

_TURN_DIGITS = 9  # more of them is no turn of anyone's
_PAGE_ID_CHARS = 64
_PIECE_BYTES = 65_536  # of an export, about: a thread for each

log = logging.getLogger(__name__)


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


def own_endpoints(
    draining: Draining, stats: Stats, memory: Memory, access: Access,
    model_table: Callable[[KeyScope], list[dict[str, Any]]], erasures: Erasures,
) -> FastAPI:  # fmt: skip
    """GET /health, /ready, /metrics, /vm/stats, /vm/models, /vm/bill, /vm/context?turn=N (default: the last
    turn), /vm/provenance?page=ID, /vm/conversations/ID/export.

    `/vm/models` says what is held of models, and why, for the credentials that come with the
    request (`model_table` gives it). Bill, context and provenance are about the session that a session header or
    ?session= names, or about the paged conversation that ?conversation= names as the header
    `x-llm-pager-conversation` does, on the path of its last answer; ?user= and ?safety_identifier= are the
    requests', where they have them.

    `/vm/bill` names neither for what this process has answered since its start, of all callers. Its JSON:

        turns, turns_without_usage    answered; of the latter upstream told no usage, so they are in no sum
        llm_pager, sliding_window, full_history    what was billed, and what the same turns would have been:
            prompt_tokens             read, of all rounds, cached and written ones included
            cached_tokens, written_tokens    of them from, and into, the provider's cache
            completion_tokens
            billed_prompt_tokens      the prompt in tokens at the model's full price
            cost_usd                  by list prices; null where one of the models has none in litellm's table
        cache_breaks {reason: {turns, lost_tokens}}    prefixes that had to be read again, by `Reason`:
            model | tools | system | epoch | rewritten | evidence | cold
        models [{model, turns, turns_without_usage, usd_per_million_tokens}]       (of a conversation)
        latest_breaks [{turn, reason, message, lost_tokens}]    the newest 50      (of a conversation)
            message                   the page id from which on the client said something else, or null
            lost_tokens               null where upstream does not say what it cached
    """
    app = FastAPI(title="llm-pager", docs_url=None, redoc_url=None, openapi_url="/vm/openapi.json")
    for failure in (HTTPException, ApiError, StorageError, LookupError):
        app.add_exception_handler(failure, _refused)

    @app.get("/health", summary="Whether the process is well; touches nothing")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", summary="Whether it is to be sent requests: asks the storage; false from SIGTERM on")
    async def ready() -> JSONResponse:
        if draining.begun:
            return JSONResponse({"status": "draining"}, status_code=503)
        try:
            await memory.store.check()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
            reason = str(error) or type(error).__name__
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        said: dict[str, Any] = {"status": "ready"}
        if memory.store.damaged:  # values that were met since the start, by kind
            said["damaged"] = dict(memory.store.damaged)
        if (repaired := memory.store.repaired) is not None:
            said["repaired"] = {"at_s": int(repaired.at_s), "kept": repaired.kept, "lost": repaired.lost}
        return JSONResponse(said)

    @app.get("/metrics", summary="Numbers, in Prometheus's text format")
    async def metrics() -> Response:
        stats.flush()
        return Response(await asyncio.to_thread(stats.prometheus.text), media_type=CONTENT_TYPE)

    @app.get("/vm/stats", summary="What this process has done since its start")
    async def read_stats() -> JSONResponse:
        return JSONResponse(stats.snapshot())

    @app.get("/vm/models", summary="What is held of models for these credentials, and why")
    async def read_models(request: Request) -> JSONResponse:
        who = access.caller(request)
        return JSONResponse({"models": model_table(memory.identity.scope(who.credentials))})

    @app.get("/vm/context", summary="The pages that were in the window of a session's turn (?turn=)")
    async def read_context(request: Request) -> JSONResponse:
        return JSONResponse(await _context(request, _head(request, memory, access), memory))

    @app.get("/vm/bill", summary="What was billed, and would have been: of the process, or of a session or conversation")
    async def read_bill(request: Request) -> JSONResponse:
        if not access.told(request).label and not {"session", "conversation"} & {*request.query_params}:
            return JSONResponse(stats.bill())
        head = _head(request, memory, access)
        return JSONResponse(await asyncio.to_thread(conversation_bill, head, memory.get_record))

    @app.get("/vm/conversations/{name}/export", summary="All of a conversation, with its branches, as JSON Lines")
    async def export(request: Request, name: str) -> Response:
        owner = await asyncio.to_thread(_conversation, name, _tenant(request, memory, access), memory)
        return export_of(owner, name, memory)

    @app.get("/vm/provenance", summary="What a page rests on, and what rests on it (?page=)")
    async def read_provenance(request: Request) -> JSONResponse:
        return JSONResponse(await _provenance(request, _head(request, memory, access), memory))

    _add_erasing(app, memory, access, erasures)
    return app


def _add_erasing(app: FastAPI, memory: Memory, access: Access, erasures: Erasures) -> None:
    """DELETE /vm/conversations/ID, /vm/conversations?session=NAME (or its header), /vm/conversations/ID/messages/PAGE,
    /vm/tenants/self: all that is stored of it is erased (docs/erasure.md); the answer is the receipt. GET /vm/erasures:
    {erasures: [the tenant's receipts, and what is under way]}; DELETE /vm/erasures: the tenant's receipts go. A receipt:

        id, what, by, began_s, ended_s    conversation | message | user | key; tenant | operator | retention; Unix seconds
        under_way                         true, in place of ended_s, until it is done
        conversations [ID]                those that went, or that the message was in; of a user or key all did
        values {kind: number}, objects [name]    what went, in the database and beside it
        messages_sha256 [hexadecimal]     of the bytes of each message as its client sent it, or was sent it
    """

    @app.delete("/vm/conversations/{name}", summary="Erase a conversation; the answer is the receipt")
    async def erase_conversation(request: Request, name: str) -> JSONResponse:
        owner = await asyncio.to_thread(_conversation, name, _tenant(request, memory, access), memory)
        return JSONResponse((await erasures.erase("conversation", "tenant", [owner])).told())

    @app.delete("/vm/conversations", summary="Erase the conversations of a session (its header, or ?session=)")
    async def erase_session(request: Request) -> JSONResponse:
        tenant, identity = _tenant(request, memory, access), memory.identity
        session = _session(request, access.caller(request))
        named = [identity.label(tenant, session), identity.session(tenant, session)]
        values = await asyncio.to_thread(lambda: [memory.store.get(key) or b"" for key in named])
        owners = {owner_of(ids[at : at + ID_BYTES]) for ids in values for at in range(0, len(ids), ID_BYTES)}
        if not owners:
            raise _no_session()
        return JSONResponse((await erasures.erase("conversation", "tenant", owners)).told())

    @app.delete("/vm/conversations/{name}/messages/{page}", summary="Erase a message, wherever its conversation says the same")
    async def erase_message(request: Request, name: str, page: str) -> JSONResponse:
        owner = await asyncio.to_thread(_conversation, name, _tenant(request, memory, access), memory)
        content = await asyncio.to_thread(erasures.content_of, owner, page)
        if content is None:
            raise ApiError(404, "There is no such message in this conversation.", param="page", code="page_not_found")
        return JSONResponse((await erasures.erase("message", "tenant", [owner], content)).told())

    @app.delete("/vm/tenants/self", summary="Erase all that is stored for these credentials")
    async def erase_tenant(request: Request) -> JSONResponse:
        tenant = _tenant(request, memory, access)[:TENANT_BYTES]
        if not await asyncio.to_thread(erasures.has, tenant):
            raise ApiError(404, "Nothing is stored for these credentials.", code="tenant_not_found")
        return JSONResponse((await erasures.erase("user", "tenant", [tenant])).told())

    @app.get("/vm/erasures", summary="Receipts of erasures, and what is under way")
    async def read_erasures(request: Request) -> JSONResponse:
        found = await asyncio.to_thread(erasures.receipts, _tenant(request, memory, access))
        return JSONResponse({"erasures": [erasure.told() for erasure in found]})

    @app.delete("/vm/erasures", summary="Forget the receipts")
    async def forget_erasures(request: Request) -> Response:
        await erasures.forget_receipts(_tenant(request, memory, access))
        return Response(status_code=204)


async def _refused(request: Request, failure: Exception) -> Response:
    """What went wrong, in OpenAI's error shape."""
    headers: Mapping[str, str] = {}
    if isinstance(failure, ApiError):
        error = failure
    elif isinstance(failure, StorageError | LookupError):
        log.error("a request cannot be served: %s", failure)
        error = as_api_error(failure)
    elif isinstance(failure, HTTPException):  # nothing serves the path, or the method
        where, headers = f"{request.method} {request.url.path}", failure.headers or {}
        if failure.status_code == 404:
            error = ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
        elif failure.status_code == 405:
            error = ApiError(405, f"Not allowed: {where}.", code="method_not_allowed")
        else:
            error = ApiError(failure.status_code, str(failure.detail))
    else:
        raise failure
    return Response(error.body(), error.status, {**headers, **error.headers, "content-type": "application/json"})


def _head(request: Request, memory: Memory, access: Access) -> Record:
    """The last answered turn of the conversation or session that the request names."""
    tenant = _tenant(request, memory, access)
    conversation = request.query_params.get("conversation")
    if conversation:
        head = memory.conversation(tenant, conversation)
        if head is None:
            raise _no_conversation()
        return head
    session = _session(request, access.caller(request))
    head = _last(memory.store.get(memory.identity.label(tenant, session)) or b"", memory.get_record)
    if head is None:
        raise _no_session()
    return head


def _tenant(request: Request, memory: Memory, access: Access) -> TenantKey:
    memory.renew()
    who = access.caller(request)
    return memory.identity.tenant(who.credentials, who.person)


def _conversation(name: str, tenant: TenantKey, memory: Memory) -> bytes:
    """Whose a tenant's conversation is."""
    owner = owner_named(tenant, name)
    if owner is None or memory.store.get(conversation_key(owner)) is None:
        raise _no_conversation()
    return owner


def _session(request: Request, who: Caller) -> str:
    session = who.label or request.query_params.get("session")
    if not session:
        raise ApiError(400, "Name the session in its header or in ?session=.", param="session",
                       code="missing_required_parameter")  # fmt: skip
    return session


def _no_conversation() -> ApiError:
    message = "There is no such conversation for these credentials."
    return ApiError(404, message, param="conversation", code="conversation_not_found")


def _no_session() -> ApiError:
    message = "There is no such session for these credentials."
    return ApiError(404, message, param="session", code="session_not_found")


def export_of(owner: bytes, name: str, memory: Memory) -> Response:
    """A conversation as a file of that name."""
    headers = {"content-disposition": f'attachment; filename="{name}.jsonl"'}
    return StreamingResponse(_exported(owner, memory), media_type="application/jsonl", headers=headers)


def _exported(owner: bytes, memory: Memory) -> Iterator[bytes]:
    """A conversation with its branches, in pieces; read in a thread while it is sent."""
    lost: list[NodeId] = []
    lines = exported(owner, memory.store.scan, memory.get, memory.identity, lost)
    piece, size = [header([owner], int(time.time()))], 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size > _PIECE_BYTES:
            yield b"".join(piece)
            piece, size = [], 0
    yield b"".join(piece)
    if lost:
        log.error("%d answers are missing in an export: llm-pager check --storage says why.", len(lost))


def _last(answers: bytes, get: GetRecord) -> Record | None:
    """The last of a session's answers. A first turn may be an application's side request under the
    same name, such as one for a title: it counts where there is nothing longer."""
    ids = (answers[at : at + ID_BYTES] for at in range(0, len(answers), ID_BYTES))
    records = [record for node_id in ids if (record := get(node_id)) is not None][::-1]
    return next((r for r in records if r.turn > 1), records[0] if records else None)


# -- what was in the window


async def _context(request: Request, head: Record, memory: Memory) -> dict[str, Any]:
    asked = request.query_params.get("turn", str(head.turn))
    if not (asked.isascii() and asked.isdigit() and len(asked) <= _TURN_DIGITS) or not 1 <= int(asked) <= head.turn:
        raise ApiError(400, f"turn must be a whole number from 1 to {head.turn}.", param="turn",
                       code="invalid_turn")  # fmt: skip
    return await asyncio.to_thread(_context_at, head, int(asked), memory)


def _context_at(head: Record, turn: int, memory: Memory) -> dict[str, Any]:
    """The window that upstream was sent in a turn. A turn that did not page had everything in front
    of its answer."""
    record = record_at(head, turn, memory.get_record, memory.get_block)
    if record.unkept:
        raise ApiError(404, "The window of this turn was not kept: its client changes what stands before it with"
                       " every request.", param="turn", code="window_not_kept")  # fmt: skip
    derived, crowded = NO_DERIVED, False
    if record.window:
        state = restore_state(record, memory.get_record, memory.get_block)
        pages = [{"page_id": e.page_id, "level": int(e.level)} for e in state.table.resident()]
        derived, crowded = state.derived, bool(state.window and state.window.crowded)
    else:
        pages = [{"page_id": make_page_id(p), "level": 0} for p in range(record.end - 1)]
    return {
        "last_turn": head.turn,
        "turn": turn,
        "paged": bool(record.window),
        "window_too_small": crowded,  # for what the conversation's requests bring
        "pages": pages,
        "derived": [
            {"page_id": i, "provenance": p.provenance, "superseded_by": derived.superseded.get(i)}
            for i, p in derived.pages.items()
        ],
    }


# -- what rests on what


async def _provenance(request: Request, head: Record, memory: Memory) -> dict[str, Any]:
    wanted = request.query_params.get("page", "")
    if not 1 <= len(wanted) <= _PAGE_ID_CHARS:
        raise ApiError(400, "Name a page in ?page=, such as claim_0007 or msg_0042.", param="page",
                       code="missing_required_parameter")  # fmt: skip
    found = await asyncio.to_thread(_provenance_of, wanted, head, memory)
    if found is None:
        raise ApiError(404, "There is no such page in this session.", param="page",
                       code="page_not_found")  # fmt: skip
    return found


def _provenance_of(wanted: str, head: Record, memory: Memory) -> dict[str, Any] | None:
    """Both ways from a page, one step and to the ground; None for a page that is not there."""
    derived = memory.derived_after(head) if head.window else NO_DERIVED
    graph = derived.provenance
    sources, ground = graph.derives_from(wanted), graph.justifies(wanted)
    made = graph.derived(wanted)
    if wanted not in derived.pages:
        place = parse_page_id(wanted)
        if place is None or place[0] >= head.end:
            return None
        position, part = place
        # The ids of media do not depend on how tokens are counted.
        pages = PathPages(memory.load_path(head), get_counter(""), 1, get_record=memory.get_record)
        media = [page.id for page in pages[position].media]
        if part >= MEDIA_PART:  # a medium comes out of its message
            if wanted not in media:
                return None
            sources = ground = [make_page_id(position)]
        else:
            wanted = make_page_id(position, part)
            # A long message is quoted by the name of its first part.
            names = [wanted] if part else [wanted, make_page_id(position, 1)]
            made = [i for name in names for i in graph.derived(name)] + ([] if part else media)
    return {
        "page_id": wanted, "derives_from": sources, "derived": made, "justified_by": ground,
        "superseded_by": derived.superseded.get(wanted),
    }  # fmt: skip

