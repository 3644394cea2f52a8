"""`llm-pager demo`: its conversation is sound, its accounts are right, and the whole show runs."""

import asyncio
import importlib.util
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from proxy.conversation.report import FaultReport, SearchReport, TurnReport
from proxy.demo.ledger import Ledger
from proxy.demo.play import _serving, conversation, demo_config
from proxy.demo.screen import (
    Recall,
    View,
    counted,
    experience,
    layout,
    print_summary,
    ranges,
)
from proxy.errors import ConfigError
from proxy.tokens import get_counter

ROOT = Path(__file__).resolve().parent.parent


def test_the_conversation_is_long_varied_and_has_its_questions() -> None:
    turns = conversation()
    told = [t["user"] for t in turns if "expect" not in t]
    asked = [t for t in turns if "expect" in t]
    assert 220 <= len(turns) <= 260 and 30 <= len(asked) <= 45
    assert len({t["user"] for t in turns}) == len(turns)
    assert all(45 <= len(text.split()) <= 115 for text in told)
    assert not any("?" in text for text in told)
    openings = {" ".join(text.split()[:4]) for text in told}
    assert len(openings) >= 0.97 * len(told)
    tokens = sum(get_counter("demo").text(t["user"]) for t in turns)
    assert 18_000 <= tokens <= 24_000


def test_every_expected_answer_was_told_at_least_twenty_turns_before() -> None:
    turns = conversation()
    for number, turn in enumerate(turns):
        if "expect" in turn:
            told = [n for n in range(number) if turn["expect"] in turns[n]["user"]]
            assert told and number - told[0] >= 20, turn
            assert turn["expect"] not in turn["user"]


def test_a_window_too_small_to_show_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2000"):
        demo_config(600, tmp_path)
    assert demo_config(4000, tmp_path).tiers.l0.tokens == 4000


def test_the_ledger_bills_a_cached_prefix_at_a_tenth_and_slides_within_the_budget() -> None:
    counter = get_counter("demo")
    ledger = Ledger(counter, budget_tokens=1500)
    messages: list[dict[str, Any]] = []
    for number in range(60):
        text = f"Plank {number} of larch cost {number + 3} pounds and was late. " * 4
        messages.append({"role": "user", "content": text})
        ledger.turn(messages, None)
        ledger.upstream_request({"messages": messages[-3:]})
    assert ledger.full.hit_rate > 0.8 and ledger.sliding.hit_rate < 0.3
    assert ledger.sliding.largest_tokens <= 1500 < ledger.full.largest_tokens
    assert ledger.full.billed_tokens == pytest.approx(
        ledger.full.prompt_tokens - 0.9 * ledger.full.cached_tokens
    )
    assert ledger.ours.requests == 60 and ledger.ours.cached_tokens == 0


def test_ranges_fold_runs_of_pages() -> None:
    assert ranges(["msg_0001", "msg_0002", "msg_0003", "msg_0007.2", "msg_0009"]) == (
        "msg_0001–0003, msg_0007.2, msg_0009"
    )


def test_ranges_fold_derived_pages_behind_the_messages() -> None:
    pages = ["summary_seg_01", "claim_0002", "claim_0003", "msg_0024", "claim_0005", "msg_0025", "msg_0003.1"]
    assert ranges(pages) == "msg_0024–0025, msg_0003.1, claim 2–3, claim 5, summary 1"
    assert ranges(["claim_0002", "msg_0009", "claim_0003"], in_order=True) == "claim 2, msg_0009, claim 3"
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
    report.segments, report.claims = 3, 3
    report.evicted_pages = ["summary_seg_01", "claim_0001"]
    view.observe(report)
    assert [(kind, what) for _, kind, what in view.events][4:] == [
        ("segment", "02–03 closed: 3 claims"), ("evict", "2 pages out: claim 1, summary 1"),
    ]  # fmt: skip
    view.observe(TurnReport("demo", "tools", 9, 3, False, 3600, 1800, segments=3, claims=3))
    assert (view.segments, view.claims, view.evicted, len(view.events)) == (3, 3, 4, 6)


def test_a_fault_for_what_the_window_has_already_brings_nothing_in() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False, turn=7)
    report = TurnReport("demo", "tools", 7, 2, False, 3600, 1800)
    report.faults = [FaultReport("claim_0001", 0, 0), FaultReport("msg_0002", 0, 70)]
    view.observe(report)
    assert view.faults == 1 and [what for *_, what in view.events] == ["msg_0002 paged in at level 0, 70 tokens"]


def test_the_summary_has_the_memorys_figures_of_merit() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False, segments=3, claims=12)
    assert experience(view) == []
    view.stats = {
        "user_experience": {
            "recall_success_rate": 0.975, "recalls": 1200, "thrash_index": 0.25, "effective_context": 7.84,
        },
        "prefetch": {"claim": {"prefetched": 4, "used": 1}, "search": {"prefetched": 1080, "used": 900}},
    }  # fmt: skip
    assert experience(view) == [
        "memory: 3 segments closed, 12 claims noted; effective context 7.8 times the window",
        "look-ups: 98% of 1,200 found something; thrash index 0.25",
        "prefetched pages that the answer used: 1 of 4 from claim, 900 of 1,080 from search",
    ]


def test_the_screen_shows_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    ledger = Ledger(get_counter("demo"), 3000)
    for plain in (True, False):
        view = View(10, 4000, 0.9, ledger, plain=plain, turn=7)
        report = TurnReport("demo", "tools", 7, 2, True, 3600, 1800)
        report.native_pages, report.evicted_pages = ["msg_0011"], ["msg_0001", "msg_0002"]
        report.searches = [SearchReport("keel bolts", ["msg_0002"])]
        report.faults = [FaultReport("msg_0002", 0, 70), FaultReport("msg_9999", 0, 0, "unknown page")]
        view.observe(report)
        view.recalled(Recall(7, "Which bolts?", "Bronze ones.", "Bronze", True, "after faults"))
        console = Console(width=120, height=36, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(layout(view, 36), height=36)
        shown = capture.get()
        for text in ("1,800 of 3,600", "keel bolts", "msg_0001–0002", "unknown page", "recall 1/1", "OpenAI's rule"):
            assert text in shown
    assert "keel bolts" in capsys.readouterr().out


def shown_at_80_by_24(view: View) -> str:
    from rich.console import Console

    console = Console(width=80, height=24, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(layout(view, 24), height=24)
    return capture.get()


def test_everything_fits_on_80_by_24() -> None:
    ledger = Ledger(get_counter("demo"), 3000)
    for account in ledger.accounts:
        account.prompt_tokens, account.billed_tokens, account.largest_tokens = 3_242_729, 684_388, 26_828
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
    assert "number 8" in shown and "number 5" in shown and "number 4" not in shown


def test_a_bypassed_turn_says_so() -> None:
    view = View(10, 4000, 0.9, Ledger(get_counter("demo"), 3000), plain=False, turn=1)
    view.observe(TurnReport("demo", "bypass", 1, budget_tokens=3600, used_tokens=1800))
    shown = shown_at_80_by_24(view)
    assert "1,800 of 3,600 tokens (the whole history fits: sent untouched)" in shown
    assert "everything fits: requests pass" in shown and "untouched  " in shown  # it may wrap
    assert "90%" not in shown and "┃" not in shown


def test_header_log_and_summary_show_the_epochs_own_number(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

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


async def test_the_demos_server_sends_without_delay() -> None:
    """asyncio sets TCP_NODELAY on connections of a listener that names its protocol."""
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (event := (await receive())["type"]) != "lifespan.shutdown":
                await send({"type": event + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        transport = receive.__self__.transport
        connection = transport.get_extra_info("socket")
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with _serving(app) as url:
        port = int(url.split(":")[2].split("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await reader.read()
        writer.close()
    assert seen and seen[0] != 0


def test_the_reader_of_the_output_may_leave(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", "-c", '"$0" -m proxy.cli demo --fast | head -2; exit "${PIPESTATUS[0]}"', sys.executable],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr, len(run.stdout.splitlines())) == (1, "", 2)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_restores_the_terminal_and_removes_the_state(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy.cli", "demo"],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path), "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    output, asked = b"", False
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            try:
                chunk = os.read(ours, 65_536)
            except OSError:  # Linux: the other side is closed
                break
            output += chunk
            if not asked and re.search(rb"turn [3-9]/", output):
                assert list(tmp_path.glob("llm-pager-demo-*"))
                process.send_signal(signal.SIGTERM)
                asked = True
        assert asked and process.wait(timeout=20) == 143, output[-2000:]
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert output.rindex(b"\x1b[?1049l") > output.rindex(b"\x1b[?1049h")  # the main screen again
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")  # with its cursor
    assert b"stopped" in output and b"Traceback" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("proxy.app") is None, reason="proxy/app.py is not there")
def test_the_whole_demo_runs_without_a_terminal() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "proxy.cli", "demo", "--fast"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "\x1b" not in run.stdout
    found, asked = map(int, re.findall(r"^recall (\d+)/(\d+)", run.stdout, re.M)[-1])
    assert found >= 0.9 * asked
    epochs = int(re.search(r"(\d+) epochs", run.stdout)[1])  # type: ignore[index]
    assert epochs == int(re.findall(r"epoch +(\d+) begins", run.stdout)[-1]) >= 3
    assert "full history" in run.stdout and "sliding window" in run.stdout
    closed = re.findall(r"segment +(?:\d+–)?(\d+) closed$", run.stdout, re.M)
    told = re.search(r"^memory: (\d+) segments? closed, (\d+) claims? noted; effective context ([\d.]+)", run.stdout, re.M)
    assert told and int(told[1]) == int(closed[-1]) >= 3 and int(told[2]) == 0 and float(told[3]) > 3
    assert re.search(r"^look-ups: \d+% of \d+ found something; thrash index 0\.\d\d; TLB hits \d", run.stdout, re.M)
    evicted = sum(int(n) for n in re.findall(r"evict +(\d+) pages? out", run.stdout))
    assert f"{evicted:,} evictions" in run.stdout
