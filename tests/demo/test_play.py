"""`llm-pager demo`: its conversation is sound, and the whole show runs."""

import asyncio
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from proxy.demo.play import _serving, conversation, demo_config
from proxy.errors import ConfigError
from proxy.tokens import get_counter

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_whole_demo_runs_without_a_terminal_and_its_dashboard_stays(tmp_path: Path) -> None:
    """It opens the dashboard in a browser, and serves it until somebody has seen enough."""
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f"#!/bin/sh\necho \"$1\" > {opened}\n")
    browser.chmod(0o700)
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy.cli", "demo", "--fast", "--ui"], cwd=ROOT, text=True,
        env={**os.environ, "BROWSER": f"{browser} %s"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while (line := process.stdout.readline()) and not line.startswith("The dashboard is at "):
            lines.append(line)
        url = re.search(r"at (http://\S+/vm/ui) until", line)
        assert url, "".join(lines[-30:])
        with urllib.request.urlopen(url[1]) as page:
            assert page.status == 200 and b"Memory at a glance" in page.read()
        assert opened.read_text().strip() == url[1]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    run = subprocess.CompletedProcess(process.args, process.returncode, "".join(lines), errors)
    assert (run.returncode, rest, errors) == (0, "", ""), run.stdout[-3000:] + errors
    assert run.stdout.endswith("  llm-pager serve\n  export OPENAI_BASE_URL=http://127.0.0.1:8080/v1\n  python your_app.py\n\n")
    said = re.findall(r"^# (.+)$", run.stdout, re.M)
    assert len(said) == len(set(said)) == 7, "each kind of event is explained once"
    assert "\x1b" not in run.stdout
    found, asked = map(int, re.findall(r"^recall (\d+)/(\d+)", run.stdout, re.M)[-1])
    assert found >= 0.9 * asked
    epochs = int(re.search(r"(\d+) epochs", run.stdout)[1])  # type: ignore[index]
    assert epochs == int(re.findall(r"epoch +(\d+) begins", run.stdout)[-1]) >= 3
    assert "full history" in run.stdout and "sliding window" in run.stdout
    closed = re.findall(r"segment +(?:\d+–)?(\d+) closed$", run.stdout, re.M)
    told = re.search(r"^memory: (\d+) segments? closed; effective context ([\d.]+)", run.stdout, re.M)
    assert told and int(told[1]) == int(closed[-1]) >= 3 and float(told[2]) > 3
    assert re.search(r"^look-ups: \d+% of \d+ found something; thrash index 0\.\d\d$", run.stdout, re.M)
    evicted = sum(int(n) for n in re.findall(r"evict +(\d+) pages? out", run.stdout))
    assert f"{evicted:,} evictions" in run.stdout
