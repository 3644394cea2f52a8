"""POST /v1/chat/completions: from bytes to a turn, and the turn's effects performed.

Promises: plain ASGI on the hot path; a wrong request gets OpenAI's error shape and status; a client
that leaves cancels everything, and nothing half-said is stored.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import takewhile
from typing import Any

import msgspec

from proxy.api.exchange import Exchange
from proxy.api.memory import Memory
from proxy.api.passthrough import Receive, Scope, Send, send_error
from proxy.config import Config, effective_reserve
from proxy.conversation.body import Body, Fields, message_ends, read_body
from proxy.conversation.effects import Append, Complete, Load, Search
from proxy.conversation.history import HistoryCache, Known
from proxy.conversation.identify import Place, chain, place
from proxy.conversation.limits import Limits
from proxy.conversation.report import TurnReport
from proxy.conversation.sieve import Sieve
from proxy.conversation.tree import Anchor, Node
from proxy.conversation.turn import Answer, Turn, TurnInput
from proxy.errors import ApiError
from proxy.memory.eviction_policy import ImportanceWeightedLRU
from proxy.memory.models import VMMode
from proxy.memory.working_set import WorkingSetConfig
from proxy.storage.l2 import StorageError
from proxy.tokens import TokenCounter, get_counter, model_card, tokens_upper_bound
from proxy.upstream import Header, Upstream, UpstreamBroken

log = logging.getLogger(__name__)

Observer = Callable[[TurnReport], None]
_NO_HISTORIES = HistoryCache(0)
_CHAIN_AT_ONCE = 512  # more new messages than this are hashed off the event loop
_SESSION_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


class ChatApi:
    """The handler; one per process."""

    def __init__(
        self, config: Config, upstream: Upstream, memory: Memory, observer: Observer | None
    ) -> None:
        self._config = config
        self._upstream = upstream
        self._memory = memory
        self._observer = observer
        self._policy = ImportanceWeightedLRU()
        self._limits = lru_cache(maxsize=256)(self._make_limits)
        self._fixed_tokens = lru_cache(maxsize=1024)(_fixed_tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request."""
        try:
            if scope["method"] != "POST":
                raise ApiError(
                    405,
                    f"Not allowed to {scope['method']} on {scope['path']}. (HINT: use POST.)",
                    code="method_not_allowed",
                    headers={"allow": "POST"},
                )
            body = await _read(scope, receive, self._config.server.body_limit_bytes)
        except ApiError as error:
            await send_error(send, error)
            return
        work = asyncio.ensure_future(self._serve(scope["headers"], body, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
        if not work.cancelled() and (failure := work.exception()) is not None:
            raise failure

    async def _serve(self, headers: list[Header], body: bytes, send: Send) -> None:
        exchange: Exchange | None = None
        try:
            given = await self._place(headers, body)
            turn = Turn(given)
            exchange = self._exchange(turn, given, headers, send)
            answer = await self._run(turn, given, exchange)
            await exchange.finish(answer, _own_headers(answer))
            if self._observer is not None and answer.refused is None:
                self._observer(answer.report)
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
            log.error("%s", error)
            failed = ApiError(503, str(error), "api_error", "storage_unavailable")
            await _fail(exchange, send, failed)
        except LookupError as error:
            log.exception("damaged storage")
            damaged = ApiError(500, f"Storage is damaged: {error}.", "api_error", "storage_damaged")
            await _fail(exchange, send, damaged)

    # -- from bytes to a turn

    async def _place(self, headers: list[Header], body: bytes) -> TurnInput:
        memory = self._memory
        key, session = self._caller(headers)
        scope = memory.identity.tenant(key, session or "")
        try:
            split = read_body(body, scope, memory.histories)
            decoded = Decoded(split.fields)
            _validate(decoded)
        except UnicodeDecodeError as error:  # strings are decoded late, wherever one is looked at
            raise ApiError(400, f"The JSON body of the request is not valid UTF-8: {error}.",
                           code="invalid_json") from None
        session = session or _metadata_session(decoded)
        user = decoded.get("safety_identifier") or decoded.get("user") or ""
        tenant = memory.identity.tenant(key, str(user))
        session_key = memory.identity.session(tenant, session) if session else None
        if split.known is not None and split.known.tenant != tenant:  # another user of this key
            split = read_body(body, scope, _NO_HISTORIES)
        if len(split.new) > _CHAIN_AT_ONCE:
            nodes, anchors = await asyncio.to_thread(chain, split, memory.identity, tenant)
        else:
            nodes, anchors = chain(split, memory.identity, tenant)
        if not nodes:  # only system messages: nothing to remember them by but themselves
            nodes, anchors = _only_system(split, memory, tenant)
            split = split._replace(system=[], history=None)
        found = place(
            nodes, anchors, memory.identity, tenant, memory.library, session_key,
            self._config.sessions.reattach,
        )
        if found.start == 0 and found.floor == 0:
            self._remember(split, scope, tenant, found)
        return await self._input(body, split, decoded, tenant, session_key, found)

    def _caller(self, headers: list[Header]) -> tuple[str, str | None]:
        """The presented key and the explicit session, if any."""
        key, session = "", None
        names = self._config.sessions.headers
        for name, value in headers:
            if name in (b"authorization", b"api-key", b"x-api-key"):
                key = key or value.decode("latin-1")
            elif name.decode("latin-1") in names and session is None:
                session = _checked_session(value.decode("latin-1"), name.decode("latin-1"))
        return key, session

    def _remember(self, split: Body, scope: bytes, tenant: bytes, found: Place) -> None:
        """Keep the history's bytes, so that the next body is recognised by them."""
        if split.history is None:
            return
        known, shared = split.known, split.shared
        ends = known.ends[:shared] if known else []
        counts = known.counts[:shared] if known else []
        ends = ends + message_ends(
            split.history, [raw for raw, _ in split.new], ends[-1] if ends else 0
        )
        nodes = counts[-1] if counts else 0
        for _, message in split.new:
            nodes += message.get("role") not in ("system", "developer")
            counts.append(nodes)
        new = Known(split.history, ends, counts, found.path, found.anchors, tenant)
        self._memory.histories.add(scope, new, known)

    async def _input(
        self,
        body: bytes,
        split: Body,
        decoded: Decoded,
        tenant: bytes,
        session_key: bytes | None,
        found: Place,
    ) -> TurnInput:
        memory = self._memory
        model = decoded["model"]
        limits = self._limits(model, _max_tokens(decoded), self._learned(model))
        window, table = None, None
        if found.record is not None:
            window, table = await memory.state_after(found.record)
        counter = get_counter(model, self._config.model_override(model).tokenizer)
        surely = window is None and found.start == 0 and len(body) <= limits.budget_tokens
        surely = surely and tokens_upper_bound(body) <= limits.budget_tokens
        tools = split.fields.get("tools")
        fixed = 0
        if not surely:
            raw_tools = bytes(tools) if tools is not None else b""
            fixed = self._fixed_tokens(tuple(split.system), raw_tools, counter)
            await _count(found.path, counter)
        return TurnInput(
            body, split.fields, split.order, decoded, split.system, found.path, found.start,
            found.floor, found.anchors, found.record, window, table, limits, counter,
            memory.identity, tenant, session_key, self._policy, memory.substitutes, fixed, surely,
            self._observer is not None,
        )

    def _learned(self, model: str) -> tuple[tuple[str, object], ...]:
        return tuple(sorted(self._memory.learned(model).items()))

    def _make_limits(
        self, model: str, max_tokens: int | None, learned: tuple[tuple[str, object], ...]
    ) -> Limits:
        config, override = self._config, self._config.model_override(model)
        card, facts = model_card(model), dict(learned)
        l0 = config.tiers.l0
        known = card.known or override.window_tokens is not None
        window = override.window_tokens or card.window_tokens
        tokens = window if l0.tokens == "auto" else l0.tokens
        reserve = effective_reserve(tokens, l0.reserve_tokens, max_tokens)
        tools = override.tools if override.tools is not None else facts.get("tools", True)
        role = override.developer_role or facts.get("developer_role") or card.developer_role
        return Limits(
            working_set=WorkingSetConfig(
                max_l0_tokens=tokens,
                reserved_tokens=reserve,
                eviction_threshold=l0.eviction_threshold,
                target_utilization=l0.target_utilization,
            ),
            window_tokens=window,
            window_known=known,
            mode=VMMode(config.memory.mode),
            model_takes_tools=bool(tools),
            developer_role="developer" if role == "developer" else "system",
            faults_per_turn=config.faults.max_per_turn,
            fault_tokens=config.faults.max_tokens_per_turn,
            max_rounds=config.faults.max_rounds,
            prefetch_pages=config.prefetch.max_pages,
            prefetch_tokens=config.prefetch.max_tokens,
            manifest_tokens=config.manifest.max_tokens,
            page_tokens=config.pages.max_tokens,
            search_results=config.search.max_results,
            snippet_tokens=config.search.snippet_tokens,
        )

    # -- the turn's effects

    def _exchange(
        self, turn: Turn, given: TurnInput, headers: list[Header], send: Send
    ) -> Exchange:
        decoded = given.decoded
        config = self._config.stream

        def new_sieve() -> Sieve:  # asked for at the first `Complete`: the turn's channel is known
            options = decoded.get("stream_options") or {}
            formatted = (decoded.get("response_format") or {}).get("type", "text") != "text"
            return Sieve(
                turn.vm_names,
                config.hold_tokens,
                config.hold_ms,
                formatted,
                bool(options.get("include_usage")),
                given.counter.text,
            )

        return Exchange(
            send,
            self._upstream,
            headers,
            bool(decoded.get("stream")),
            new_sieve,
            self._config.server.body_limit_bytes,
        )

    async def _run(self, turn: Turn, given: TurnInput, exchange: Exchange) -> Answer:
        dialogue = turn.run()
        reply: Any = None
        stored: frozenset[bytes] = frozenset()
        try:
            while True:
                effect = dialogue.send(reply)
                if isinstance(effect, Complete):
                    reply = await exchange.complete(effect)
                elif isinstance(effect, Append):
                    stored = await self._memory.append(effect)
                    reply = None
                elif isinstance(effect, Search):
                    reply = await self._memory.search(effect, given.path, turn.pages)
                elif isinstance(effect, Load):
                    reply = turn.pages.text(effect.position, effect.part, effect.level)
        except StopIteration as end:
            answer: Answer = end.value
        finally:
            dialogue.close()
        if turn.record is not None and turn.window is not None and turn.record.id in stored:
            self._memory.keep_state(turn.record, turn.window, turn.table)
        if answer.learned:
            log.warning("model %s: learned %s", given.decoded["model"], answer.learned)
            await self._memory.learn(given.decoded["model"], answer.learned)
        return answer


class Decoded(Mapping[str, Any]):
    """The request's top-level fields, each decoded when it is asked for."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._values: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            self._values[name] = msgspec.json.decode(self._fields[name])
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


async def _read(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit_bytes:
            raise _too_large(limit_bytes)
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "Send the request body without content-encoding.",
                           code="unsupported_content_encoding")
    message = await receive()
    if not message.get("more_body"):
        return bytes(message.get("body", b""))
    parts, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client left while it sent the body.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than {limit_bytes} bytes (server.body_limit_bytes).",
        code="request_too_large",
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _fail(exchange: Exchange | None, send: Send, error: ApiError) -> None:
    if exchange is None:
        await send_error(send, error)
    else:
        await exchange.fail(error)


def _validate(decoded: Mapping[str, Any]) -> None:
    """What we rely on ourselves; everything else is upstream's to judge."""
    model = decoded.get("model")
    if not model:
        raise ApiError(400, "you must provide a model parameter", param="model",
                       code="missing_required_parameter")
    if not isinstance(model, str):
        raise ApiError(400, "Invalid type for 'model': expected a string.", param="model",
                       code="invalid_type")
    expected: tuple[tuple[str, type, str], ...] = (
        ("stream", bool, "a boolean"),
        ("n", int, "an integer"),
        ("tools", list, "an array"),
        ("metadata", dict, "an object"),
        ("stream_options", dict, "an object"),
        ("response_format", dict, "an object"),
    )
    for name, kind, words in expected:
        value = decoded.get(name)
        if value is not None and not isinstance(value, kind):
            raise ApiError(
                400, f"Invalid type for '{name}': expected {words}.", param=name, code="invalid_type"
            )


def _checked_session(value: str, where: str) -> str:
    if not _SESSION_ID.fullmatch(value):
        raise ApiError(
            400,
            f"The session id in {where} must be 1 to 128 letters, digits or ._:@/+=- .",
            param=where,
            code="invalid_session_id",
        )
    return value


def _metadata_session(decoded: Mapping[str, Any]) -> str | None:
    value = (decoded.get("metadata") or {}).get("session_id")
    if value is None:
        return None
    return _checked_session(str(value), "metadata.session_id")


def _only_system(
    split: Body, memory: Memory, tenant: bytes
) -> tuple[list[Node], list[Anchor]]:
    messages = [(raw, msgspec.json.decode(raw)) for raw in split.system]
    return memory.identity.extend(tenant, [], messages), []


def _max_tokens(decoded: Mapping[str, Any]) -> int | None:
    value = decoded.get("max_completion_tokens") or decoded.get("max_tokens")
    return value if isinstance(value, int) else None


_COUNT_AT_ONCE_BYTES = 65_536  # more new text than this is counted off the event loop


async def _count(path: list[Node], counter: TokenCounter) -> None:
    """Give the new nodes at the end of the path their tokens, once in their life."""
    new = list(takewhile(lambda node: node.tokens < 0, reversed(path)))
    if sum(len(node.raw) for node in new) > _COUNT_AT_ONCE_BYTES:
        await asyncio.to_thread(_count_all, new, counter)


def _count_all(nodes: list[Node], counter: TokenCounter) -> None:
    for node in nodes:
        node.tokens = counter.message(msgspec.json.decode(node.raw))


def _fixed_tokens(system: tuple[bytes, ...], tools: bytes, counter: TokenCounter) -> int:
    total = sum(counter.message(msgspec.json.decode(raw)) for raw in system)
    return total + (counter.tools(msgspec.json.decode(tools) or ()) if tools else 0)


def _own_headers(answer: Answer) -> list[Header]:
    report = answer.report
    if report.channel == "bypass":
        return []
    vm = (answer.usage or {}).get("vm") or {}
    headers: list[Header] = [
        (b"x-llm-pager-channel", report.channel.encode()),
        (b"x-llm-pager-rounds", b"%d" % report.rounds),
    ]
    if vm:
        headers.append((b"x-llm-pager-billed-prompt-tokens", b"%d" % vm["prompt_tokens"]))
    return headers
