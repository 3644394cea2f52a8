"""Browsers' requests: who reads our answers, who spends the operator's key, and who is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.app import create_app
from proxy.config import load_config
from proxy.upstream import BytesReply
from tests.test_app import CHAT, Upstream

BODY = json.dumps(CHAT).encode()
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-own"}


class Site:
    """The application behind a scripted upstream; `ask` is a request with these headers."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
        self.upstream = Upstream()
        monkeypatch.setattr("proxy.app.make_upstream", lambda config: self.upstream)
        given = {"tiers.l2.path": str(path / "data"), "tiers.l0.tokens": 8000, **flags}
        self.app = create_app(load_config(None, {}, given))

    async def ask(
        self, method: str = "POST", path: str = "/v1/chat/completions", body: bytes = BODY, **headers: str
    ) -> tuple[int, dict[str, str], list[str]]:
        """(status, headers, what upstream was asked)"""
        self.upstream.asked.clear()
        status, got = 0, dict[str, str]()

        async def receive() -> Any:
            import asyncio

            if body_left:
                return body_left.pop()
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                got.update({k.decode(): v.decode() for k, v in message["headers"]})

        body_left = [{"type": "http.request", "body": body, "more_body": False}]
        raw = [(b"content-length", str(len(body)).encode())]
        raw += [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": raw,
            "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }
        await self.app(scope, receive, send)
        return status, got, list(self.upstream.asked)


KEY = {"upstream.api_key": "sk-operator"}
HERE = "127.0.0.1:8080"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": HERE},
        {},
        {"host": "localhost:8080", "origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
        {"host": "llm-pager:8080"},
        {"host": "[::1]:8080"},
        {"host": "192.168.1.7:8080"},
        {"host": "host.docker.internal:8080"},
        {"host": HERE, "origin": "http://127.0.0.1:8080", "sec_fetch_site": "same-origin"},
        {"host": HERE, "origin": "chrome-extension://abcdef", "sec_fetch_site": "none"},
        {"host": HERE, "origin": "app://notes.md", "sec_fetch_site": "cross-site"},
        {"host": HERE, "sec_fetch_site": "none"},
    ],
)
async def test_programs_and_pages_of_this_machine_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    status, _, asked = await Site(tmp_path, monkeypatch, **KEY).ask(**headers)
    assert (status, asked) == (200, ["chat"])


FOREIGN = [
    {"host": "evil.example", "origin": "http://evil.example", "sec_fetch_site": "same-origin"},  # rebound
    {"host": "evil.example."},
    {"host": "127.0.0.1.evil.example:8080"},
    {"host": "localhost.evil.example"},
    {"host": HERE, "origin": "https://evil.example", "content_type": "text/plain"},
    {"host": HERE, "origin": "null"},
    {"host": HERE, "origin": "http://127.0.0.1.evil.example"},
    {"host": HERE, "origin": "http://localhost@evil.example"},
    {"host": HERE, "sec_fetch_site": "cross-site"},
    {"host": HERE, "origin": "http://["},
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/props", "/vm/stats"])
async def test_a_foreign_page_never_spends_the_operators_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    site = Site(tmp_path, monkeypatch, **KEY)
    for headers in FOREIGN:
        status, got, asked = await site.ask(path=path, **headers)
        assert (status, asked) == (403, []), headers
        assert "access-control-allow-origin" not in got


async def test_without_a_key_of_its_own_the_server_asks_nobody_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, monkeypatch)
    assert [headers for headers in FOREIGN if (await site.ask(**headers))[0] != 200] == []


async def test_behind_a_load_balancer_any_name_is_ours_unless_they_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anywhere = {**KEY, "server.host": "0.0.0.0"}
    site = Site(tmp_path, monkeypatch, **anywhere)
    assert (await site.ask(host="api.example.com"))[0] == 200
    assert (await site.ask(host="api.example.com", origin="https://api.example.com"))[0] == 200
    assert (await site.ask(host="inner", origin="https://chat.example.com", sec_fetch_site="same-origin"))[0] == 200
    assert (await site.ask(host="api.example.com", origin="https://evil.example"))[0] == 403
    assert (await site.ask(host="api.example.com", origin="http://localhost:3000"))[0] == 403
    listed = Site(tmp_path / "b", monkeypatch, **anywhere, **{"server.allowed_hosts": ["API.example.com"]})
    assert (await listed.ask(host="api.example.com:443"))[0] == 200
    assert (await listed.ask(host="10.0.0.1"))[0] == 200
    assert (await listed.ask(host="evil.example"))[0] == 403


async def test_keys_that_litellm_finds_in_the_environment_are_the_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, monkeypatch, **{"upstream.provider": "litellm"})
    assert (await site.ask(host=HERE, origin="https://evil.example"))[0] == 403
    status, got, _ = await site.ask(host=HERE, origin="https://app.example", authorization="Bearer mine")
    assert status == 200 and "access-control-allow-origin" not in got


# ---------------------------------------------------------------- CORS


async def test_listed_origins_read_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = "https://chat.example.com"
    site = Site(tmp_path, monkeypatch, **KEY, **{"server.cors_origins": [mine]})
    status, got, asked = await site.ask("OPTIONS", "/any/path", b"", host=HERE, origin=mine, **PREFLIGHT)
    assert (status, asked) == (204, [])
    assert got["access-control-allow-origin"] == mine
    assert got["access-control-allow-methods"] == "POST"
    assert got["access-control-allow-headers"] == "authorization, x-own"
    assert got["vary"] == "Origin"
    for method, path, body, expected in (
        ("POST", "/v1/chat/completions", BODY, 200), ("GET", "/v1/models", b"", 200),
        ("GET", "/v1/%2e%2e/x", b"", 400), ("GET", "/vm/nothing", b"", 404), ("GET", "/health", b"", 200),
    ):
        status, got, _ = await site.ask(method, path, body, host=HERE, origin=mine)
        assert (status, got["access-control-allow-origin"]) == (expected, mine), path
        assert "x-llm-pager-channel" in got["access-control-expose-headers"]
    status, got, asked = await site.ask("OPTIONS", "/v1/models", b"", host=HERE, origin="https://evil.example", **PREFLIGHT)
    assert (status, asked) == (403, []) and "access-control-allow-origin" not in got


async def test_a_star_is_everybody_and_replaces_upstreams_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, monkeypatch, **{"server.cors_origins": ["*"]})

    async def forward(*_: Any) -> BytesReply:
        return BytesReply(200, [(b"access-control-allow-origin", b"https://other.example")], b"")

    monkeypatch.setattr(site.upstream, "forward", forward)
    _, got, _ = await site.ask("GET", "/v1/models", b"", origin="https://any.example")
    assert got["access-control-allow-origin"] == "*"
    assert "vary" not in got


async def test_by_default_upstream_says_who_reads_and_our_errors_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, monkeypatch)

    async def forward(method: str, *_: Any) -> BytesReply:
        headers = [(b"access-control-allow-origin", b"*")] if method == "OPTIONS" else []
        return BytesReply(204, headers, b"")

    broken = {"method": "GET", "path": "/v1/%2e%2e/x", "body": b""}
    _, got, _ = await site.ask(**broken, origin="https://a.example")
    assert "access-control-allow-origin" not in got
    monkeypatch.setattr(site.upstream, "forward", forward)
    _, got, _ = await site.ask("OPTIONS", "/v1/x", b"", origin="https://a.example", **PREFLIGHT)
    assert got["access-control-allow-origin"] == "*"
    _, got, _ = await site.ask(**broken, origin="https://a.example")
    assert got["access-control-allow-origin"] == "*"
    _, got, _ = await site.ask(**broken, origin="https://b.example")
    assert "access-control-allow-origin" not in got
    _, got, _ = await site.ask("GET", "/v1/x", b"", origin="https://a.example")
    assert "access-control-allow-origin" not in got  # upstream's answer has none


@pytest.mark.parametrize("provider", ["litellm", "demo"])
async def test_a_provider_without_a_face_lets_pages_of_this_machine_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    site = Site(tmp_path, monkeypatch, **{"upstream.provider": provider})
    local = "http://localhost:5173"
    status, got, asked = await site.ask("OPTIONS", body=b"", host=HERE, origin=local, **PREFLIGHT)
    assert (status, asked, got["access-control-allow-origin"]) == (204, [], local)
    status, got, _ = await site.ask(host=HERE, origin=local)
    assert (status, got["access-control-allow-origin"]) == (200, local)
    _, got, _ = await site.ask("OPTIONS", body=b"", host=HERE, origin="https://evil.example", **PREFLIGHT)
    assert "access-control-allow-origin" not in got
