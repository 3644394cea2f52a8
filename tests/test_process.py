"""The process: its log, HTTP/1.0 clients, the environment's forward proxy, and how it drains."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy import process
from tests.e2e.processes import ServerProcess
from tests.test_cli import ROOT

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}\n\n'
ANSWER = json.dumps({
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
}).encode()  # fmt: skip


@contextmanager
def peer(answer: Callable[[socket.socket, bytes], None]) -> Iterator[int]:
    """A server that hands each connection and its request's head to `answer`; yields the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65_536)):
                    return
                data += more
            head, _, body = data.partition(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                           if line.startswith(b"content-length:")), 0)  # fmt: skip
            while len(body) < length and (more := connection.recv(65_536)):
                body += more
            answer(connection, head)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def whole(connection: socket.socket, body: bytes, kind: bytes = b"application/json") -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                       % (kind, len(body), body))  # fmt: skip


def config(port: int, **server: object) -> dict[str, object]:
    upstream = {"base_url": f"http://127.0.0.1:{port}/v1"}
    return {"server": server, "upstream": upstream, "tiers": {"l0": {"tokens": 4000}}}


def send(port: int, line: str, body: bytes = b"", headers: str = "") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"{line}\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def rest(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while more := connection.recv(65_536):
        data += more
    connection.close()
    head, _, body = data.partition(b"\r\n\r\n")
    return head.lower(), body


def test_an_http_1_0_client_reads_to_the_end_of_the_connection_and_meanwhile() -> None:
    go = threading.Event()

    def answer(connection: socket.socket, head: bytes) -> None:
        if head.startswith(b"HEAD "):
            return connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\n")
        if b"/whole" in head:
            return whole(connection, ANSWER)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        connection.sendall(CHUNK % (b"first", b"null"))
        go.wait(10)
        connection.sendall(CHUNK % (b" last", b'"stop"') + b"data: [DONE]\n\n")
        return None

    with peer(answer) as port, ServerProcess(config(port)) as server:  # type: ignore[arg-type]
        for path in ("/v1/chat/completions", "/v1/other"):
            go.clear()
            connection = send(server.port, f"POST {path} HTTP/1.0", json.dumps({**CHAT, "stream": True}).encode())
            begun = b""
            while b"first" not in begun:
                begun += connection.recv(65_536)
            go.set()
            _, _, body = begun.partition(b"\r\n\r\n")
            data = b""
            while more := connection.recv(65_536):
                data += more
            assert b"transfer-encoding" not in begun.lower() and b"connection: close" in begun.lower()
            assert body + data == CHUNK % (b"first", b"null") + CHUNK % (b" last", b'"stop"') + b"data: [DONE]\n\n"
        head, body = rest(send(server.port, "GET /v1/whole HTTP/1.0"))
        assert b"content-length: %d" % len(ANSWER) in head and body == ANSWER
        head, body = rest(send(server.port, "HEAD /v1/whole HTTP/1.0"))
        assert body == b"" and b"200" in head


@pytest.mark.parametrize("secret", ["", "user:p%40ss@"])
def test_the_environments_proxy_is_asked_with_its_credentials(secret: str) -> None:
    heads: list[bytes] = []

    def answer(connection: socket.socket, head: bytes) -> None:
        heads.append(head)
        whole(connection, ANSWER)

    with peer(answer) as port:
        env = {"HTTP_PROXY": f"http://{secret}127.0.0.1:{port}", "http_proxy": f"http://{secret}127.0.0.1:{port}", "NO_PROXY": "", "no_proxy": ""}
        inner = {**config(1), "upstream": {"base_url": "http://llm.corp.invalid/v1"}}
        with ServerProcess(inner, env=env) as server:  # type: ignore[arg-type]
            close = "connection: close\r\n"
            assert rest(send(server.port, "POST /v1/chat/completions HTTP/1.1", json.dumps(CHAT).encode(), close))[1] == ANSWER
            assert rest(send(server.port, "GET /v1/models HTTP/1.1", b"", close))[1] == ANSWER
            assert "p@ss" not in server.log and "p%40ss" not in server.log
    assert heads[0].startswith(b"POST http://llm.corp.invalid/v1/chat/completions ")
    assert heads[1].startswith(b"GET http://llm.corp.invalid/v1/models ")
    expected = b"basic " + base64.b64encode(b"user:p@ss").lower()
    assert all((b"proxy-authorization: " + expected in head.lower()) == bool(secret) for head in heads)


def test_a_tunnel_to_an_https_upstream_is_asked_for_with_the_credentials() -> None:
    heads: list[bytes] = []

    def answer(connection: socket.socket, head: bytes) -> None:
        heads.append(head)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    with peer(answer) as port:
        env = {"https_proxy": f"http://user:p%40ss@127.0.0.1:{port}", "NO_PROXY": "", "no_proxy": ""}
        inner = {**config(1), "upstream": {"base_url": "https://llm.corp.invalid/v1"}}
        with ServerProcess(inner, env=env) as server:  # type: ignore[arg-type]
            close = "connection: close\r\n"
            head, body = rest(send(server.port, "GET /v1/models HTTP/1.1", b"", close + "authorization: Bearer k\r\n"))
    assert b" 502 " in head and b"p@ss" not in body
    assert heads[0].startswith(b"CONNECT llm.corp.invalid:443 ")
    assert b"basic " + base64.b64encode(b"user:p@ss").lower() in heads[0].lower()
    assert b"bearer" not in heads[0].lower()


def test_first_request_loads_nothing() -> None:
    """What takes time to read was read before the server answers: a first request costs as the second does."""

    def cpu_s() -> float:
        fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask() -> None:
        body = json.dumps({**CHAT, "model": "a-model-of-nobody"}).encode()
        assert rest(send(server.port, "POST /v1/chat/completions HTTP/1.1", body, "connection: close\r\n"))[1] == ANSWER

    with peer(lambda connection, head: whole(connection, ANSWER)) as port:
        with ServerProcess(config(port), env={"LC_ALL": "C"}, forked=False) as server:  # type: ignore[arg-type]
            before = cpu_s()
            ask()
            assert cpu_s() - before <= 0.1  # the tokenizer alone takes 0.3 s


def test_ready_is_false_before_the_server_stops_and_streams_end() -> None:
    go = threading.Event()

    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        connection.sendall(CHUNK % (b"first", b"null"))
        go.wait(10)
        connection.sendall(CHUNK % (b" last", b'"stop"') + b"data: [DONE]\n\n")

    with peer(answer) as port, ServerProcess(config(port, drain_s=2.0)) as server:  # type: ignore[arg-type]
        stream = send(server.port, "POST /v1/chat/completions HTTP/1.1", json.dumps({**CHAT, "stream": True}).encode())
        while b"first" not in stream.recv(65_536):
            pass
        pid = server.pid
        os.kill(pid, signal.SIGTERM)
        deadline, status = time.monotonic() + 1.5, b"200"
        while status == b"200" and time.monotonic() < deadline:
            status = rest(send(server.port, "GET /ready HTTP/1.0"))[0].split(b" ")[1]
        assert status == b"503"
        assert rest(send(server.port, "GET /health HTTP/1.0"))[0].split(b" ")[1] == b"200"
        go.set()
        ended = b""
        while b"[DONE]" not in ended and (more := stream.recv(65_536)):
            ended += more
        stream.close()
        assert b"[DONE]" in ended
        server.stop()
        with pytest.raises(OSError):
            send(server.port, "GET /health HTTP/1.0")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_that_runs_at_sigterm_ends_whole_and_is_remembered(workers: int) -> None:
    """As Kubernetes stops a pod: one signal, to the first process, and then patience. The port is closed before the
    stream has its second chunk."""
    closed = threading.Event()

    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        connection.sendall(CHUNK % (b"first", b"null"))
        assert closed.wait(20)
        connection.sendall(CHUNK % (b" last", b'"stop"') + b"data: [DONE]\n\n")

    body = json.dumps({**CHAT, "stream": True}).encode()
    session = "x-session-id: s\r\nauthorization: Bearer k\r\n"
    with peer(answer) as port, ServerProcess(config(port, drain_s=0.1), workers=workers, forked=workers == 1) as server:  # type: ignore[arg-type]
        stream = send(server.port, "POST /v1/chat/completions HTTP/1.1", body, session)
        got = b""
        while b"first" not in got:
            got += stream.recv(65_536)
        os.kill(server.pid, signal.SIGTERM)
        with pytest.raises(ConnectionError):  # what comes too late is refused, and does not wait
            while True:
                rest(send(server.port, "GET /health HTTP/1.0"))
        closed.set()
        while more := stream.recv(65_536):  # then the connection ends, too
            got += more
        stream.close()
        assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b" last" in got
        server.stop()
        if workers == 1:
            server.restart()
            context = rest(send(server.port, "GET /vm/context HTTP/1.0", b"", session))[1]
            assert json.loads(context)["last_turn"] == 1


def test_what_does_not_end_in_time_is_cut() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        connection.sendall(CHUNK % (b"first", b"null"))
        connection.recv(1)  # until the proxy gives it up

    with peer(answer) as port, ServerProcess(config(port, drain_answers_s=1)) as server:  # type: ignore[arg-type]
        body = json.dumps({**CHAT, "stream": True}).encode()
        stream = send(server.port, "POST /v1/chat/completions HTTP/1.1", body)
        while b"first" not in stream.recv(65_536):
            pass
        os.kill(server.pid, signal.SIGTERM)
        began_s = time.monotonic()
        assert b"[DONE]" not in rest(stream)[1]
        assert 0.9 < time.monotonic() - began_s < 5


# -- the log

CODE = """
import logging, sys
from proxy.process import configure
configure(sys.argv[1], sys.argv[2])
ours, theirs = logging.getLogger("proxy.api.chat"), logging.getLogger("somebody")
ours.info("a %s", "word", extra={"fields": {"status": 200, "name": "\\u00e9\\nx"}})
fields = {"channel": "tools", "ms": 1.5}
logging.getLogger("proxy.request").info("%s", fields, extra={"fields": fields})
theirs.info("chatter")
theirs.warning("trouble")
logging.getLogger("uvicorn.error").warning("of the server")
try:
    1 / 0
except ZeroDivisionError:
    ours.exception("it failed")
"""


def logged(form: str, level: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, form, level], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_one_object_a_line_with_the_entries_fields() -> None:
    entries = [json.loads(line) for line in logged("json", "info")]
    assert [entry["logger"] for entry in entries] == [
        "proxy.api.chat", "proxy.request", "somebody", "uvicorn.error", "proxy.api.chat",
    ]  # fmt: skip
    assert entries[0]["message"] == "a word" and entries[0]["status"] == 200
    assert (entries[1]["channel"], entries[1]["ms"], "message" in entries[1]) == ("tools", 1.5, False)
    assert "ZeroDivisionError" in entries[-1]["exception"]
    assert all(entry["time"].endswith("Z") and entry["level"] for entry in entries)


def test_text_is_time_level_place_and_message() -> None:
    lines = logged("text", "info")
    assert lines[0].endswith(" INFO proxy.api.chat: a word")
    assert "trouble" in lines[2] and "chatter" not in "\n".join(lines)
    assert lines[-1].startswith("ZeroDivisionError")


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_higher_level_leaves_the_requests_out(level: str) -> None:
    text = "\n".join(logged("text", level))
    assert "a word" not in text and "it failed" in text
    assert ("trouble" in text) == (level == "warning")


def test_entries_of_one_round_are_one_write_and_what_is_worse_waits_for_nothing() -> None:
    written: list[str] = []
    stream = io.StringIO()
    stream.write = written.append  # type: ignore[method-assign, assignment]
    handler = process._Handler(stream)

    def enter(level: int, text: str) -> None:
        handler.handle(logging.LogRecord("proxy.request", level, "", 0, text, None, None))

    async def round_of_the_loop() -> None:
        enter(logging.INFO, "one")
        enter(logging.INFO, "two")
        assert not written
        await asyncio.sleep(0)
        assert written == ["one\ntwo\n"]
        enter(logging.INFO, "three")
        enter(logging.WARNING, "four")
        assert written[1:] == ["three\nfour\n"]

    asyncio.run(round_of_the_loop())
    enter(logging.INFO, "five")
    assert written[2:] == ["five\n"]


async def test_old_objects_are_collected_in_a_moment_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    busy = iter([False, False, True])  # is_idle, each time that it is asked

    async def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 4:
            raise asyncio.CancelledError

    found: list[int] = []
    monkeypatch.setattr(process.asyncio, "sleep", sleep)
    monkeypatch.setattr(process.gc, "collect", lambda: found.append(len(naps)))
    with pytest.raises(asyncio.CancelledError):
        await process.collect_now_and_then(lambda: next(busy))
    assert naps[:3] == [600, 1, 1] and found == [3]
