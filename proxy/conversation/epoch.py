"""Begins an epoch: one rebuild of the window, from the plan to the bytes of its first entries. Pure.

Promises: the new window fits the room whatever the history (or the request is refused as too large);
the newest message is in it; the layout is the developer message with rules, manifest and kept pages,
then kept media in a user message, then the newest groups in their own roles; what was in the window
and is not any more is a page, and of the segment that leaves a line says what it was about. The manifest's cost does not
grow with the history: a bounded number of entries is priced, and what is older is one line per segment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from proxy.conversation.derived import derive, entered
from proxy.conversation.effects import Effect, Load
from proxy.conversation.limits import Limits
from proxy.conversation.oversized import Cuts, cut_newest
from proxy.conversation.pages import RESULT_ROLES, PathPages, group_start, groups_of
from proxy.conversation.report import crowded_window
from proxy.conversation.window import (
    KEPT,
    SYSTEM,
    Entry,
    Window,
    native_entries,
    system_entry,
    without_oldest_round,
)
from proxy.errors import ApiError
from proxy.memory.compressor import hint
from proxy.memory.context import context_parts, page_parts
from proxy.memory.eviction import PinnedSet, PinReason
from proxy.memory.ids import make_page_id
from proxy.memory.manifest import (
    MIN_MANIFEST_TOKENS,
    AvailablePageEntry,
    ManifestBuilder,
    ManifestPolicies,
)
from proxy.memory.models import (
    CompressionLevel,
    MemoryPage,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageType,
    StorageTier,
    VMMode,
)
from proxy.memory.planner import Budget, Group, Plan, changed, native_groups, plan
from proxy.memory.standing import holding
from proxy.memory.vm_tools import build_vm_developer_message
from proxy.memory.working_set import CACHED_PRICE, rebuild_target, watermarks
from proxy.tokens import PER_MESSAGE

if TYPE_CHECKING:
    from proxy.conversation.turn_window import TurnWindow

_CONTEXT_SHARE = 0.25  # of the low watermark, for pages kept from older turns
_MANIFEST_SHARE = 0.20  # and at most so much for the manifest,
_OWN_SHARE = 0.10  # which with rules and tools takes at most so much of L0
_TAGS_TOKENS = 16  # of the tags around it
_GROWTH_ANSWERS = 8  # the last ones, whose messages say how fast the window fills
_MIN_CUT_SHARE = 0.35  # of the room, for what is shown of a newest group that is cut
_LOAD_TOKENS = 480  # beside a loaded page: the frame that a VM result keeps free and the result's JSON
_OPENING = "[The messages before this one are in memory.]"
_NEVER = 1 << 40  # the price of a native message for a group that may not be native
_MANIFEST_ENTRIES = 64  # priced at most; the rest is one line per segment
_MANIFEST_ENTRY_TOKENS = 24  # no entry is shorter
_SEGMENTS = 8
_LOOKED_AT = 16  # messages, for one of the user's
_FIRST_HINT_WORDS = 10
_STANDING_SHARE = 10  # what was said for all later answers takes at most 1/10 of the room
_HARDLY_LONGER = 2  # times what stands in it: such a message is shown whole

_PINS = PinnedSet()


@dataclass
class _Standing:
    """What is kept of messages that stand: as lines, of so many `tokens` in all, and what that changes in the
    table. `decided`: their groups, by their first position, and those that leave."""

    lines: list[tuple[Group, CompressionLevel]] = field(default_factory=list)
    mutations: list[PageMutation] = field(default_factory=list)
    tokens: int = 0
    decided: set[int] = field(default_factory=set)

    def keep(self, group: Group, page: MemoryPage, tokens: int, turn: TurnWindow) -> None:
        """One page of the group as a line."""
        level = page.compression_level
        self.tokens += tokens
        self.leave(group, turn, page.page_id)
        self.lines.append((replace(group, pages=(page.page_id,)), level))
        for mutation in changed(turn.table, page.page_id, level, True, turn.turn):
            self.mutations.append(msgspec.structs.replace(mutation, tokens=tokens))

    def leave(self, group: Group, turn: TurnWindow, but: str = "") -> None:
        """The group's pages go, but for one."""
        self.decided.add(group.first)
        for page_id in group.pages:
            if page_id != but:
                self.mutations += changed(turn.table, page_id, None, True, turn.turn)


class Epoch:
    """One rebuild of `turn`'s window over `pages`, down to the low watermark of `room_tokens`.

    `tail`: this turn's VM exchange so far, or the `after` messages that follow those of the pages.
    `sent`: by position, the messages that stay as this turn already sent them: the newest one before its
    exchange, the user's with its evidence. After `begin()`: `evicted` pages left the
    window, `made` were derived, `shown` are the older pages in it by (id, level), and where the
    exchange did not fit, `tail` is what is left of it (`folded`).
    """

    def __init__(
        self,
        turn: TurnWindow,
        pages: PathPages,
        number: int,
        room_tokens: int,
        tail: tuple[Entry, ...],
        after: int,
        sent: dict[int, Entry],
    ) -> None:
        self.turn = turn
        self.pages = pages
        self.number = number
        self.room_tokens = room_tokens
        self.tail = tail
        self.after = after
        self.sent = sent
        self.folded = False
        self.evicted: list[str] = []
        self.made: Sequence[MemoryPage] | None = None
        self.shown: dict[tuple[str, int], MemoryPage] = {}
        floor = max(turn.context.place.floor, pages.far, turn.before.native_from if turn.before else 0)
        self._known = turn.known_until(settling=after > 0)  # what is behind is fresh
        self._floor = group_start(pages.path, min(floor, len(pages.path) - 1))  # none before it is native again
        self._end = len(pages.path)
        path = turn.pages.path
        users = (i for i in range(self._end + after - 1, -1, -1) if path[i].role == "user")
        self._last_user = next(users, -1)  # in the tail, where it stands behind the pages
        self._cuts: Cuts = {}
        self._said: dict[str, MemoryPage] = {}  # what is kept word for word

    def begin(self) -> Generator[Effect, Any, Window]:
        """The new window; ApiError context_length_exceeded when nothing fits.

        When this turn's own exchange does not fit (upstream has just said that its window is smaller),
        the evidence leaves first, then the oldest rounds of it; without any of it, the newest message is cut anew.
        """
        while True:
            window, over = yield from self._rebuild()
            if window is not None:
                return window
            if self._hide_evidence():
                continue
            if self.after or all(entry.kind == SYSTEM for entry in self.tail):
                limits = self.turn.limits
                raise context_length_exceeded(limits, limits.budget_tokens + over)
            self.tail, self.folded = without_oldest_round(self.tail), True
            self.sent = self.sent if self.tail else {}

    def _rebuild(self) -> Generator[Effect, Any, tuple[Window | None, int]]:
        """The new window, or None and by how many tokens it is too large."""
        turn, room = self.turn, self.room_tokens
        tail_tokens = sum(entry.tokens for entry in self.tail)
        high, low = watermarks(room, turn.limits.working_set)
        growth = self._growth()
        low = rebuild_target(low, high, growth, CACHED_PRICE)
        groups = self._groups()
        rules = rules_tokens(turn)
        frame = rules + tail_tokens
        limit = high - frame
        self._cuts = {}
        if sum(group.tokens for group in groups if group.mandatory) > limit and self._hide_evidence():
            groups = self._groups()
        if sum(group.tokens for group in groups if group.mandatory) > limit:
            # So that one of its parts can still be loaded beside what is shown of it.
            loadable = max(int(room * _MIN_CUT_SHARE), room - turn.limits.page_tokens - _LOAD_TOKENS)
            self._cuts = yield from cut_newest(self, groups, min(limit, loadable))
        own = int(turn.limits.working_set.max_l0_tokens * _OWN_SHARE) - rules - turn.tools_tokens - _TAGS_TOKENS
        manifest = int(min(turn.limits.manifest_tokens, low * _MANIFEST_SHARE, max(own, MIN_MANIFEST_TOKENS)))
        context = int(low * _CONTEXT_SHARE)
        if self.after:  # their room is taken: the newest native messages stand before them
            groups.append(Group(self._end, self._end + self.after, 0, (), mandatory=True))
        over = 0
        for shrink in (1.0, 0.5, 0.0):
            lines = int(context * shrink)
            budget = Budget(low - frame - manifest - lines, lines, high - frame)
            yield from self._derive(groups, budget)
            standing = self._standing(groups, budget, room // _STANDING_SHARE)
            candidates = [*self._derived_groups(), *(g for g in groups if g.first not in standing.decided)]
            budget = replace(budget, context_tokens=budget.context_tokens - standing.tokens)
            planned = plan(turn.table, candidates, budget, turn.context.policy, turn.turn, _is_pinned)
            planned.native = [g for g in planned.native if g.first < self._end]
            planned.context = sorted([*planned.context, *standing.lines], key=lambda one: one[0].first)
            planned.mutations += standing.mutations
            window = yield from self._assemble(planned, int(manifest * shrink))
            over = window.tokens - room
            if over <= 0:
                window = self._judged(window, high - max(low, rules + int(growth)), int(growth))
                mutations = planned.mutations + self._evict_cut()
                for mutation in mutations:
                    turn.apply(mutation)
                self.evicted = [m.page_id for m in mutations if m.op is MutationType.EVICT]
                return window, 0
        return None, over

    def _judged(self, window: Window, left_tokens: int, growth_tokens: int) -> Window:
        """The window with what is to be said of its size: of requests of the usual growth a second one has no
        room, even in a window rebuilt as far as can be. Said once of a conversation and a size."""
        turn, before = self.turn, self.turn.before
        if before is None:
            return window
        crowded = growth_tokens > left_tokens
        turn.report.crowded = turn.report.crowded or crowded
        said, l0 = before.crowded, turn.limits.working_set.max_l0_tokens
        if crowded and said != l0:
            said = l0
            turn.report.warning = turn.report.warning or crowded_window(turn.limits, left_tokens, growth_tokens)
        return msgspec.structs.replace(window, crowded=said)

    def _derive(self, groups: Sequence[Group], budget: Budget) -> Generator[Effect, Any, None]:
        """Close the segment of what is about to leave; what derives from it competes for the window."""
        if self.made is not None:
            return
        turn, pages = self.turn, self.pages
        last = native_from(native_groups(groups, budget), self._end)
        before = pages.derived
        self.made = yield from derive(pages, last, turn.limits, turn.context.counter)
        for mutation in entered(self.made, before, pages.derived, turn.turn):
            turn.apply(mutation)

    # -- what the user said for all later answers

    def _standing(self, groups: Sequence[Group], budget: Budget, most_tokens: int) -> _Standing:
        """Of the messages that do not stay native, what their user said for all later answers: word for
        word, and all of the message where it says little else. Instructions first, and the newest, as far as
        there is room; what a later one took the place of leaves.
        """
        turn, pages, out = self.turn, self.pages, _Standing()
        native = {group.first for group in native_groups(groups, budget)}
        marked = [
            (group, pages[position])
            for group in groups
            for position in range(group.first, min(group.last, self._end))
            if (entry := turn.table.lookup(pages[position].ids[0])) and entry.pinned and pages[position].standing
        ]
        rows: list[tuple[bool, int, Group, MemoryPage]] = []
        for (group, message), holds in zip(marked, holding([m.standing for _, m in marked]), strict=True):
            if group.first in native:
                continue
            page = pages.page(message.ids[0])
            words = " ".join(sentence.text for sentence in holds)
            if len(message.parts) > 1 or len(page.text()) > _HARDLY_LONGER * len(words):
                changes = {"content": words, "size_tokens": None, "compression_level": CompressionLevel.REDUCED}
                page = page.model_copy(update=changes)
            if holds:
                rows.append((any(sentence.instruction for sentence in holds), group.first, group, page))
            else:
                out.leave(group, turn)
                out.mutations.append(PageMutation(MutationType.UNPIN, page.page_id, turn.turn))
        left = min(most_tokens, budget.context_tokens)
        for _, _, group, page in sorted(rows, key=lambda row: row[:2], reverse=True):
            tokens = pages.packer.pack([page]).tokens_est
            if out.tokens + tokens > left:
                out.leave(group, turn)
            else:
                self._said[page.page_id] = page
                out.keep(group, page, tokens, turn)
        return out

    # -- what may stay native

    def _groups(self) -> list[Group]:
        """Groups with a page in L0, oldest first; those before the floor can only be context lines."""
        path, floor = self.pages.path, self._floor
        starts: list[tuple[int, int]] = []
        seen = -1
        shown = self._shown_as_evidence()
        for entry in self.turn.table.resident():
            if entry.position >= floor:
                break
            if entry.position <= seen or entry.position < 0 or entry.page_id in shown:
                continue
            first = group_start(path, entry.position)
            end = first + 1
            while end < min(floor, self._end) and path[end].role in RESULT_ROLES:
                end += 1
            starts.extend(groups_of(path, first, end))
            seen = starts[-1][1] - 1
        starts.extend(groups_of(path, floor, self._end))
        user = self._last_user
        if 0 <= user < floor and all(not a <= user < b for a, b in starts):
            starts.append((user, user + 1))
            starts.sort()
        came_with: dict[int, int] = {}  # where the user's messages begin that follow each other up to this one
        for first, _ in starts:
            follows = first > 0 and path[first - 1].role == path[first].role == "user"
            came_with[first] = came_with.get(first - 1, first) if follows else first
        return [
            Group(
                first,
                last,
                self._native_tokens(first, last),
                tuple(i for position in range(first, last) for i in self.pages[position].ids),
                mandatory=(last == self._end and not self.after) or first <= user < last,
                answer=last - first == 1 and path[first].role == "assistant",
                fresh=came_with[first] if first >= max(floor, self._known) else -1,
            )
            for first, last in starts
        ]

    def _growth(self) -> float:
        """Tokens that a request has more than the one before, on the average of the last ones."""
        path = self.pages.path
        answers = (p for p in range(self._end - 1, -1, -1) if path[p].role == "assistant")
        last = list(islice(answers, _GROWTH_ANSWERS + 1))
        first = last[-1] if len(last) > _GROWTH_ANSWERS else 0
        return sum(map(self.pages.tokens, range(first, self._end))) / max(1, len(last))

    def _hide_evidence(self) -> bool:
        """Whether there was any."""
        evidence = [entry for entry in self.sent.values() if entry.shown_tokens]
        self.sent |= {entry.position: self.turn.bare(entry) for entry in evidence}
        return bool(evidence)

    def _shown_as_evidence(self) -> set[str]:
        """Pages that are not planned: they stand before the user's message until the turn ends."""
        return {page_id for entry in self.sent.values() for page_id in entry.shown}

    def _native_tokens(self, first: int, last: int) -> int:
        pages = self.pages
        if first < self._floor and not first <= self._last_user < last:
            return _NEVER
        total = sum(pages.tokens(p) + pages[p].notes_tokens for p in range(first, last))
        if last - first > 1:  # a call with results may have been a mixed one
            kept = native_entries(pages, first, self.turn.context.substitutes)
            total += sum(entry.tokens for entry in kept) - pages.tokens(first)
        here = (entry for position, entry in self.sent.items() if first <= position < last)
        return total + sum(entry.tokens - pages.tokens(entry.position) for entry in here)

    def _derived_groups(self) -> list[Group]:
        """Summaries and claims in L0: in front of all messages, in the order of their making."""
        known = self.pages.derived.pages
        resident = self.turn.table.resident()
        ids = [e.page_id for e in resident if e.position < 0 and e.page_id in known]
        return [Group(i - len(ids), i - len(ids), _NEVER, (page_id,)) for i, page_id in enumerate(ids)]

    def _evict_cut(self) -> list[PageMutation]:
        """A cut message is not in the window: its pages can be faulted in."""
        table, turn = self.turn.table, self.turn.turn
        return [
            PageMutation(MutationType.EVICT, page_id, turn, tier=StorageTier.L2)
            for position in self._shortened()
            for page_id in self.pages[position].ids
            if (entry := table.lookup(page_id)) and entry.tier is StorageTier.L0
        ]

    def _shortened(self) -> set[int]:
        """Positions of the messages that are not shown whole, or not all that belongs to their page."""
        path = self.pages.path
        return {p for (p, n), e in self._cuts.items() if (e.whole if n else e.raw != path[p].raw)}

    # -- the bytes

    def show(self, page_id: str, level: CompressionLevel) -> Generator[Effect, Any, MemoryPage]:
        """A page at a level: from the shell where that takes a codec or a model, else made here."""
        page = self._said.get(page_id) or self.shown.get((page_id, int(level)))
        if page is None:
            pages = self.pages
            made_elsewhere = self.turn.limits.written_by_models or pages.medium(page_id) is not None
            if made_elsewhere and level:
                page = yield Load(page_id, int(level))
            else:
                page = pages.at(page_id, level)
            self.shown[page_id, int(level)] = page
        return page

    def _assemble(self, planned: Plan, manifest_tokens: int) -> Generator[Effect, Any, Window]:
        turn, pages, counter = self.turn, self.pages, self.turn.context.counter
        first = native_from(planned.native, self._end)
        kept: list[MemoryPage] = []  # of older turns, each at its level
        for group, level in planned.context:
            for page_id in group.pages:
                page = yield from self.show(page_id, level)
                kept.append(page)
        cut = self._shortened()
        resident = {p for g in planned.native for p in range(g.first, g.last)} - cut
        resident.update(p for g, _ in planned.context for p in range(g.first, g.last))
        resident.update(pages.position(page_id) for page_id in self._shown_as_evidence())
        manifest = self._manifest(first, resident, cut, manifest_tokens)
        context = pages.packer.pack([page for page in kept if not page_parts(page)]).content
        developer = _developer(turn, manifest, context)
        developer_tokens = PER_MESSAGE + counter.text(developer)
        entries: list[Entry] = []
        if media := [page for page in kept if page_parts(page)]:
            # Images and frames of older turns go in a user message, as the API wants it.
            entries.append(self._user_entry(context_parts(pages.packer.pack(media).parts)))
        for group in planned.native:
            for position in range(group.first, group.last):
                entries.extend(self._native(position))
        entries.extend(self.tail)
        if turn.limits.developer_role == "system":
            spoken = next((e for e in entries if e.kind != SYSTEM), None)
            if spoken is not None and msgspec.json.decode(spoken.raw)["role"] != "user":
                # Many templates want the user to speak first, and the client's history does.
                entries.insert(0, self._user_entry(_OPENING))
        return Window(
            self.number,
            developer,
            developer_tokens,
            first,
            self._end,
            tuple(entries),
            developer_tokens + sum(entry.tokens for entry in entries),
            counter.name,
            pages.notes_digest(first),
            turn.limits.tokens_factor,
            turn.limits.calls,
            turn.turn,
        )

    def _native(self, position: int) -> list[Entry]:
        """A message in its own role, between the system messages of its page."""
        counter = self.turn.context.counter
        notes = [
            self._cuts.get((position, number)) or system_entry(note, counter)
            for number, note in enumerate(self.pages[position].notes, 1)
        ]
        if position in self.sent:
            own = [self.sent[position]]
        elif (position, 0) in self._cuts:
            own = [self._cuts[position, 0]]
        else:
            own = native_entries(self.pages, position, self.turn.context.substitutes)
        before = [note for note in notes if note.position <= position]
        return [*before, *own, *(note for note in notes if note.position > position)]

    def _user_entry(self, content: Any) -> Entry:
        message = {"role": "user", "content": content}
        return Entry(msgspec.json.encode(message), self.turn.context.counter.message(message), -1, KEPT)

    # -- the manifest

    def _manifest(self, native_from: int, resident: set[int], cut: set[int], max_tokens: int) -> str:
        """The pages outside the window: those that were cut, then the nearest, then segments."""
        turn, pages = self.turn, self.pages
        if max_tokens < MIN_MANIFEST_TOKENS or turn.mode is VMMode.PASSIVE:
            return ""
        builder = ManifestBuilder(policies=ManifestPolicies(max_faults_per_turn=turn.limits.faults_per_turn))
        outside = sorted(cut, reverse=True)
        position = native_from - 1
        limit = min(_MANIFEST_ENTRIES, max_tokens // _MANIFEST_ENTRY_TOKENS)
        while position >= 0 and len(outside) < limit:
            if position not in resident:
                outside.append(position)
            position -= 1
        for p in outside:
            for page in pages[p].pages:
                builder.add_available_page_entry(
                    AvailablePageEntry(
                        page_id=page.id,
                        modality=page.modality.value,
                        tier=StorageTier.L2.value,
                        hint=hint(pages.bare(page.id), _FIRST_HINT_WORDS),
                    )
                )
        inside = sorted(resident)
        for first, last, topics in self._segments(position + 1):
            count = last - first - (bisect_left(inside, last) - bisect_left(inside, first))
            if count > 0:
                builder.add_segment(make_page_id(first), make_page_id(last - 1), count, topics)
        return builder.fit(max_tokens, turn.context.counter.text).model_dump_json()

    def _segments(self, end: int) -> list[tuple[int, int, str]]:
        """Positions 0..end-1 as ranges (first, last, topics): the newest closed segments, and what is in
        none of them with what its first user message says."""
        closed: list[tuple[int, int, str]] = []
        for page in reversed(list(self.pages.derived.pages.values())):
            if page.page_type is PageType.INDEX and len(closed) < _SEGMENTS:
                first, last = (self.pages.position(i) for i in page.provenance)
                if first < end:
                    closed.append((first, min(last + 1, end), page.text().partition("): ")[2]))
        ranges, at = list[tuple[int, int, str]](), 0
        for first, last, topics in (*reversed(closed), (end, end, "")):
            if at < first:
                ranges.append((at, first, self._opening(at, first)))
            ranges.append((first, last, topics))
            at = last
        return ranges

    def _opening(self, first: int, last: int) -> str:
        """What the first user message of positions first..last-1 says."""
        looked_at = range(first, min(last, first + _LOOKED_AT))
        speaker = next((p for p in looked_at if self.pages.path[p].role == "user"), first)
        return hint(self.pages[speaker].parts[0], _FIRST_HINT_WORDS)


def native_from(native: Sequence[Group], end: int) -> int:
    """Where the newest messages begin that stay in their own roles without a gap."""
    first = end
    for group in reversed(native):
        if group.last == first:
            first = group.first
    return first


def rules_tokens(turn: TurnWindow) -> int:
    """The developer message's tokens when there is nothing in it but the rules."""
    return PER_MESSAGE + turn.context.counter.text(_developer(turn, "", ""))


def _developer(turn: TurnWindow, manifest: str, context: str) -> str:
    names = turn.channel.names
    return build_vm_developer_message(turn.mode, manifest, context, turn.limits.faults_per_turn, names)


def _is_pinned(entry: PageTableEntry, turn: int) -> bool:
    """Pinned for more than its age: the newest messages are in the window as they are."""
    return _PINS.reason(entry, turn) > PinReason.RECENT


def context_length_exceeded(limits: Limits, tokens: int) -> ApiError:
    """What OpenAI says when messages and tools cannot fit, with our window's size."""
    return ApiError(
        400,
        f"This model's maximum context length is {limits.working_set.max_l0_tokens} tokens, of which"
        f" {limits.reserve_tokens} are kept for the answer. However, the messages and"
        f" tools that must stay in it come to {tokens} tokens. Please shorten the system messages or"
        " the tools.",
        param="messages",
        code="context_length_exceeded",
    )
