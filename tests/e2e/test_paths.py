"""Chat requests as gateways and SDKs send them: on other paths, compressed, without a model's name."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import brotli
import pytest
import zstandard

from tests.e2e.processes import ServerProcess

Request = tuple[str, dict[str, str], bytes]


def history(turns: int = 20) -> list[dict[str, str]]:
    out: list[dict[str, str]] = []
    for turn in range(turns):
        words = " ".join(f"rope{turn}x{i}" for i in range(150))
        out += [{"role": "user", "content": f"Task {turn}: {words}"},
                {"role": "assistant", "content": f"Done {turn}: {words}"}]  # fmt: skip
    return [*out, {"role": "user", "content": "And now?"}]


class Upstream(ThreadingHTTPServer):
    """Answers any chat request, keeps all."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                message = {"role": "assistant", "content": "ok"}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                said = json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_POST = do_GET = answer

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[ServerProcess, Upstream]]:
    upstream = Upstream()
    Thread(target=upstream.serve_forever, daemon=True).start()
    config = {
        "server": {"body_limit_bytes": 1 << 20, "body_ratio": 10},
        "upstream": {"base_url": f"http://127.0.0.1:{upstream.server_port}/base/v1"},
        "tiers": {"l0": {"tokens": 4000}},
    }
    try:
        with ServerProcess(config) as server:
            yield server, upstream
    finally:
        upstream.shutdown()
        upstream.server_close()


@contextmanager
def asking(
    site: tuple[ServerProcess, Upstream], path: str, body: bytes, method: str = "POST", **headers: str
) -> Iterator[tuple[http.client.HTTPResponse, Request | None]]:
    server, upstream = site
    upstream.asked.clear()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"content-type": "application/json", **named})
    try:
        response = connection.getresponse()
        response.read()
        yield response, upstream.asked[-1] if upstream.asked else None
    finally:
        connection.close()


AZURE = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"


@pytest.mark.parametrize(
    ("path", "above"),
    [
        ("/v1/chat/completions/", "/base/v1/chat/completions"),
        ("//chat//completions", "/base/v1/chat/completions"),
        ("/proxy/v1/chat/completions?a=b", "/base/v1/chat/completions?a=b"),
        (AZURE, "/base" + AZURE),
        ("/v1" + AZURE, "/base" + AZURE),
        ("/api/chat/completions", "/base/api/chat/completions"),
    ],
)
def test_a_long_chat_is_paged_on_any_path(
    site: tuple[ServerProcess, Upstream], path: str, above: str
) -> None:
    body = json.dumps({"model": "gpt-4o", "messages": history()}).encode()
    with asking(site, path, body) as (response, asked):
        assert response.getheader("x-llm-pager-channel") == "tools"
        assert asked is not None and asked[0] == above and len(asked[2]) < len(body) / 2


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}])
def test_a_deployment_stands_for_the_model_that_the_body_lacks(
    site: tuple[ServerProcess, Upstream], model: dict[str, Any]
) -> None:
    with asking(site, AZURE, json.dumps({**model, "messages": history()}).encode()) as (response, asked):
        assert response.getheader("x-llm-pager-channel") == "tools"
        assert asked is not None and json.loads(asked[2]).get("model") == model.get("model")
    with asking(site, "/v1/chat/completions", json.dumps({"messages": history()}).encode()) as (response, _):
        assert response.getheader("x-llm-pager-channel") == "unpaged"


ENCODERS: dict[str, Any] = {
    "gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress, "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_a_compressed_chat_is_paged_and_sent_plain(site: tuple[ServerProcess, Upstream], name: str) -> None:
    for turns, channel in ((20, "tools"), (1, "bypass")):
        body = json.dumps({"model": "gpt-4o", "messages": history(turns)}).encode()
        with asking(site, "/v1/chat/completions", ENCODERS[name](body), content_encoding=name) as (response, asked):
            assert response.getheader("x-llm-pager-channel") == channel
            assert asked is not None and "content-encoding" not in asked[1]
            assert (asked[2] == body) == (channel == "bypass")


@pytest.mark.parametrize(("name", "body"), [("snappy", b"\x01\x02"), ("gzip", gzip.compress(b"x" * 99, mtime=0)[:-9])])
def test_a_body_that_nobody_can_read_goes_up_as_it_came(
    site: tuple[ServerProcess, Upstream], name: str, body: bytes
) -> None:
    with asking(site, "/v1/chat/completions", body, content_encoding=name) as (response, asked):
        assert response.status == 200 and response.getheader("x-llm-pager-channel") == "unpaged"
        assert asked is not None and asked[1]["content-encoding"] == name and asked[2] == body


def test_a_bomb_is_refused(site: tuple[ServerProcess, Upstream]) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    with asking(site, "/v1/chat/completions", bomb, content_encoding="gzip") as (response, asked):
        assert response.status == 413 and asked is None
        assert response.getheader("x-llm-pager-channel") == "unpaged"


@pytest.mark.parametrize(
    ("path", "above"),
    [("/", "/base/"), ("/props", "/base/props"), ("/v1/models", "/base/v1/models"), ("/models?x=1", "/base/v1/models?x=1"),
     ("/api/tags", "/base/api/tags")],
)  # fmt: skip
def test_everything_else_is_upstreams(site: tuple[ServerProcess, Upstream], path: str, above: str) -> None:
    with asking(site, path, b"", "GET") as (response, asked):
        assert response.status == 200 and response.getheader("x-llm-pager-channel") == "unpaged"
        assert asked is not None and asked[0] == above
