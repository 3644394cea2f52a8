"""What a turn depends on: one value, complete when admission has made it.

Promises: a request's facts have one home here; turn, window, epoch, evidence and faults read them and
copy none into values of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.conversation.body import Body
from proxy.conversation.calibration import Calibration
from proxy.conversation.identify import Place
from proxy.conversation.limits import Limits
from proxy.conversation.model_facts import Capabilities, Seen
from proxy.conversation.pins import Pin
from proxy.conversation.records import NO_NAMES, GetRecord, GetStoredBlock, SessionNames, State
from proxy.conversation.tree import NO_SCOPE, Identity, KeyScope, TenantKey
from proxy.memory.eviction import EvictionPolicy
from proxy.memory.models import PageMutation
from proxy.tokens import TokenCounter


@dataclass(slots=True, kw_only=True)
class TurnContext:
    """A request that has found its place in the tree, and all that its turn depends on."""

    body: bytes  # as it came
    sent: Body  # its fields, their order and its system messages, as written
    decoded: Mapping[str, Any]  # its top-level fields
    place: Place
    state: State | None  # after `place.record`; None: never evicted
    limits: Limits
    next_limits: Limits | None = None  # from the next epoch on, where they differ
    counter: TokenCounter
    policy: EvictionPolicy
    identity: Identity
    tenant: TenantKey
    scope: KeyScope = NO_SCOPE  # of the API key alone: what is learned of a model holds for it
    names: SessionNames = NO_NAMES
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was learned of the model
    known_factor: float = 1.0  # what the bills of all conversations taught so far
    fixed_tokens: Callable[[], int]  # system messages, the client's tools and schemas; counted when asked
    surely_fits: bool = False  # so short that nothing has to be counted
    is_large: bool = False  # what is new in it, so that every step of its turn takes long
    substitutes: Callable[[bytes], Sequence[bytes]]
    get_record: GetRecord
    get_block: GetStoredBlock = lambda _, __: None  # of a page table or a path's index
    capabilities: Callable[[], Capabilities] = Capabilities  # asked only when it may matter
    seen: Callable[[], Seen] = Seen  # asked only after a refusal
    calibration: Callable[[], Calibration] | None = None  # of the model's bills, as it is stored now
    now_s: float = 0.0  # Unix time: of the request, and for what upstream lets expire
    cache_key: Callable[[], str] | None = None  # the conversation's prompt_cache_key, where the client has none
    changes: Sequence[PageMutation] = ()  # a library's caller's pins and importances, for the log
    pins: Callable[[], Sequence[Pin]] = tuple  # a person's; asked only when the turn pages
    observed: bool = True  # somebody reads the report's page lists
    given_answers: bool = False  # a library's turn: the caller has tools that it does not list, and what
    # it says ends the turn, unless it calls a VM tool

    @property
    def agent(self) -> bool:
        """The client has tools of its own."""
        return bool(self.decoded.get("tools"))
