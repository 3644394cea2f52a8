"""Where a path is upstream for the base URLs that people have, and which proxy the environment names."""

from __future__ import annotations

import pytest

from proxy.upstream import CHAT_PATH, RootPath
from proxy.upstream.routing import (
    Proxy,
    chat_url,
    end_to_end,
    forward_url,
    proxy_for,
    server_root,
)

AZURE = "https://res.openai.azure.com"
DEPLOYED = RootPath("/openai/deployments/x/chat/completions")


@pytest.mark.parametrize(
    ("base", "root"),
    [
        ("http://h:8080/v1", "http://h:8080"),
        ("http://h:8080", "http://h:8080"),
        ("https://h/tenant-a/v1", "https://h/tenant-a"),
        ("https://h/api/paas/v4", "https://h/api/paas"),
        ("https://g/v1beta/openai", "https://g/v1beta/openai"),
        ("https://g/v1beta", "https://g"),
        (f"{AZURE}/openai/deployments/x", AZURE),
    ],
)
def test_the_root_is_base_url_without_what_makes_it_the_apis(base: str, root: str) -> None:
    assert server_root(base) == root


@pytest.mark.parametrize("base", [AZURE, f"{AZURE}/openai", f"{AZURE}/openai/v1", f"{AZURE}/openai/deployments/x"])
def test_an_azure_client_reaches_its_deployment_whatever_base_url_names(base: str) -> None:
    assert chat_url(base, DEPLOYED) == AZURE + DEPLOYED


def test_a_plain_client_of_a_deployment() -> None:
    assert chat_url(f"{AZURE}/openai/deployments/x", CHAT_PATH) == AZURE + DEPLOYED


@pytest.mark.parametrize(
    ("base", "path", "url"),
    [
        ("http://h/v1", "/models", "http://h/v1/models"),
        ("http://h/v1", "", "http://h/v1"),
        ("http://h/v1", "@evil/x", "http://h/v1/@evil/x"),
        ("http://h/v1", RootPath("/props"), "http://h/props"),
        ("http://h/v1", RootPath("/"), "http://h/"),
        ("http://h", RootPath("/v1@evil"), "http://h/v1@evil"),
        ("http://h/t/v1", RootPath("/slots"), "http://h/t/slots"),
        ("https://openrouter.ai/api/v1", RootPath("/api/v1/models"), "https://openrouter.ai/api/v1/models"),
    ],
)
def test_other_paths(base: str, path: str, url: str) -> None:
    assert forward_url(base, path) == url


def test_hops_end_here_with_the_headers_that_they_name() -> None:
    sent = [(b"connection", b"close, X-Per-Hop"), (b"x-per-hop", b"1"), (b"te", b"trailers"), (b"x-a", b"1")]
    assert end_to_end(sent) == [(b"x-a", b"1")]


# ---------------------------------------------------------------- forward proxies

UP = "https://api.corp.example/v1"
VIA = Proxy("http://proxy:3128", None)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, VIA),
        ({"https_proxy": "proxy:3128"}, VIA),
        ({"ALL_PROXY": "http://proxy:3128"}, VIA),
        ({"HTTP_PROXY": "http://proxy:3128"}, None),  # of another scheme
        ({"https_proxy": "", "HTTPS_PROXY": "http://proxy:3128"}, None),  # lower case wins, empty is none
        ({"HTTPS_PROXY": "http://proxy:3128", "ALL_PROXY": "http://other:1"}, VIA),
        ({"HTTPS_PROXY": "http://proxy"}, Proxy("http://proxy:80", None)),
        ({"HTTPS_PROXY": "http://[::1]:3128/"}, Proxy("http://[::1]:3128", None)),
        ({"HTTPS_PROXY": "http://us%40er:p%3Aw@proxy:3128"}, Proxy("http://proxy:3128", "Basic dXNAZXI6cDp3")),
    ],
)
def test_the_variables_of_the_urls_scheme(environ: dict[str, str], expected: Proxy | None) -> None:
    assert proxy_for(UP, environ) == expected


@pytest.mark.parametrize(
    ("url", "no_proxy", "direct"),
    [
        (UP, "*", True),
        (UP, "api.corp.example", True),
        (UP, "corp.example", True),
        (UP, ".corp.example", True),
        (UP, "*.corp.example", True),
        (UP, "localhost, .CORP.example ,x", True),
        (UP, "localhost corp.example", True),
        (UP, "orp.example", False),
        (UP, "api.corp", False),
        (UP, "", False),
        (UP, "api.corp.example:443", True),
        (UP, "api.corp.example:8443", False),
        (UP, "https://api.corp.example/", True),
        ("https://127.0.0.1:8000/v1", "", False),
        ("https://127.0.0.1:8000/v1", "localhost", False),
        ("https://127.0.0.1:8000/v1", "127.0.0.1", True),
        ("https://127.0.0.1:8000/v1", "127.0.0.1:8000", True),
        ("https://127.0.0.1:8000/v1", "127.0.0.1:80", False),
        ("https://10.1.2.3/v1", "10.0.0.0/8", True),
        ("https://10.1.2.3/v1", "192.168.0.0/16,172.16.0.0/12", False),
        ("https://10.1.2.3/v1", "2.3", False),
        ("https://[fd00::1]/v1", "fd00::/8", True),
        ("https://[::1]:8000/v1", "[::1]", True),
        ("https://localhost:8000/v1", "localhost", True),
    ],
)
def test_exceptions_as_people_write_them(url: str, no_proxy: str, direct: bool) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        found = proxy_for(url, {"ALL_PROXY": "http://proxy:3128", name: no_proxy})
        assert found == (None if direct else VIA)


def test_a_proxy_that_cannot_be_used_is_said_without_its_password() -> None:
    with pytest.raises(ValueError, match="ALL_PROXY") as refused:
        proxy_for(UP, {"ALL_PROXY": "socks5://user:secret@proxy:1080"})
    assert "secret" not in str(refused.value)
