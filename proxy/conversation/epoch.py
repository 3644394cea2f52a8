"""Begins an epoch: one rebuild of the window, from the plan to the bytes of its first entries. Pure.

Promises: the new window fits the room whatever the history (or the request is refused as too large);
the newest message is in it; the layout is the developer message with rules, manifest and kept pages,
then kept media in a user message, then the newest groups in their own roles; what was in the window
and is not any more is a page, and the segment that leaves is summarised first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from proxy.conversation.closing import close_segment, created
from proxy.conversation.effects import Effect
from proxy.conversation.epoch_request import EpochRequest, show
from proxy.conversation.limits import Limits
from proxy.conversation.listing import manifest_of
from proxy.conversation.newest import Cuts, cut_newest
from proxy.conversation.pathpages import (
    RESULT_ROLES,
    PathPages,
    anchor_tokens,
    group_start,
    groups_of,
)
from proxy.conversation.room import without_oldest_round
from proxy.conversation.tree import Anchor
from proxy.conversation.window import KEPT, MIXED, NATIVE, SYSTEM, VM, Entry, Window
from proxy.errors import ApiError
from proxy.memory.context import context_parts, page_parts
from proxy.memory.eviction import PinnedSet, PinReason
from proxy.memory.models import MemoryPage, MutationType, PageMutation, StorageTier, VMMode
from proxy.memory.planner import Budget, Group, IsPinned, Plan, native_groups, plan
from proxy.memory.segments import Segment
from proxy.memory.vm_tools import build_vm_developer_message
from proxy.memory.working_set import watermarks
from proxy.tokens import PER_MESSAGE, TokenCounter

_CONTEXT_SHARE = 0.25  # of the low watermark, for pages kept from older turns
_MANIFEST_SHARE = 0.20  # and at most so much for the manifest
_MANDATORY_SHARE = 0.70  # of the room; a newest group above it is cut
_MIN_CUT_SHARE = 0.35  # of the room, for what is shown of a newest group that is cut
_LOAD_TOKENS = 480  # beside a loaded page: the frame that paging.py keeps free and the result's JSON
_OPENING = "[The messages before this one are in memory.]"
_NEVER = 1 << 40  # the price of a native message for a group that may not be native


@dataclass(slots=True)
class Epoch:
    """The new window, the pages that left it, and the segment that was closed. `tail`: what is left
    of the request's; `folded`: rounds of it left."""

    window: Window
    evicted: list[str]
    segment: Segment | None
    tail: tuple[Entry, ...]
    folded: bool = False


def begin_epoch(request: EpochRequest) -> Generator[Effect, Any, Epoch]:
    """Rebuild down to the low watermark; raises ApiError context_length_exceeded when nothing fits.

    When this turn's own exchange does not fit (upstream has just said that its window is smaller),
    the oldest rounds of it leave; without any of it, the newest message is cut anew.
    """
    asked, segment = request, None
    while True:
        epoch, segment, over = yield from _rebuild(asked, segment)
        if epoch is not None:
            epoch.folded = asked is not request
            return epoch
        if asked.after or all(entry.kind == SYSTEM for entry in asked.tail):
            break
        tail = without_oldest_round(asked.tail)
        asked = replace(asked, tail=tail, newest=asked.newest if tail else None)
    raise context_length_exceeded(request.limits, request.limits.budget_tokens + over)


def _rebuild(
    request: EpochRequest, segment: Segment | None
) -> Generator[Effect, Any, tuple[Epoch | None, Segment | None, int]]:
    """The new window, or None and by how many tokens it is too large; with the segment that is closed
    by now (`segment`: before)."""
    tail_tokens = sum(entry.tokens for entry in request.tail)
    _, low = watermarks(request.room_tokens, request.limits.working_set)
    groups = _groups(request)
    limit = int(request.room_tokens * _MANDATORY_SHARE) - tail_tokens
    mandatory = sum(group.tokens for group in groups if group.mandatory)
    cuts: Cuts = {}
    if mandatory > limit:
        cuts = yield from cut_newest(request, groups, min(limit, _loadable(request)))
    manifest = int(min(request.limits.manifest_tokens, low * _MANIFEST_SHARE))
    context = int(low * _CONTEXT_SHARE)
    rules = rules_tokens(request.mode, request.limits, request.names, request.counter)
    frame = rules + tail_tokens
    groups += _after(request)
    for shrink in (1.0, 0.5, 0.0):
        budget = Budget(low - frame - manifest - int(context * shrink), int(context * shrink))
        segment = segment or _close(request, groups, budget)
        candidates = [*_derived_groups(request), *groups]
        planned = plan(
            request.table, candidates, budget, request.policy, request.turn, _pinned(request.pins)
        )
        planned.native = [g for g in planned.native if g.first < len(request.pages.path)]
        window = yield from _assemble(request, planned, cuts, int(manifest * shrink))
        over = window.tokens - request.room_tokens
        if over <= 0:
            mutations = planned.mutations + _evict_cut(request, cuts)
            for mutation in mutations:
                request.apply(mutation)
            gone = [m.page_id for m in mutations if m.op is MutationType.EVICT]
            return Epoch(window, gone, segment, request.tail), segment, 0
    return None, segment, over


def _pinned(pins: PinnedSet) -> IsPinned:
    """Pinned for more than its age: the newest messages are in the window as they are."""
    return lambda entry, turn: pins.reason(entry, turn) > PinReason.RECENT


def _close(request: EpochRequest, groups: Sequence[Group], budget: Budget) -> Segment | None:
    """Close the segment of what is about to leave; what derives from it competes for the window."""
    stays = native_groups(groups, budget.native_tokens)
    last = native_from(stays, len(request.pages.path))
    known = request.pages.derived.pages
    segment = close_segment(request.pages, last, request.limits, request.turn, request.counter)
    for mutation in created(segment, request.pages, request.turn, known) if segment else ():
        request.apply(mutation)
    return segment


def native_from(native: Sequence[Group], end: int) -> int:
    """Where the newest messages begin that stay in their own roles without a gap."""
    first = end
    for group in reversed(native):
        if group.last == first:
            first = group.first
    return first


def _loadable(request: EpochRequest) -> int:
    """What cut messages may take so that one of their parts can still be loaded beside them."""
    room, page = request.room_tokens, request.limits.page_tokens
    return max(int(room * _MIN_CUT_SHARE), room - page - _LOAD_TOKENS)


def context_length_exceeded(limits: Limits, tokens: int) -> ApiError:
    """What OpenAI says when messages and tools cannot fit, with our window's size."""
    return ApiError(
        400,
        f"This model's maximum context length is {limits.working_set.max_l0_tokens} tokens, of which"
        f" {limits.working_set.reserved_tokens} are kept for the answer. However, the messages and"
        f" tools that must stay in it come to {tokens} tokens. Please shorten the system messages or"
        " the tools.",
        param="messages",
        code="context_length_exceeded",
    )


# -- what may stay native


def _groups(request: EpochRequest) -> list[Group]:
    """Groups with a page in L0, oldest first; those before the floor can only be context lines."""
    pages, path = request.pages, request.pages.path
    last_user = next((i for i in range(len(path) - 1, -1, -1) if path[i].role == "user"), -1)
    last_user = -1 if request.after else last_user  # the user's newest message is in the tail
    starts: list[tuple[int, int]] = []
    seen = -1
    for entry in request.table.resident():
        if entry.position >= request.floor:
            break
        if entry.position <= seen or entry.position < 0:
            continue
        first = group_start(path, entry.position)
        starts.extend(groups_of(path, first, _group_end(request, first)))
        seen = starts[-1][1] - 1
    starts.extend(groups_of(path, request.floor, len(path)))
    if 0 <= last_user < request.floor and all(not a <= last_user < b for a, b in starts):
        starts.append((last_user, last_user + 1))
        starts.sort()
    return [
        Group(
            first,
            last,
            _native_tokens(request, first, last, last_user),
            tuple(i for position in range(first, last) for i in pages.ids(position)),
            mandatory=not request.after and (last == len(path) or first <= last_user < last),
            answer=last - first == 1 and path[first].role == "assistant",
        )
        for first, last in starts
    ]


def _after(request: EpochRequest) -> list[Group]:
    """The messages in the tail, whose room is taken: the newest native ones stand before them."""
    end = len(request.pages.path)
    return [Group(end, end + request.after, 0, (), mandatory=True)] if request.after else []


def _derived_groups(request: EpochRequest) -> list[Group]:
    """Summaries and claims in L0: in front of all messages, in the order of their making."""
    known = request.pages.derived.pages
    ids = [e.page_id for e in request.table.resident() if e.position < 0 and e.page_id in known]
    return [Group(i - len(ids), i - len(ids), _NEVER, (wanted,)) for i, wanted in enumerate(ids)]


def _group_end(request: EpochRequest, first: int) -> int:
    path = request.pages.path
    end = first + 1
    while end < min(request.floor, len(path)) and path[end].role in RESULT_ROLES:
        end += 1
    return end


def _native_tokens(request: EpochRequest, first: int, last: int, last_user: int) -> int:
    pages = request.pages
    if first < request.floor and not first <= last_user < last:
        return _NEVER
    total = sum(pages.tokens(p) + pages.notes_tokens(p) for p in range(first, last))
    if last - first > 1:  # a call with results may have been a mixed one
        kept = native_entries(pages, first, request.substitutes, request.counter)
        total += sum(entry.tokens for entry in kept) - pages.tokens(first)
    if request.newest is not None and last == len(pages.path):
        total += request.newest.tokens - pages.tokens(last - 1)
    return total


def _evict_cut(request: EpochRequest, cuts: Cuts) -> list[PageMutation]:
    """A cut message is not in the window: its pages can be faulted in."""
    return [
        PageMutation(MutationType.EVICT, i, request.turn, tier=StorageTier.L2)
        for position in _shortened(request, cuts)
        for i in request.pages.ids(position)
        if (entry := request.table.lookup(i)) and entry.tier is StorageTier.L0
    ]


def _shortened(request: EpochRequest, cuts: Cuts) -> set[int]:
    """Positions of the messages that are not shown whole, or not all that belongs to their page."""
    path = request.pages.path
    return {p for (p, n), e in cuts.items() if (e.whole if n else e.raw != path[p].raw)}


# -- the bytes


def _assemble(
    request: EpochRequest, planned: Plan, cuts: Cuts, manifest_tokens: int
) -> Generator[Effect, Any, Window]:
    path = request.pages.path
    first = native_from(planned.native, len(path))
    pages = yield from _kept_pages(request, planned)
    resident = {p for g in planned.native for p in range(g.first, g.last)}
    cut = _shortened(request, cuts)
    resident -= cut
    resident.update(p for g, _ in planned.context for p in range(g.first, g.last))
    manifest = manifest_of(request, first, resident, cut, manifest_tokens)
    words = [page for page in pages if not page_parts(page)]
    context = request.pages.packer.pack(words).content
    developer, tokens = _developer(request, manifest, context)
    entries = _kept_media(request, [page for page in pages if page_parts(page)])
    for group in planned.native:
        for position in range(group.first, group.last):
            notes = [
                cuts.get((position, number)) or system_entry(note, request.counter)
                for number, note in enumerate(request.pages.notes(position), 1)
            ]
            entries.extend(note for note in notes if note.position <= position)
            entries.extend(_native(request, position, cuts))
            entries.extend(note for note in notes if note.position > position)
    entries.extend(request.tail)
    if request.limits.developer_role == "system":
        entries = [*_opening(request, entries), *entries]
    return Window(
        request.epoch,
        developer,
        tokens,
        first,
        len(path),
        tuple(entries),
        tokens + sum(entry.tokens for entry in entries),
        request.counter.name,
        request.pages.notes_digest(first),
        request.limits.tokens_factor,
    )


def _kept_pages(
    request: EpochRequest, planned: Plan
) -> Generator[Effect, Any, list[MemoryPage]]:
    """What the plan keeps of older turns, each page at its level."""
    pages: list[MemoryPage] = []
    for group, level in planned.context:
        for wanted in group.pages:
            page = yield from show(request, wanted, level)
            pages.append(page)
    return pages


def _kept_media(request: EpochRequest, pages: Sequence[MemoryPage]) -> list[Entry]:
    """Images and frames of older turns go in a user message, as the API wants it."""
    if not pages:
        return []
    content = context_parts(request.pages.packer.pack(pages).parts)
    message = {"role": "user", "content": content}
    return [Entry(msgspec.json.encode(message), request.counter.message(message), -1, KEPT)]


def _opening(request: EpochRequest, entries: Sequence[Entry]) -> list[Entry]:
    """A user message in front of a log that would begin with an answer: many templates want the user
    to speak first, and the client's history does."""
    spoken = next((e for e in entries if e.kind != SYSTEM), None)
    if spoken is None or msgspec.json.decode(spoken.raw)["role"] == "user":
        return []
    message = {"role": "user", "content": _OPENING}
    return [Entry(msgspec.json.encode(message), request.counter.message(message), -1, KEPT)]


def anchored(
    anchors: Sequence[Anchor], position: int, counter: TokenCounter
) -> list[Entry]:
    """The client's system messages that stand just before `position`."""
    return [system_entry(a, counter) for a in anchors if a.position == position]


def system_entry(anchor: Anchor, counter: TokenCounter) -> Entry:
    """A system message in mid-conversation as it stands in the log."""
    return Entry(anchor.raw, anchor_tokens(anchor, counter), anchor.position, SYSTEM)


def client_entries(
    pages: PathPages, anchors: Sequence[Anchor], substitutes: Callable[[bytes], Sequence[bytes]],
    counter: TokenCounter, first: int, last: int, anchors_until: int,
) -> list[Entry]:
    """The client's messages at positions first..last-1, with its system messages that stand before
    them, and behind them, up to the position `anchors_until`."""
    entries: list[Entry] = []
    for position in range(first, last + 1):
        if position <= anchors_until:
            entries.extend(anchored(anchors, position, counter))
        if position < last:
            entries.extend(native_entries(pages, position, substitutes, counter))
    return entries


def native_entries(
    pages: PathPages, position: int, substitutes: Callable[[bytes], Sequence[bytes]],
    counter: TokenCounter,
) -> list[Entry]:
    """A message in its own role; a mixed call as the model made it, with the VM results."""
    node = pages.path[position]
    raws = substitutes(node.id) if node.role == "assistant" else ()
    if not raws:
        return [Entry(node.raw, pages.tokens(position), position, NATIVE)]
    sizes = [counter.message(msgspec.json.decode(raw)) for raw in raws]
    head = Entry(raws[0], sizes[0], position, MIXED)
    rest = zip(raws[1:], sizes[1:], strict=True)
    return [head, *(Entry(raw, size, -1, VM) for raw, size in rest)]


def _native(request: EpochRequest, position: int, cuts: Cuts) -> list[Entry]:
    if request.newest is not None and position == len(request.pages.path) - 1:
        return [request.newest]
    if (position, 0) in cuts:
        return [cuts[position, 0]]
    return native_entries(request.pages, position, request.substitutes, request.counter)


def rules_tokens(
    mode: VMMode, limits: Limits, names: Mapping[str, str], counter: TokenCounter
) -> int:
    """The developer message's tokens when there is nothing in it but the rules."""
    text = build_vm_developer_message(mode, "", "", "", limits.faults_per_turn, names)
    return PER_MESSAGE + counter.text(text)


def _developer(request: EpochRequest, manifest: str, context: str) -> tuple[str, int]:
    text = build_vm_developer_message(
        request.mode, manifest, context, "", request.limits.faults_per_turn, request.names
    )
    return text, PER_MESSAGE + request.counter.text(text)
