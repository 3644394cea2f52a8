"""Paths: which are chat requests, where each goes, and which spellings leave the place they name."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.api.http import (
    chat_target,
    deployment,
    forward_target,
    is_chat,
    is_ours,
    refuse_dot_segments,
)
from proxy.errors import ApiError
from proxy.upstream import CHAT_PATH, RootPath

PREFIXES = ["", "/v1", "/v1/v1", "/api/v1", "/openai/v1", "/engines/llama.cpp/v1"]


@pytest.mark.parametrize("prefix", PREFIXES)
@given(slashes=st.lists(st.integers(1, 3), min_size=8, max_size=8), tail=st.integers(0, 2))
def test_a_chat_path_is_one_whatever_its_slashes(prefix: str, slashes: list[int], tail: int) -> None:
    parts = [part for part in (prefix + "/chat/completions").split("/") if part]
    raw = "".join("/" * n + part for n, part in zip(slashes, parts, strict=False)) + "/" * tail
    assert is_chat(raw)
    assert chat_target(raw) == CHAT_PATH
    assert not isinstance(chat_target(raw), RootPath)
    assert deployment(raw) is None


@pytest.mark.parametrize(
    "raw",
    ["/v1/chat", "/v1/completions", "/chat/completions/chatcmpl-1", "/v1/xchat/completions", "/", ""],
)
def test_other_paths_are_no_chat(raw: str) -> None:
    assert not is_chat(raw)


@pytest.mark.parametrize("prefix", ["", "/v1", "/"])
def test_azures_deployment_keeps_its_path_and_names_the_model(prefix: str) -> None:
    raw = prefix + "/openai/deployments/my%20gpt/chat/completions"
    assert is_chat(raw)
    target = chat_target(raw)
    assert target == "/openai/deployments/my%20gpt/chat/completions"
    assert isinstance(target, RootPath)
    assert deployment(raw) == "my gpt"


def test_another_prefix_stays_with_the_request() -> None:
    assert chat_target("/api/chat/completions") == "/api/chat/completions"
    assert isinstance(chat_target("/api/chat/completions"), RootPath)
    below = chat_target("/v1/account/gateway/compat/chat/completions")
    assert below == "/account/gateway/compat/chat/completions" and not isinstance(below, RootPath)


@pytest.mark.parametrize("raw", ["/v1/props", "/v1", "/v1/", "/models", "/embeddings", "/responses/r1"])
def test_the_apis_paths_stand_below_base_url(raw: str) -> None:
    assert not isinstance(forward_target(raw), RootPath)


@pytest.mark.parametrize("raw", ["/", "/props", "/slots", "/api/tags", "/v1x/models", "/modelsx", "/V1/a"])
def test_other_paths_stand_below_the_servers_root(raw: str) -> None:
    assert isinstance(forward_target(raw), RootPath)
    assert forward_target(raw) == raw


def test_our_own_paths() -> None:
    assert all(map(is_ours, ("/health", "/ready", "/metrics", "/vm/stats", "/vm/context")))
    assert not any(map(is_ours, ("/healthz", "/v1/health", "/vmx", "/metrics/x", "/")))


DOTS = [
    "..", "%2e%2e", "%2E.", ".%2e", "%252e%252e", "%25252e.", "..;x=1", "%2e%2e%3bx", "..%00", "%c0%ae%c0%ae",
    "%ef%bc%8e%ef%bc%8e", "%u002e%u002e", "..%20",
]  # fmt: skip
SLASHES = ["/", "\\", "%2f", "%2F", "%5c", "%252f", "%c0%af"]


@pytest.mark.parametrize("dots", DOTS)
def test_a_dot_segment_is_refused_however_it_is_spelled(dots: str) -> None:
    for slash in SLASHES:
        for raw in (f"/v1/{dots}{slash}{dots}{slash}admin", f"/v1{slash}{dots}", f"/v1/x{slash}{dots}/y"):
            with pytest.raises(ApiError) as refused:
                forward_target(raw)
            assert (refused.value.status, refused.value.code) == (400, "invalid_path"), raw


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_name_that_is_no_dot_segment_passes_as_it_came(name: str) -> None:
    raw = "/v1/files/x" + quote(name, safe="") + "x"
    inner = quote(name, safe="")
    try:
        refuse_dot_segments(raw)
    except ApiError:
        assert ".." in name or "%" in name or "．" in name or "‥" in name or "…" in name
    else:
        assert forward_target(raw) == "/files/x" + inner + "x"


@pytest.mark.parametrize("raw", ["/v1/files/a..b", "/v1/files/...", "/v1/models/a%2Fb", "/v1/x%20y", "/v1/100%25"])
def test_ordinary_names_with_dots_and_percents_pass(raw: str) -> None:
    assert forward_target(raw) == raw.removeprefix("/v1")
