"""What the demo shows."""

import pytest
from rich.console import Console

from proxy.conversation.report import FaultReport, SearchReport, TurnReport
from proxy.demo.bill import Ledger
from proxy.demo.screen import _MEANS, View, counted, experience, layout, print_summary, ranges
from proxy.tokens import get_counter


def test_ranges_fold_runs_of_pages() -> None:
    assert ranges(["msg_0001", "msg_0002", "msg_0003", "msg_0007.2", "msg_0009"]) == (
        "msg_0001–0003, msg_0007.2, msg_0009"
    )


def test_ranges_in_order_are_not_folded_and_many_are_counted() -> None:
    assert ranges(["msg_0002", "msg_0003", "msg_0001"], in_order=True) == "msg_0002, msg_0003, msg_0001"
    assert ranges([f"msg_{n:04}" for n in range(1, 21, 2)]).endswith("msg_0015 and 2 more") and ranges([]) == ""


def test_a_closed_segment_is_one_line() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False, turn=7)
    report = TurnReport("demo", "tools", 7, 1, True, 3600, 1800)
    report.segments, report.evicted_pages = 1, ["msg_0001", "msg_0002"]
    view.observe(report)
    assert [(kind, what) for _, kind, what in view.events][1:] == [
        ("segment", "01 closed"), ("evict", "2 pages out: msg_0001–0002"),
    ]  # fmt: skip
    report = TurnReport("demo", "tools", 8, 3, True, 3600, 1800)  # one turn began two epochs
    report.segments = 3
    report.evicted_pages = ["summary_seg_01", "claim_0001"]
    view.observe(report)
    assert [(kind, what) for _, kind, what in view.events][4:] == [
        ("segment", "02–03 closed"), ("evict", "2 pages out: summary_seg_01, claim_0001"),
    ]  # fmt: skip
    view.observe(TurnReport("demo", "tools", 9, 3, False, 3600, 1800, segments=3))
    assert (view.segments, view.evicted, len(view.events)) == (3, 4, 6)


def test_a_fault_for_what_the_window_has_already_brings_nothing_in() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False, turn=7)
    report = TurnReport("demo", "tools", 7, 2, False, 3600, 1800)
    report.faults = [FaultReport("claim_0001", 0, 0), FaultReport("msg_0002", 0, 70)]
    view.observe(report)
    assert view.faults == 1 and [what for *_, what in view.events] == ["msg_0002 paged in at level 0, 70 tokens"]


def test_the_summary_has_the_memorys_figures_of_merit() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False, segments=3)
    assert experience(view) == []
    view.stats = {
        "user_experience": {
            "recall_success_rate": 0.975, "recalls": 1200, "thrash_index": 0.25, "effective_context": 7.84,
            "prefetched": 1084, "prefetched_used": 901,
        },
    }  # fmt: skip
    assert experience(view) == [
        "memory: 3 segments closed; effective context 7.8 times the window",
        "look-ups: 98% of 1,200 found something; thrash index 0.25",
        "prefetched pages that the answer used: 901 of 1,084",
    ]


def test_the_screen_shows_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(get_counter("demo"), 3000)
    for plain in (True, False):
        view = View(10, 4000, 0.9, ledger, plain=plain, turn=7)
        report = TurnReport("demo", "tools", 7, 2, True, 3600, 1800)
        report.native_pages, report.evicted_pages = ["msg_0011"], ["msg_0001", "msg_0002"]
        report.searches = [SearchReport("keel bolts", ["msg_0002"])]
        report.faults = [FaultReport("msg_0002", 0, 70), FaultReport("msg_9999", 0, 0, "unknown page")]
        view.observe(report)
        view.recalled("Which bolts?", "Bronze ones.", "Bronze")
        console = Console(width=120, height=36, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(layout(view, 36), height=36)
        shown = capture.get()
        for text in ("1,800 of 3,600", "keel bolts", "msg_0001–0002", "unknown page", "recall 1/1", "OpenAI's rule"):
            assert text in shown
    assert "keel bolts" in capsys.readouterr().out


def shown_at_80_by_24(view: View) -> str:
    console = Console(width=80, height=24, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(layout(view, 24), height=24)
    return capture.get()


def test_everything_fits_on_80_by_24() -> None:
    ledger = Ledger(get_counter("demo"), 3000)
    for account in ledger.accounts:
        account.prompt_tokens, account.largest_tokens = 3_242_729, 26_828
    view = View(234, 4000, 0.9, ledger, plain=False, turn=200)
    view.evicted, view.prefetched, view.searches, view.faults = 904, 69, 29, 8
    pages = [f"msg_{n:04}" for n in range(1, 200, 3)]
    view.observe(TurnReport("demo", "tools", 200, 45, True, 3600, 1800, pages, pages, pages[:2]))
    shown = shown_at_80_by_24(view)
    assert "epoch 45 · tools · out 906 · in 69 · found 29 · faults 8 " in shown
    for text in ("sliding window", "at a tenth ", "2 pages out", "90%", "epoch 45   "):
        assert text in shown, shown
    assert max(map(len, shown.splitlines())) <= 80 and len(shown.splitlines()) == 24


def test_the_newest_events_are_the_ones_on_a_small_screen() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False)
    for number in range(9):
        view.event("fault", f"number {number}")
    shown = shown_at_80_by_24(view)
    assert "number 8" in shown and "number 6" in shown and "number 5" not in shown


@pytest.mark.parametrize("kind", [*_MEANS, ""])
def test_what_happens_is_explained_in_a_line(kind: str) -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False)
    view.event(kind, "it")
    assert f"│ {view.meaning} " in shown_at_80_by_24(view) and view.meaning.endswith(".")


def test_a_bypassed_turn_says_so() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False, turn=1)
    view.observe(TurnReport("demo", "bypass", 1, budget_tokens=3600, used_tokens=1800))
    shown = shown_at_80_by_24(view)
    assert "1,800 of 3,600 tokens (the whole history fits: sent untouched)" in shown
    assert "everything fits: requests pass" in shown and "untouched  " in shown  # it may wrap
    assert "90%" not in shown and "┃" not in shown


def test_header_log_and_summary_show_the_epochs_own_number(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=True, turn=1)
    report = TurnReport("demo", "tools", 1, 3, True, 3600, 1800)  # one turn began three
    report.evicted_pages, report.searches = ["msg_0001"], [SearchReport("keel", [])]
    view.observe(report)
    assert "epoch     3 begins" in (log := capsys.readouterr().out) and "1 page out" in log
    assert "epoch 3   " in shown_at_80_by_24(view)
    view.evicted = 1178
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        print_summary(view, console)
    assert "1 turn through a window of 4,000 tokens: 3 epochs, 1,178 evictions, " in capture.get()
    assert "0 prefetched, 1 search, 0 page faults" in capture.get()


def test_counted() -> None:
    assert (counted(1, "search", "searches"), counted(2, "search", "searches")) == ("1 search", "2 searches")
    assert (counted(0, "page"), counted(1178, "page")) == ("0 pages", "1,178 pages")
