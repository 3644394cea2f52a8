"""What a user marks as to be kept, and what is read of a model's claims."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.claims import (
    CLAIM_TOKENS,
    CLAIMS_PER_SEGMENT,
    PIN_TOKENS,
    Claim,
    claim_page,
    is_standing,
    read_claims,
)
from proxy.memory.models import PageType

SOURCES = ["msg_0004", "msg_0005", "msg_0009"]


def count(text: str) -> int:
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


@pytest.mark.parametrize(
    "text",
    ["Always cite sources.", "please never use tabs", "Fine. From now on answer in French", "ok\nremember that I fly",
     "And whenever I ask, be brief", "Don't ever apologise"],
)
def test_marks_a_standing_instruction_of_the_users_is_pinned(text: str) -> None:
    assert is_standing("user", text, 10)
    assert not is_standing("assistant", text, 10) and not is_standing("user", text, PIN_TOKENS + 1)


@pytest.mark.parametrize("text", ["I always walk home.", "She never came", "Do you remember Paris?", ""])
def test_marks_a_story_is_not_an_instruction(text: str) -> None:
    assert not is_standing("user", text, 10)


def test_marks_preferences_of_the_users_own_are_pinned() -> None:
    for text in ("I'd prefer tea", "my name is Ada", "I am allergic to nuts", "So call me Al"):
        assert is_standing("user", text, 10) and not is_standing("user", text, PIN_TOKENS + 1)
        assert not is_standing("assistant", text, 10) and not is_standing("system", text, 10)
    assert not is_standing("user", "hello", 10) and not is_standing("user", "They prefer tea", 10)


ANSWER = """They planned the launch.
Two things are open.

```json
{"subject": "launch date", "text": "The launch is on April 9.", "source": "msg_0005"}
- {"subject": "database", "text": "They use\\n SQLite."},
{"subject": "half", "text":
{"text": "no subject"}
{"subject": "blank", "text": "  "}
```"""


def test_answer_lines_that_are_claims_are_no_summary() -> None:
    summary, claims = read_claims(ANSWER)
    assert claims == [
        Claim("launch date", "The launch is on April 9.", "msg_0005"),
        Claim("database", "They use SQLite."),
    ]
    assert summary.startswith("They planned the launch.\nTwo things are open.")
    assert "April" not in summary and "```" not in summary


def test_answer_of_claims_alone_is_its_own_summary() -> None:
    lines = [json.dumps({"subject": f"s{n}", "text": f"T{n}."}) for n in range(CLAIMS_PER_SEGMENT + 5)]
    summary, claims = read_claims("\n".join(lines))
    assert len(claims) == CLAIMS_PER_SEGMENT and summary.startswith("T0. T1. T2.")
    assert read_claims("Nothing new.") == ("Nothing new.", []) and read_claims("") == ("", [])


@given(st.text())
def test_answer_of_any_text_is_read(text: str) -> None:
    summary, claims = read_claims(text)
    assert len(claims) <= CLAIMS_PER_SEGMENT and isinstance(summary, str)


def test_claim_page_rests_on_the_page_that_it_names_or_on_the_whole_segment() -> None:
    page = claim_page(7, Claim("Launch  Date", "The launch is on April 9.", "msg_0005"), SOURCES, 3, count)
    assert (page.page_id, page.page_type, page.provenance) == ("claim_0007", PageType.CLAIM, ["msg_0005"])
    assert page.metadata == {"turn": 3, "subject": "launch date"}
    for source in ("", "msg_0001", "../x"):
        page = claim_page(8, Claim("x", "many words " * 200, source), SOURCES, 3, count)
        assert page.provenance == ["msg_0004", "msg_0009"]
        assert page.size_tokens == count(page.text()) <= CLAIM_TOKENS
    assert claim_page(9, Claim("x", "y"), SOURCES[:1], 3, count).provenance == ["msg_0004"]
