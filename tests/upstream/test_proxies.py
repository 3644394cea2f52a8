"""Which proxy the environment names for a URL."""

from __future__ import annotations

import pytest

from proxy.upstream.proxies import Proxy, proxy_for

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
