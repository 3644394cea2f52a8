"""From bytes to a turn: whose request it is, where in the tree it belongs, and which bounds it has.

Promises: old messages stay bytes; a tenant's history is only ever compared with the same tenant's;
what is large and new leaves the event loop; whatever we rely on ourselves is checked, and a request
that fails the check is the upstream's to judge, unchanged (`is_upstreams_to_judge`); only a body over
the limit is refused here, before it is read to its end; what admission returns is complete.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, cast

import msgspec
from cachetools import LRUCache

from proxy import keys
from proxy.api.caller import Caller, caller, encoded, parameters, with_body
from proxy.api.memory import Memory
from proxy.api.model_facts import ModelFacts
from proxy.api.pool import empty
from proxy.config import Config
from proxy.conversation.body import (
    NOT_SEEN,
    Body,
    Fields,
    Known,
    Recognised,
    counted_fields,
    fixed_tokens,
    is_short,
    recognise,
    remembered,
    split_body,
)
from proxy.conversation.calibration import TOKENS_FACTOR
from proxy.conversation.calling import VM_CALLS, offered
from proxy.conversation.context import TurnContext
from proxy.conversation.identify import Place, chain, place
from proxy.conversation.limits import Limits
from proxy.conversation.pins import decode_pins, pins_key
from proxy.conversation.records import NO_NAMES, Record, SessionNames
from proxy.conversation.tree import Anchor, Identity, KeyScope, TenantKey
from proxy.conversation.window import Window
from proxy.errors import ApiError, StorageError
from proxy.keys import OWNER_BYTES
from proxy.model_limits import POLICIES, limits_of
from proxy.tokens import (
    TokenCounter,
    encoding_is_known,
    encoding_is_loaded,
    get_counter,
    tokens_upper_bound,
)
from proxy.upstream import Header

log = logging.getLogger(__name__)

# More than this that is new leaves the event loop: to be read, hashed, counted, put into a window.
_AT_ONCE_BYTES = 65_536
_AT_ONCE_MESSAGES = 64
_REACH = 2  # windows of messages are counted before the turn; what is older is counted when somebody asks
_PROVED_S = 1.0  # a commit of the last so many seconds proves that what a client says can be stored
_MODEL_CHARS = 512  # what is known of a model is kept by its name, so it is bounded
_SESSIONS = 65_536  # of new messages, which are told when the storage has lost them
_FIXED_COUNTS = 1024  # of system messages and tools, remembered by their digest
_CALLERS = 256  # whose headers, or credentials, are not looked through again
_RETRY_COUNT = b"x-stainless-retry-count"  # the SDKs' own header
# Codes of `split_body` and `_validate`: the request as such.
_UNREADABLE = ("invalid_json", "invalid_type", "missing_required_parameter", "empty_array")
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "model": (str, "a string"),
    "stream": (bool, "a boolean"),
    "n": ((int, float), "an integer"),  # 1.0 is a whole number too
    "tools": (list, "an array"),
    "metadata": (dict, "an object"),
    "stream_options": (dict, "an object"),
    "response_format": (dict, "an object"),
}


class Decoded(Mapping[str, Any]):
    """The request's top-level fields, each decoded when it is asked for. `model`: what the path names,
    for a body without one (Azure's deployments)."""

    def __init__(self, fields: Fields, model: str | None = None) -> None:
        self._fields = fields
        self._values: dict[str, Any] = {}
        if model is not None and bytes(fields.get("model", b"null")) in (b"null", b'""'):
            self._values["model"] = model

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            self._values[name] = msgspec.json.decode(self._fields[name])
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:  # Mapping's own makes an exception and drops it
        if name in self._values:
            return self._values[name]
        return self[name] if name in self._fields else default

    def __contains__(self, name: object) -> bool:
        return name in self._fields or name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class Admission:
    """One per process. `observed`: somebody reads the turns' reports."""

    def __init__(self, config: Config, memory: Memory, model_facts: ModelFacts, observed: bool) -> None:
        self._config = config
        self._memory = memory
        self._model_facts = model_facts
        self._observed = observed
        sessions = config.sessions
        self._session_headers = encoded(sessions.headers), encoded(sessions.delta_headers)
        self._policy = POLICIES[config.memory.eviction]
        self._limits = lru_cache(maxsize=256)(self._limits_of)
        self._counters = lru_cache(maxsize=256)(self._counter_of)
        self._met: LRUCache[str, bool] = LRUCache(256)
        self._fixed: LRUCache[bytes, int] = LRUCache(_FIXED_COUNTS)
        self._callers = lru_cache(_CALLERS)(self._caller_of)
        self._tenants = lru_cache(_CALLERS)(Identity.tenant)
        self._sessions: LRUCache[int, int] = LRUCache(_SESSIONS)  # of new messages: what the store had lost by then
        self._fixed_lock = threading.Lock()

    async def admit(
        self, headers: list[Header], query: bytes, body: bytes, deployment: str | None = None
    ) -> TurnContext:
        """A request's turn; `deployment`: the model that its path names. Raises ApiError 400 for what
        cannot be a chat request; StorageError and LookupError where a client that sends only what is new would
        lose what it says, or is answered without what it said."""
        memory = self._memory
        who = self._callers(tuple([h for h in headers if h[0] != b"content-length"]), query)
        if who.delta:  # what it says is nowhere else: it can be stored, or upstream is not asked
            await memory.store.check(_PROVED_S)
        elif memory.store.trouble is not None:
            with suppress(StorageError):  # perhaps it is over
                await memory.store.check(_PROVED_S)
        memory.renew()
        identity = memory.identity
        scope = KeyScope(self._tenants(identity, who.credentials, ""))
        seen = NOT_SEEN if is_short(body) else recognise(body, scope, memory.histories)
        try:
            split = await self._read(scope, body, seen)
            decoded = Decoded(split.fields, deployment)
            _validate(decoded)
            who = with_body(who, decoded)
        except UnicodeDecodeError as error:  # strings are decoded late, wherever one is looked at
            raise ApiError(400, f"The JSON body of the request is not valid UTF-8: {error}.",
                           code="invalid_json") from None
        tenant = self._tenants(identity, who.credentials, who.person)
        names = self._names(tenant, who)
        if split.known is not None and split.known.tenant != tenant:  # another user of this key
            split = await self._read(tenant, body, Recognised(seen.head, None, 0))
        work = partial(self._place, split, identity, tenant, names, keys.MODEL + scope + decoded["model"].encode())
        away = _is_large([raw for raw, _ in split.new])
        split, found, known = await memory.pool.run(tenant, work) if away else work()
        if memory.store.erased != identity.erased:  # as a read of this request's has told
            return await self.admit(headers, query, body, deployment)
        if known is not None:
            memory.histories.add(scope, known, split.continued)
        if names.delta is not None:
            self._require_no_loss(hash(who), found)
        if found.start and _is_retry(headers):
            found = self._as_retry(found, tenant, names)
        return await self._context(body, split, decoded, scope, tenant, names, found)

    def _caller_of(self, headers: Sequence[Header], query: bytes) -> Caller:
        """Who asks with these headers: a client's are mostly the same, but for the length of what it sends."""
        return caller(headers, parameters(query), *self._session_headers)

    def _require_no_loss(self, session: int, found: Place) -> None:
        """LookupError when this process has served the session from a store that is not there any more, and the
        request does not bring a history of its own."""
        losses = self._memory.store.losses
        own = any(node.role == "assistant" for node in found.path[found.start :])
        if self._sessions.get(session, losses) != losses and not own:
            raise LookupError("what this session said before was lost with its storage")
        self._sessions[session] = losses

    def _names(self, tenant: TenantKey, who: Caller) -> SessionNames:
        if who.label is None:
            return NO_NAMES
        identity = self._memory.identity
        delta = identity.session(tenant, who.label) if who.delta else None
        return SessionNames(identity.label(tenant, who.label), delta)

    async def _read(self, whose: bytes, body: bytes, seen: Recognised) -> Body:
        if len(body) - seen.end > _AT_ONCE_BYTES:
            return await self._memory.pool.run(whose, split_body, body, seen)
        return split_body(body, seen)

    def _place(
        self, split: Body, identity: Identity, tenant: TenantKey, names: SessionNames, facts: bytes
    ) -> tuple[Body, Place, Known | None]:
        """Where the request belongs, and the history to recognise the next one by. `facts`: where those of its model
        stand."""
        memory = self._memory
        nodes, anchors = chain(split, identity, tenant)
        if not nodes:  # only system messages: nothing to remember them by but themselves
            messages = [(raw, msgspec.json.decode(raw)) for raw in split.system]
            nodes, anchors = identity.extend(tenant, [], messages), []
            split = split._replace(system=[], history=None)
        if memory.store.suspends:
            memory.ahead(nodes, tenant, names, facts)
        tools = split.fields.get("tools")
        frame = identity.frame(split.system, bytes(tools) if tools is not None else b"")
        reattach = self._config.sessions.reattach
        seek = partial(place, nodes, anchors, tenant, memory.library, frame, names.delta)
        try:
            found = seek(reattach)
        except LookupError as error:  # invariant 6: what is missing is a miss ...
            if names.delta is not None:  # ... but for a client that sends only what is new
                raise
            log.warning("a history was not joined to the one that it may go on from: %s", error)
            found = seek(False)
        whole = found.start == 0 and found.floor == 0
        known = remembered(split, found.path, found.anchors, tenant) if whole else None
        empty(split.new)
        return split, found, known

    def _as_retry(self, found: Place, tenant: TenantKey, names: SessionNames) -> Place:
        """`found`, or, when the session's last turn answered these very messages, before that answer:
        its client did not read it, and sends only what is new. Somebody may well say the same thing
        twice, so this is for a request whose SDK says that it sends it again; a client that sends its
        whole history needs nothing of it."""
        memory, last, new = self._memory, found.record, found.path[found.start :]
        if names.delta is None or found.floor or last is None or found.start != last.end:
            return found
        if [node.content for node in new] != last.contents[:-1]:
            return found
        root = memory.identity.root(tenant)
        back = last.end - last.first
        return replace(
            found,
            path=memory.identity.rechain(found.path[: last.first], new, root),
            start=last.first,
            anchors=[Anchor(a.position - back, a.raw) for a in found.anchors],
            record=memory.get_record(last.parent) if last.parent else None,
        )

    async def _context(
        self, body: bytes, split: Body, decoded: Decoded, scope: KeyScope, tenant: TenantKey,
        names: SessionNames, found: Place,
    ) -> TurnContext:  # fmt: skip
        memory, model = self._memory, decoded["model"]
        try:
            state = await memory.state_after(found.record, tenant) if found.record is not None else None
        except (LookupError, ValueError) as error:  # invariant 6: the path is here, and is paged anew
            log.warning("a conversation begins anew: %s", error)
            found, state = replace(found, record=None), None
        window = state.window if state else None
        facts = memory.learned(scope, model)
        limits, following, factor = self._bounds(facts, model, found.record, window)
        if model not in self._met:
            self._met[model] = True
            if not encoding_is_loaded(model, self._config.model_override(model).tokenizer):
                await memory.pool.run(tenant, self._counters, model)  # a tenth of a second
        counter, exact = self._counters(model)
        surely = window is None and found.start == 0 and len(body) <= limits.budget_tokens
        surely = surely and tokens_upper_bound(body, counter) <= limits.budget_tokens
        fixed = partial(self._fixed_tokens, split, counter)
        is_large = False
        if not surely:
            new = found.path[_uncounted(found, counter) :]
            is_large = _is_large([node.raw for node in new])
            reach = _REACH * max(some.budget_tokens for some in (limits, following) if some is not None)
            if is_large or _is_large([*split.system, *counted_fields(split.fields)]):
                await memory.pool.run(tenant, _count, found, counter, reach, fixed)
            elif new:
                _count(found, counter, reach)
        root = found.path[0].id  # keyed, and of this tenant's conversation alone
        return TurnContext(
            body=body, sent=split, decoded=decoded, place=found, state=state,
            limits=limits, next_limits=following, counter=counter,
            policy=self._policy, identity=memory.identity, tenant=tenant, scope=scope, names=names,
            facts=facts, known_factor=factor, surely_fits=surely, is_large=is_large,
            fixed_tokens=fixed,
            substitutes=memory.substitutes, get_record=memory.get_record, get_block=memory.get_block,
            capabilities=partial(self._model_facts.of, model, facts),
            seen=partial(self._model_facts.seen, scope, model),
            calibration=partial(memory.calibration, scope, model, counter.name, exact),
            now_s=time.time(),
            cache_key=partial(_cache_key, root),
            pins=lambda: decode_pins(memory.get(pins_key(root[:OWNER_BYTES]))),
            observed=self._observed,
        )  # fmt: skip

    async def anew(self, context: TurnContext) -> TurnContext:
        """The request's turn without what is stored of it, which cannot be used; all that it needs is in the
        request, or was read already."""
        found = replace(context.place, record=None, alike=None)
        return await self._context(
            context.body, context.sent, cast(Decoded, context.decoded), context.scope, context.tenant,
            context.names, found,
        )  # fmt: skip

    def _fixed_tokens(self, split: Body, counter: TokenCounter) -> int:
        """Counted once for the same system messages and fields; they are not kept, only their digest."""
        digest = hashlib.blake2b(counter.name.encode(), digest_size=16)
        counted = counted_fields(split.fields)
        for raw in (*split.system, *counted):
            digest.update(b"%d:" % len(raw) + raw)
        key = digest.digest()
        with self._fixed_lock:
            found = self._fixed.get(key)
        if found is None:
            found = fixed_tokens(split.system, counted, counter)
            with self._fixed_lock:
                self._fixed[key] = found
        return found

    def _bounds(
        self, facts: Mapping[str, object], model: str, record: Record | None, window: Window | None
    ) -> tuple[Limits, Limits | None, float]:
        """`facts`: what was learned of the model. The limits of a turn after `record`, those of its
        next epoch where they differ, and the factor that all bills taught so far.

        A conversation's own records say which factor its next turn begins with, and its window with
        which one it was made, and whether with the VM tools: a retry, another replica or a restart finds the same bounds, whatever
        was learned meanwhile. What its first turn begins with is what the model's bills taught by then.
        """
        known = facts.get(TOKENS_FACTOR, 1.0)
        known = factor = known if isinstance(known, float) else 1.0
        bill = record.bill if record is not None else None
        if bill is not None and bill.model == model:
            factor = bill.factor
        epoch = factor
        if window is not None and window.factor and (bill is None or bill.model == model):
            epoch = window.factor
        calls, calls_next = True, True
        if self._config.memory.tools == "auto":
            calls, calls_next = offered(model, facts, record, window)
        counted = (TOKENS_FACTOR, VM_CALLS)
        learned = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k not in counted}
        asked = model, tuple(sorted(learned.items()))
        same = (factor, calls_next) == (epoch, calls)
        following = None if same else self._limits(*asked, factor, calls_next)
        return self._limits(*asked, epoch, calls), following, known

    def _counter_of(self, model: str) -> tuple[TokenCounter, bool]:
        """What counts the model's tokens, and whether it is known to be the model's own."""
        override = self._config.model_override(model).tokenizer
        return get_counter(model, override), override is None and encoding_is_known(model)

    def _limits_of(
        self, model: str, learned: tuple[tuple[str, object], ...], factor: float, calls: bool
    ) -> Limits:
        limits = limits_of(self._config, model, dict(learned), factor)
        return limits if calls else limits.uncalled()


def is_upstreams_to_judge(error: ApiError) -> bool:
    """The body was not what we can page; what it is, the upstream says best."""
    return error.status == 400 and error.code in _UNREADABLE


def _validate(decoded: Mapping[str, Any]) -> None:
    """What we rely on ourselves. ApiError 400 for what we cannot page."""
    model = decoded.get("model")
    if not model:
        raise ApiError(400, "you must provide a model parameter", param="model",
                       code="missing_required_parameter")
    if isinstance(model, str) and len(model) > _MODEL_CHARS:
        raise ApiError(400, "Invalid value for 'model': no model has so long a name.", param="model",
                       code="invalid_type")
    for name in decoded:
        kind, words = _TYPES.get(name, (object, ""))
        if kind is not object and (value := decoded[name]) is not None and not isinstance(value, kind):
            raise ApiError(
                400, f"Invalid type for '{name}': expected {words}.", param=name, code="invalid_type"
            )


def _is_retry(headers: Sequence[Header]) -> bool:
    """The client's SDK says that it sends this again, because the answer was lost on the way."""
    return any(name == _RETRY_COUNT and value.isdigit() and int(value) > 0 for name, value in headers)


def _cache_key(root: bytes) -> str:
    return hashlib.blake2b(root, digest_size=16).hexdigest()


def _is_large(raws: Sequence[bytes]) -> bool:
    """What is made of them takes long, told by their sizes."""
    return len(raws) > _AT_ONCE_MESSAGES or sum(map(len, raws)) > _AT_ONCE_BYTES


def _uncounted(found: Place, counter: TokenCounter) -> int:
    """Where the end of the path begins that has no record, or no tokens for this kind of model."""
    path, at = found.path, found.record.end if found.record is not None else 0
    while at and isinstance(path, list) and (path[at - 1].tokens < 0 or path[at - 1].counter not in ("", counter.name)):
        at -= 1
    return at


def _count(found: Place, counter: TokenCounter, most: int, fixed_tokens: Callable[[], int] | None = None) -> None:
    """Give messages at the end of the path their tokens, once in their life, until there are so many. What other
    requests see is not changed: a message that was counted for another model is another one here. `fixed_tokens` are
    counted to be remembered."""
    path = found.path
    for at in range(len(path) - 1, _uncounted(found, counter) - 1, -1):
        if most <= 0:
            break
        node = path[at]
        if node.tokens >= 0 and node.counter not in ("", counter.name) and isinstance(path, list):
            node = path[at] = msgspec.structs.replace(node, tokens=-1)
        if node.tokens < 0:
            node.counted(counter.message(msgspec.json.decode(node.raw)), counter.name)
        most -= node.tokens
    if fixed_tokens is not None:
        fixed_tokens()
