"""Times as models write them, and as a result shows them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.seen import Bound, read_bound, seen_text
from tests.examples import examples

NOW = datetime(2026, 11, 28, 10, 30, tzinfo=UTC)
NOW_S = NOW.timestamp()


def at(*when: int) -> float:
    return datetime(*when, tzinfo=UTC).timestamp()  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("said", [
    "2023-05-07", "2023/05/07", "2023.05.07", "7 May 2023", "May 7, 2023", "May 7th 2023", "the 7th of May, 2023",
    "Sunday, 7 May 2023", "20230507", "7.5.2023", "05/07/2023", "7-May-2023", " '2023-5-7' ",
])  # fmt: skip
def test_a_day_is_read_however_it_is_written(said: str) -> None:
    assert read_bound(said, NOW_S) == Bound(None, at(2023, 5, 7), at(2023, 5, 8))


@pytest.mark.parametrize(("said", "begin", "end"), [
    ("2023-12", at(2023, 12, 1), at(2024, 1, 1)), ("May 2023", at(2023, 5, 1), at(2023, 6, 1)),
    ("2023", at(2023, 1, 1), at(2024, 1, 1)), (2023, at(2023, 1, 1), at(2024, 1, 1)),
    ("27/5/2023", at(2023, 5, 27), at(2023, 5, 28)), ("3 March", at(2026, 3, 3), at(2026, 3, 4)),
    ("December 3", at(2025, 12, 3), at(2025, 12, 4)), ("today", at(2026, 11, 28), at(2026, 11, 29)),
    ("Yesterday", at(2026, 11, 27), at(2026, 11, 28)),
])  # fmt: skip
def test_longer_and_nearer_times_are_read(said: object, begin: float, end: float) -> None:
    assert read_bound(said, NOW_S) == Bound(None, begin, end)


@pytest.mark.parametrize(("said", "when"), [
    ("2023-05-07T14:05:09Z", at(2023, 5, 7, 14, 5, 9)), ("2023-05-07 14:05", at(2023, 5, 7, 14, 5)),
    ("2023-05-07T14:05:09.250+02:00", at(2023, 5, 7, 12, 5, 9)), ("20:15", at(2026, 11, 28, 20, 15)),
    ("1:56 pm on 8 May, 2023", at(2023, 5, 8, 13, 56)), ("8 May 2023 at 9am", at(2023, 5, 8, 9)),
    (1683468309, 1683468309), ("1683468309000", 1683468309), ("2 days ago", NOW_S - 2 * 86_400),
    ("an hour ago", NOW_S - 3600), ("last week", NOW_S - 7 * 86_400), ("now", NOW_S),
])  # fmt: skip
def test_a_time_is_a_moment(said: object, when: float) -> None:
    assert read_bound(said, NOW_S) == Bound(None, when, when)


@pytest.mark.parametrize("said", ["msg_0042", "MSG_42", "[msg_0042.2]", 42, "42", "img_0042_1"])
def test_a_page_is_a_place(said: object) -> None:
    assert read_bound(said, NOW_S) == Bound(41)


@pytest.mark.parametrize("said", ["", "soon", "2023-13-40", "31 February 2023", "May", "-3", "9" * 30, None, True, ["2023"], {}, 0])
def test_what_says_no_time_is_none(said: object) -> None:
    found = read_bound(said, NOW_S)
    assert found is None or said == "May"


@examples(90)
@given(st.text(st.sampled_from("0123456789 :-/.tzpamMyjundecago,"), max_size=30) | st.text() | st.floats() | st.integers())
def test_nothing_that_a_model_says_raises(said: object) -> None:
    found = read_bound(said, NOW_S)
    assert found is None or found.position is not None or found.begin_s <= found.end_s


def test_a_time_is_shown_as_precisely_as_tells_pages_apart() -> None:
    morning = int(at(2026, 11, 28, 9, 5))
    assert [seen_text(morning, span) for span in (0, 300, 10**7)] == ["2026-11-28"] * 3
    assert seen_text(morning, 7200) == "2026-11-28 09:05Z"
