"""This turn's window: what is in it, what enters, and when it begins anew. Pure.

Promises: the window covers the whole path once it is open; it grows at its end or begins a new
epoch, nothing else; each change of the page table is in this turn's mutation log; what one VM
result may take leaves room for the newest messages.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from proxy.conversation.channel import Channel
from proxy.conversation.compose import with_context
from proxy.conversation.effects import Effect, Load
from proxy.conversation.epoch import (
    anchored,
    begin_epoch,
    context_length_exceeded,
    native_entries,
)
from proxy.conversation.epoch_request import EpochRequest
from proxy.conversation.limits import Limits
from proxy.conversation.pathpages import PathPages, group_start
from proxy.conversation.prefetch import Chosen, Prefetch
from proxy.conversation.report import PrefetchReport, TurnReport
from proxy.conversation.tree import Anchor
from proxy.conversation.window import NATIVE, SYSTEM, Entry, Window, render
from proxy.memory.context_packer import context_block
from proxy.memory.core import MemoryCore
from proxy.memory.importance import importance_of, is_standing
from proxy.memory.models import (
    MEDIA_PART,
    FaultReason,
    MutationType,
    PageMutation,
    PageType,
    StorageTier,
    VMMode,
)
from proxy.memory.page_table import DEFAULT_IMPORTANCE
from proxy.memory.prefetcher import fresh_terms, points_back, was_used
from proxy.memory.segments import Segment
from proxy.memory.tlb import TLBWithPageTable
from proxy.memory.vm_prompts import without_citations
from proxy.memory.working_set import TokenBudget, watermarks
from proxy.tokens import TokenCounter

_FRAME_TOKENS = 400  # kept free beside VM results: rules, tags and the calls themselves
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
    json_mode: bool = False  # the answer has to be JSON
    agent: bool = False  # the client has tools of its own
    window: Window = field(init=False)
    segments: list[Segment] = field(init=False, default_factory=list)  # closed in this turn
    shown: list[Load] = field(init=False, default_factory=list)  # by this turn's last epoch
    _brought: dict[str, Chosen] = field(init=False, default_factory=dict)  # before the call
    _tail: list[Entry] = field(init=False, default_factory=list)  # this turn's VM exchange

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
            before = before.recount(self.counter)  # another model than in the last turn
        end = len(self.pages.path)
        self._register(before.covered if before else 0, end)
        if before is None:
            yield from self._begin_epoch(1)
            return
        entries: list[Entry] = []
        placed = [e.raw for e in before.entries if (e.kind, e.position) == (SYSTEM, before.covered)]
        for position in range(before.covered, end + 1):
            system = anchored(self.anchors, position, self.counter)
            entries.extend(system[len(placed) :] if position == before.covered else system)
            if position < end:
                entries.extend(native_entries(self.pages, position, self.substitutes, self.counter))
        self.window = before.append(entries, end)
        high, _ = watermarks(self.room, self.limits.working_set)
        too_full = self.window.tokens + self._prefetcher().reserve() > high
        if too_full or self._anchors_moved(before, placed):
            yield from self._begin_epoch(before.epoch + 1)

    def _register(self, first: int, last: int) -> None:
        """Enter new pages in the table; standing instructions are pinned."""
        pages = self.pages
        for position in range(first, last):
            tier = StorageTier.L0 if position >= self.floor else StorageTier.L2
            role, text = pages.path[position].role, pages.parts(position)[0]
            weight = importance_of(role, text)
            ids = pages.ids(position)
            for i, tokens in zip(ids, pages.sizes(position), strict=True):
                kind = pages.page_type(position, MEDIA_PART if pages.is_medium(i) else 0)
                self.apply(
                    PageMutation(
                        MutationType.CREATE, i, self.turn, None, tier, tokens,
                        importance=None if weight == DEFAULT_IMPORTANCE else weight,
                        modality=pages.modality(i),
                        page_type=None if kind is PageType.TRANSCRIPT else kind,
                    )
                )
            if is_standing(role, text, pages.text_tokens(position)):
                self.apply(PageMutation(MutationType.PIN, ids[0], self.turn))

    def _anchors_moved(self, before: Window, last: Sequence[bytes]) -> bool:
        """The client's system messages inside the window are not what the window has.

        `last` stood behind the newest message. A client that always has one there moves it along:
        the old one may stay for a turn.
        """
        first, covered = max(before.native_from, self.start), before.covered
        sent = [e.raw for e in before.entries if e.kind == SYSTEM and first <= e.position < covered]
        now = [a.raw for a in self.anchors if first <= a.position < covered]
        here = [a.raw for a in self.anchors if a.position == covered]
        return sent != now or (bool(here) and here[: len(last)] != list(last))

    def _begin_epoch(self, number: int) -> Generator[Effect, Any, None]:
        room = self.room_for_messages
        if room <= 0:
            raise context_length_exceeded(self.limits, self.limits.budget_tokens - room)
        path, before = self.pages.path, self.before
        floor = max(self.floor, before.native_from if before else 0)
        asked = EpochRequest(
            pages=self.pages,
            table=self.table,
            policy=self.memory.policy,
            pins=self.memory.pinned,
            counter=self.counter,
            limits=self.limits,
            anchors=self.anchors,
            substitutes=self.substitutes,
            names=self.channel.names,
            mode=self.limits.mode if self.channel.listed else VMMode.PASSIVE,
            turn=self.turn,
            epoch=number,
            floor=group_start(path, min(floor, len(path) - 1)),
            room_tokens=room,
            apply=self.apply,
            newest=self._newest_entry() if self._tail else None,
            tail=tuple(self._tail),
        )
        epoch = yield from begin_epoch(asked)
        self.shown = [Load(i, level) for i, level in asked.shown]
        self.window = epoch.window
        self.report.new_epoch = True
        self.report.evicted_pages += epoch.evicted
        if epoch.segment is not None:
            self.segments.append(epoch.segment)

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
        """Tokens for the window when all of the client's system messages are in front of it."""
        return self.whole_room_tokens - anchor_tokens(self.anchors, self.counter)

    @property
    def room(self) -> int:
        """Tokens for the window: what system messages before it and the tools leave of the budget."""
        before = anchor_tokens(self.anchors, self.counter, self.window.native_from)
        return self.whole_room_tokens - before

    @property
    def budget(self) -> TokenBudget:
        """L0's tokens: what is kept for the answer and stands outside the window, and what it uses."""
        total = self.limits.working_set.max_l0_tokens
        reserved = max(0, total - self.room)
        return TokenBudget(total_limit=total, reserved=reserved, used=self.window.tokens)

    @property
    def left(self) -> int:
        """Tokens that an epoch could make free for this turn's exchange, less a little."""
        path = self.pages.path
        last = len(path) - 1
        first = group_start(path, last)
        user = next((i for i in range(last, -1, -1) if path[i].role == "user"), last)
        stays = sum(
            e.tokens for e in self.window.entries if e.position >= first or e.position == user
        )
        stays += sum(entry.tokens for entry in self._tail) + _FRAME_TOKENS
        return self.room - stays

    @property
    def result_room(self) -> int:
        """Tokens that one VM result may take."""
        return min(self.room // _RESULT_SHARE, self.left)

    # -- rounds

    def messages(self, system: Sequence[bytes]) -> Generator[Effect, Any, bytes]:
        """The next request's messages array; begins an epoch first when the log outgrew the room.

        `system` are the client's system messages in front of its history.
        """
        if not self.budget.can_fit(0):
            yield from self._begin_epoch(self.window.epoch + 1)
        self.report.used_tokens = self.limits.budget_tokens - self.room + self.window.tokens
        head = [*system, *(a.raw for a in self.anchors if a.position < self.window.native_from)]
        as_text = not self.channel.listed
        window = self.window
        if self.json_mode and self.limits.mode is VMMode.STRICT:  # no citation may get into the JSON
            plain = without_citations(window.developer)
            window = msgspec.structs.replace(window, developer=plain)
        return render(head, window, self.limits.developer_role, as_text)

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


def anchor_tokens(
    anchors: Sequence[Anchor], counter: TokenCounter, before: int | None = None
) -> int:
    """Tokens of the mid-conversation system messages, or of those that stand before a position."""
    decode = msgspec.json.decode
    wanted = [a for a in anchors if before is None or a.position < before]
    return sum(counter.message(decode(a.raw)) for a in wanted)
