"""From bytes to a turn: whose request it is, where in the tree it belongs, and which bounds it has.

Promises: old messages stay bytes; a tenant's history is only ever compared with the same tenant's;
what is large and new leaves the event loop.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from itertools import takewhile

import msgspec

from proxy.api.caller import presented
from proxy.api.memory import TOKENS_FACTOR, Memory
from proxy.api.request import Decoded, max_tokens, metadata_session, validate
from proxy.config import Config, effective_reserve
from proxy.conversation.body import Body, message_ends, read_body
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.history import HistoryCache, Known
from proxy.conversation.identify import Place, chain, place
from proxy.conversation.limits import Limits
from proxy.conversation.tree import Anchor, Node
from proxy.conversation.turn import TurnInput
from proxy.errors import ApiError
from proxy.memory.eviction_policy import (
    LRU,
    EvictionPolicy,
    ImportanceWeightedLRU,
    ModalityAwareLRU,
)
from proxy.memory.models import VMMode
from proxy.memory.working_set import WorkingSetConfig
from proxy.tokens import (
    TokenCounter,
    encoding_is_known,
    get_counter,
    model_card,
    tokens_upper_bound,
)
from proxy.upstream import Header

_COUNTED = ("tools", "functions", "response_format", "prediction")  # fields that are in the prompt
_NO_HISTORIES = HistoryCache(0)
_POLICIES: dict[str, EvictionPolicy] = {
    "importance": ImportanceWeightedLRU(),
    "lru": LRU(),
    "modality": ModalityAwareLRU(),
}
_CHAIN_AT_ONCE = 512  # more new messages than this are hashed off the event loop
_COUNT_AT_ONCE_BYTES = 65_536  # more new text than this is counted off the event loop


class Placing:
    """One per process. `observed`: somebody reads the turns' reports."""

    def __init__(self, config: Config, memory: Memory, observed: bool) -> None:
        self._config = config
        self._memory = memory
        self._observed = observed
        self._policy = _POLICIES[config.memory.eviction]
        self._limits = lru_cache(maxsize=256)(self._make_limits)
        self._fixed_tokens = lru_cache(maxsize=1024)(_fixed_tokens)

    async def place(
        self, headers: list[Header], body: bytes, deployment: str | None = None
    ) -> TurnInput:
        """Find a request's place; `deployment`: the model that its path names. Raises ApiError 400 for what cannot be a chat request."""
        memory = self._memory
        key, session = presented(headers, self._config.sessions.headers)
        scope = memory.identity.tenant(key, "")
        try:
            split = read_body(body, scope, memory.histories)
            decoded = Decoded(split.fields, deployment)
            validate(decoded)
        except UnicodeDecodeError as error:  # strings are decoded late, wherever one is looked at
            raise ApiError(400, f"The JSON body of the request is not valid UTF-8: {error}.",
                           code="invalid_json") from None
        session = session or metadata_session(decoded)
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
        return await self._input(body, split, decoded, scope, tenant, session_key, found)

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
        scope: bytes,
        tenant: bytes,
        session_key: bytes | None,
        found: Place,
    ) -> TurnInput:
        memory = self._memory
        model = decoded["model"]
        limits = self._limits(model, max_tokens(decoded), self._learned(scope, model))
        state = await memory.state_after(found.record) if found.record is not None else None
        window = state.window if state else None
        override = self._config.model_override(model).tokenizer
        counter, exact = get_counter(model, override), override is None and encoding_is_known(model)
        surely = window is None and found.start == 0 and len(body) <= limits.budget_tokens
        surely = surely and tokens_upper_bound(body, counter) <= limits.budget_tokens
        fixed = 0
        if not surely:
            raws = tuple(bytes(split.fields[name]) for name in _COUNTED if name in split.fields)
            fixed = self._fixed_tokens(tuple(split.system), raws, counter)
            await _count(found.path, counter)
        return TurnInput(
            body, split.fields, split.order, decoded, split.system, found.path, found.start,
            found.floor, found.anchors, found.record, window, state.table if state else None,
            limits, counter, memory.identity, tenant, session_key, self._policy,
            memory.substitutes, fixed, surely, self._observed, scope,
            state.derived if state else NO_DERIVED, memory.get_block, exact,
        )

    def _learned(self, scope: bytes, model: str) -> tuple[tuple[str, object], ...]:
        return tuple(sorted(self._memory.learned(scope, model).items()))

    def _make_limits(
        self, model: str, max_tokens: int | None, learned: tuple[tuple[str, object], ...]
    ) -> Limits:
        config, override = self._config, self._config.model_override(model)
        card, facts = model_card(model), dict(learned)
        l0 = config.tiers.l0
        known = card.known or override.window_tokens is not None
        window = override.window_tokens or card.window_tokens
        factor = facts.get(TOKENS_FACTOR, 1.0)  # what upstream bills for a token as we count it
        factor = factor if isinstance(factor, float) else 1.0
        tokens = int((window if l0.tokens == "auto" else l0.tokens) / factor)
        reserve = effective_reserve(tokens, int(l0.reserve_tokens / factor), max_tokens)
        tools = override.tools  # a bridge is there so that the model can call them
        if tools is None:
            tools = override.bridge is not None or bool(facts.get("tools", True))
        role = override.developer_role or facts.get("developer_role") or card.developer_role
        return Limits(
            working_set=WorkingSetConfig(
                max_l0_tokens=tokens,
                reserved_tokens=reserve,
                eviction_threshold=l0.eviction_threshold,
                target_utilization=l0.target_utilization,
            ),
            window_tokens=int(window / factor),
            window_known=known,
            mode=VMMode(config.memory.mode),
            model_takes_tools=tools,
            tools_with_json=_said(override.tools_with_json, facts.get("tools_with_json")),
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
            segment_messages=config.segments.max_messages,
            summary_tokens=config.segments.summary_tokens,
            max_claims=config.segments.max_claims,
            written_by_models=config.compression.model is not None,
        )


def _said(override: bool | None, learned: object) -> bool:
    """What the configuration says, else what a refusal taught, else yes."""
    return override if override is not None else bool(learned is not False)


def _only_system(
    split: Body, memory: Memory, tenant: bytes
) -> tuple[list[Node], list[Anchor]]:
    messages = [(raw, msgspec.json.decode(raw)) for raw in split.system]
    return memory.identity.extend(tenant, [], messages), []


async def _count(path: list[Node], counter: TokenCounter) -> None:
    """Give nodes at the end of the path their tokens, once in their life and for each kind of model."""

    def uncounted(node: Node) -> bool:
        return node.tokens < 0 or bool(node.counter and node.counter != counter.name)

    new = list(takewhile(uncounted, reversed(path)))
    if sum(len(node.raw) for node in new) > _COUNT_AT_ONCE_BYTES:
        await asyncio.to_thread(_count_all, new, counter)


def _count_all(nodes: list[Node], counter: TokenCounter) -> None:
    for node in nodes:
        node.tokens = counter.message(msgspec.json.decode(node.raw))
        node.counter = counter.name


def _fixed_tokens(
    system: tuple[bytes, ...], fields: tuple[bytes, ...], counter: TokenCounter
) -> int:
    """Tokens of what every request of the conversation carries beside its history."""
    total = sum(counter.message(msgspec.json.decode(raw)) for raw in system)
    for raw in fields:
        value = msgspec.json.decode(raw)
        total += counter.tools(value if isinstance(value, list) else [value]) if value else 0
    return total
