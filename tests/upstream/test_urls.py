"""Where a path is upstream, for the base URLs that people have."""

from __future__ import annotations

import pytest

from proxy.upstream import CHAT_PATH, RootPath
from proxy.upstream.urls import chat_url, forward_url, server_root

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
