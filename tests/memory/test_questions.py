"""What is asked of a message that says more than its question."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.questions import Query, search_queries
from tests.examples import examples

QUESTION = "Which harbour did we moor in last summer?"
CODE = "```python\n" + "def moor(boat):\n    return boat.harbour  # is it free?\n" * 30 + "```"
LOG = "\n".join(f"2024-05-01 12:00:{i:02d},{i:03d} INFO worker[{i}] job={i} took {i} ms?" for i in range(60))
ARTICLE = "The committee met on Monday to look at the budget. " * 80


@pytest.mark.parametrize(
    "message",
    [
        QUESTION,
        f"{QUESTION} Answer in a few words.",
        f"Hi there! Hope you had a great weekend. {QUESTION} Thanks in advance.",
        f"{QUESTION}\n\n{CODE}",
        f"{CODE}\n\n{QUESTION}",
        f"{LOG}\n{QUESTION}",
        f"{QUESTION}\n{LOG}",
        f"{ARTICLE}\n\n{QUESTION}",
        f"{QUESTION}\n\n{ARTICLE}",
        f"> {ARTICLE}\n\n{QUESTION}",
    ],
)
def test_what_is_asked_is_the_question_alone(message: str) -> None:
    assert [query.text for query in search_queries(message)] == [QUESTION]


def test_the_case_stands_beside_the_question_as_its_context() -> None:
    case = "I want to add a login and monthly charts to my Flask app."
    (query,) = search_queries(f"{case} What would you use for these features?")
    assert query == Query("What would you use for these features?", case)


def test_each_question_is_a_search_of_its_own() -> None:
    first, second = search_queries(f"{QUESTION} And who paid the harbour fees?")
    assert (first.text, second.text) == (QUESTION, "And who paid the harbour fees?")
    assert QUESTION in second.context
    assert len(search_queries("Is it so? " * 50)) == 4


def test_without_a_question_mark_the_prose_is_asked() -> None:
    assert search_queries(f"Remind me of the mooring fees.\n{CODE}") == (Query("Remind me of the mooring fees."),)
    assert search_queries("船の名前を教えて。") == (Query("船の名前を教えて。"),)
    (query,) = search_queries("吉他多少钱？谢谢。")
    assert query == Query("吉他多少钱？", "谢谢。")


def test_a_message_that_is_all_pasted_is_asked_by_its_end() -> None:
    (query,) = search_queries(CODE)
    assert CODE.endswith(query.text) and len(query.text) <= 600


@pytest.mark.parametrize("message", ["When was that?", "And then?", "How much did they want for it?", "Why?"])
def test_a_follow_up_has_the_last_turns_as_context(message: str) -> None:
    earlier = ["Long ago.", "We sold the old violin. Who was the buyer?", "A dealer from Ghent."]
    (query,) = search_queries(message, earlier)
    assert query == Query(message, "Who was the buyer? A dealer from Ghent.")


def test_a_question_that_stands_alone_has_no_such_context() -> None:
    assert search_queries(QUESTION, ["Do you like jazz?", "Very much."]) == (Query(QUESTION),)


def test_nothing_said_nothing_asked() -> None:
    assert search_queries("") == search_queries(" \n") == search_queries("?!") == search_queries("```\n```") == ()


@examples(20)
@given(st.text(max_size=300), st.lists(st.text(max_size=60), max_size=3))
def test_any_text_has_few_and_bounded_queries(text: str, earlier: list[str]) -> None:
    queries = search_queries(text * 3, earlier)
    assert len(queries) <= 4
    assert all(query.text and len(query.text) <= 1200 and len(query.context) <= 1300 for query in queries)
    assert queries == search_queries(text * 3, earlier)
