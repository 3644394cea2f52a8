"""Who asks: whatever may tell callers apart does, and what changes with every request does not."""

from __future__ import annotations

import itertools
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.api.caller import Caller, caller, parameters, with_body
from proxy.upstream import Header
from tests.cpu import cpu_within
from tests.examples import examples

# Of the gateways and front ends that people put before an API. The rule has no such list.
CREDENTIALS = """
authorization api-key x-api-key apikey x-goog-api-key ocp-apim-subscription-key x-functions-key
x-litellm-api-key x-litellm-key x-portkey-api-key x-portkey-virtual-key helicone-auth
cf-aig-authorization cf-access-client-secret cf-access-jwt-assertion x-forwarded-authorization
x-forwarded-access-token x-amz-security-token x-ms-token-aad-id-token x-rapidapi-key
x-vercel-oidc-token x-jwt-assertion proxy-authorization x-shared-secret x-auth-request-access-token
""".split()
PEOPLE = """
x-openwebui-user-id x-openwebui-user-email x-openwebui-user-name openai-organization openai-project
x-goog-user-project x-forwarded-user x-forwarded-email x-forwarded-preferred-username
x-auth-request-user x-auth-request-email remote-user x-remote-user x-webauth-user x-end-user-id
helicone-user-id cf-access-client-id cf-access-authenticated-user-email x-amzn-oidc-identity
x-ms-client-principal-id tailscale-user-login x-consumer-username x-consumer-custom-id x-tenant
x-tenant-id x-account x-acct-id x-organisation-id x-org x-customer-id x-workspace-id x-team
x-litellm-end-user-id x-ssl-client-s-dn x-member-id x-company from
""".split()
PASSING = """
x-request-id x-client-request-id x-ms-client-request-id x-user-request-id x-correlation-id
traceparent tracestate x-b3-traceid x-b3-spanid sentry-trace baggage uber-trace-id x-amzn-trace-id
x-cloud-trace-context x-datadog-trace-id x-litellm-trace-id x-portkey-trace-id helicone-request-id
date x-date x-amz-date x-timestamp x-user-timestamp idempotency-key x-idempotency-key
x-stainless-retry-count x-stainless-read-timeout user-agent x-amz-user-agent content-length
content-md5 content-digest x-nonce x-csrf-token x-xsrf-token cf-ray x-forwarded-for x-real-ip
x-openwebui-message-id x-message-id x-transaction-id sec-fetch-user if-none-match x-max-tokens
x-signature x-hub-signature accept referer origin priority x-cache-key
""".split()
QUERY = ["key", "api_key", "api-key", "access_token", "subscription-key", "code", "sig", "user", "user_id", "tenant"]
CHAT = {"model": "m", "messages": [], "max_tokens": 5, "prompt_cache_key": "k", "seed": 1}
SESSIONS = (b"x-session-id", b"x-thread")


def asks(*headers: tuple[str, str], query: str = "", body: dict[str, Any] | None = None) -> Caller:
    sent: list[Header] = [(name.encode(), value.encode()) for name, value in headers]
    who = caller(sent, parameters(query.encode()), SESSIONS, (b"x-delta",))
    return with_body(who, CHAT if body is None else body)


def who(*headers: tuple[str, str], query: str = "", body: dict[str, Any] | None = None) -> tuple[str, str]:
    return asks(*headers, query=query, body=body)[:2]


def test_a_header_that_speaks_of_a_caller_tells_callers_apart() -> None:
    """By itself, and beside a key that everybody sends."""
    for name in CREDENTIALS + PEOPLE:
        for beside in ((), (("authorization", "Bearer anything"),)):
            one, two = (who(*beside, (name, value)) for value in ("one", "two"))
            assert len({one, two, who(*beside)}) == 3, name
        is_credential = bool(asks((name, "one")).credentials)
        assert is_credential is (name in CREDENTIALS), f"what a key taught of a model is its: {name}"


def test_a_header_that_changes_with_every_request_splits_nothing() -> None:
    assert [name for name in PASSING if not who((name, "one")) == who((name, "two")) == who()] == []


def test_a_query_parameter_tells_callers_apart() -> None:
    for name in QUERY:
        assert len({who(query=f"{name}={v}") for v in ("one", "two", "")} | {who()}) == 4, name
    assert who(query="api-version=2024-10-21") == who(query="api-version=2025-01-01") == who()


@pytest.mark.parametrize("one, two", [
    ("session=a", "session=b"), ("sid=a", "sid=b"), ("theme=dark; auth_token=a", "theme=dark; auth_token=b"),
    ("chocolate=a", "chocolate=b"), ("connect.sid=a; AWSALB=1", "connect.sid=b; AWSALB=1"),
    ("__Secure-next-auth.session-token=a", "__Secure-next-auth.session-token=b"),
])  # fmt: skip
def test_cookies_tell_callers_apart(one: str, two: str) -> None:
    assert who(("cookie", one)) != who(("cookie", two)) != who()


def test_a_balancers_cookie_beside_a_session_splits_nothing() -> None:
    assert who(("cookie", "connect.sid=a; AWSALB=1; _ga=1")) == who(("cookie", "_ga=2; connect.sid=a; AWSALB=2"))


@pytest.mark.parametrize("field", ["user", "safety_identifier", "user_id", "end_user", "customer"])
def test_a_field_of_the_body_tells_users_apart(field: str) -> None:
    assert len({who(body={**CHAT, field: v}) for v in ("one", "two")} | {who()}) == 3
    both = {who(body={**CHAT, "user": a, "safety_identifier": b}) for a in "xy" for b in "xy"}
    assert len(both) == 4, "both count"


def test_the_apis_own_fields_are_nobodys_name() -> None:
    others = {**CHAT, "max_tokens": 9, "prompt_cache_key": "other", "max_completion_tokens": 3, "metadata": {}}
    assert who(body=others) == who()


def test_metadata_tells_users_apart_and_requests_do_not() -> None:
    def meta(**fields: str) -> tuple[str, str]:
        return who(body={**CHAT, "metadata": fields})

    assert meta(user_id="one") != meta(user_id="two") != who()
    assert meta(trace_id="one", message_id="1") == meta(trace_id="two", message_id="2") == who()
    header = [who(("x-portkey-metadata", f'{{"_user": "{u}", "trace_id": "{t}"}}')) for u, t in ("a1", "a2", "b1")]
    assert header[0] == header[1] != header[2]


def test_a_signature_over_the_request_splits_nothing() -> None:
    signed = "AWS4-HMAC-SHA256 Credential=AKIA{}/20260101/eu/bedrock/aws4_request, SignedHeaders=host, Signature={}"
    one, again, other = (who(("authorization", signed.format(*v))) for v in ("A1", "A2", "B1"))
    assert one == again != other


def test_hostile_names_and_values_cost_little() -> None:
    """CPU time, not the clock: none of these may be quadratic, or be kept."""
    crowded = {f"field{i}": i for i in range(300_000)} | {"user": "ann", "metadata": {"k" * 10**6: 1}}
    with cpu_within(1.0):
        asks(("authorization", "Digest ignature=" + " " * 60_000), ("x-" + "a" * 60_000, "v"), ("idempot" * 8000, "v"))
        assert who(body={**CHAT, **crowded}) != who(body={**CHAT, **crowded, "user": "bob"})


def test_callers_are_told_apart_whatever_the_order() -> None:
    sent = [("authorization", "Bearer a"), ("api-key", "b"), ("x-user", "c")]
    assert len({who(*order) for order in itertools.permutations(sent)}) == 1
    some = [who(*c) for n in range(4) for c in itertools.combinations(sent, n)]
    assert len(set(some)) == len(some) == 8, "one more or one less is someone else"
    assert who(("authorization", "b")) != who(("api-key", "b"))


values = st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=12)


@examples(25)
@given(st.dictionaries(st.sampled_from(CREDENTIALS + PEOPLE), values, max_size=4),
       st.dictionaries(st.sampled_from(CREDENTIALS + PEOPLE), values, max_size=4), values, values)
def test_invariant_06_two_callers_are_one_only_with_the_same_names_and_values(
    one: dict[str, str], two: dict[str, str], user: str, other: str
) -> None:
    """No value can pass for two, or for another name's."""
    def tenant(headers: dict[str, str], name: str) -> tuple[str, str]:
        sent: list[Header] = [(n.encode(), v.encode("latin-1")) for n, v in headers.items()]
        return with_body(caller(sent), {**CHAT, "user": name})[:2]

    same = (one, user) == (two, other)
    if not any("ignature=" in v or v.startswith("{") for v in (*one.values(), *two.values())):
        assert (tenant(one, user) == tenant(two, other)) is same


@given(st.text(string.ascii_lowercase + "-_.", min_size=1, max_size=20), values)
def test_any_name_and_value_is_taken(name: str, value: str) -> None:
    sent: list[Header] = [(name.encode(), value.encode("latin-1"))]
    who = caller(sent, [(name, value)], SESSIONS)
    assert who == caller(sent, [(name, value)], SESSIONS)
    body = {name: value, "metadata": {name: value}}
    assert with_body(who, body) == with_body(who, dict(reversed(body.items())))


# -- sessions


def test_the_first_session_header_is_a_label() -> None:
    who = asks(("x-other", "n"), ("x-thread", "t-1"), ("x-session-id", "s-1"))
    assert (who.label, who.delta) == ("t-1", False)
    assert who[:2] == asks()[:2], "a label tells conversations apart, not callers"
    assert caller([(b"x-session-id", b"s")]).label is None


@pytest.mark.parametrize("name", ["x-llm-pager-session", "x-delta"])
def test_a_header_of_ours_or_of_the_operators_asks_for_a_session_of_new_messages(name: str) -> None:
    for order in itertools.permutations([("x-session-id", "label"), (name, "mine")]):
        who = asks(*order)
        assert (who.label, who.delta) == ("mine", True)
    assert asks((name, "")).delta is False


@pytest.mark.parametrize("name", [
    "", "{9f1c-22}", "agent:main:group:-1001#topic 4", "user@x|2026", "Alba's chat", "日本", "x" * 2000, '{"a": 1}', "\ud800",
])  # fmt: skip
def test_any_text_is_a_sessions_name(name: str) -> None:
    body = {**CHAT, "metadata": {"session_id": name}}
    assert asks(body=body).label == (name or None)
    assert asks(body={**CHAT, "metadata": {"session_id": 7}}).label == "7"
    assert asks(("x-session-id", "first"), body=body).label == "first"
    if name.isascii():
        assert asks(("x-session-id", name)).label == (name or None)
