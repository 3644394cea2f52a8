"""What a conversation was billed, and what the same turns would have been billed otherwise. Pure.

Promises: every figure of ours is upstream's own `usage`; a turn of which upstream told none is counted and
adds nothing. Beside it stand two requests that were never made: the client's whole history, and a sliding
window of the same size over its messages. They follow from sizes that are known already, so a turn costs
the same in a conversation of ten thousand messages; of a long history that was new, what was never in a window
counts by its bytes (`PathPages.size`). Sums are carried from record to record along the path
(`Account`): a fork goes on with its ancestors' and has nothing of its siblings'.

The rule of the cache, one for the demo, the benches and here: of two requests in a row what they share at
their beginning is cached, from 1,024 tokens on, in steps of 128. The two others find

    all that they share with the request before    while their head (model, system messages, tools) is the same
    what ours found                                 in front of a new head, and in the first turn
    as much less as ours did                        where the provider had lost a prefix that was the same
    nothing                                         where upstream does not say what it cached

and write what they did not find, by the share that ours was billed as written. What was sent untouched is
the history and fits the window, so there all three are one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from proxy.tokens import PER_REPLY, USUAL_CACHED_PRICE, prices

if TYPE_CHECKING:  # its records have accounts
    from proxy.conversation.pages import PathPages

CACHED_PRICE = USUAL_CACHED_PRICE  # of an uncached token's, where nobody knows the model's own
WRITTEN_PRICE = 1.25  # Anthropic's, for five minutes
MIN_PREFIX_TOKENS = 1024
STEP_TOKENS = 128
_SLACK_TOKENS = 2 * STEP_TOKENS  # a prefix that comes so much short is whole: what ends a prompt is not cached
_MOST_TOKENS = 1 << 32  # no prompt is that large
_LEAST_RATIO, _MOST_RATIO = 0.25, 4.0  # billed tokens for a counted one
_MODELS = 8  # of one conversation, whose sums are kept apart
_OTHERS = ""  # all others'
_RESULTS = ("tool", "function")  # roles that cannot stand without the call in front of them

_replace = msgspec.structs.replace


def cached_prefix(shared_tokens: int) -> int:
    """How many tokens of a prompt are cached that shares its first `shared_tokens` with the one before."""
    return shared_tokens - shared_tokens % STEP_TOKENS if shared_tokens >= MIN_PREFIX_TOKENS else 0


# -- one upstream answer


class Usage(NamedTuple):
    """One call's bill, in upstream's tokens. `cached` and `written` are part of `prompt`; `cached` is None
    where upstream does not say."""

    prompt: int
    cached: int | None = None
    written: int = 0
    completion: int = 0


def usage_of(usage: Mapping[str, Any] | None, expected_tokens: float) -> Usage | None:
    """The bill in a `usage`; None when it tells no prompt.

    Providers name what was read from a cache, or written, as they like: it is what has `cache` in its name.
    Some leave it out of `prompt_tokens`: of the two readings the one counts that is nearer to what we expect.
    """
    if usage is None or not (prompt := _number(usage.get("prompt_tokens"))):
        return None
    cached: int | None = None
    written = 0
    details = usage.get("prompt_tokens_details")
    for fields in (usage, details) if isinstance(details, dict) else (usage,):
        for name in fields:
            if "cache" not in name or "miss" in name or type(value := fields[name]) is not int:
                continue
            if "creat" in name or "writ" in name:
                written = max(written, _number(value))
            else:
                cached = max(cached or 0, _number(value))
    whole = prompt + (cached or 0) + written
    if (cached or 0) > prompt or whole * prompt < expected_tokens**2:  # as a ratio, `whole` is nearer
        prompt = whole
    return Usage(prompt, cached, written, _number(usage.get("completion_tokens")))


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return value if 0 < value <= _MOST_TOKENS else 0


# -- sums


class Tokens(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """What requests were billed: `cached` and `written` are part of `prompt`."""

    prompt: int = 0
    cached: int = 0
    written: int = 0
    completion: int = 0

    def __add__(self, more: Tokens) -> Tokens:
        return Tokens(
            self.prompt + more.prompt, self.cached + more.cached,
            self.written + more.written, self.completion + more.completion,
        )  # fmt: skip

    def billed(self, model: str) -> int:
        """Input in tokens at the model's full price."""
        cached, written = _relative_prices(model)
        return round(self.prompt - self.cached * (1 - cached) + self.written * (written - 1))


@lru_cache(maxsize=1024)
def _relative_prices(model: str) -> tuple[float, float]:
    """Of a cached and of a written token, to that of any other in a prompt."""
    known = prices(model)
    if known is None:
        return CACHED_PRICE, WRITTEN_PRICE
    return known.cached / known.prompt, known.written / known.prompt


class Sums(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """Turns that one model answered. Of `unbilled` ones upstream told no usage: they add nothing else.
    `others`: the sliding window's bill and the whole history's, where they are not ours."""

    model: str
    turns: int = 0
    unbilled: int = 0
    ours: Tokens = Tokens()
    others: tuple[Tokens, Tokens] | None = None

    @property
    def sliding(self) -> Tokens:
        return self.ours if self.others is None else self.others[0]

    @property
    def full(self) -> Tokens:
        return self.ours if self.others is None else self.others[1]

    def __add__(self, more: Sums) -> Sums:
        others = None
        if self.others is not None or more.others is not None:
            others = self.sliding + more.sliding, self.full + more.full
        ours = self.ours + more.ours
        return Sums(self.model, self.turns + more.turns, self.unbilled + more.unbilled, ours, others)


class Reason(StrEnum):
    """Why a request did not find in the cache what the one before had put there."""

    MODEL = "model"  # another one answers
    TOOLS = "tools"  # the tools, or a schema, are others
    SYSTEM = "system"  # the client's system messages are others
    EPOCH = "epoch"  # the window was rebuilt
    REWRITTEN = "rewritten"  # the client says a message otherwise than it did
    EVIDENCE = "evidence"  # what was shown for the last message is gone
    COLD = "cold"  # the prefix was the same: the provider had lost it


class Break(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """A turn whose requests found less than they could. `message`: the position that was rewritten (-1:
    none); `lost_tokens` were read again (-1: upstream does not say)."""

    reason: Reason
    turn: int
    message: int = -1
    lost_tokens: int = -1


Anchors = Sequence[tuple[int, int]]  # (position, tokens) of the client's system messages in mid-conversation


class Sizes(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """The two other requests of a turn, as far as the next turn has to know them: tokens as they are counted
    here. `covered` messages of the path were in the whole history, those from `slid_from` on in the sliding
    window; the client's system messages between them have `anchors` tokens, the last stands at `anchor_at`."""

    covered: int = 0
    messages: int = 0
    slid_from: int = 0
    slid: int = 0
    anchors: int = 0
    anchor_at: int = 0

    def at(self, end: int, pages: PathPages, anchors: Anchors) -> Sizes:
        """Those of a request with the first `end` messages of the path, before anything slides."""
        if end >= self.covered:
            more = sum(map(pages.size, range(self.covered, end)))
        else:
            more = -sum(map(pages.size, range(end, self.covered)))
        inside = [(position, tokens) for position, tokens in anchors if position < end]
        return Sizes(
            end, self.messages + more, min(self.slid_from, end), max(0, self.slid + more),
            sum(tokens for _, tokens in inside), inside[-1][0] if inside else 0,
        )  # fmt: skip

    def slide(self, pages: PathPages, room_tokens: int) -> Sizes:
        """The oldest messages leave until the others fit; no result stands without its call."""
        at, slid, last = self.slid_from, self.slid, self.covered - 1
        while at < last and (slid > room_tokens or pages.path[at].role in _RESULTS):
            slid -= pages.size(at)
            at += 1
        return self if at == self.slid_from else _replace(self, slid_from=at, slid=slid)

    def shared(self, pages: PathPages, anchors: Anchors) -> int:
        """Tokens of its messages that the next request of the whole history begins with: all, or up to the
        last of the system messages between them, where a client moves that along."""
        inside = sum(tokens for position, tokens in anchors if position < self.covered)
        if inside == self.anchors:
            return self.messages + inside
        gone = sum(map(pages.tokens, range(self.anchor_at, self.covered)))
        return self.messages - gone + sum(tokens for position, tokens in anchors if position < self.anchor_at)


class Head(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What stands in front of a request's messages: the client's (`frame`: system messages and tools; `tools`
    and schemas alone), and whether our tools do."""

    frame: bytes
    tools: bytes
    listed: bool


class Account(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """What a path was billed up to a record, and what the next turn's bill is compared with.

    `prompt`: the last request's billed tokens (0: not told); `head`: what stood in front of it; `sizes`:
    the two others' (None: it went up untouched); `breaks`: by reason, how many and the tokens lost;
    `broke`: in the record's own turn; `broken`: the last record before it whose turn broke the cache.
    """

    sums: tuple[Sums, ...] = ()
    prompt: int = 0
    head: Head | None = None
    sizes: Sizes | None = None
    breaks: dict[str, tuple[int, int]] = {}
    broke: Break | None = None
    broken: bytes = b""

    @property
    def model(self) -> str:
        """Which answered last."""
        return self.sums[-1].model if self.sums else ""

    @property
    def billed(self) -> tuple[int, int, int]:
        """Input in tokens at the full price: ours, the sliding window's, the whole history's."""
        return (
            sum(one.ours.billed(one.model) for one in self.sums),
            sum(one.sliding.billed(one.model) for one in self.sums),
            sum(one.full.billed(one.model) for one in self.sums),
        )

    def rewound(self, end: int, pages: PathPages, anchors: Anchors) -> Account:
        """The same for a record with the first `end` messages of the path alone: of what stands behind them
        the next request may say something else."""
        return self if self.sizes is None else _replace(self, sizes=self.sizes.at(end, pages, anchors))


_NOTHING = Account()


# -- a turn


class Turned(NamedTuple):
    """One turn, as it was asked and billed. `usages` are its rounds'; `counted` the last request's tokens as
    we count them; `why`: what the turn did to its prefix, at the position `message`."""

    number: int
    model: str
    usages: Sequence[Usage | None]
    counted: int
    head: Head
    why: Reason | None = None
    message: int = -1


class Others(NamedTuple):
    """What the two requests that were not made have in common with ours: the messages, `fixed` tokens in
    front of them, and the `budget` of a whole request. `sizes`: those of the request before."""

    pages: PathPages
    anchors: Anchors
    fixed: int
    budget: int
    sizes: Sizes


def accounted(before: Account | None, record_id: bytes, turn: Turned, others: Others | None) -> tuple[Account, Sums]:
    """The account after a turn, and the turn's own sums. `before`: after the record `record_id`, which the
    turn goes on from; `others`: None for what went up untouched."""
    usages, sizes = turn.usages, None
    broke = _broke(before, turn) if before is not None else None
    before = before or _NOTHING
    if others is not None:
        room = others.budget - others.fixed - PER_REPLY
        sizes = others.sizes.at(len(others.pages.path), others.pages, others.anchors).slide(others.pages, room)
    if None in usages:
        own = Sums(turn.model, 1, 1)
    else:
        ours, two = _together(usages), None
        if others is not None and sizes is not None:
            two = _others_billed(before, turn, others, sizes, ours, broke)
        own = Sums(turn.model, 1, 0, ours, two)
    breaks = before.breaks
    if broke is not None:
        count, lost = breaks.get(broke.reason, (0, 0))
        breaks = {**breaks, broke.reason.value: (count + 1, lost + max(0, broke.lost_tokens))}
    if before.model == turn.model:
        sums = (*before.sums[:-1], before.sums[-1] + own)
    else:
        name = turn.model if len(before.sums) < _MODELS else _OTHERS
        by_model = {one.model: one for one in before.sums}
        known = by_model.get(turn.model) or by_model.get(name) or Sums(name)
        sums = (*(one for one in before.sums if one is not known), known + own)
    last = usages[-1]
    broken = record_id if before.broke is not None else before.broken
    return Account(sums, last.prompt if last else 0, turn.head, sizes, breaks, broke, broken), own


def _together(usages: Sequence[Usage | None]) -> Tokens:
    prompt = cached = written = completion = 0
    for usage in usages:
        if usage is not None:
            prompt += usage.prompt
            cached += usage.cached or 0
            written += usage.written
            completion += usage.completion
    return Tokens(prompt, cached, written, completion)


def _in_front(before: Account, turn: Turned) -> Reason | None:
    """What of the client's stands otherwise in front of all messages."""
    old, new = before.head, turn.head
    if old is None or before.model not in (turn.model, _OTHERS):
        return Reason.MODEL
    if old.tools != new.tools:
        return Reason.TOOLS
    return None if old.frame == new.frame else Reason.SYSTEM


def _broke(before: Account, turn: Turned) -> Break | None:
    if before.head is None:
        return None
    reason, message = _in_front(before, turn), -1
    if reason is None:
        reason, message = turn.why, turn.message
        if before.head.listed != turn.head.listed and reason is not Reason.EPOCH:
            reason, message = Reason.TOOLS, -1
    lost, prompt = 0, before.prompt
    for usage in turn.usages:
        if usage is None or usage.cached is None or not prompt:
            return None if reason is None else Break(reason, turn.number, message)
        missed, prompt = cached_prefix(prompt) - usage.cached, usage.prompt
        if missed > _SLACK_TOKENS:
            lost += missed
        elif not lost:  # it was whole so far: all that can break it in a later round
            reason, message = Reason.EPOCH if turn.why is Reason.EPOCH else None, -1
    return Break(reason or Reason.COLD, turn.number, message, lost) if lost else None


def _others_billed(
    before: Account, turn: Turned, others: Others, sizes: Sizes, ours: Tokens, broke: Break | None
) -> tuple[Tokens, Tokens]:
    """The sliding window's and the whole history's bill, in upstream's tokens."""
    first, last = turn.usages[0], turn.usages[-1]
    assert first is not None and last is not None
    ratio = min(_MOST_RATIO, max(_LEAST_RATIO, last.prompt / turn.counted)) if turn.counted else 1.0
    was, start, anchors = others.sizes, sizes.slid_from, others.anchors
    shared = was.shared(others.pages, anchors)
    slid_shared = 0  # another first message: only what stands in front is the same
    if start == was.slid_from:
        gone = was.messages - was.slid + sum(tokens for position, tokens in anchors if position < start)
        slid_shared = max(0, shared - gone)
    inside = sum(tokens for position, tokens in anchors if position >= start)
    every = sum(tokens for _, tokens in anchors)
    found = first.cached or 0
    is_new = _in_front(before, turn) is not None
    warm = 1.0
    if broke is not None and broke.reason is Reason.COLD:
        warm = min(1.0, found / max(1, cached_prefix(before.prompt)))
    written = ours.written / max(1, ours.prompt - ours.cached)

    def bill(prompt_tokens: int, shared_tokens: int) -> Tokens:
        prompt = round(ratio * (others.fixed + prompt_tokens + PER_REPLY))
        cached = found if is_new else round(warm * cached_prefix(round(ratio * (others.fixed + shared_tokens))))
        cached = 0 if first.cached is None else min(cached, prompt)
        return Tokens(prompt, cached, round(written * (prompt - cached)), last.completion)

    return bill(sizes.slid + inside, slid_shared), bill(sizes.messages + every, shared)
