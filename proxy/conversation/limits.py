"""Every bound that a turn keeps, in one value: from the configuration, the model and the request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from proxy.memory.models import VMMode
from proxy.memory.prefetcher import evidence_tokens
from proxy.memory.working_set import WorkingSetConfig

_LEAST_ROOM_SHARE = 4  # of L0: messages get at least a quarter of it, whatever stands before them
_TOOLS_TOKENS = 350  # of the VM tools and what is told of them
_LEAST_ROOM_TOKENS = 1024  # and no less than this, where half of L0 is that much


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens unless the name says otherwise. `window_tokens` is what the model itself takes."""

    working_set: WorkingSetConfig  # max_l0_tokens, reserved_tokens and the watermarks
    window_tokens: int
    window_known: bool
    mode: VMMode
    model_takes_tools: bool
    developer_role: Literal["developer", "system"]
    faults_per_turn: int
    fault_tokens: int
    max_rounds: int
    prefetch_pages: int
    prefetch_tokens: int | None  # None: by the window's size
    manifest_tokens: int
    page_tokens: int
    search_results: int
    snippet_tokens: int
    segment_messages: int  # messages of a segment that are read
    max_claims: int
    tools_with_json: bool = True  # the model takes tools in a request whose answer has to be JSON
    not_with_tools: frozenset[str] = frozenset()  # fields of a request that exclude tools
    written_by_models: bool = False  # a model writes summaries and captions off the request path
    calls: bool = True  # the VM tools are worth their tokens: the model calls them, or may
    parameters_b: float | None = None  # the model's billions of parameters, where its name says them
    cached_price: float = 0.1  # of a token that upstream has cached, where a new one is 1.0
    tokens_factor: float = 1.0  # what upstream bills for a token as it is counted here
    answer_beside: bool = False  # the answer takes what the model's window has beyond L0, as far as that is known
    # These follow from the others: what the answer has beside L0; what L0 keeps for it, which is all of its reserve that
    # has no room there; what a whole upstream request may count, which is L0 less that.
    beside_tokens: int = field(init=False)
    reserve_tokens: int = field(init=False)
    budget_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        l0_tokens, known = self.working_set.max_l0_tokens, self.answer_beside and self.window_known
        beside = max(0, self.window_tokens - l0_tokens) if known else 0
        reserve = max(0, self.working_set.reserved_tokens - beside)
        for name, tokens in (("beside", beside), ("reserve", reserve), ("budget", l0_tokens - reserve)):
            object.__setattr__(self, f"{name}_tokens", tokens)

    @property
    def evidence_tokens(self) -> int:
        """What may be shown unasked; of a model that does not call also what its tools would take."""
        tokens = self.prefetch_tokens
        if tokens is None:
            tokens = evidence_tokens(self.working_set.max_l0_tokens, self.parameters_b)
        return tokens + _TOOLS_TOKENS if tokens and not self.calls else tokens

    def uncalled(self) -> Limits:
        """The limits of a model that goes without the VM tools, as it does not call them."""
        return replace(self, calls=False)


def least_room(l0_tokens: int) -> int:
    """Tokens for messages in an `l0_tokens` window: with less, a conversation could not go on in it."""
    return max(l0_tokens // _LEAST_ROOM_SHARE, min(_LEAST_ROOM_TOKENS, l0_tokens // 2))


def stretched(limits: Limits, fixed_tokens: int, answer_tokens: int | None) -> Limits:
    """The limits of one request: `fixed_tokens` of it (system messages, tools, schemas) cannot be
    paged, and its client lets the answer have `answer_tokens`.

    The answer gets what it may have: what it has beside L0, and up to half of L0, as far as the least room for
    messages is left. Where even the configured reserve leaves less, L0 grows by what is missing, within the
    model's window where that is known; there the reserve gives way, down to half of what is left.
    """
    l0, reserved, beside = limits.working_set.max_l0_tokens, limits.working_set.reserved_tokens, limits.beside_tokens
    least = least_room(l0)
    asked = min(answer_tokens or 0, beside + min(l0 // 2, l0 - fixed_tokens - least))
    total, kept = l0, max(reserved, asked)
    if fixed_tokens and l0 - fixed_tokens - limits.reserve_tokens < least:
        total, kept = max(l0, fixed_tokens + least + (0 if beside else reserved)), reserved
        most = max(l0, limits.window_tokens)
        if limits.window_known and fixed_tokens + least + reserved > most:
            total, kept = most, min(reserved, max(0, most - fixed_tokens) // 2)
    if (total, kept) == (l0, reserved):
        return limits
    room = {"max_l0_tokens": total, "reserved_tokens": kept}
    return replace(limits, working_set=limits.working_set.model_copy(update=room))
