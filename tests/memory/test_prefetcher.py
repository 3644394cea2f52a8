"""One decision, one budget; what asks back, and what was of use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.evidence import asks_back, points_back
from proxy.memory.prefetcher import MIN_EVIDENCE, Candidate, Prefetcher, fresh_terms, was_used
from tests.examples import examples

candidates = st.lists(
    st.builds(
        Candidate,
        st.sampled_from([f"msg_{n:04d}" for n in range(1, 9)]),
        st.floats(0.1, 50),
        st.floats(0, 4),
        st.integers(0, 900),
    ),
    max_size=30,
    unique_by=lambda candidate: candidate.page_id,
)


def of(page_id: str, score: float = 5.0, evidence: float = 2.0, tokens: int = 100) -> Candidate:
    return Candidate(page_id, score, evidence, tokens)


def ids(*proposed: Candidate, pages: int = 9, tokens: int = 9_999) -> list[str]:
    chosen = Prefetcher(pages, tokens).choose(proposed, lambda c, left: c.tokens if c.tokens <= left else None)
    return [candidate.page_id for candidate in chosen]


@examples(80)
@given(candidates, st.integers(0, 6), st.integers(0, 1500), st.integers(1, 3))
def test_invariant_07_what_is_chosen_fits_and_does_not_depend_on_the_order(
    proposed: list[Candidate], pages: int, tokens: int, cut: int
) -> None:
    def price(candidate: Candidate, left: int) -> int | None:
        shown = candidate.tokens // cut
        return None if candidate.tokens % 7 == 0 or shown > left else shown

    chosen = Prefetcher(pages, tokens).choose(proposed, price)
    left = tokens - sum(candidate.tokens // cut for candidate in chosen)
    assert len(chosen) <= pages and left >= 0
    assert all(candidate.evidence >= MIN_EVIDENCE for candidate in chosen)
    if len(chosen) < pages:  # nothing that fits was left behind
        others = [c for c in proposed if c not in chosen and c.evidence >= MIN_EVIDENCE]
        assert all(price(c, left) is None for c in others)
    assert Prefetcher(pages, tokens).choose(reversed(proposed), price) == chosen


def test_of_two_pages_that_say_as_much_the_shorter_is_first() -> None:
    proposed = of("msg_0001", tokens=900), of("msg_0002", tokens=60), of("msg_0003", score=20.0, tokens=900)
    assert ids(*proposed) == ["msg_0003", "msg_0002", "msg_0001"]
    assert ids(*proposed, pages=2) == ["msg_0003", "msg_0002"]


def test_a_page_too_large_for_what_is_left_makes_room_for_the_next() -> None:
    proposed = of("msg_0001", 50.0, tokens=60), of("msg_0002", 9.0, tokens=60), of("msg_0003", tokens=40)
    assert ids(*proposed, tokens=100) == ["msg_0001", "msg_0003"]


@pytest.mark.parametrize(
    ("text", "asks", "points"),
    [
        ("Where did we moor?", True, False),
        ("前に何と言った？", True, False),
        ("Remind me of the rent", True, True),
        ("As we said EARLIER, go on.", True, True),
        ("Give me a summary of it", True, True),
        ("The rememberance day parade", False, False),
        ("He is forearlierly so", False, False),
        ("Write a poem about rain.", False, False),
        ("", False, False),
    ],
)
def test_signals_of_a_recall(text: str, asks: bool, points: bool) -> None:
    assert (asks_back(text), points_back(text)) == (asks, points)


PAGE = "The new keel bolts are aluminium bronze, 24 millimetres, from a foundry in Hayle."


@pytest.mark.parametrize(
    ("question", "answer", "used"),
    [
        ("Which keel bolts?", "They are aluminium bronze.", True),
        ("How wide are the keel bolts?", "They are 24 wide.", True),
        ("Are the bolts aluminium bronze?", "Yes, aluminium bronze.", False),  # the question said it
        ("Which keel bolts?", "They were cast in a foundry.", False),  # one word may be chance
        ("Which keel bolts?", "I do not know.", False),
        ("Which keel bolts?", "", False),
        ("Which keel bolts?", "ALUMINIUM, cast in Hayle.", True),
    ],
)
def test_a_page_was_used_when_the_answer_says_what_only_it_says(question: str, answer: str, used: bool) -> None:
    assert was_used(PAGE, fresh_terms(question, answer)) is used
