"""When the messages of a path were first seen here, and which of them a model's `after` and `before` mean. Pure.

Promises: what a record says, so the same after a restart and on any replica. It is "seen", not "said": of a history that came
with its answers in a conversation's first request nobody knows when it was said, so no result says when it was seen; `after` and
`before` take the time of that request. A path of n messages costs some log n looks at records.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import islice

from proxy.conversation.context import TurnContext
from proxy.conversation.pages import PathPages
from proxy.conversation.records import Record
from proxy.memory.seen import read_bound, seen_text, shown_day
from proxy.memory.vm_tools import FurtherPage, SearchArgs, SearchResultEntry, SearchToolResult

_SHARED = 16  # answers, at most, that are looked at for one that has a record


class Timeline:
    """Of the first `end` messages of a request's path."""

    def __init__(self, pages: PathPages, end: int, context: TurnContext) -> None:
        self._pages, self._end, self._context = pages, end, context
        record = context.place.record
        self._stored = 0 if record is None else record.end
        self._seen_s: dict[int, int] = {}  # what was asked for: a search halves the same path again and again

    def seen_s(self, position: int) -> int:
        """Unix seconds; 0 where it was stored by a version that did not say."""
        found = self._seen_s.get(position)
        if found is None:
            found = self._seen_s[position] = self._read_seen_s(position)
        return found

    def _read_seen_s(self, position: int) -> int:
        if position >= self._stored:
            return self._pages.path[position].seen_s or int(self._context.now_s)
        record = self._record(position)
        if record is None:
            return 0
        return (position == record.end - 1 and record.answered_s) or record.seen_s

    def _record(self, position: int) -> Record | None:
        path, get = self._pages.path, self._context.get_record
        answers = (p for p in range(position, self._stored) if path[p].role == "assistant")
        found = (get(path[p].id) for p in islice(answers, _SHARED))  # an answer that is `Shared` has none
        return next((record for record in found if record is not None), None)

    def _witnessed(self, position: int) -> bool:
        """It came when it was said, as far as anybody can tell: not with a history at first sight."""
        if not 0 <= position < self._stored:
            return False
        record = self._record(position)
        return record is not None and record.answered_s > 0

    def positions(self, args: SearchArgs) -> tuple[range, str]:
        """The positions that a search is for, and a sentence where a time leaves none. Times grow along a path; one that
        is not known is before those that are."""
        whole, now_s = range(self._end), self._context.now_s
        after, before = read_bound(args.after, now_s), read_bound(args.before, now_s)
        timed = [bound for bound in (after, before) if bound is not None and bound.position is None]
        known = self._first_at(1) if timed else 0
        if timed and known == self._end:
            return whole, "When these pages were seen is not known."
        start, stop = 0, self._end
        if after is not None:
            start = self._first_at(after.begin_s) if after.position is None else after.position + 1
            start = 0 if start == known and after.position is None else start
        if before is not None:
            same = len(timed) > 1 and before.begin_s <= timed[0].begin_s
            until_s = before.end_s if same else before.begin_s
            stop = self._first_at(until_s) if before.position is None else before.position
        found = whole[start:max(start, stop)]
        if found or not timed:
            return found, ""
        first, last = (shown_day(self.seen_s(p)) for p in (known, self._end - 1))
        return found, f"No page was seen then: these were from {first} to {last}."

    def _first_at(self, at_s: float) -> int:
        return bisect_left(range(self._end), at_s, key=self.seen_s)

    def tell(self, found: SearchToolResult) -> None:
        """Enter when each result was seen: once, where that is the same for all."""
        entries: list[SearchResultEntry | FurtherPage] = [*found.results, *found.also]
        places = [self._pages.position(entry.page_id) for entry in entries]
        if not any(map(self._witnessed, places)):
            return
        span_s = self.seen_s(self._end - 1) - self.seen_s(self._first_at(1) % self._end)
        times = [seen_text(at, span_s) if (at := self.seen_s(place)) else "" for place in places if place >= 0]
        if len(set(times)) == 1:
            found.seen = times[0]
            return
        for entry, place in zip(entries, places, strict=True):
            entry.seen = seen_text(self.seen_s(place), span_s) if self._witnessed(place) else ""
