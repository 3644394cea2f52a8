"""This turn's window: what is in it, what enters, and when it begins anew. Pure.

Promises: the window covers the whole path once it is open; it grows at its end, is taken back to
where the client's system messages changed, or begins a new epoch, nothing else; each change of the
page table is in this turn's mutation log; what one VM result may take leaves room for the newest
messages.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from proxy.conversation.channel import Channel
from proxy.conversation.closing import encode_closing
from proxy.conversation.commit import Stored
from proxy.conversation.compose import Form, with_context
from proxy.conversation.effects import Effect, Load
from proxy.conversation.epoch import (
    begin_epoch,
    client_entries,
    context_length_exceeded,
    rules_tokens,
)
from proxy.conversation.epoch_request import EpochRequest
from proxy.conversation.limits import Limits
from proxy.conversation.newpages import new_pages, renewed
from proxy.conversation.pathpages import RESULT_ROLES, PathPages, anchor_tokens, group_start, owner
from proxy.conversation.prefetch import Chosen, Prefetch
from proxy.conversation.report import PrefetchReport, TurnReport
from proxy.conversation.rewind import brought_since, differs_at, taken_back
from proxy.conversation.room import STANDING_TOKENS, newest_entries, spare_tokens, standing
from proxy.conversation.tree import Anchor, GetRecord, Record
from proxy.conversation.window import NATIVE, SYSTEM, Entry, Window, render
from proxy.memory.context_packer import context_block
from proxy.memory.core import MemoryCore
from proxy.memory.models import FaultReason, MutationType, PageMutation, StorageTier, VMMode
from proxy.memory.mutation_log import encode as encode_mutations
from proxy.memory.prefetcher import fresh_terms, points_back, was_used
from proxy.memory.segments import Segment
from proxy.memory.tlb import TLBWithPageTable
from proxy.memory.vm_prompts import without_citations
from proxy.memory.working_set import TokenBudget, watermarks
from proxy.tokens import TokenCounter

_FRAME_TOKENS = 400  # kept free beside VM results: rules, tags and the calls themselves
_ALL = 1 << 40  # tokens
_RESULT_SHARE = 2  # one VM result takes at most 1/2 of the room: a full page of a 4,000-token L0


@dataclass(slots=True)
class TurnWindow:
    """One per turn that pages; `window` is there after `open()`.

    `start`, `floor`, `anchors` and `before` are the `TurnInput`'s, `before` being the window after the
    deepest answered ancestor. `whole_room_tokens`: the budget less what stands in front of the path
    (system messages, tools, the answer's frame).
    """

    pages: PathPages
    memory: MemoryCore  # the page table, its log and who acts on them
    counter: TokenCounter
    limits: Limits
    channel: Channel
    anchors: Sequence[Anchor]
    substitutes: Callable[[bytes], Sequence[bytes]]
    start: int
    floor: int
    before: Window | None
    turn: int
    whole_room_tokens: int
    report: TurnReport
    answered: int = 0  # the messages before it are answered, and have no record yet (0: all have)
    record: Record | None = None  # the deepest answered ancestor
    get_record: GetRecord | None = None
    json_mode: bool = False  # the answer has to be JSON
    agent: bool = False  # the client has tools of its own
    next_limits: Limits | None = None  # from the next epoch on, where they differ
    window: Window = field(init=False)
    segments: list[Segment] = field(init=False, default_factory=list)  # closed in this turn
    shown: list[Load] = field(init=False, default_factory=list)  # by this turn's last epoch
    settled: Stored | None = field(init=False, default=None)  # the state with what is `answered`
    _brought: dict[str, Chosen] = field(init=False, default_factory=dict)  # before the call
    _tail: list[Entry] = field(init=False, default_factory=list)  # this turn's VM exchange
    _stood: dict[int | None, list[Anchor]] = field(init=False, default_factory=dict)
    _folded: bool = field(init=False, default=False)  # rounds of it had to leave

    def apply(self, mutation: PageMutation) -> None:
        """The only way in which a turn changes the table."""
        self.memory.apply(mutation)

    @property
    def table(self) -> TLBWithPageTable:
        return self.memory.combined

    # -- opening

    def open(self) -> Generator[Effect, Any, None]:
        """Append the new messages, or begin an epoch when they do not fit."""
        before = self.before
        if before is not None and before.counter and before.counter != self.counter.name:
            self.before = before = before.recount(self.counter)  # another model than in the last turn
        if before is not None and before.factor != self.limits.tokens_factor:
            self.before = msgspec.structs.replace(before, factor=self.limits.tokens_factor)
        if self.answered:
            yield from self._settle(self.answered)
        end = len(self.pages.path)
        self._register(self.pages)
        grown = self._grown(end, end)
        if grown is None or not self._fits(grown):
            yield from self._begin_epoch(self._next_epoch, self.pages, ())
        else:
            self._take_back()
            self.window = grown

    def _settle(self, end: int) -> Generator[Effect, Any, None]:
        """Open the window for the answered messages alone, as if in a turn before this one.

        What a client sends behind them may be said otherwise in its next request: this state, which
        has nothing of it, is where that one goes on. Nothing is done when there is no window yet and
        what stands behind leaves no room for one.
        """
        pages, last = self.pages.before(end), len(self.pages.path)
        behind = self._entries(end, last, last)
        grown = self._grown(end, end - 1, strict=True)
        fits = grown is not None and self._fits(grown.append(behind))
        rebuilt = not fits and self._leaves_room(end, behind)
        if self.before is None and not rebuilt:
            return
        self.turn -= 1
        self._register(pages)
        if rebuilt:
            yield from self._begin_epoch(self._next_epoch, pages, behind, last - end)
            self.window = self.window.until(len(self.window.entries) - len(behind), end)
            self.pages.derived = pages.derived
        elif fits and grown is not None:
            self._take_back(strict=True)
            self.window = grown
        elif self.before is not None:  # it does not fit, and the epoch is this turn's own
            self.window = self._continued(self.before, end, end - 1)
        self.settled = self.snapshot()
        self.before = self.window
        self.turn += 1

    @property
    def _next_epoch(self) -> int:
        return self.before.epoch + 1 if self.before else 1

    def _leaves_room(self, end: int, behind: Sequence[Entry]) -> bool:
        """Whether an epoch can be planned without a look at what stands behind its path."""
        path = self.pages.path
        if end == len(path):
            alone = True
        else:
            alone = path[end].role not in RESULT_ROLES and any(n.role == "user" for n in path[end:])
        _, low = watermarks(self.room_for_messages, self.limits.working_set)
        return alone and sum(entry.tokens for entry in behind) <= low

    def _grown(self, end: int, anchors_until: int, strict: bool = False) -> Window | None:
        """The log with the path up to `end`, taken back first to where the client's system messages
        differ from it; None when there is none to go on with."""
        before = self.before
        if before is None:
            return None
        if not self.start and before.notes != self.pages.notes_digest(before.native_from):
            return None  # what was shown of the older ones is not what the client says now
        at = differs_at(before, self.pages.path, self.anchors, self.start, strict)
        if at is not None:
            if self.get_record is None or not self._whole(at, before.covered):
                return None
            before = taken_back(before, at)
        return self._continued(before, end, anchors_until)

    def _continued(self, before: Window, end: int, anchors_until: int) -> Window:
        first = before.covered
        placed = sum((e.kind, e.position) == (SYSTEM, first) for e in before.entries)
        here = sum(anchor.position == first for anchor in self.anchors)
        entries = self._entries(first, end, anchors_until)
        return before.append(entries[min(placed, here) :], end)

    def _entries(self, first: int, last: int, anchors_until: int) -> list[Entry]:
        return client_entries(
            self.pages, self.anchors, self.substitutes, self.counter, first, last, anchors_until
        )

    def _fits(self, window: Window) -> bool:
        """The window stays below the high watermark, with what may be brought in before the call."""
        self.window = window
        high, _ = watermarks(self.room, self.limits.working_set)
        return window.tokens + self._prefetcher().reserve() <= high

    def _whole(self, first: int, last: int) -> bool:
        """These messages are in the window, and nothing of them was cut."""
        entries = [self.table.lookup(i) for p in range(first, last) for i in self.pages.ids(p)]
        return all(e and e.tier is StorageTier.L0 and not e.level for e in entries)

    def _register(self, pages: PathPages) -> None:
        """Enter new pages in the table, and anew those whose system messages are others now."""
        first = self.before.covered if self.before else 0
        if self.before is not None and first:
            at = differs_at(self.before, self.pages.path, self.anchors, self.start)
            since = first if at is None else at
            for mutation in renewed(pages, max(0, since - 1), first, self.table, self.turn):
                self.apply(mutation)
        for mutation in new_pages(pages, first, self.floor, self.turn):
            self.apply(mutation)

    def _take_back(self, strict: bool = False) -> None:
        """What was brought into the part of the log that is gone is not in the window any more."""
        if self.before is None or self.record is None or self.get_record is None:
            return
        at = differs_at(self.before, self.pages.path, self.anchors, self.start, strict)
        if at is None:
            return
        self.report.taken_back = True
        for page_id in brought_since(self.record, at, self.get_record):
            entry = self.table.lookup(page_id)
            if entry is not None and entry.tier is StorageTier.L0 and entry.position < at:
                out = PageMutation(MutationType.EVICT, page_id, self.turn, tier=StorageTier.L2)
                self.apply(out)

    def snapshot(self) -> Stored:
        """The state as it stands, for a record. Leaves of the table that are in `blocks` are whole in
        RAM: nothing of them is read before they are stored."""
        closing, blocks = b"", dict[bytes, bytes]()
        if self.segments:
            derived, most = self.pages.derived, self.limits.max_claims
            root, blocks = self.table.checkpoint()
            closing = encode_closing(root, self.segments, derived.end, most)
        mutations = msgspec.msgpack.encode(encode_mutations(self.memory.log.entries))
        closed = tuple(self.segments)
        return Stored(self.window, mutations, closing, blocks, self.pages.derived, closed)

    def _begin_epoch(
        self, number: int, pages: PathPages, tail: Sequence[Entry], after: int = 0
    ) -> Generator[Effect, Any, None]:
        """Rebuild the window of `pages`; `tail`: this turn's exchange, or `after` more messages."""
        if self.next_limits is not None:
            self.resize(self.next_limits)
        room = self.room_for_messages
        if room <= 0:
            raise context_length_exceeded(self.limits, self.limits.budget_tokens - room)
        path, before = pages.path, self.before
        floor = max(self.floor, before.native_from if before else 0)
        asked = EpochRequest(
            pages=pages,
            table=self.table,
            policy=self.memory.policy,
            pins=self.memory.pinned,
            counter=self.counter,
            limits=self.limits,
            substitutes=self.substitutes,
            names=self.channel.names,
            mode=self._mode,
            turn=self.turn,
            epoch=number,
            floor=group_start(path, min(floor, len(path) - 1)),
            room_tokens=room,
            apply=self.apply,
            newest=self._newest_entry() if self._tail else None,
            tail=tuple(tail),
            after=after,
        )
        epoch = yield from begin_epoch(asked)
        self.shown = [Load(i, level) for i, level in asked.shown]
        self.window = epoch.window
        if epoch.folded:
            self._tail, self._folded = list(epoch.tail), True
        self.report.new_epoch = True
        self.report.evicted_pages += epoch.evicted
        if epoch.segment is not None:
            self.segments.append(epoch.segment)

    def resize(self, limits: Limits) -> None:
        """Other bounds from now on."""
        self.whole_room_tokens += limits.budget_tokens - self.limits.budget_tokens
        self.limits, self.next_limits = limits, None
        self.report.budget_tokens = limits.budget_tokens

    @property
    def _mode(self) -> VMMode:
        return self.limits.mode if self.channel.listed else VMMode.PASSIVE

    # -- pages brought in before the call

    def prefetch(self) -> Generator[Effect, Any, None]:
        """Pages that the newest user message is about go in front of its own text."""
        entry = self._newest_entry()
        if entry is None:
            return
        prefetch = self._prefetcher()
        self.report.asked_back = points_back(prefetch.query)
        chosen = yield from prefetch.choose(self.budget.remaining)
        for page in chosen:
            self._brought[page.page_id] = page
            self.apply(
                PageMutation(
                    MutationType.MAP, page.page_id, self.turn, page.level, StorageTier.L0,
                    page.tokens, reason=FaultReason.SPECULATIVE,
                )
            )  # fmt: skip
        if chosen:
            self._replace(entry, context_block(page.line for page in chosen))

    def settle(self, answer: str) -> None:
        """Judge what was brought in by the answer: a page that served it counts as used."""
        if not self._brought:
            return
        fresh = fresh_terms(self._prefetcher().query, answer)
        for page in self._brought.values():
            used = was_used(self.pages.bare(page.page_id), fresh)
            self.report.prefetched.append(PrefetchReport(page.page_id, page.source.value, used))
            if used:
                self.apply(PageMutation(MutationType.ACCESS, page.page_id, self.turn))

    @property
    def fault_reason(self) -> FaultReason:
        """Why the model would ask for a page in this turn."""
        if self.report.asked_back:
            return FaultReason.USER_REQUESTED_RECALL
        return FaultReason.TOOL_PREREQUISITE if self.agent else FaultReason.RESOLVE_REFERENCE

    def _prefetcher(self) -> Prefetch:
        return Prefetch(
            self.pages, self.table, self.counter, self.limits, self.channel.offer, self.room,
            self.turn, self.agent, self.memory.anti_thrash,
        )  # fmt: skip

    def _newest_entry(self) -> Entry | None:
        last = len(self.pages.path) - 1
        return next((e for e in self.window.entries if e.position == last and e.kind == NATIVE), None)

    def _replace(self, entry: Entry, block: str) -> None:
        message = with_context(msgspec.json.decode(entry.raw), block)
        new = Entry(msgspec.json.encode(message), self.counter.message(message), entry.position)
        entries = tuple(new if e is entry else e for e in self.window.entries)
        self.window = msgspec.structs.replace(
            self.window, entries=entries, tokens=self.window.tokens + new.tokens - entry.tokens
        )

    # -- room

    @property
    def room_for_messages(self) -> int:
        """Tokens for the window whichever standing instructions of the client's are in front of it."""
        return self.whole_room_tokens - min(STANDING_TOKENS, self._tokens_of(self._standing()))

    @property
    def room(self) -> int:
        """Tokens for the window: what system messages before it and the tools leave of the budget."""
        return self.whole_room_tokens - self._tokens_of(self._standing(self.window.native_from))

    def _standing(self, native_from: int | None = None) -> list[Anchor]:
        """The standing instructions that are in front of a window whose native messages begin there;
        None: all there are."""
        found = self._stood.get(native_from)
        if found is None:
            path, anchors, most = self.pages.path, self.anchors, _ALL
            if native_from is not None:
                anchors = [a for a in anchors if owner(path, a.position) < native_from]
                most = STANDING_TOKENS
            found = self._stood[native_from] = standing(anchors, self.counter, most)
        return found

    def _tokens_of(self, anchors: Sequence[Anchor]) -> int:
        return sum(anchor_tokens(anchor, self.counter) for anchor in anchors)

    @property
    def budget(self) -> TokenBudget:
        """L0's tokens: what is kept for the answer and stands outside the window, and what it uses."""
        total = self.limits.working_set.max_l0_tokens
        reserved = max(0, total - self.room)
        return TokenBudget(total_limit=total, reserved=reserved, used=self.window.tokens)

    @property
    def left(self) -> int:
        """Tokens that an epoch could make free for this turn's exchange, less a little."""
        stays = [*newest_entries(self.window, self.pages.path), *self._tail]
        return min(self.room - sum(e.tokens for e in stays) - _FRAME_TOKENS, self.spare)

    @property
    def spare(self) -> int:
        """All tokens that an epoch could make free for this turn's exchange."""
        rules = rules_tokens(self._mode, self.limits, self.channel.names, self.counter)
        newest = newest_entries(self.window, self.pages.path)
        return spare_tokens(self.room_for_messages, rules, newest, self._tail)

    @property
    def result_room(self) -> int:
        """Tokens that one VM result may take; none once the window could not keep all results."""
        return 0 if self._folded else min(self.room // _RESULT_SHARE, self.left)

    # -- rounds

    def messages(self, system: Sequence[bytes], form: Form) -> Generator[Effect, Any, bytes]:
        """The next request's messages array; begins an epoch first when the log outgrew the room.

        `system` are the client's system messages in front of its history.
        """
        if not self.budget.can_fit(0):
            yield from self._begin_epoch(self.window.epoch + 1, self.pages, self._tail)
        self.report.used_tokens = self.limits.budget_tokens - self.room + self.window.tokens
        head = [*system, *(a.raw for a in self._standing(self.window.native_from))]
        as_text = not self.channel.listed
        window = self.window
        if self.json_mode and self.limits.mode is VMMode.STRICT:  # no citation may get into the JSON
            plain = without_citations(window.developer)
            window = msgspec.structs.replace(window, developer=plain)
        return render(head, window, self.limits.developer_role, as_text, form)

    def extend(self, exchange: Sequence[Entry]) -> None:
        """Add a round's VM exchange at the end."""
        self._tail.extend(exchange)
        self.window = self.window.append(exchange)

    def tell(self) -> None:
        """Enter the window's state in the report."""
        report = self.report
        report.epoch = self.window.epoch
        native = {e.position for e in self.window.entries if e.kind == NATIVE}
        report.native_pages = [i for p in sorted(native) for i in self.pages.ids(p)]
        resident = self.table.resident()
        report.context_pages = [e.page_id for e in resident if e.position not in native]
