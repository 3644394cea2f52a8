"""Who asks: every credential counts, a session's name is checked, and nothing else is looked at."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.api.caller import presented
from proxy.errors import ApiError
from proxy.upstream import Header
from tests.examples import examples

SESSION_HEADERS = ("x-session-id", "x-thread")
CREDENTIALS = [(b"authorization", b"Bearer a"), (b"api-key", b"b"), (b"x-api-key", b"c")]
names = st.sampled_from([b"authorization", b"api-key", b"x-api-key", b"accept", b"cookie"])
values = st.binary(max_size=8).filter(lambda v: b"\n" not in v and b"\r" not in v)
headers = st.lists(st.tuples(names, values), max_size=6)


def key_of(sent: list[Header]) -> str:
    return presented(sent, SESSION_HEADERS)[0]


def test_all_credentials_count_whatever_their_order() -> None:
    keys = {key_of(list(order)) for order in itertools.permutations(CREDENTIALS)}
    assert len(keys) == 1
    some = [key_of(list(c)) for n in range(4) for c in itertools.combinations(CREDENTIALS, n)]
    assert len(set(some)) == len(some) == 8, "one more or one less is someone else"
    assert key_of([(b"authorization", b"b")]) != key_of([(b"api-key", b"b")])
    assert key_of([*CREDENTIALS, (b"cookie", b"d")]) == key_of(CREDENTIALS)


@examples(80)
@given(headers, headers)
def test_invariant_06_two_callers_are_one_only_with_the_same_credentials(one: list[Header], two: list[Header]) -> None:
    a, b = (sorted(h for h in sent if h[0] in dict(CREDENTIALS)) for sent in (one, two))
    assert (key_of(one) == key_of(two)) is (a == b)


def test_the_first_session_header_names_the_session() -> None:
    sent: list[Header] = [(b"x-other", b"n"), (b"x-thread", b"t-1"), (b"x-session-id", b"s-1")]
    assert presented(sent, SESSION_HEADERS) == ("", "t-1")
    assert presented(sent, ()) == ("", None) == presented([], SESSION_HEADERS)


@pytest.mark.parametrize("bad", [b"", b" ", b"a b", b"s" * 129, b"a\x00", b"a\r\nx: y", b"\xff", b"%2e?", b"{}"])
def test_a_session_name_is_untrusted(bad: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        presented([(b"x-session-id", bad)], SESSION_HEADERS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_session_id", "x-session-id")
