"""Headers between a client and a provider behind litellm."""

from __future__ import annotations

from types import SimpleNamespace

from proxy.upstream.litellm_headers import relayed, reply_headers, request_headers


def test_tracing_betas_and_custom_headers_go_up_and_credentials_never() -> None:
    sent = [
        (b"authorization", b"Bearer sk"), (b"x-api-key", b"sk"), (b"x-goog-api-key", b"sk"),
        (b"x-amz-security-token", b"s"), (b"x-forwarded-for", b"10.0.0.1"), (b"cookie", b"a=b"),
        (b"x-llm-pager-session", b"s"), (b"traceparent", b"00-1"), (b"idempotency-key", b"k"),
        (b"anthropic-beta", b"b"), (b"x-my-own", b"caf\xe9"), (b"content-length", b"3"),
        (b"host", b"h"), (b"openai-organization", b"org"),
    ]  # fmt: skip
    assert request_headers(sent) == {
        "traceparent": "00-1", "idempotency-key": "k", "anthropic-beta": "b", "x-my-own": "café",
    }  # fmt: skip


def test_hops_end_here_with_the_headers_that_they_name() -> None:
    sent = [(b"connection", b"close, X-Per-Hop"), (b"x-per-hop", b"1"), (b"te", b"trailers"), (b"x-a", b"1")]
    assert request_headers(sent) == {"x-a": "1"}


def test_the_providers_headers_come_back_also_under_openais_names() -> None:
    said = {
        "Request-Id": "req_1", "anthropic-ratelimit-tokens-remaining": 12, "content-type": "text/html",
        "transfer-encoding": "chunked", "Connection": "x-hop", "x-hop": "1", "x-litellm-cost": "0",
        "retry-after": "7", "odd": None,
    }  # fmt: skip
    assert dict(relayed(said)) == {
        b"request-id": b"req_1", b"x-request-id": b"req_1", b"retry-after": b"7",
        b"anthropic-ratelimit-tokens-remaining": b"12", b"x-ratelimit-remaining-tokens": b"12",
    }  # fmt: skip


def test_no_credential_ever_comes_back() -> None:
    """Were the headers of an exception those of the request."""
    ours = {"Authorization": "Bearer sk", "x-api-key": "sk", "x-goog-api-key": "sk", "api-key": "sk",
            "x-amz-security-token": "s", "cookie": "a=b", "retry-after": "7"}  # fmt: skip
    assert dict(relayed(ours)) == {b"retry-after": b"7"}


def test_litellms_prefix_is_taken_off_and_no_headers_are_none() -> None:
    result = SimpleNamespace(_hidden_params={"additional_headers": {"llm_provider-x-request-id": "r"}})
    assert reply_headers(result) == [(b"x-request-id", b"r")]
    assert reply_headers(SimpleNamespace()) == []
    assert reply_headers(SimpleNamespace(_hidden_params={"additional_headers": None})) == []
