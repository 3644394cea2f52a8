"""What a turn is given, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.conversation.body import Fields
from proxy.conversation.calibration import Calibration
from proxy.conversation.commit import SessionNames
from proxy.conversation.derived import NO_DERIVED, Derived
from proxy.conversation.effects import Refused
from proxy.conversation.limits import Limits
from proxy.conversation.model_facts import Capabilities, Seen
from proxy.conversation.report import TurnReport
from proxy.conversation.tree import Anchor, Identity, Node, Record, Sent
from proxy.conversation.window import Window
from proxy.memory.eviction_policy import EvictionPolicy
from proxy.memory.tlb import TLBWithPageTable
from proxy.tokens import TokenCounter


@dataclass(slots=True)
class TurnInput:
    """A request that has found its place in the tree.

    `path` ends with the newest message; `start` is the position of the client's first message on it;
    messages before `floor` may not become native (a trimming client dropped them). `record` is the
    deepest answered ancestor, `window` and `table` the state after it (None: never evicted).
    """

    body: bytes
    fields: Fields
    order: Sequence[str]
    decoded: Mapping[str, Any]
    system: Sequence[bytes]
    path: list[Node]
    start: int
    floor: int
    anchors: Sequence[Anchor]
    record: Record | None
    window: Window | None
    table: TLBWithPageTable | None
    limits: Limits
    counter: TokenCounter
    identity: Identity
    tenant: bytes
    names: SessionNames
    policy: EvictionPolicy
    substitutes: Callable[[bytes], Sequence[bytes]]
    fixed_tokens: int  # system messages, the client's tools and schemas
    surely_fits: bool = False  # so short that nothing had to be counted
    observed: bool = True  # somebody reads the report's page lists
    scope: bytes = b""  # of the API key alone: what is learned of a model holds for it
    derived: Derived = NO_DERIVED  # summaries and claims of this path
    load_block: Callable[[bytes], bytes | None] | None = None  # reads a table's stored blocks
    exact_counter: bool = False  # the model is known to be counted by this encoding
    capabilities: Callable[[], Capabilities] = Capabilities  # asked only when it may matter
    seen: Callable[[], Seen] = Seen  # asked only after a refusal
    get_record: Callable[[bytes], Record | None] | None = None  # earlier answers, for their sound
    now_s: float = 0.0  # Unix time, for what upstream lets expire
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was learned of the model
    sent: Sent | None = None  # how the request stood to those before it; stored with its answer
    given_answers: bool = False  # a library's turn: the caller has tools that it does not list, and what
    # it says ends the turn, unless it calls a VM tool
    cache_key: bytes | None = None  # the conversation's prompt_cache_key, where the client has none
    next_limits: Limits | None = None  # from the next epoch on, where they differ from `limits`
    known_factor: float = 1.0  # what the bills of all conversations taught so far
    calibration: Callable[[], Calibration] | None = None  # these bills, as they are stored now


@dataclass(slots=True)
class Answer:
    """How the turn ended. `body` is the response of a non-streaming call (None: as upstream said)."""

    report: TurnReport
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    body: bytes | None = None
    refused: Refused | None = None
    learned: dict[str, Any] = field(default_factory=dict)  # about the model, from a refusal
    doubted_tokens: int = 0  # a window that is learned when it shows once more
    unexplained: bool = False  # a refusal was, of a request that may have been too large
