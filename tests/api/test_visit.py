"""What is said of a request: headers in the first head, counts, one line, and none of anyone's words."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.api.memory import Memory
from proxy.api.renditions import Renditions
from proxy.api.visit import Stats
from proxy.api.writer import Writer
from proxy.config import load_config
from proxy.conversation.report import FaultReport, SearchReport, TurnReport
from proxy.upstream import make_upstream
from tests.e2e.processes import ServerProcess
from tests.test_app import CHAT, app_in, call

SECRET = "sk-verysecret"


@contextmanager
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """The fields of the requests' lines."""
    found: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO, "proxy.request"):
        yield found
    found += [record.fields for record in caplog.records if record.name == "proxy.request"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "path", "content", "channel", "kind"),
    [
        ("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), "bypass", None),
        ("POST", "/v1/chat/completions", b"{", "unpaged", "chat"),
        ("POST", "/v1/responses", b"{}", "unpaged", "responses"),
        ("POST", "/v1/messages", b"{}", "unpaged", "messages"),
        ("POST", "/v1/messages/count_tokens", b"{}", "unpaged", "messages"),
        ("GET", "/v1/models", b"", "unpaged", "other"),
        ("POST", "/tokenize", b"{}", "unpaged", "other"),
        ("GET", "/v1/%2e%2e/x", b"", "unpaged", "other"),
    ],
)
async def test_every_answer_says_its_channel_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    method: str, path: str, content: bytes, channel: str, kind: str | None,
) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, _):
        with lines(caplog) as found:
            status, headers, _out = await call(app, method, path, content, query=b"key=" + SECRET.encode())
        assert headers["x-llm-pager-channel"] == channel
        [line] = found
        assert (line["channel"], line["status"]) == (channel, status)
        assert ("path" in line) == (channel == "unpaged")
        assert SECRET not in caplog.text and "hello" not in caplog.text
        stats = json.loads((await call(app, "GET", "/vm/stats"))[2])
        assert stats["unpaged"] == ({kind: 1} if kind else {})
        page = (await call(app, "GET", "/metrics"))[2].decode()
        model = "other" if kind is None else "none"
        assert f'llm_pager_requests_total{{channel="{channel}",model="{model}",status="{status // 100}xx"}} 1.0' in page
        assert (f'llm_pager_unpaged_total{{path="{kind}"}} 1.0' in page) == (kind is not None)
        assert (f'llm_pager_chat_seconds_count{{channel="{channel}"}} 1.0' in page) == (kind is None)


async def test_our_own_paths_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, _):
        with lines(caplog) as found:
            for path in ("/health", "/ready", "/vm/stats", "/metrics"):
                await call(app, "GET", path)
        assert found == []


async def test_name_from_a_client_stays_on_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, _):
        forged = json.dumps({**CHAT, "model": "m\nchannel=tools status=200 \x1b[31m" + "x" * 5000}).encode()
        with lines(caplog):
            await call(app, "POST", "/v1/chat/completions", forged)
        [record] = [record for record in caplog.records if record.name == "proxy.request"]
        assert record.getMessage().isprintable() and len(record.getMessage()) < 500


# ---------------------------------------------------------------- over real sockets


def history(turns: int) -> list[dict[str, str]]:
    out: list[dict[str, str]] = []
    for turn in range(turns):
        words = " ".join(f"plank{turn}x{i}" for i in range(150))
        out += [{"role": "user", "content": f"Task {turn}: {words}"},
                {"role": "assistant", "content": f"Done {turn}: {words}"}]  # fmt: skip
    return [*out, {"role": "user", "content": "And now?"}]


@contextmanager
def serving(workers: int = 1, **sections: Any) -> Iterator[tuple[ServerProcess, Any]]:
    """`llm-pager serve` in front of a small upstream in a thread, that refuses the model "no"."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status = 200
            answer: dict[str, Any] = {
                "id": "c", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107,
                          "prompt_tokens_details": {"cached_tokens": 40}},
            }  # fmt: skip
            kind, body = "application/json", json.dumps(answer).encode()
            if asked.get("model") == "no":
                status, body = 401, json.dumps({"error": {"message": f"bad key {SECRET}", "code": "invalid_api_key"}}).encode()
            elif asked.get("stream"):
                chunk = {**answer, "object": "chat.completion.chunk", "choices": [
                    {"index": 0, "delta": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}]}
                kind, body = "text/event-stream", b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    config = {
        "upstream": {"base_url": f"http://127.0.0.1:{upstream.server_port}/v1"},
        "tiers": {"l0": {"tokens": 4000}}, **sections,
    }
    try:
        with ServerProcess(config, workers=workers) as server:
            yield server, upstream
    finally:
        upstream.shutdown()
        upstream.server_close()


def post(server: ServerProcess, **fields: Any) -> tuple[int, dict[str, str], bytes]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(fields).encode(),
                       {"content-type": "application/json", "authorization": f"Bearer {SECRET}"})
    response = connection.getresponse()
    answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return answer


def until(read: Callable[[], dict[str, str]], expected: dict[str, str]) -> None:
    """What `read` says comes to have what is expected: workers tell each other twice a second."""
    until_s = time.monotonic() + 10
    while (found := {name: value for name, value in read().items() if name in expected}) != expected:
        assert time.monotonic() < until_s, found
        time.sleep(0.05)


def get(server: ServerProcess, path: str) -> str:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_paged_answer_says_its_window_streamed_or_not_and_the_log_has_a_line_of_each() -> None:
    with serving(log={"format": "json"}, models={"gpt-4*": {}}) as (server, _):
        heads = [post(server, model="gpt-4o", messages=history(20), stream=stream)[1] for stream in (False, True)]
        for head in heads:
            assert head["x-llm-pager-channel"] == "tools"
            assert 0 < int(head["x-llm-pager-window-tokens"]) <= 4000
            assert int(head["x-llm-pager-epoch"]) >= 1
            assert len(bytes.fromhex(head["x-llm-pager-conversation"])) == 6
        assert heads[0]["x-llm-pager-conversation"] == heads[1]["x-llm-pager-conversation"]
        status, _head, _body = post(server, model="no", messages=history(20))
        assert status == 401
        page = get(server, "/metrics")
        logged = server.log
    assert SECRET not in logged and "plank" not in logged
    entries = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
    requests = [entry for entry in entries if "ms" in entry]
    assert [(entry["channel"], entry["status"]) for entry in requests] == [
        ("tools", 200), ("tools", 200), ("tools", 401)]  # fmt: skip
    assert requests[0]["rounds"] == 1 and requests[0]["prompt_tokens"] == 100
    assert requests[0]["conversation"] == heads[0]["x-llm-pager-conversation"]
    assert [entry["event"] for entry in entries if "event" in entry].count("refusal") == 1
    [first, *_] = [entry for entry in entries if entry.get("event") == "first_paging"]
    assert first["conversation"] == heads[0]["x-llm-pager-conversation"]
    assert 'llm_pager_requests_total{channel="tools",model="gpt-4*",status="2xx"} 2.0' in page
    assert 'llm_pager_requests_total{channel="tools",model="other",status="4xx"} 1.0' in page
    assert 'llm_pager_first_token_seconds_count{channel="tools"} 1.0' in page, "of the streamed one"
    assert "llm_pager_upstream_refusals_total 1.0" in page
    assert 'llm_pager_billed_tokens_total{kind="cached"}' in page


def test_workers_counts_add_up_and_their_files_go_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of its own: other tests' servers have theirs at the same time
    with serving(workers=2) as (server, _):
        for _ in range(12):
            post(server, model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
        for _ in range(6):  # whoever answers
            until(lambda: dict(re.findall(r"^(\S+) (\S+)$", get(server, "/metrics"), re.M)), {
                'llm_pager_requests_total{channel="bypass",model="other",status="2xx"}': "12.0",
                'llm_pager_billed_tokens_total{kind="prompt"}': "1200.0",
                'llm_pager_chat_seconds_count{channel="bypass"}': "12.0",
                'llm_pager_chat_seconds_bucket{channel="bypass",le="+Inf"}': "12.0",
                'llm_pager_queue{queue="pool"}': "0.0",
            })  # fmt: skip
        assert list(tmp_path.glob("llm-pager-metrics-*"))
        server.stop()
    assert not list(tmp_path.glob("llm-pager-metrics-*"))


# -- what they add up to


@asynccontextmanager
async def stats_in(folder: Path) -> AsyncIterator[tuple[Stats, Memory]]:
    file = folder / "config.yaml"
    file.write_text(json.dumps({"tiers": {"l2": {"path": str(folder / "data")}}}))
    config = load_config(file, {}, {})
    memory, upstream = Memory(config), make_upstream(config)
    try:
        yield Stats(memory, Writer(config, upstream, Renditions(config, memory))), memory
    finally:
        await memory.close()
        await upstream.close()


def report(turn: int = 5, **changes: Any) -> TurnReport:
    made = TurnReport("gpt-secret", "tools", turn, budget_tokens=3000, used_tokens=1000, reachable_tokens=4000)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


async def test_rates_are_of_what_the_turns_reported(tmp_path: Path) -> None:
    async with stats_in(tmp_path) as (stats, _):
        faults = [FaultReport("msg_0001", 0, 70), FaultReport("msg_0002", 0, 50, refault=True),
                  FaultReport("msg_0003", 0, 0), FaultReport("msg_9999", 0, 0, "unknown page")]  # fmt: skip
        searches = [SearchReport("my secret", ["msg_0001"]), SearchReport("nothing", [])]
        stats.told(report(faults=faults, searches=searches, evicted_pages=["a", "b"], new_epoch=True,
                          prefetched_pages=["msg_0004", "msg_0005"], prefetched_used=1))
        stats.told(report(6, used_tokens=3000, reachable_tokens=4000, crowded=True))
        stats.told(report(7, channel="bypass"))
        found = stats.snapshot()
    assert (found["turns"], found["paged_turns"], found["epochs"]) == (3, 2, 1)
    assert found["crowded_epochs"] == 1
    told = found["user_experience"]
    assert (told["recalls"], told["recalls_succeeded"]) == (6, 4)
    assert told["recall_success_rate"] == pytest.approx(4 / 6)
    assert (told["faults"], told["refaults"]) == (2, 1), "a page that was there already costs nothing"
    assert told["thrash_index"] == 0.5 and told["evictions"] == 2 and told["turns"] == 2
    assert told["effective_context"] == 2.0
    assert (told["prefetched"], told["prefetch_hit_rate"]) == (2, 0.5)


async def test_stats_are_numbers_only(tmp_path: Path) -> None:
    async with stats_in(tmp_path) as (stats, _):
        for turn in range(200):
            searches = [SearchReport(f"secret {turn}", ["msg_0001"])]
            stats.told(report(turn, prefetched_pages=[f"msg_{turn:04d}"], searches=searches))
        text = json.dumps(stats.snapshot())
    assert "secret" not in text and "msg_" not in text and "gpt" not in text


async def test_what_is_in_ram_is_counted(tmp_path: Path) -> None:
    async with stats_in(tmp_path) as (stats, memory):
        memory.cache.put("record", b"x", "value", 12)
        memory.cache.get("record", b"x")
        found = stats.snapshot()
        tokens = memory.cache.tokens
    assert found["l1"] == {"values": 1, "tokens": tokens, "hits": 1, "misses": 0} and tokens > 0
    assert found["writer"] == {"written": 0, "failed": 0, "dropped": 0}
