"""Begins an epoch: one rebuild of the window, from the plan to the bytes of its first entries. Pure.

Promises: the new window fits the room whatever the history (or the request is refused as too large);
the newest message is in it; the layout is the developer message with rules, manifest and kept pages,
then the newest groups in their own roles; what was in the window and is not any more is a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from proxy.conversation.cut import cut_message, fair_shares
from proxy.conversation.limits import Limits
from proxy.conversation.pathpages import RESULT_ROLES, PathPages, group_start, groups_of
from proxy.conversation.tree import Anchor
from proxy.conversation.window import MIXED, NATIVE, SYSTEM, VM, Entry, Window
from proxy.errors import ApiError
from proxy.memory.compressor import hint
from proxy.memory.eviction_policy import EvictionPolicy
from proxy.memory.manifest import (
    MIN_MANIFEST_TOKENS,
    AvailablePageEntry,
    ManifestBuilder,
    ManifestPolicies,
)
from proxy.memory.models import (
    MutationType,
    PageMutation,
    StorageTier,
    VMMode,
)
from proxy.memory.page_table import PageTable
from proxy.memory.pages import page_id
from proxy.memory.planner import Budget, Group, Plan, plan
from proxy.memory.vm_prompts import build_vm_developer_message
from proxy.memory.working_set import watermarks
from proxy.tokens import PER_MESSAGE, TokenCounter

_CONTEXT_SHARE = 0.25  # of the low watermark, for pages kept from older turns
_MANIFEST_SHARE = 0.20  # and at most so much for the manifest
_MANDATORY_SHARE = 0.70  # of the room; a newest group above it is cut
_MIN_CUT_SHARE = 0.35  # of the room, for what is shown of a newest group that is cut
_LOAD_TOKENS = 480  # beside a loaded page: the frame that paging.py keeps free and the result's JSON
_MANIFEST_ENTRIES = 64  # priced at most; the rest is one line per segment
_SEGMENTS = 6
_NEVER = 1 << 40  # the price of a native message for a group that may not be native
_FIRST_HINT_WORDS = 10


@dataclass(slots=True)
class EpochRequest:
    """Everything a rebuild depends on. `floor`: no message before it may become native again."""

    pages: PathPages
    table: PageTable
    policy: EvictionPolicy
    counter: TokenCounter
    limits: Limits
    anchors: Sequence[Anchor]
    substitutes: Callable[[bytes], Sequence[bytes]]
    names: Mapping[str, str]  # what the VM tools are called in this conversation
    mode: VMMode
    turn: int
    epoch: int
    floor: int
    room_tokens: int  # for everything but the client's system messages and the tools
    newest: Entry | None = None  # the newest message as this turn already sent it
    tail: tuple[Entry, ...] = ()  # this turn's VM exchange so far


@dataclass(slots=True)
class Epoch:
    """The new window, and the change of the table that goes with it (not applied yet)."""

    window: Window
    mutations: list[PageMutation]


def begin_epoch(request: EpochRequest) -> Epoch:
    """Rebuild down to the low watermark; raises ApiError context_length_exceeded when nothing fits."""
    tail_tokens = sum(entry.tokens for entry in request.tail)
    _, low = watermarks(request.room_tokens, request.limits.working_set)
    groups = _groups(request)
    limit = int(request.room_tokens * _MANDATORY_SHARE) - tail_tokens
    mandatory = sum(group.tokens for group in groups if group.mandatory)
    cuts = _cut_mandatory(request, groups, min(limit, _loadable(request))) if mandatory > limit else {}
    manifest = int(min(request.limits.manifest_tokens, low * _MANIFEST_SHARE))
    context = int(low * _CONTEXT_SHARE)
    frame = _developer(request, "", "")[1] + tail_tokens
    for shrink in (1.0, 0.5, 0.0):
        native = low - frame - manifest - int(context * shrink)
        budget = Budget(native, int(context * shrink))
        planned = plan(request.table, groups, budget, request.policy, request.turn)
        window = _assemble(request, planned, cuts, int(manifest * shrink))
        over = window.tokens - _system_tokens(window) - request.room_tokens
        if over <= 0:
            mutations = planned.mutations + _evict_cut(request, cuts)
            return Epoch(window, mutations)
    raise context_length_exceeded(request.limits, request.limits.budget_tokens + over)


def _system_tokens(window: Window) -> int:
    """Those of the system messages in the log: the room is without them."""
    return sum(entry.tokens for entry in window.entries if entry.kind == SYSTEM)


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
            mandatory=last == len(path) or first <= last_user < last,
            answer=last - first == 1 and path[first].role == "assistant",
        )
        for first, last in starts
    ]


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
    total = sum(pages.tokens(position) for position in range(first, last))
    if last - first > 1:  # a call with results may have been a mixed one
        kept = native_entries(pages, first, request.substitutes, request.counter)
        total += sum(entry.tokens for entry in kept) - pages.tokens(first)
    if request.newest is not None and last == len(pages.path):
        total += request.newest.tokens - pages.tokens(last - 1)
    return total


def _cut_mandatory(
    request: EpochRequest, groups: Sequence[Group], limit: int
) -> dict[int, Entry]:
    """The newest groups' messages cut so that together they stay within `limit` tokens.

    A mixed call is reduced to the client's part of it first.
    """
    positions = [p for g in groups if g.mandatory for p in range(g.first, g.last)]
    if request.newest is not None:  # cut before, in this turn
        positions = [p for p in positions if p != len(request.pages.path) - 1]
        limit -= request.newest.tokens
    sizes = [request.pages.tokens(p) for p in positions]
    cuts = {
        p: Entry(request.pages.path[p].raw, size, p)
        for p, size in zip(positions, sizes, strict=True)
        if request.pages.path[p].role == "assistant"
    }
    for position, size, share in zip(positions, sizes, fair_shares(sizes, limit), strict=True):
        if share < size:
            ids = request.pages.ids(position)
            message = cut_message(request.pages.message(position), ids, share, request.counter)
            raw = msgspec.json.encode(message)
            cuts[position] = Entry(raw, request.counter.message(message), position)
    return cuts


def _evict_cut(request: EpochRequest, cuts: Mapping[int, Entry]) -> list[PageMutation]:
    """A cut message is not in the window: its pages can be faulted in."""
    return [
        PageMutation(MutationType.EVICT, i, request.turn, tier=StorageTier.L2)
        for position in _shortened(request, cuts)
        for i in request.pages.ids(position)
        if (entry := request.table.lookup(i)) and entry.tier is StorageTier.L0
    ]


def _shortened(request: EpochRequest, cuts: Mapping[int, Entry]) -> set[int]:
    return {p for p, entry in cuts.items() if entry.raw != request.pages.path[p].raw}


# -- the bytes


def _assemble(
    request: EpochRequest, planned: Plan, cuts: Mapping[int, Entry], manifest_tokens: int
) -> Window:
    path = request.pages.path
    native_from = len(path)
    for group in reversed(planned.native):
        if group.last == native_from:
            native_from = group.first
    lines = _context_lines(request, planned)
    resident = {p for g in planned.native for p in range(g.first, g.last)}
    cut = _shortened(request, cuts)
    resident -= cut
    resident.update(p for g, _ in planned.context for p in range(g.first, g.last))
    manifest = _manifest(request, native_from, resident, cut, manifest_tokens)
    developer, tokens = _developer(request, manifest, "\n".join(lines))
    entries: list[Entry] = []
    for group in planned.native:
        for position in range(group.first, group.last):
            if position >= native_from:
                entries.extend(anchored(request.anchors, position, request.counter))
            entries.extend(_native(request, position, cuts))
    entries.extend(anchored(request.anchors, len(path), request.counter))
    entries.extend(request.tail)
    return Window(
        request.epoch,
        developer,
        tokens,
        native_from,
        len(path),
        tuple(entries),
        tokens + sum(entry.tokens for entry in entries),
    )


def anchored(
    anchors: Sequence[Anchor], position: int, counter: TokenCounter
) -> list[Entry]:
    """The client's system messages that stand just before `position`."""
    return [
        Entry(a.raw, counter.message(msgspec.json.decode(a.raw)), position, SYSTEM)
        for a in anchors
        if a.position == position
    ]


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


def _native(request: EpochRequest, position: int, cuts: Mapping[int, Entry]) -> list[Entry]:
    if request.newest is not None and position == len(request.pages.path) - 1:
        return [request.newest]
    if position in cuts:
        return [cuts[position]]
    return native_entries(request.pages, position, request.substitutes, request.counter)


def _context_lines(request: EpochRequest, planned: Plan) -> list[str]:
    return [
        request.pages.line(position, part, level)
        for group, level in planned.context
        for wanted in group.pages
        for position, part in request.pages.locate(wanted)
    ]


def _developer(request: EpochRequest, manifest: str, context: str) -> tuple[str, int]:
    text = build_vm_developer_message(
        request.mode, manifest, context, "", request.limits.faults_per_turn, request.names
    )
    return text, PER_MESSAGE + request.counter.text(text)


def _manifest(
    request: EpochRequest, native_from: int, resident: set[int], cut: set[int], max_tokens: int
) -> str:
    """The pages outside the window: the ones faulted before, then the nearest, then segments."""
    if max_tokens < MIN_MANIFEST_TOKENS or request.mode is VMMode.PASSIVE:
        return ""
    policies = ManifestPolicies(max_faults_per_turn=request.limits.faults_per_turn)
    builder = ManifestBuilder(policies=policies)
    outside = sorted(cut, reverse=True)
    position = native_from - 1
    limit = min(_MANIFEST_ENTRIES, max_tokens // 24)  # no entry is shorter
    while position >= 0 and len(outside) < limit:
        if position not in resident:
            outside.append(position)
        position -= 1
    for p in outside:
        for wanted in request.pages.ids(p):
            builder.add_available_page_entry(_available(request, wanted, p))
    _add_segments(request, builder, position + 1, resident)
    return builder.fit(max_tokens, request.counter.text).model_dump_json()


def _available(request: EpochRequest, wanted: str, position: int) -> AvailablePageEntry:
    part = request.pages.locate(wanted)[0][1]
    text = request.pages.parts(position)[part - 1 if part else 0]
    return AvailablePageEntry(
        page_id=wanted,
        modality=request.pages.modality(position).value,
        tier=StorageTier.L2.value,
        hint=hint(text, _FIRST_HINT_WORDS),
    )


def _add_segments(
    request: EpochRequest, builder: ManifestBuilder, end: int, resident: set[int]
) -> None:
    """Positions 0..end-1 as a few ranges, each with the hint of its first user message."""
    path = request.pages.path
    size = -(-end // _SEGMENTS)
    for first in range(0, end, size or 1):
        last = min(first + size, end)
        count = sum(1 for p in range(first, last) if p not in resident)
        if count == 0:
            continue
        speaker = next((p for p in range(first, last) if path[p].role == "user"), first)
        text = hint(request.pages.parts(speaker)[0], _FIRST_HINT_WORDS)
        builder.add_segment(page_id(first), page_id(last - 1), count, text)
