"""This turn's window: what is in it, what enters, and when it begins anew. Pure.

Promises: the window covers the whole path once it is open; it grows at its end, is taken back to
where the client's system messages changed, or begins a new epoch, nothing else; each change of the
page table is in this turn's mutations; what one VM result may take leaves room for the newest
messages.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from proxy.conversation.calling import holds
from proxy.conversation.channel import Channel, choose_channel, vm_tools_tokens, wants_json
from proxy.conversation.compose import without_context
from proxy.conversation.context import TurnContext
from proxy.conversation.derived import encode_closing
from proxy.conversation.effects import OFFLOAD, Effect, Load
from proxy.conversation.envelope import Envelope
from proxy.conversation.epoch import Epoch, context_length_exceeded, rules_tokens
from proxy.conversation.evidence import (
    Shown,
    asks,
    choose,
    reserve,
    stays,
    used,
    with_evidence,
)
from proxy.conversation.form import Form
from proxy.conversation.limits import Limits
from proxy.conversation.pages import (
    RESULT_ROLES,
    MessagePages,
    PathPages,
    anchor_tokens,
    group_start,
    owner,
)
from proxy.conversation.pins import pinned
from proxy.conversation.records import Stored, brought_since
from proxy.conversation.report import TurnReport
from proxy.conversation.tree import Anchor
from proxy.conversation.window import (
    NATIVE,
    SYSTEM,
    Entry,
    Window,
    client_entries,
    differs_at,
    newest_entries,
)
from proxy.memory.ids import make_page_id
from proxy.memory.message_text import message_text
from proxy.memory.models import (
    CompressionLevel,
    FaultReason,
    MemoryPage,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageType,
    StorageTier,
    VMMode,
)
from proxy.memory.prefetcher import fresh_terms
from proxy.memory.standing import standing_in
from proxy.memory.table import PageTable, encode_log
from proxy.memory.working_set import watermarks
from proxy.tokens import PER_REPLY

SETTLED = 64  # answers of one request, the newest, after which a state is left
CHECKPOINT = 1024  # mutations of the page table, between which it is not stored: replaying them takes some ms
STANDING_TOKENS = 256  # of standing instructions of the application's in front of a window, at most

_STANDING_BYTES = 2048  # of one of them
_FRAME_TOKENS = 400  # kept free beside VM results: rules, tags and the calls themselves
_ALL = 1 << 40  # tokens
_AT_ONCE_MESSAGES = 64  # that enter the window while others wait
_RESULT_SHARE = 2  # one VM result takes at most 1/2 of the room: a full page of a 4,000-token L0


class TurnWindow:
    """One per turn that pages; `window` is there after `open()`.

    `limits` and `channel` may change between rounds, as upstream refuses them. `answered`: the positions
    behind the answers that have no record yet.
    """

    window: Window

    def __init__(
        self,
        context: TurnContext,
        pages: PathPages,
        table: PageTable,
        channel: Channel,
        limits: Limits,
        next_limits: Limits | None,
        fixed_tokens: int,
        report: TurnReport,
        answered: Sequence[int] = (),
    ) -> None:
        self.context = context
        self.pages = pages
        self.table = table
        self.channel = channel
        self.limits = limits
        self.report = report
        self.turn = report.turn
        self.before = context.state.window if context.state else None  # what this turn goes on with
        self.mutations: list[PageMutation] = []
        self.made: list[MemoryPage] = []  # derived in this turn
        self.shown: list[Load] = []  # by the last epoch, or to be written
        self.settled: list[Stored] = []  # the states after what is `answered`
        self.brought: list[Shown] = []  # before the call
        self._query: str | None = None
        self._settled_with: list[tuple[list[PageMutation], list[MemoryPage]]] = []
        self._answered = answered
        self._entered = self.before.covered if self.before else 0  # the pages before it are in the table
        self._next_limits = next_limits
        # The budget less what stands in front of the path: system messages, tools, the answer's frame.
        self.tools_tokens = vm_tools_tokens(channel, context.counter)
        self._whole_room_tokens = limits.budget_tokens - fixed_tokens - PER_REPLY - self.tools_tokens
        self._tail: list[Entry] = []  # this turn's VM exchange
        self._folded = False  # rounds of it had to leave
        self._stood: dict[int | None, tuple[list[Anchor], int]] = {}

    def apply(self, mutation: PageMutation) -> None:
        """The only way in which a turn changes the table. A page that is about to be shown is counted before."""
        if mutation.op in (MutationType.MAP, MutationType.FAULT_IN):
            entry = self.table.lookup(mutation.page_id)
            if entry is not None and entry.estimated:
                here = self.pages[entry.position]
                tokens = here.text_tokens // len(here.parts)
                self.apply(PageMutation(MutationType.UPDATE, mutation.page_id, mutation.turn, tokens=tokens))
        self.table.apply(mutation)
        self.mutations.append(mutation)

    @property
    def mode(self) -> VMMode:
        return self.limits.mode if self.channel.listed else VMMode.PASSIVE

    # -- opening

    def open(self) -> Generator[Effect, Any, None]:
        """Append the new messages, or begin an epoch when they do not fit."""
        before, counter = self.before, self.context.counter
        if before is not None and before.counter and before.counter != counter.name:
            before = before.recount(counter)  # another model than in the last turn
        if before is not None and before.factor != self.limits.tokens_factor:
            before = msgspec.structs.replace(before, factor=self.limits.tokens_factor)
        if len(self.pages.path) - self._entered > _AT_ONCE_MESSAGES:
            yield OFFLOAD
            if far := self._beyond_reach():
                self.pages.leave_far(far)
        self.turn -= len(self._answered)  # in the first of them, if the request brought some
        self.before = self._without_evidence(before)
        self.turn = self.report.turn
        if self._answered:
            yield from self._settle()
        end, at = len(self.pages.path), self._differs_at()
        self._register(self.pages, at)
        since = self.turn - len(self._answered)
        pins = list(pinned(self.context.pins(), self.table, self.pages.path, self.turn, since))
        for mutation in (*self.context.changes, *pins):
            self.apply(mutation)
        grown = self._grown(at, end, end)
        brought = any(mutation.op is MutationType.MAP for mutation in pins)  # it has no place in a log that only grows
        if grown is None or brought or not self._fits(grown):
            cause = "rewritten" if grown is None and self.before is not None else "pinned" if brought else "full"
            yield from self._begin_epoch(self._next_epoch, self.pages, (), cause=cause)
        else:
            if at is not None:
                self._take_back(at)
            self.window = grown

    def _without_evidence(self, before: Window | None) -> Window | None:
        """The log a turn later: what was shown for the last message of the user's is taken out of it, where
        that is cheaper than to carry it on."""
        path = self.pages.path
        if before is None or all(node.role != "user" for node in path[before.covered :]):
            return before  # the same turn goes on
        at = next((i for i in range(len(before.entries) - 1, -1, -1) if before.entries[i].shown_tokens), None)
        if at is None or stays(before, at, self.limits):
            return before
        self.report.evidence_left = True
        return before.replaced(before.entries[at], self.bare(before.entries[at]))

    def bare(self, entry: Entry) -> Entry:
        """A user's message without the evidence in front of its text, whose pages leave the window, but for those
        that the model asked for since: they stand in a result, too."""
        since = self.turn - sum(node.role == "assistant" for node in self.pages.path[entry.position :])
        for page_id in entry.shown:
            found = self.table.lookup(page_id)
            if found is not None and found.tier is StorageTier.L0 and (found.faulted_turn or 0) < since:
                self.apply(PageMutation(MutationType.EVICT, page_id, self.turn, tier=StorageTier.L2))
        raw = self.pages.path[entry.position].raw
        message = without_context(msgspec.json.decode(entry.raw))
        if message != msgspec.json.decode(raw):  # it was cut
            raw = msgspec.json.encode(message)
        return Entry(raw, entry.tokens - entry.shown_tokens, entry.position)

    def _settle(self) -> Generator[Effect, Any, None]:
        """Open the window for the answered messages alone, as if each answer had been a turn's before this one.

        A client may say what stands behind any of them otherwise in its next request: it rewrites its newest
        message, or what it put some messages before it. The states that are left here have nothing of what
        stands behind them, and that request goes on from the last of them that it shares. So where a new
        epoch has to begin, it begins in front of what this client has just rewritten, if there is room. (No
        state is left when there is no window yet and what stands behind leaves no room for one.)
        """
        path, ends = self.pages.path, self._answered
        turn, last = self.turn, len(path)
        record = self.context.place.record
        at = self._differs_at(strict=True)
        grown = self._grown(at, ends[-1], ends[-1] - 1)
        fits = grown is not None and self._fits(grown.append(self._entries(ends[-1], last, last)))
        begins = None if fits else self._epoch_begins(record.end if record else 0, ends[-1])
        first = len(ends) - min(len(ends), SETTLED)
        for number, end in enumerate(ends[first:], first - len(ends)):
            self.turn = turn + number
            pages = self.pages.before(end)
            if begins is not None and begins <= end:
                yield from self._begin_before(begins)
                begins = None
            if self.before is None:
                continue
            at = self._differs_at(strict=True)
            grown = self._grown(at, end, end - 1) if fits else None
            self._register(pages, self._differs_at())
            if grown is None:  # it does not fit, and the epoch is this turn's own or was just begun
                self.window = self._continued(self.before, end, end - 1)
            else:
                if at is not None:
                    self._take_back(at)
                self.window = grown
            self.settled.append(self.snapshot(end))
            self._settled_with.append((self.mutations, self.made))
            self.mutations, self.made = [], []
            self.before = self.window
        self.turn = turn

    def unsettle(self, end: int) -> None:
        """No states are left behind `end`: what happened there is this turn's own."""
        while self.settled and self.settled[-1].end > end:
            self.settled.pop()
            mutations, made = self._settled_with.pop()
            self.mutations, self.made = [*mutations, *self.mutations], [*made, *self.made]

    def _epoch_begins(self, known: int, answered: int) -> int | None:
        """Where the path of a new epoch ends that leaves room for all that stands behind it: where the client
        began to rewrite (the messages before `known` are stored), else behind all answers; None: nowhere."""
        path, last = self.pages.path, len(self.pages.path)
        rewritten = group_start(path, known)
        for end in (rewritten, answered):
            if end and self._leaves_room(end, self._entries(end, last, last)):
                return end
        return None

    def _begin_before(self, end: int) -> Generator[Effect, Any, None]:
        """An epoch of what stands before `end`, with room for what stands behind it."""
        pages, last = self.pages.before(end), len(self.pages.path)
        behind = self._entries(end, last, last)
        self._register(pages, self._differs_at())
        yield from self._begin_epoch(self._next_epoch, pages, behind, last - end)
        self.window = self.window.until(len(self.window.entries) - len(behind), end)
        self.pages.derived = pages.derived
        self.before = self.window

    @property
    def _next_epoch(self) -> int:
        return self.before.epoch + 1 if self.before else 1

    def known_until(self, settling: bool) -> int:
        """The end of the messages that are answered for an epoch of this turn: a request that comes again
        finds all that have an answer."""
        record = self.context.place.record
        known = record.end if record else 0
        return known if settling else max(known, self._answered[-1] if self._answered else 0)

    def _leaves_room(self, end: int, behind: Sequence[Entry]) -> bool:
        """Whether an epoch can be planned without a look at what stands behind its path."""
        path = self.pages.path
        if end < len(path) and path[end].role in RESULT_ROLES:
            return False
        _, low = watermarks(self.room_for_messages, self.limits.working_set)
        return sum(entry.tokens for entry in behind) <= low

    def _differs_at(self, strict: bool = False) -> int | None:
        """Where the client's system messages differ from the log, if there is one."""
        place = self.context.place
        if self.before is None:
            return None
        return differs_at(self.before, self.pages.path, place.anchors, place.start, strict)

    def _grown(self, at: int | None, end: int, anchors_until: int) -> Window | None:
        """The log with the path up to `end`, taken back first to `at`, where the client's system messages
        differ from it; None when there is none to go on with."""
        before = self.before
        if before is None:
            return None
        if not self.context.place.start and before.notes != self.pages.notes_digest(before.native_from):
            return None  # what was shown of the older ones is not what the client says now
        if at is not None:
            if not self._whole(at, before.covered):
                return None
            before = before.taken_back(at)
        return self._continued(before, end, anchors_until)

    def _continued(self, before: Window, end: int, anchors_until: int) -> Window:
        first = before.covered
        entries = self._entries(first, end, anchors_until)
        if here := sum(anchor.position == first for anchor in self.context.place.anchors):
            placed = sum((e.kind, e.position) == (SYSTEM, first) for e in before.entries)
            entries = entries[min(placed, here) :]
        return before.append(entries, end)

    def _entries(self, first: int, last: int, anchors_until: int) -> list[Entry]:
        context = self.context
        return client_entries(
            self.pages, context.place.anchors, context.substitutes, first, last, anchors_until
        )

    def _fits(self, window: Window) -> bool:
        """The window stays below the high watermark, with what may be brought in before the call: not for its
        sake where it was rebuilt in the turn before and is full of what came since the last answer."""
        self.window = window
        high, _ = watermarks(self.room, self.limits.working_set)
        rebuilt = window.began and self.turn - window.began <= 1
        return window.tokens <= min(high, self.room - (0 if rebuilt else reserve(self)))

    def _whole(self, first: int, last: int) -> bool:
        """These messages are in the window, and nothing of them was cut."""
        entries = [self.table.lookup(i) for p in range(first, last) for i in self.pages[p].ids]
        return all(e and e.tier is StorageTier.L0 and not e.level for e in entries)

    def _register(self, pages: PathPages, at: int | None) -> None:
        """Enter new pages in the table, and anew those whose system messages are others now, from `at` on."""
        first = self._entered
        for position in range(max(0, (first if at is None else at) - 1), min(first, len(pages.path))):
            for mutation in self._renewed(pages[position]):
                self.apply(mutation)
        for position in range(first, len(pages.path)):
            for mutation in created(pages, position, self.context.place.floor, self.turn):
                self.apply(mutation)
            if position < pages.far:
                pages.forget(position)
        self._entered = max(first, len(pages.path))

    def _beyond_reach(self) -> int:
        """Where the newest messages begin that are twice what any window of this turn holds: told from their sizes."""
        budgets = [limits.budget_tokens for limits in (self.limits, self._next_limits) if limits is not None]
        left, at = 2 * max(budgets), len(self.pages.path)
        while at > self._entered and left > 0:
            at -= 1
            left -= self.pages.tokens(at)
        return group_start(self.pages.path, at) if at > self._entered else 0

    def _renewed(self, message: MessagePages) -> Iterator[PageMutation]:
        """The pages of a message that the table has, where these are others now because the system
        messages behind it changed. They are where those before them were."""
        table, turn = self.table, self.turn
        known = [table.lookup(page.id) for page in message.pages]
        if all(known):
            for page, entry in zip(message.pages, known, strict=True):
                if entry is not None and entry.size_tokens != page.tokens:
                    yield PageMutation(MutationType.UPDATE, page.id, turn, tokens=page.tokens)
            return
        old = self._stale(message)
        before = [*old, *(e for e in known[: len(message.parts)] if e is not None)]
        inside = bool(before) and all(e.tier is StorageTier.L0 and not e.level for e in before)
        for entry in old:
            if entry.tier is StorageTier.L0:
                yield PageMutation(MutationType.EVICT, entry.page_id, turn, tier=StorageTier.L2)
        tier, full = StorageTier.L0 if inside else StorageTier.L2, CompressionLevel.FULL
        for page, entry in zip(message.pages, known, strict=True):
            if entry is None:
                yield PageMutation(MutationType.CREATE, page.id, turn, None, tier, page.tokens)
            elif inside and entry.tier is not StorageTier.L0:
                yield PageMutation(MutationType.MAP, page.id, turn, full, StorageTier.L0, page.tokens)

    def _stale(self, message: MessagePages) -> list[PageTableEntry]:
        """The text pages of a message that the table has under other ids."""
        names = [make_page_id(message.position)]
        while self.table.lookup(more := make_page_id(message.position, len(names))) is not None:
            names.append(more)
        found = (self.table.lookup(name) for name in names if name not in message.ids)
        return [entry for entry in found if entry is not None]

    def _take_back(self, at: int) -> None:
        """What was brought into the part of the log that is gone is not in the window any more."""
        record = self.context.place.record
        if record is None:
            return
        self.report.rewritten_at = at
        for page_id in brought_since(record, at, self.context.get_record):
            entry = self.table.lookup(page_id)
            if entry is not None and entry.tier is StorageTier.L0 and entry.position < at:
                self.apply(PageMutation(MutationType.EVICT, page_id, self.turn, tier=StorageTier.L2))

    def snapshot(self, end: int) -> Stored:
        """The state as it stands, for the record that ends there. Leaves of the table that are in `blocks`
        are whole in RAM: nothing of them is read before they are stored."""
        closing, blocks = b"", dict[bytes, bytes]()
        derived = self.pages.derived
        if self.made:
            due = self.table.unstored >= CHECKPOINT
            root, blocks = self.table.checkpoint() if due else (b"", {})
            closing = encode_closing(root, self.made, derived.end, self.limits.max_claims)
        mutations = encode_log(self.mutations)
        return Stored(end, self.window, mutations, closing, blocks, derived)

    def _begin_epoch(
        self, number: int, pages: PathPages, tail: Sequence[Entry], after: int = 0, cause: str = "full"
    ) -> Generator[Effect, Any, None]:
        """Rebuild the window of `pages`; `tail`: this turn's exchange, or `after` more messages.
        ApiError context_length_exceeded when nothing fits."""
        yield OFFLOAD
        if self._next_limits is not None:
            self.resize(self._next_limits)
        room = self.room_for_messages
        if room <= 0:
            raise context_length_exceeded(self.limits, self.limits.budget_tokens - room)
        epoch = Epoch(self, pages, number, room, tuple(tail), after, {} if after else self._sent())
        self.window = yield from epoch.begin()
        self.shown = [Load(page_id, level) for page_id, level in epoch.shown]
        self.shown += [Load(page_id, 0) for page_id in pages.derived.unwritten]
        if epoch.folded:
            self._tail, self._folded = list(epoch.tail), True
        self.report.new_epoch, self.report.epoch_cause = True, cause if self.before is not None else "first"
        self.report.evicted_pages += epoch.evicted
        self.made += epoch.made or ()

    def _sent(self) -> dict[int, Entry]:
        """By position, the messages that no epoch of this turn may change (`Epoch.sent`)."""
        path, window = self.pages.path, getattr(self, "window", None) or self.before
        user = next((i for i in range(len(path) - 1, -1, -1) if path[i].role == "user"), -1)
        entries = window.entries if window is not None else ()
        sent = {e.position: e for e in entries if e.shown_tokens and e.position == user}
        if path[-1].role in RESULT_ROLES:  # an agent's own results need the room: what was shown has been read
            sent = {position: self.bare(entry) for position, entry in sent.items()}
        newest = self.newest_entry() if self._tail else None
        return sent if newest is None else {**sent, newest.position: newest}

    def resize(self, limits: Limits) -> None:
        """Other bounds from now on, and with them the VM tools or none; in a turn that has called, they stay."""
        if self._tail and limits.calls != self.limits.calls:
            limits = replace(limits, calls=self.limits.calls)
        if limits.calls != self.limits.calls:
            takes, before = self.channel.client_calls, self.tools_tokens
            self.channel = replace(choose_channel(self.context.decoded, limits), client_calls=takes)
            self.tools_tokens = vm_tools_tokens(self.channel, self.context.counter)
            self._whole_room_tokens += before - self.tools_tokens
            self.report.channel = self.channel.name
        self._whole_room_tokens += limits.budget_tokens - self.limits.budget_tokens
        self.limits, self._next_limits = limits, None
        self.report.budget_tokens = limits.budget_tokens

    # -- what is shown unasked

    @property
    def query(self) -> str:
        """The newest message's words."""
        if self._query is None:
            self._query = message_text(self.pages[len(self.pages.path) - 1].message)
        return self._query

    def bring(self) -> Generator[Effect, Any, None]:
        """Pages that the newest user message is about go in front of its own text."""
        entry = self.newest_entry()
        if entry is None:
            return
        self.brought = yield from choose(self, max(0, self.free_tokens))
        if not self.brought:
            return
        self.report.asked_back = asks(self.query)
        new = [page for page in self.brought if not self._is_loaded(page.page_id)]
        for page in new:
            self.apply(
                PageMutation(
                    MutationType.MAP, page.page_id, self.turn, page.level, StorageTier.L0,
                    page.tokens, reason=FaultReason.SPECULATIVE,
                )
            )  # fmt: skip
        decoded = msgspec.json.decode(entry.raw)
        message, tokens = with_evidence(decoded, entry.tokens, self.brought, self.context.counter)
        ids = tuple(page.page_id for page in new)
        shown = Entry(
            msgspec.json.encode(message), tokens, entry.position, shown_tokens=tokens - entry.tokens, shown=ids
        )  # fmt: skip
        self.window = self.window.replaced(entry, shown)

    def _is_loaded(self, page_id: str) -> bool:
        """The page is in the window already, at some level."""
        entry = self.table.lookup(page_id)
        return entry is not None and entry.tier is StorageTier.L0

    @property
    def evidence(self) -> frozenset[str]:
        """The pages that stand in the window as evidence."""
        return frozenset(page_id for entry in self.window.entries for page_id in entry.shown)

    def settle(self, answer: str) -> None:
        """Judge what was brought in by the answer: a page that served it counts as used."""
        self.report.prefetched_pages += [page.page_id for page in self.brought]
        for page in used(self.brought, self.pages, self.query, answer):
            self.report.prefetched_used += 1
            self.apply(PageMutation(MutationType.ACCESS, page.page_id, self.turn))

    @property
    def unserved(self) -> bool:
        """The user asked for what a page outside the window holds, and the answer took nothing from what was
        shown of it (after `settle`)."""
        if not self.brought or self.report.prefetched_used or not asks(self.query):
            return False
        asked = fresh_terms("", self.query)
        texts = (self.pages.bare(page.page_id) for page in self.brought)
        return any(holds(text, asked) for text in texts if not asks(text))

    @property
    def fault_reason(self) -> FaultReason:
        """Why the model would ask for a page in this turn."""
        if self.report.asked_back:
            return FaultReason.USER_REQUESTED_RECALL
        return FaultReason.TOOL_PREREQUISITE if self.context.agent else FaultReason.RESOLVE_REFERENCE

    def newest_entry(self) -> Entry | None:
        """The newest message, when it stands in the window in its own role."""
        last = len(self.pages.path) - 1
        return next((e for e in reversed(self.window.entries) if e.position == last and e.kind == NATIVE), None)

    # -- room

    @property
    def room_for_messages(self) -> int:
        """Tokens for the window whichever standing instructions of the client's are in front of it."""
        return self._whole_room_tokens - min(STANDING_TOKENS, self._standing(None)[1])

    @property
    def room(self) -> int:
        """Tokens for the window: what system messages before it and the tools leave of the budget."""
        return self._whole_room_tokens - self._standing(self.window.native_from)[1]

    def _standing(self, native_from: int | None) -> tuple[list[Anchor], int]:
        """The standing instructions that are in front of a window whose native messages begin there
        (None: all there are), the newest ones within their share, and their tokens. They stay in front of
        a window that does not hold them any more, as what a user said for all later answers stays in it."""
        known = self._stood.get(native_from)
        if known is not None:
            return known
        anchors, most, total = self.context.place.anchors, _ALL, 0
        if native_from is not None:
            anchors = [a for a in anchors if owner(self.pages.path, a.position) < native_from]
            most = STANDING_TOKENS
        found: list[Anchor] = []
        for anchor in reversed(anchors):
            if len(anchor.raw) > _STANDING_BYTES:
                continue
            tokens = anchor_tokens(anchor, self.context.counter)
            message = msgspec.json.decode(anchor.raw)
            standing = standing_in(str(message.get("role")), message_text(message))
            if standing and 2 * tokens <= STANDING_TOKENS:
                if total + tokens > most:
                    break
                total += tokens
                found.append(anchor)
        self._stood[native_from] = found[::-1], total
        return self._stood[native_from]

    @property
    def free_tokens(self) -> int:
        """What is left of the room."""
        return self.room - self.window.tokens

    @property
    def left(self) -> int:
        """Tokens that an epoch could make free for this turn's exchange, less a little."""
        stays = [*newest_entries(self.window, self.pages.path), *self._tail]
        return min(self.room - sum(e.tokens for e in stays) - _FRAME_TOKENS, self.spare)

    @property
    def spare(self) -> int:
        """What this turn's exchange may still take, to the last token: with that much more in it, an
        epoch that keeps nothing else of older turns fits."""
        rules = rules_tokens(self)
        kept = [*newest_entries(self.window, self.pages.path), *self._tail]
        return self.room_for_messages - rules - sum(entry.tokens for entry in kept)

    @property
    def takes_results(self) -> bool:
        """A VM result has room; told without counting where there is plenty."""
        plenty = self.free_tokens > _FRAME_TOKENS + STANDING_TOKENS
        return (plenty and not self._folded) or self.result_room > 0

    @property
    def result_room(self) -> int:
        """Tokens that one VM result may take; none once the window could not keep all results."""
        return 0 if self._folded else min(self.room // _RESULT_SHARE, self.left)

    # -- rounds

    def envelope(self, form: Form) -> Generator[Effect, Any, Envelope]:
        """How the window goes into the next request; begins an epoch first when the log outgrew the room."""
        if self.free_tokens < 0:
            yield from self._begin_epoch(self.window.epoch + 1, self.pages, self._tail, cause="round")
        self.report.used_tokens = self.limits.budget_tokens - self.free_tokens
        standing, _ = self._standing(self.window.native_from)
        head = [*self.context.sent.system, *(anchor.raw for anchor in standing)]
        plain = self.limits.mode is VMMode.STRICT and wants_json(self.context.decoded)
        role, written = self.limits.developer_role, (form.several, form.late, form.system, form.alternate)
        return Envelope(b"", b"", head, role, not self.channel.listed, plain, written)

    def extend(self, exchange: Sequence[Entry]) -> None:
        """Add a round's VM exchange at the end."""
        self._tail.extend(exchange)
        self.window = self.window.append(exchange)

    def tell(self) -> None:
        """Enter the window's state in the report."""
        report = self.report
        report.epoch = self.window.epoch
        derived = self.pages.derived
        report.segments = derived.segments
        native = {e.position for e in self.window.entries if e.kind == NATIVE}
        report.native_pages = [i for p in sorted(native) for i in self.pages[p].ids]
        resident = self.table.resident()
        report.context_pages = [e.page_id for e in resident if e.position not in native]


def created(pages: PathPages, position: int, floor: int, turn: int) -> Iterator[PageMutation]:
    """A new message stands in the window, but for those before the floor, and of those that are far from it all but
    what may be a line of it: media, and what says something for all later answers, which is pinned."""
    message = pages[position]
    standing = message.standing
    near = position >= pages.far or bool(standing or message.media)
    tier = StorageTier.L0 if near and position >= floor else StorageTier.L2
    for page in message.pages if near else message.sized(pages.size(position)):
        kind = page.page_type
        yield PageMutation(
            MutationType.CREATE, page.id, turn, None, tier, page.tokens,
            modality=page.modality,
            page_type=None if kind is PageType.TRANSCRIPT else kind,
            estimated=not near,
        )  # fmt: skip
    if standing:
        yield PageMutation(MutationType.PIN, message.pages[0].id, turn)
