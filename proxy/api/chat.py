"""POST /v1/chat/completions, with any prefix: a request's turn run, and its effects performed.

Promises: plain ASGI on the hot path; a request that we cannot read or place goes to upstream as it
is, and upstream's answer comes back as it is; our own errors have OpenAI's shape; a client that
leaves cancels everything, and nothing half-said is stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, assert_never, cast

from proxy.api.admission import Admission, is_upstreams_to_judge
from proxy.api.exchange import Exchange
from proxy.api.http import (
    Receive,
    Scope,
    Send,
    chat_target,
    decoded,
    deployment,
    encodings,
    plain_headers,
    refuse_dot_segments,
    relay,
    send_error,
)
from proxy.api.intake import Intake
from proxy.api.memory import LONG_MESSAGES, Memory, as_api_error, calibration_key, lesson_keys
from proxy.api.model_facts import ModelFacts
from proxy.api.renditions import Renditions
from proxy.api.visit import Stats, Visit
from proxy.api.writer import Writer
from proxy.config import Config
from proxy.conversation.calling import VM_CALLS, Calling, may_speak_first
from proxy.conversation.channel import wants_json
from proxy.conversation.context import TurnContext
from proxy.conversation.effects import Append, Complete, Effect, Load, Offload, Refused, Search
from proxy.conversation.records import State, conversation_key, owner_of, record_key
from proxy.conversation.report import TurnReport
from proxy.conversation.sieve import Sieve
from proxy.conversation.turn import Answer, Turn
from proxy.errors import ApiError
from proxy.memory.ids import Hit
from proxy.memory.models import StorageTier
from proxy.storage.l2 import StorageError
from proxy.upstream import CHAT_PATH, Header, Reply, Upstream, UpstreamBroken

if TYPE_CHECKING:  # an extra
    from proxy.api.embeddings import Embedder

log = logging.getLogger(__name__)

_SETTLED = 2  # of a turn's states of answers that the request brought, the newest: one of them comes next
_WARNINGS = 256  # remembered, so that each is logged once

Observer = Callable[[TurnReport], None]


class ChatApi:
    """The handler; one per process."""

    def __init__(
        self,
        config: Config,
        upstream: Upstream,
        memory: Memory,
        renditions: Renditions,
        writer: Writer,
        stats: Stats,
        observer: Observer | None,
    ) -> None:
        self._config = config
        self._upstream = upstream
        self._memory = memory
        self._renditions = renditions
        self._writer = writer
        self._stats = stats
        self._observer = observer
        self.model_facts = ModelFacts(config, memory, upstream)
        self._embedder: Embedder | None = None
        if config.search.embeddings == "upstream":
            from proxy.api.embeddings import Embedder

            self._embedder = Embedder(config, upstream, memory)
        self._admission = Admission(config, memory, self.model_facts, observer is not None)
        self._intake = Intake(config.server.body_limit_bytes, config.server.bodies_limit_bytes)
        self._warned: set[str] = set()  # what was logged
        self._forwards_encoded = config.upstream.provider == "openai"

    def queued(self) -> dict[str, float]:
        """Jobs that wait, by queue."""
        return {
            "pool": self._memory.pool.waiting, "writer": self._writer.waiting, "decoders": self._renditions.waiting,
            "embedder": self._embedder.waiting if self._embedder is not None else 0,
        }  # fmt: skip

    async def close(self) -> None:
        """What is being asked beside the requests is given up."""
        await self.model_facts.close()
        if self._embedder is not None:
            await self._embedder.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request, a POST."""
        try:
            refuse_dot_segments(Visit.of(scope).path)
            body = await self._intake.read(scope, receive)
            if names := encodings(scope["headers"]):
                scope, body = await self._decoded(scope, body, names)
        except ApiError as error:
            await send_error(send, error)
            return
        work, gone = asyncio.current_task(), asyncio.create_task(_disconnected(receive))
        assert work is not None

        def leave(_: asyncio.Task[None]) -> None:
            work.cancel()

        gone.add_done_callback(leave)
        try:
            await self._serve(scope, body, send)
        except asyncio.CancelledError:
            if not gone.done():
                raise  # the server ends
            work.uncancel()
        finally:
            gone.remove_done_callback(leave)
            gone.cancel()

    async def _decoded(
        self, scope: Scope, body: bytes, names: list[str]
    ) -> tuple[Scope, bytes]:
        """The request with a plain body; as it came when it cannot be read. ApiError 413."""
        server = self._config.server
        plain = await asyncio.to_thread(
            decoded, body, names, server.body_limit_bytes, server.body_ratio
        )
        if plain is None:
            return scope, body
        return {**scope, "headers": plain_headers(scope["headers"])}, plain

    async def _serve(self, scope: Scope, body: bytes, send: Send) -> None:
        exchange: Exchange | None = None
        context: TurnContext | None = None
        visit = Visit.of(scope)
        try:
            context = await self._admitted(scope, body, send)
            if context is None:
                return
            turn = await self._memory.pool.run(context.tenant, Turn, context) if context.is_large else Turn(context)
            visit.placed(context.decoded["model"], context.place.path[0].id)
            exchange = self._exchange(turn, context, scope, send)
            try:
                answer = await self._run(turn, context, exchange, scope["headers"], visit)
            except (LookupError, ValueError) as error:
                paid = exchange.started or (exchange.asked and type(error) is not LookupError)
                if paid or context.place.record is None or context.place.start:
                    raise
                log.warning("a conversation begins anew: what is stored of it cannot be used (%r)", error)
                await exchange.close()
                context = await self._admission.anew(context)
                turn = Turn(context)
                exchange = self._exchange(turn, context, scope, send)
                answer = await self._run(turn, context, exchange, scope["headers"], visit)
            if answer.refused is None:  # before the end is sent
                visit.answered(answer.report, answer.usage, context.state is None)
            await exchange.finish(answer, _own_headers(answer), visit.memory_lost > 0)
            if answer.report.warning is not None:
                self._warn(f"model {context.decoded['model']}: {answer.report.warning}")
            if answer.refused is None:
                self._stats.told(answer.report)
                if self._observer is not None:
                    self._observer(answer.report)
                kept = visit.memory_lost == 0 and context.identity is self._memory.identity  # nothing was erased since
                if self._writer.active and turn.shown and kept:
                    self._writer.submit(scope["headers"], turn.pages, context.counter, turn.shown)
                if self._embedder is not None and turn.window is not None and kept:
                    self._embedder.submit(context.tenant, scope["headers"], turn.pages)
                query = scope.get("query_string", b"")
                self.model_facts.look(context.scope, context.decoded["model"], scope["headers"], query)
        except ApiError as error:
            await _fail(exchange, send, error)
        except UpstreamBroken as error:
            if exchange is not None and exchange.started:
                log.warning("stream cut: %s", error)
                raise  # the server closes the connection: the client sees a broken answer
            message = f"The upstream broke off its answer: {error}."
            broken = ApiError(502, message, "api_error", "upstream_broken")
            await _fail(exchange, send, broken)
        except StorageError as error:
            self._warn(f"requests cannot be served: {error}")
            await _fail(exchange, send, as_api_error(error))
        except Exception as error:
            whole = context is not None and not context.place.start  # what upstream needs is in the body
            if type(error) is LookupError and not whole:  # our own word, unlike KeyError and IndexError
                self._warn(f"requests cannot be served: {error}")
                unread = self._memory.store.trouble  # it is not known then what is there
                await _fail(exchange, send, as_api_error(StorageError(unread) if unread else error))
                return
            if exchange is None or exchange.asked:
                raise
            log.exception("a request could not be paged: it goes upstream as it is")  # invariant 1
            await self._unpaged(scope, body, send)
        finally:
            if exchange is not None:
                await exchange.close()

    async def _admitted(self, scope: Scope, body: bytes, send: Send) -> TurnContext | None:
        """The request's turn; None when it was answered by upstream, as it is."""
        headers = scope["headers"]
        try:
            if not encodings(headers):  # else upstream may know them
                query = scope.get("query_string", b"")
                return await self._admission.admit(headers, query, body, deployment(Visit.of(scope).path))
        except ApiError as error:
            if not is_upstreams_to_judge(error):
                raise
        except (StorageError, UpstreamBroken):
            raise
        except Exception as error:
            if type(error) is LookupError:
                raise
            log.exception("a request could not be placed: it goes upstream as it is")  # invariant 1
        await self._unpaged(scope, body, send)
        return None

    async def _unpaged(self, scope: Scope, body: bytes, send: Send) -> None:
        """The request as it came, and upstream's answer as it comes. Raises as upstream does."""
        visit = Visit.of(scope)
        visit.unpaged()
        headers, query = scope["headers"], scope.get("query_string", b"")
        if not encodings(headers):
            reply = await self._upstream_of(scope).chat(body, headers, query)
        elif self._forwards_encoded:
            path = chat_target(visit.path)
            reply = await self._upstream.forward("POST", path, query, headers, _whole(body))
        else:
            raise ApiError(415, "The request body cannot be decoded; send it without content-encoding.",
                           code="unsupported_content_encoding")
        visit.refusals += reply.status >= 400
        await relay(reply, send)

    def _warn(self, warning: str) -> None:
        """One line for each: the same client meets it with every request."""
        if warning in self._warned:
            return
        if len(self._warned) >= _WARNINGS:
            self._warned.clear()
        self._warned.add(warning)
        log.warning("%s", warning)

    def _upstream_of(self, scope: Scope) -> Upstream:
        """The upstream, at the place where it has what the client's path names."""
        path = chat_target(Visit.of(scope).path)
        return self._upstream if path == CHAT_PATH else cast(Upstream, _At(self._upstream, path))

    # -- the turn's effects

    def _exchange(
        self, turn: Turn, context: TurnContext, scope: Scope, send: Send
    ) -> Exchange:
        decoded = context.decoded
        config = self._config.stream

        def new_sieve() -> Sieve:  # asked for at the first `Complete`: the turn's channel is known
            options = decoded.get("stream_options") or {}
            return Sieve(
                turn.channel,
                config.hold_tokens if may_speak_first(context.facts, turn.window) else 0,
                config.hold_ms,
                wants_json(decoded),
                bool(options.get("include_usage")),
                context.counter.text,
                turn.talks_of_tools,
                config.event_limit_bytes,
            )

        return Exchange(
            send,
            self._upstream_of(scope),
            scope["headers"],
            scope.get("query_string", b""),
            bool(decoded.get("stream")),
            new_sieve,
            self._config,
        )

    async def _run(
        self, turn: Turn, context: TurnContext, exchange: Exchange, headers: list[Header], visit: Visit
    ) -> Answer:
        dialogue = turn.run()
        patience = self._renditions.patience()
        reply: Any = None
        effect: Effect | Answer | None = None
        stored: frozenset[bytes] = frozenset()
        loaded: dict[str, tuple[StorageTier, float, float]] = {}  # when it began, and ended
        trace, took = visit.trace, self._stats.took
        model = context.decoded["model"]
        appended, lost, pool = False, False, self._memory.pool
        long_steps = (Offload, Search, Complete) if len(turn.path) > LONG_MESSAGES else Offload
        try:
            while True:
                if context.is_large or isinstance(effect, long_steps):
                    effect = await pool.run(context.tenant, _next, dialogue, reply)
                else:
                    effect = _next(dialogue, reply)
                began_s = time.perf_counter()
                if isinstance(effect, Answer):
                    answer = effect
                    break
                if isinstance(effect, Offload):
                    reply = None
                elif isinstance(effect, Complete):
                    visit.asks(turn.report, turn.window.epoch if turn.window else 0)
                    visit.remembers(self._memory.store.trouble is None and not visit.reads.failed)  # as far as is known
                    if trace is not None:
                        exchange.headers = trace.calls(headers, visit)
                    reply = await exchange.complete(effect)
                    took("upstream", time.perf_counter() - began_s)
                    if trace is not None:
                        trace.called(reply)
                    if isinstance(reply, Refused):
                        visit.refused(reply)
                    else:
                        reply.ended_s = time.time()
                        if self._memory.store.suspends and (end := turn.ending(reply)) is not None:
                            lessons = lesson_keys(context.scope, model, context.counter.name)
                            self._memory.store.ahead([*lessons, record_key(end), conversation_key(owner_of(end))])
                elif isinstance(effect, Append):
                    reply = None
                    records = len(effect.records)
                    try:
                        stored, appended = await self._append(effect, context), True
                        if len(stored) == records:
                            turn.was_stored()
                    except StorageError:  # the store has said why
                        lost = True
                    took("commit", time.perf_counter() - began_s)
                    if trace is not None:
                        trace.did("commit", began_s, {"llm_pager.records": records, "llm_pager.lost": lost})
                elif isinstance(effect, Search):
                    near: list[Hit] = []
                    if self._embedder is not None:
                        with suppress(StorageError):  # else it is by words
                            near = await self._embedder.near(
                                context.tenant, headers, effect, turn.pages, context.identity
                            )
                    reply = await self._memory.search(context.tenant, effect, turn.pages, near, context.identity)
                    took("search", time.perf_counter() - began_s)
                    if trace is not None:
                        trace.did("search", began_s, {"llm_pager.queries": len(effect.queries), "llm_pager.hits": len(reply)})
                elif isinstance(effect, Load):
                    reply = await self._renditions.load(
                        context.tenant, effect, turn.pages, patience, context.identity
                    )
                    loaded[effect.page_id] = visit.reads.coldest, began_s, (ended_s := time.perf_counter())
                    took("load", ended_s - began_s)
                else:
                    assert_never(effect)
        finally:
            dialogue.close()
        if turn.unremembered is not None:
            log.error("an answer is not remembered: what it goes on from is damaged (%r)", turn.unremembered)
        visit.remembers(not lost and turn.unremembered is None)
        for fault in answer.report.faults:
            parts = [where for page_id, where in loaded.items() if page_id.partition(".")[0] == fault.page_id.partition(".")[0]]
            fault.tier = max((tier for tier, _, _ in parts), default=fault.tier)
            fault.ms = sum(ended_s - began_s for _, began_s, ended_s in parts) * 1000
            if trace is not None:
                trace.faulted(fault, min((began_s for _, began_s, _ in parts), default=time.perf_counter()))
        ours = [record for record, _ in turn.settled]
        if turn.record is not None and turn.window is not None:
            ours.append(turn.record)
        if ours and all(record.id in stored for record in ours):  # else another request's state is the one
            if turn.window is not None and turn.record is not None and not turn.record.unkept:
                state = State(turn.window, turn.table, turn.pages.derived)
                self._memory.keep_state(turn.record, state)
            for record, settled in turn.settled[-_SETTLED:]:
                self._memory.keep_settled(record, settled)
        if answer.refused is not None:
            if answer.unexplained:
                self.model_facts.failed(context.scope, model)
        elif turn.record is not None:  # it was an answer
            billed = (answer.usage or {}).get("prompt_tokens")
            tokens = billed if isinstance(billed, int) and billed > 0 else answer.report.used_tokens
            self.model_facts.answered(context.scope, model, tokens, answer.doubted_tokens)
        if answer.learned and not appended:  # by an answer that cannot be remembered
            with suppress(StorageError):
                await self.model_facts.learn(context.scope, model, answer.learned)
        if answer.learned:
            log.warning("model %s: learned %s", model, answer.learned)
        return answer

    async def _append(self, effect: Append, context: TurnContext) -> frozenset[bytes]:
        """Store a turn and what it taught in one commit; what is stored already was billed before."""
        model, facts = context.decoded["model"], dict(effect.facts)
        more: list[tuple[bytes, bytes]] = []
        lesson, record = effect.lesson, effect.records[-1]
        if lesson is not None and self._memory.get_record(record.id) is None:
            key = calibration_key(context.scope, model, context.counter.name)
            more.append((key, lesson.calibration.encode()))
            facts |= lesson.facts
            if lesson.warning:
                log.warning("model %s: %s", model, lesson.warning)
        if effect.calls is not None and self._memory.get_record(record.id) is None:
            facts[VM_CALLS] = effect.calls
            before = Calling.of(context.facts)
            if effect.calls.given_up != before.given_up:
                log.warning(
                    "model %s: %s", model, _GIVEN_UP % effect.calls.missed if effect.calls.given_up else _TAKEN_UP
                )
        if facts:
            more += self.model_facts.lessons(context.scope, model, facts)
        return await self._memory.append(context.tenant, effect, context.identity, more)


_GIVEN_UP = (
    "no VM call came in %d turns that needed one, so its next epochs go without the VM tools; now and then they are"
    " tried again (memory.tools: always keeps them)"
)
_TAKEN_UP = "a VM call helped: its next epochs have the VM tools again"


def _next(dialogue: Generator[Effect, Any, Answer], reply: Any) -> Effect | Answer:
    """What the turn asks next, or how it ended."""
    try:
        return dialogue.send(reply)
    except StopIteration as end:
        answer: Answer = end.value
        return answer


class _At:
    """The chat door of an upstream at another path than the usual one."""

    def __init__(self, upstream: Upstream, path: str) -> None:
        self._upstream = upstream
        self._path = path

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"") -> Reply:
        return await self._upstream.chat(body, headers, query, self._path)


async def _whole(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _fail(exchange: Exchange | None, send: Send, error: ApiError) -> None:
    if exchange is None:
        await send_error(send, error)
    else:
        await exchange.fail(error)


def _own_headers(answer: Answer) -> list[Header]:
    report = answer.report
    if report.channel == "bypass":
        return []
    vm = (answer.usage or {}).get("vm") or {}
    headers: list[Header] = [(b"x-llm-pager-rounds", b"%d" % report.rounds)]
    if vm:
        headers.append((b"x-llm-pager-billed-prompt-tokens", b"%d" % vm["prompt_tokens"]))
    return headers
