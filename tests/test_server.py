"""The server's sockets over raw ones: what is refused, when, with which words; who is closed for whom."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.config import ServerConfig
from proxy.server import Door
from tests.e2e.processes import ServerProcess
from tests.test_process import ANSWER, CHAT, CHUNK, config, peer, rest, send, whole

TIMEOUT_S = 0.5  # of the server: a client that is refused for it has waited so long, and a sweep
BODIES = 300_000
BODY = json.dumps(CHAT).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def _upstream(connection: socket.socket, head: bytes) -> None:
    if b"/long" not in head:
        return whole(connection, ANSWER)
    connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
    piece = b"x" * 65_536
    try:
        for _ in range(1 << 14):
            connection.sendall(piece)
    except OSError:
        _left.set()
    return None


_left = threading.Event()  # the proxy has given its call of the long answer up


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    limits = {
        "head_limit_bytes": 8192, "receive_timeout_s": TIMEOUT_S, "send_timeout_s": 1.0, "connections": 60,
        "connections_per_address": 40, "bodies_limit_bytes": BODIES, "body_limit_bytes": BODIES,
    }  # fmt: skip
    with peer(_upstream) as port, ServerProcess(config(port, **limits)) as running:  # type: ignore[arg-type]
        yield running


def _open(server: ServerProcess, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(data)
    return connection


def _refusal(connection: socket.socket) -> tuple[int, str]:
    """Status and code of the answer that ends the connection."""
    head, body = rest(connection)
    assert b"connection: close" in head and b"application/json" in head
    return int(head.split(b" ")[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nbig: " + b"z" * 9000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nbig: " + b"z" * 3_000_000,  # and no end
        b"GET /health HTTP/1.1\r\n" + b"a: 1\r\n" * 300 + b"\r\n",  # 33 bytes each
        b"GET /" + b"z" * 9000 + b" HTTP/1.1\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n1;" + b"e" * 1_000_000,  # chunk extensions
        POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"t: 1\r\n" * 200_000,  # trailers
    ],
    ids=["header", "endless", "many", "path", "extensions", "trailers"],
)
def test_a_long_head_is_refused_with_431_though_its_client_goes_on_sending(server: ServerProcess, head: bytes) -> None:
    assert _refusal(_open(server, head)) == (431, "head_too_large")


def test_a_head_below_the_limit_passes_with_its_body_in_one_packet(server: ServerProcess) -> None:
    whole_body = json.dumps({**CHAT, "user": "u" * 20_000}).encode()
    head = POST + b"a: " + b"z" * 7000 + b"\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(whole_body)
    assert rest(_open(server, head + whole_body))[1] == ANSWER


@pytest.mark.parametrize("begun", [b"GET /hea", POST + b"content-length: 9\r\n\r\n{", POST + b"transfer-encoding: chunked\r\n\r\n"])
def test_an_unfinished_request_is_refused_with_408_in_time(server: ServerProcess, begun: bytes) -> None:
    began_s = time.monotonic()
    assert _refusal(_open(server, begun)) == (408, "request_timeout")
    assert time.monotonic() - began_s < TIMEOUT_S + 2


def test_a_body_that_drips_is_refused_and_a_passed_on_one_too(server: ServerProcess) -> None:
    for path in (b"/v1/chat/completions", b"/v1/files"):
        connection = _open(server, b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        connection.settimeout(0.05)
        said = b""
        for _ in range(60):
            connection.sendall(b"x")  # one byte each 50 ms
            try:
                said = connection.recv(100)
            except TimeoutError:
                continue
            break
        connection.close()
        assert said.startswith(b"HTTP/1.1 408 ")


def test_a_line_after_a_request_does_not_end_its_answer() -> None:
    """Some clients send one; and a next head that has begun waits for its turn."""

    def answer(connection: socket.socket, head: bytes) -> None:
        go.wait(10)
        whole(connection, ANSWER)

    go = threading.Event()
    with peer(answer) as port, ServerProcess(config(port, receive_timeout_s=0.2)) as slow:  # type: ignore[arg-type]
        connection = _open(slow, POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY + b"\r\nGET /hea")
        connection.settimeout(0.7)  # times of the server in which nothing may come
        with pytest.raises(TimeoutError):
            connection.recv(1)
        go.set()
        connection.settimeout(20)
        said = b""
        while more := connection.recv(65_536):
            said += more
        connection.close()
        assert said.startswith(b"HTTP/1.1 200 ") and ANSWER in said and b"HTTP/1.1 408 " in said


def test_what_is_no_http_is_refused_in_openais_shape(server: ServerProcess) -> None:
    assert _refusal(_open(server, b"\x16\x03\x01 hello\r\n\r\n")) == (400, "invalid_http")


def test_requests_piled_up_behind_an_answer_end_their_connection(server: ServerProcess) -> None:
    assert rest(_open(server, POST.replace(b"POST", b"GET") + b"\r\n" + HEALTH * 30))[0].count(b"200 ok") <= 1
    two = _open(server, HEALTH * 2 + HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert b"".join(rest(two)).count(b"200 OK") + 1 == 3  # `rest` lowers the first head


def test_bodies_that_stop_make_room_for_one_that_comes(server: ServerProcess) -> None:
    head = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n"
    stopped = [_open(server, head % 190_000 + b"x" * 140_000) for _ in range(2)]  # refused for others after 1 s, 408 at once
    body = json.dumps({**CHAT, "user": "u" * 150_000}).encode()
    assert rest(_open(server, head % len(body) + body))[1] == ANSWER
    assert {_refusal(c)[0] for c in stopped} <= {408, 503}


def test_a_client_that_does_not_read_loses_its_connection_and_upstreams_call_ends(server: ServerProcess) -> None:
    _left.clear()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(b"GET /v1/long HTTP/1.1\r\nhost: x\r\n\r\n")
        assert _left.wait(10)  # send_timeout_s


def test_the_longest_idle_connection_goes_for_a_new_one_and_none_that_is_served(server: ServerProcess) -> None:
    busy = _open(server, POST + b"content-length: %d\r\n\r\n" % len(BODY))
    idle = [_open(server) for _ in range(45)]
    busy.sendall(BODY)
    assert b" 200 " in busy.recv(65_536)
    busy.close()
    first, last = idle[0], idle[-1]
    last.sendall(HEALTH)
    assert b" 200 " in last.recv(65_536)
    first.settimeout(5)
    assert first.recv(1) == b""
    for connection in idle:
        connection.close()


def test_where_none_is_idle_a_connection_too_many_is_told_so(server: ServerProcess) -> None:
    busy = [_open(server, POST + b"content-length: 5000\r\n\r\n{") for _ in range(40)]
    assert _refusal(_open(server)) == (503, "too_many_connections")
    for connection in busy:
        connection.close()


def test_a_load_balancers_address_is_not_counted() -> None:
    door = Door(ServerConfig(trusted_proxies=("10.0.0.0/8", "::1")))
    assert door._is_proxy("10.2.3.4") and door._is_proxy("::1") and not door._is_proxy("11.0.0.1")


def test_readers_that_stop_cost_little(server: ServerProcess) -> None:
    """Some 30 stopped readers of an endless answer: buffers of a bounded size, and `/health` is quick."""

    def rss() -> int:
        return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    before, readers = rss(), []
    for _ in range(30):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(b"GET /v1/long HTTP/1.1\r\nhost: x\r\n\r\n")
        readers.append(reader)
    for reader in readers:
        assert reader.recv(16).startswith(b"HTTP/1.1 200")
    assert b" 200 " in _open(server, HEALTH).recv(100)
    assert (rss() - before) / len(readers) < 400_000
    for reader in readers:
        reader.close()


def test_a_whole_answer_comes_with_its_head(server: ServerProcess) -> None:
    """Both are one write: what is read first has them."""
    connection = _open(server, POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
    head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and json.loads(body)["choices"]


def test_a_stream_that_is_read_slowly_is_remembered(server: ServerProcess) -> None:
    """What the client has not read yet is not lost: its next turn finds the answer."""
    events = b"".join(CHUNK % (b"word " * 20, b"null") for _ in range(2000)) + CHUNK % (b"end", b'"stop"') + b"data: [DONE]\n\n"

    def answer(connection: socket.socket, head: bytes) -> None:
        whole(connection, events, b"text/event-stream")

    with peer(answer) as port, ServerProcess(config(port)) as slow:  # type: ignore[arg-type]
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", slow.port))
            body = json.dumps({**CHAT, "stream": True}).encode()
            reader.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            got = b""
            while more := reader.recv(4096):
                got += more
        assert b"[DONE]" in got
        stats = json.loads(rest(send(slow.port, "GET /vm/stats HTTP/1.1", headers="connection: close\r\n"))[1])
        assert stats["turns"] == 1
