"""How long a refused request waits: upstream's word, and never more than what is allowed."""

from __future__ import annotations

import pytest

from proxy.api.patience import Patience
from proxy.upstream import Header

NOW_S = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    "headers, wait_s",
    [
        ([(b"retry-after-ms", b"250"), (b"retry-after", b"3")], 0.25),
        ([(b"retry-after", b"3")], 3.0),
        ([(b"retry-after-ms", b"soon"), (b"retry-after", b"3")], 3.0),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:13:24 GMT")], 4.0),
        ([(b"retry-after", b"Tue, 14 Nov 2023 22:13:00 GMT")], 0.0),
        ([(b"retry-after", b"-5")], 0.0),
        ([(b"retry-after", b"later")], 0.5),
        ([], 0.5),
        ([(b"retry-after", b"11")], None),
        ([(b"retry-after", b"nan")], 0.5),
        ([(b"x-should-retry", b"false")], None),
    ],
)
def test_upstreams_word_counts(headers: list[Header], wait_s: float | None) -> None:
    assert Patience(2, 10).wait_s(429, headers, NOW_S) == wait_s


def test_tries_and_seconds_are_bounded_and_a_wait_doubles_by_itself() -> None:
    patience = Patience(3, 100)
    assert [patience.wait_s(503, [], NOW_S) for _ in range(4)] == [0.5, 1.0, 2.0, None]
    patience = Patience(9, 5)
    after = [(b"retry-after", b"2")]
    assert [patience.wait_s(503, after, NOW_S) for _ in range(3)] == [2.0, 2.0, None]
    assert patience.wait_s(503, [(b"retry-after", b"1")], NOW_S) == 1.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 501])
def test_what_would_be_refused_again_is_not_sent_again(status: int) -> None:
    assert Patience(2, 10).wait_s(status, [], NOW_S) is None
