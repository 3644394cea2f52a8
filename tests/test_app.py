"""The application: which path is whose, what is refused, its start and its end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.app import App, app_from_env, create_app
from proxy.config import EFFECTIVE_CONFIG_VARIABLE, Config, load_config
from proxy.errors import ConfigError
from proxy.upstream import CHAT_PATH, BytesReply, UpstreamBroken

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}


def config_in(path: Path) -> Config:
    flags = {
        "tiers.l2.path": str(path / "data"), "upstream.base_url": "http://127.0.0.1:9/v1",
        "tiers.l0.tokens": 8000,
    }  # fmt: skip
    return load_config(None, {}, flags)


class Upstream:
    """Says which door was used."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.started = False
        self.closed = False
        self.failure: Exception | None = None

    async def chat(
        self, body: bytes, headers: Any, query: bytes = b"", path: str = CHAT_PATH
    ) -> BytesReply:
        self.asked.append("chat" if path == CHAT_PATH else f"chat {path}")
        if self.failure:
            raise self.failure
        return BytesReply(200, [(b"content-type", b"application/json")], b'{"choices": []}')

    async def forward(self, method: str, path: str, query: bytes, headers: Any, body: Any) -> BytesReply:
        self.asked.append(f"{method} {path}?{query.decode()}")
        if self.failure:
            raise self.failure
        return BytesReply(200, [(b"x-from", b"upstream")], b"passed")

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def app_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[App, Upstream]]:
    upstream = Upstream()
    monkeypatch.setattr("proxy.app.make_upstream", lambda config: upstream)
    app = create_app(config_in(path))
    try:
        yield app, upstream
    finally:
        await app.memory.close()


async def call(
    app: App, method: str, path: str, content: bytes = b"", query: bytes = b""
) -> tuple[int, dict[str, str], bytes]:
    incoming = [{"type": "http.request", "body": content, "more_body": False}]
    status, headers, out = 0, dict[str, str](), b""

    async def receive() -> Any:
        import asyncio

        return incoming.pop(0) if incoming else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        nonlocal status, out
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update({k.decode(): v.decode() for k, v in message["headers"]})
        out += message.get("body", b"")

    length = [(b"content-length", str(len(content)).encode())] if content else []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": query, "root_path": "",
        "headers": length, "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }
    await app(scope, receive, send)
    return status, headers, out


async def test_each_path_goes_to_its_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, upstream):
        body = json.dumps(CHAT).encode()
        for path in (
            "/v1/chat/completions", "/chat/completions", "/v1/chat//completions/",
            "/openai/deployments/gpt-4o/chat/completions",
        ):
            assert (await call(app, "POST", path, body))[0] == 200
        azure = "chat /openai/deployments/gpt-4o/chat/completions"
        assert upstream.asked == ["chat", "chat", "chat", azure]
        upstream.asked.clear()
        for method, path in (
            ("GET", "/v1/models"), ("DELETE", "/v1/files/a%2Fb"), ("POST", "/v1/chat/completions/x"),
            ("GET", "/v1"), ("POST", "/v1/embeddings"), ("BREW", "/v1/coffee"), ("GET", "/"),
            ("HEAD", "/"), ("POST", "/tokenize"), ("GET", "/docs"), ("POST", "/v1x/chat"),
            ("GET", "/openapi.json"), ("GET", "/healthy"),
        ):
            status, headers, out = await call(app, method, path, query=b"a=1&b=%20")
            assert (status, headers["x-from"], out) == (200, "upstream", b"passed")
        assert upstream.asked == [
            "GET /models?a=1&b=%20", "DELETE /files/a%2Fb?a=1&b=%20",
            "POST /chat/completions/x?a=1&b=%20", "GET ?a=1&b=%20", "POST /embeddings?a=1&b=%20",
            "BREW /coffee?a=1&b=%20", "GET /?a=1&b=%20", "HEAD /?a=1&b=%20",
            "POST /tokenize?a=1&b=%20", "GET /docs?a=1&b=%20", "POST /v1x/chat?a=1&b=%20",
            "GET /openapi.json?a=1&b=%20", "GET /healthy?a=1&b=%20",
        ]


async def test_health_and_ready_do_not_ask_upstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, upstream):
        assert json.loads((await call(app, "GET", "/health"))[2]) == {"status": "ok"}
        assert json.loads((await call(app, "GET", "/ready"))[2]) == {"status": "ready"}
        (tmp_path / "data").rename(tmp_path / "gone")
        status, _, out = await call(app, "GET", "/ready")
        assert status == 503
        assert str(tmp_path / "data") in json.loads(out)["reason"]
        assert (await call(app, "GET", "/health"))[0] == 200
        assert upstream.asked == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/vm/nothing", 404, "unknown_url"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_what_nobody_serves_is_refused_in_openais_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int, code: str
) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, upstream):
        got, headers, out = await call(app, method, path)
        error = json.loads(out)["error"]
        assert (got, error["code"], error["type"]) == (status, code, "invalid_request_error")
        assert set(error) == {"message", "type", "param", "code"}
        assert path in error["message"]
        assert headers["content-type"] == "application/json"
        assert ("allow" in headers) == (status == 405)
        assert upstream.asked == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
async def test_a_failure_of_ours_is_a_500_without_its_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, upstream):
        upstream.failure = ZeroDivisionError("a secret detail")
        status, _, out = await call(app, "POST", path, json.dumps(CHAT).encode())
        assert status == 500
        assert json.loads(out)["error"]["code"] == "internal_error"
        assert b"secret" not in out
        assert "a secret detail" in caplog.text  # its place is the log


async def test_an_answer_that_breaks_off_breaks_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, upstream):
        upstream.failure = UpstreamBroken("cut")
        with pytest.raises(UpstreamBroken):
            await call(app, "GET", "/v1/models")


async def test_start_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with app_in(tmp_path, monkeypatch) as (app, upstream):
        incoming = ["lifespan.startup", "lifespan.shutdown"]
        sent: list[str] = []

        async def receive() -> Any:
            return {"type": incoming.pop(0)}

        async def send(message: Any) -> None:
            assert upstream.started, "what takes long is done before the first request"
            sent.append(message["type"])

        await app({"type": "lifespan"}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert upstream.closed
        status, _, _ = await call(app, "GET", "/ready")
        assert status == 503  # the store is closed


async def test_observers_are_told_of_answered_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.app.make_upstream", lambda config: Upstream())
    reports: list[Any] = []
    app = create_app(config_in(tmp_path), reports.append)
    await call(app, "POST", "/v1/chat/completions", json.dumps(CHAT).encode())
    await call(app, "POST", "/v1/chat/completions", b"{")
    await app.memory.close()
    assert [report.model for report in reports] == ["gpt-4o"]


async def test_a_worker_takes_its_parents_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.app.configure", lambda *_: None)  # the log is the test run's
    monkeypatch.setenv(EFFECTIVE_CONFIG_VARIABLE, config_in(tmp_path).model_dump_json())
    app = app_from_env()
    assert (tmp_path / "data").is_dir()
    await app.memory.close()
    monkeypatch.setenv(EFFECTIVE_CONFIG_VARIABLE, "{}x")
    with pytest.raises(ConfigError):
        app_from_env()
