"""What the demo shows: a live layout on a terminal, plain lines anywhere else.

Promises: plain output has no control characters; both show the same facts, which come from the
proxy's own `TurnReport`s and from the ledger. A terminal of 80 by 24 is large enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, Group
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from proxy.conversation.bill import MIN_PREFIX_TOKENS, STEP_TOKENS

if TYPE_CHECKING:
    from proxy.conversation.report import FaultReport, TurnReport
    from proxy.demo.bill import Ledger

# For a panel of 76 columns.
_RULE = f"OpenAI's rule: prefixes from {MIN_PREFIX_TOKENS:,} tokens, in steps of {STEP_TOKENS}, at a tenth"
_SHOWN_EVENTS = 200
_SHOWN_ANSWERS = 50
_SHOWN_RUNS = 8  # of pages in one list
# What happens, for who sees it for the first time; for a panel of 76 columns, but for the numbers.
_BEGINS = "The application sends all of its history. It fits: not a byte is touched."
_MEANS = {
    "epoch": "At {high:.0%} full the window is built anew; from there it grows at its end.",
    "segment": "Messages that left are closed into a segment: an index line of it stays.",
    "evict": "Pages leave the window, for the store: nothing that was said is lost.",
    "prefetch": "Pages about the new message are put in front of it, before anybody asks.",
    "search": "The model searched: the proxy answers that, the application sees nothing.",
    "fault": "The model asked for an old page: the proxy brings it, and asks it again.",
    "recall": "A question about something said long ago is answered: from the memory.",
}
_YOURS = """Your application, unchanged:
  llm-pager serve
  export OPENAI_BASE_URL=http://127.0.0.1:8080/v1
  python your_app.py"""
_STYLES = {
    "epoch": "bold magenta", "segment": "blue", "evict": "red", "prefetch": "cyan", "search": "yellow",
    "fault": "bold yellow", "error": "bold red",
}  # fmt: skip
_MESSAGE = "msg_"


class Recall(NamedTuple):
    """One recall question and how it ended."""

    turn: int
    question: str
    answer: str
    expect: str
    found: bool


@dataclass
class View:
    """Everything that is on show."""

    turns: int
    window_tokens: int
    high_watermark: float
    ledger: Ledger
    plain: bool
    turn: int = 0
    said: str = ""
    report: TurnReport | None = None
    epochs: int = 0  # the newest epoch's number: one turn may begin several
    segments: int = 0  # the newest closed segment's number
    evicted: int = 0
    prefetched: int = 0
    faults: int = 0
    searches: int = 0
    recalls: list[Recall] = field(default_factory=list)
    events: deque[tuple[int, str, str]] = field(default_factory=lambda: deque(maxlen=_SHOWN_EVENTS))
    stats: dict[str, Any] = field(default_factory=dict)  # what GET /vm/stats says at the end
    unread: bool = False  # the reader of our plain output has gone (`| head`): the show may end
    meaning: str = _BEGINS
    dashboard: str = ""  # its URL, where it was asked for
    _meant: set[str] = field(default_factory=set)

    def event(self, kind: str, text: str) -> None:
        self.events.append((self.turn, kind, text))
        self._explain(kind)
        self._say(f"turn {self.turn:3}  {kind:8}  {text}")

    def begin(self) -> None:
        """The first line of the plain output."""
        self._say(f"{self.turns} turns through a window of {self.window_tokens:,} tokens. {_BEGINS}")
        if self.dashboard:
            self._say(f"dashboard  {self.dashboard}")

    def _explain(self, kind: str) -> None:
        """On a terminal whenever it happens, elsewhere the first time."""
        self.meaning = _MEANS.get(kind, self.meaning).format(high=self.high_watermark)
        if kind in _MEANS and kind not in self._meant:
            self._meant.add(kind)
            self._say(f"# {self.meaning}")

    def _say(self, line: str) -> None:
        # Called from inside the server's turn, which a closed pipe must not fail: it is remembered.
        if not self.plain or self.unread:
            return
        try:
            print(line, flush=True)
        except BrokenPipeError:
            self.unread = True

    def observe(self, report: TurnReport) -> None:
        """Takes in one turn's report."""
        self.report = report
        if report.new_epoch:
            self.epochs = report.epoch
            self.event("epoch", f"{report.epoch} begins: {in_window(report)}; {gauge_text(report)}")
        if report.segments > self.segments:
            closed = dict.fromkeys((self.segments + 1, report.segments))
            self.event("segment", "–".join(f"{n:02}" for n in closed) + " closed")
            self.segments = report.segments
        if gone := report.evicted_pages:
            self.evicted += len(gone)
            self.event("evict", f"{counted(len(gone), 'page')} out: {ranges(gone)}")
        if report.prefetched_pages:
            self.prefetched += len(report.prefetched_pages)
            if not self.plain or report.searches or report.faults:
                self.event("prefetch", f"before the call: {ranges(report.prefetched_pages)}")
        for search in report.searches:
            self.searches += 1
            found = ranges(search.results[:6], in_order=True) or "nothing"
            self.event("search", f"“{search.query}” found {found}")
        for fault in report.faults:
            if fault.error:
                self.event("error", f"{fault.page_id}: {fault.error}")
        for fault in paged_in(report):
            self.faults += 1
            size = counted(fault.tokens, "token")
            self.event("fault", f"{fault.page_id} paged in at level {fault.level}, {size}")

    def recalled(self, question: str, answer: str, expect: str) -> None:
        """Takes in how one recall question ended; its turn's report is in already."""
        how, report = "from the window", self.report
        if report and (report.searches or paged_in(report)):
            searches = counted(len(report.searches), "search", "searches")
            how = f"after {searches} and {counted(len(paged_in(report)), 'fault')}"
        found = expect in answer
        self.recalls.append(Recall(self.turn, question, answer, expect, found))
        self._explain("recall")
        self._say(f"turn {self.turn:3}  {'✓' if found else '✗'} recall  {question}")
        self._say(f"                    {answer}  [{how}]")

    @property
    def found(self) -> int:
        return sum(r.found for r in self.recalls)


def counted(number: int, one: str, more: str = "") -> str:
    """`1 page`, `1,178 pages`; `more` is the plural when it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def paged_in(report: TurnReport) -> list[FaultReport]:
    """The faults that brought a page; one that the window had already costs nothing."""
    return [fault for fault in report.faults if fault.error is None and fault.tokens]


def ranges(page_ids: Sequence[str], in_order: bool = False) -> str:
    """`msg_0001–0012, msg_0015`: page ids in short, with runs folded but for `in_order`."""
    runs: list[tuple[str, str]] = []  # first and last
    for page_id in page_ids:
        if not in_order and runs and _follows(runs[-1][1], page_id):
            runs[-1] = (runs[-1][0], page_id)
        else:
            runs.append((page_id, page_id))
    shown = [a if a == z else f"{a}–{z.removeprefix(_MESSAGE)}" for a, z in runs[:_SHOWN_RUNS]]
    more = f" and {len(runs) - _SHOWN_RUNS} more" if len(runs) > _SHOWN_RUNS else ""
    return ", ".join(shown) + more


def _follows(page_id: str, next_id: str) -> bool:
    number = page_id.removeprefix(_MESSAGE)
    return number.isdigit() and next_id == f"{_MESSAGE}{int(number) + 1:04}"


def in_window(report: TurnReport) -> str:
    native = ranges(report.native_pages) or "none"
    return f"native {native}, {counted(len(report.context_pages), 'older page')} as context"


def gauge_text(report: TurnReport) -> str:
    return f"{report.used_tokens:,} of {report.budget_tokens:,} tokens"


def _gauge(used: int, budget: int, high: float | None) -> Text:
    """A bar with a mark at the share `high`; None: nothing happens at any mark."""
    width = 44
    filled = min(width, round(width * used / budget)) if budget else 0
    mark = width if high is None else min(width - 1, round(width * high))
    bar = Text()
    for i in range(width):
        full = i < filled
        colour = "red" if full and i >= mark else "green" if full else "bright_black"
        bar.append("┃" if i == mark else "█" if full else "░", "bold white" if i == mark else colour)
    return bar


def _window_panel(view: View) -> Panel:
    r = view.report
    if r is None:
        return Panel("waiting for the first turn", title="the model's window")
    if r.channel == "bypass":
        high, remark = None, "the whole history fits: sent untouched"
    else:
        high, remark = view.high_watermark, f"┃ {view.high_watermark:.0%}: a new epoch begins"
    lines = [
        _gauge(r.used_tokens, r.budget_tokens or view.window_tokens, high),
        Text(f"{gauge_text(r)} ({remark})", "bold"),
        Text.assemble(("native   ", "bold green"), ranges(r.native_pages) or "–"),
        Text.assemble(("context  ", "bold blue"), ranges(r.context_pages) or "–"),
        Text.assemble(("brought  ", "bold cyan"), ranges(r.prefetched_pages) or "–"),
        Text(
            f"epoch {r.epoch} · {r.channel} · out {view.evicted:,} · in {view.prefetched:,}"
            f" · found {view.searches:,} · faults {view.faults:,}",
            "dim",
        ),
    ]
    for line in lines:  # a wrapped one would push the last out of the panel
        line.no_wrap, line.overflow = True, "ellipsis"
    return Panel(Group(*lines), title="the model's window", border_style="green")


def _event_panel(view: View, rows: int) -> Panel:
    text = Text(no_wrap=True, overflow="ellipsis")
    if not view.events:
        text = Text("everything fits: requests pass untouched", "dim")
    for turn, kind, what in list(view.events)[-rows:]:
        text.append(f"{turn:4} ", "dim")
        text.append(f"{kind:9}", _STYLES.get(kind, ""))
        text.append(what + "\n")
    return Panel(text, title="paging", border_style="yellow")


def _recall_panel(view: View, rows: int) -> Panel:
    text = Text(no_wrap=True, overflow="ellipsis")
    for r in view.recalls[-_SHOWN_ANSWERS:][-max(1, rows // 2) :]:
        text.append("✓ " if r.found else "✗ ", "bold green" if r.found else "bold red")
        text.append(f"{r.question}\n", "bold")
        before, fact, after = _around(r.answer, r.expect)
        text.append(f"  {before}", "dim")
        text.append(fact, "green")
        text.append(f"{after}\n", "dim")
    return Panel(text, title=f"recall {view.found}/{len(view.recalls)}", border_style="cyan")


def _around(answer: str, expect: str, lead_chars: int = 24) -> tuple[str, str, str]:
    """An answer cut so that the expected fact shows in a narrow column."""
    answer = " ".join(answer.split())
    before, fact, after = answer.partition(expect)
    if fact and len(before) > lead_chars:
        before = "… " + before[-lead_chars:].partition(" ")[2]
    return before, fact, after


def bill_table(view: View) -> Table:
    """The three accounts; `billed` counts a cached prefix token as a tenth."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("largest prompt", "input tokens", "cached", "billed", "recall"):
        table.add_column(name, justify="right", no_wrap=True)
    ledger = view.ledger
    for a in ledger.accounts:
        recalled = view.found if a is ledger.ours else a.recalled
        table.add_row(
            a.name, f"{a.largest_tokens:,}", f"{a.prompt_tokens:,}", f"{a.hit_rate:.0%}", f"{a.billed_tokens:,.0f}",
            f"{recalled}/{len(view.recalls)}", style="bold green" if a is ledger.ours else "",
        )  # fmt: skip
    return table


def layout(view: View, height: int) -> Layout:
    """The whole screen for a terminal of `height` lines."""
    root = Layout()
    rows = max(2, height - 4 - 8 - 7 - 2)  # what the other panels and this one's frame leave
    title = Text.assemble(
        ("llm-pager demo ", "bold"),
        f"turn {view.turn}/{view.turns} · window {view.window_tokens:,} tokens · epoch {view.epochs}   ",
        (view.dashboard or view.said, "italic dim"), no_wrap=True, overflow="ellipsis",
    )  # fmt: skip
    meaning = Text(view.meaning, "cyan", no_wrap=True, overflow="ellipsis")
    root.split_column(
        Layout(Panel(Group(title, meaning)), size=4),
        Layout(_window_panel(view), size=8),
        Layout(name="body"),
        Layout(Panel(Group(bill_table(view), Text(_RULE, "dim")), title="input bill"), size=7),
    )
    root["body"].split_row(Layout(_event_panel(view, rows)), Layout(_recall_panel(view, rows)))
    return root


def experience(view: View) -> list[str]:
    """The memory's figures of merit in words, from what GET /vm/stats says; [] without them."""
    if not view.stats:
        return []
    seen = view.stats["user_experience"]
    brought, used = seen["prefetched"], seen["prefetched_used"]
    lines = [
        f"memory: {counted(view.segments, 'segment')} closed;"
        f" effective context {seen['effective_context']:.1f} times the window",
        f"look-ups: {seen['recall_success_rate']:.0%} of {seen['recalls']:,} found something;"
        f" thrash index {seen['thrash_index']:.2f}",
    ]
    return [*lines, f"prefetched pages that the answer used: {used:,} of {brought:,}"] if brought else lines


def print_summary(view: View, console: Console) -> None:
    """The end: what happened, the bill, and the recall."""
    console.print()
    console.print(
        f"{counted(view.turn, 'turn')} through a window of {view.window_tokens:,} tokens: "
        f"{counted(view.epochs, 'epoch')}, {counted(view.evicted, 'eviction')}, "
        f"{view.prefetched:,} prefetched, {counted(view.searches, 'search', 'searches')}, "
        f"{counted(view.faults, 'page fault')}",
        highlight=False,
    )
    console.print(bill_table(view))
    console.print(_RULE, style="dim", highlight=False)
    ours = view.ledger.ours.billed_tokens
    if ours:
        rest = ", ".join(f"{a.billed_tokens / ours:.1f} times less than the {a.name}" for a in view.ledger.accounts[1:])
        console.print(f"input billed: {rest}", highlight=False)
    for line in experience(view):
        console.print(line, highlight=False)
    for r in view.recalls:
        if not r.found:
            console.print(f"✗ turn {r.turn}: {r.question} -> {r.answer}", highlight=False, markup=False)
    console.print(f"recall {view.found}/{len(view.recalls)}", style="bold", highlight=False)
    console.print(f"\n{_YOURS}", highlight=False)


def result(view: View) -> dict[str, Any]:
    """The summary as JSON values."""
    return {
        "turns": view.turn, "window_tokens": view.window_tokens, "epochs": view.epochs, "evicted_pages": view.evicted,
        "prefetched_pages": view.prefetched, "searches": view.searches, "faults": view.faults, "segments": view.segments,
        "recall": {"found": view.found, "asked": len(view.recalls)},
        "bill": {a.name: {"largest_tokens": a.largest_tokens, "prompt_tokens": a.prompt_tokens, "cached_share": round(a.hit_rate, 3),
                          "billed_tokens": round(a.billed_tokens)} for a in view.ledger.accounts},
    }  # fmt: skip
