"""`llm-pager demo`: its conversation is sound, its accounts are right, and the whole show runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.conversation.report import FaultReport, SearchReport, TurnReport
from proxy.demo.ledger import Ledger
from proxy.demo.play import conversation, demo_config
from proxy.demo.screen import Recall, View, layout, ranges
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
    assert int(re.search(r"(\d+) epochs", run.stdout)[1]) >= 3  # type: ignore[index]
    assert "full history" in run.stdout and "sliding window" in run.stdout
