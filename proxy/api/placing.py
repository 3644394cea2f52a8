"""From bytes to a turn: whose request it is, where in the tree it belongs, and which bounds it has.

Promises: old messages stay bytes; a tenant's history is only ever compared with the same tenant's;
what is large and new leaves the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from itertools import takewhile
from typing import Any

import msgspec

from proxy.api.caller import caller, encoded, parameters, with_body
from proxy.api.memory import UPSTREAM_WINDOW, Memory
from proxy.api.request import Decoded, validate
from proxy.config import Config, effective_reserve
from proxy.conversation.body import (
    Body,
    HistoryCache,
    counted_fields,
    fixed_tokens,
    read_body,
    remembered,
)
from proxy.conversation.calibration import TOKENS_FACTOR
from proxy.conversation.commit import NO_NAMES, SessionNames
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.identify import Place, chain, place
from proxy.conversation.limits import Limits
from proxy.conversation.tree import Anchor, Node, Record
from proxy.conversation.turn import TurnInput
from proxy.conversation.window import Window
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
        sessions = config.sessions
        self._session_headers = encoded(sessions.headers), encoded(sessions.delta_headers)
        self._policy = _POLICIES[config.memory.eviction]
        self._limits = lru_cache(maxsize=256)(self._make_limits)
        self._fixed_tokens = lru_cache(maxsize=1024)(fixed_tokens)

    async def place(
        self, headers: list[Header], query: bytes, body: bytes, deployment: str | None = None
    ) -> TurnInput:
        """Find a request's place; `deployment`: the model that its path names. Raises ApiError 400 for
        what cannot be a chat request."""
        memory, sessions = self._memory, self._config.sessions
        identity = memory.identity
        who = caller(headers, parameters(query), *self._session_headers)
        scope = identity.tenant(who.credentials, "")
        try:
            split = read_body(body, scope, memory.histories)
            decoded = Decoded(split.fields, deployment)
            validate(decoded)
            who = with_body(who, decoded)
        except UnicodeDecodeError as error:  # strings are decoded late, wherever one is looked at
            raise ApiError(400, f"The JSON body of the request is not valid UTF-8: {error}.",
                           code="invalid_json") from None
        tenant = identity.tenant(who.credentials, who.person)
        names = NO_NAMES
        if who.label is not None:
            delta = identity.session(tenant, who.label) if who.delta else None
            names = SessionNames(identity.label(tenant, who.label), delta)
        if split.known is not None and split.known.tenant != tenant:  # another user of this key
            split = read_body(body, scope, _NO_HISTORIES)
        if len(split.new) > _CHAIN_AT_ONCE:
            nodes, anchors = await asyncio.to_thread(chain, split, identity, tenant)
        else:
            nodes, anchors = chain(split, identity, tenant)
        if not nodes:  # only system messages: nothing to remember them by but themselves
            nodes, anchors = _only_system(split, memory, tenant)
            split = split._replace(system=[], history=None)
        tools = split.fields.get("tools")
        frame = identity.frame(split.system, bytes(tools) if tools is not None else b"")
        found = place(
            nodes, anchors, identity, tenant, memory.library, frame, names.delta, sessions.reattach
        )
        if found.start == 0 and found.floor == 0:
            known = remembered(split, found.path, found.anchors, tenant)
            if known is not None:
                memory.histories.add(scope, known, split.known)
        return await self._input(body, split, decoded, scope, tenant, names, found)

    async def _input(
        self,
        body: bytes,
        split: Body,
        decoded: Decoded,
        scope: bytes,
        tenant: bytes,
        names: SessionNames,
        found: Place,
    ) -> TurnInput:
        memory = self._memory
        model = decoded["model"]
        state = await memory.state_after(found.record) if found.record is not None else None
        window = state.window if state else None
        facts = memory.learned(scope, model)
        limits, following, factor = self._bounds(facts, decoded, found.record, window)
        override = self._config.model_override(model).tokenizer
        counter, exact = get_counter(model, override), override is None and encoding_is_known(model)
        surely = window is None and found.start == 0 and len(body) <= limits.budget_tokens
        surely = surely and tokens_upper_bound(body, counter) <= limits.budget_tokens
        fixed = 0
        if not surely:
            fixed = self._fixed_tokens(tuple(split.system), counted_fields(split.fields), counter)
            await _count(found, counter)
        return TurnInput(
            body, split.fields, split.order, decoded, split.system, found.path, found.start,
            found.floor, found.anchors, found.record, window, state.table if state else None,
            limits, counter, memory.identity, tenant, names, self._policy,
            memory.substitutes, fixed, surely, self._observed, scope,
            state.derived if state else NO_DERIVED, memory.get_block, exact,
            next_limits=following, known_factor=factor, sent=found.sent, facts=facts,
        )  # fmt: skip

    def bound(self, given: TurnInput) -> None:
        """Give a turn the bounds of its place in the tree."""
        given.limits, given.next_limits, given.known_factor = self._bounds(
            given.facts, given.decoded, given.record, given.window
        )

    def _bounds(
        self,
        facts: Mapping[str, object],
        decoded: Mapping[str, Any],
        record: Record | None,
        window: Window | None,
    ) -> tuple[Limits, Limits | None, float]:
        """`facts`: what was learned of the model. The limits of a turn after `record`, those of its next epoch where they differ, and the factor
        that all bills taught so far.

        A conversation's own records say which factor its next turn begins with, and its window with
        which one it was made: a retry, another replica or a restart finds the same bounds, whatever
        was learned meanwhile. What its first turn begins with is what the model's bills taught by then.
        """
        model = decoded["model"]
        known = facts.get(TOKENS_FACTOR, 1.0)
        known = factor = known if isinstance(known, float) else 1.0
        bill = record.bill if record is not None else None
        if bill is not None and bill.model == model:
            factor = bill.factor
        epoch = factor
        if window is not None and window.factor and (bill is None or bill.model == model):
            epoch = window.factor
        learned = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k != TOKENS_FACTOR}
        asked = model, tuple(sorted(learned.items()))
        following = self._limits(*asked, factor) if factor != epoch else None
        return self._limits(*asked, epoch), following, known

    def _make_limits(
        self, model: str, learned: tuple[tuple[str, object], ...], factor: float
    ) -> Limits:
        """`factor`: what upstream bills for a token as we count it."""
        config, override = self._config, self._config.model_override(model)
        card, facts = model_card(model), dict(learned)
        l0 = config.tiers.l0
        stated = facts.get(UPSTREAM_WINDOW) if override.window_tokens is None else None
        stated = stated if isinstance(stated, int) else None
        known = card.known or override.window_tokens is not None or stated is not None
        window = override.window_tokens or stated or card.window_tokens
        tokens = window if l0.tokens == "auto" else min(l0.tokens, stated or l0.tokens)
        tokens = int(tokens / factor)
        reserve = effective_reserve(tokens, int(l0.reserve_tokens / factor))
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
            not_with_tools=_names(facts.get("not_with_tools")),
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
            tokens_factor=factor,
        )


def _names(learned: object) -> frozenset[str]:
    return frozenset(learned) if isinstance(learned, tuple) else frozenset()


def _said(override: bool | None, learned: object) -> bool:
    """What the configuration says, else what a refusal taught, else yes."""
    return override if override is not None else bool(learned is not False)


def _only_system(
    split: Body, memory: Memory, tenant: bytes
) -> tuple[list[Node], list[Anchor]]:
    messages = [(raw, msgspec.json.decode(raw)) for raw in split.system]
    return memory.identity.extend(tenant, [], messages), []


async def _count(found: Place, counter: TokenCounter) -> None:
    """Give messages at the end of the path their tokens, once in their life and for each kind of model."""

    def uncounted(message: Node | Anchor) -> bool:
        return message.tokens < 0 or bool(message.counter and message.counter != counter.name)

    new: list[Node | Anchor] = list(takewhile(uncounted, reversed(found.path)))
    new += takewhile(uncounted, reversed(found.anchors))
    if sum(len(node.raw) for node in new) > _COUNT_AT_ONCE_BYTES:
        await asyncio.to_thread(_count_all, new, counter)


def _count_all(nodes: list[Node | Anchor], counter: TokenCounter) -> None:
    for node in nodes:
        node.tokens = counter.message(msgspec.json.decode(node.raw))
        node.counter = counter.name
