"""Which days a question names, and when they were."""

from __future__ import annotations

import pytest

from proxy.search.dates import days_asked, spans


@pytest.mark.parametrize(
    ("text", "narrowest"),
    [
        ("What happened on 8 May 2023?", (2023, 5, 8)),
        ("on May 8th, 2023", (2023, 5, 8)),
        ("2023-05-08", (2023, 5, 8)),
        ("08.05.2023", (2023, 5, 8)),
        ("05/23/2023", (2023, 5, 23)),
        ("in July 2022", (2022, 7)),
        ("on the 3rd of June", (6, 0, 3)),
        ("in October", (10,)),
    ],
)
def test_a_question_names_a_day(text: str, narrowest: tuple[int, ...]) -> None:
    found = days_asked(text)
    assert found[0] == narrowest
    assert len(found) == len(narrowest) // 3 + 1 and all(len(date) <= len(narrowest) for date in found)


def test_a_word_that_is_also_a_month_is_none_alone() -> None:
    assert days_asked("May I march on? You may.") == []
    assert days_asked("in May 2023") == [(2023, 5)]


def test_days_are_spans_of_time() -> None:
    assert list(spans((2023, 5, 8), ())) == [(1683504000, 1683590400)]
    assert list(spans((2023, 2), ())) == [(1675209600, 1677628800)]
    assert list(spans((2, 0, 30), range(2020, 2024))) == list(spans((2023, 13, 1), ())) == []
    assert len(list(spans((12,), range(2020, 2023)))) == 3
