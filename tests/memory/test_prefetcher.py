"""One decision, one budget; and what was of use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.prefetcher import (
    ASKED_EVIDENCE,
    MIN_EVIDENCE,
    Candidate,
    Prefetcher,
    evidence_tokens,
    fresh_terms,
    was_used,
)
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


def of(page_id: str, score: float = 5.0, evidence: float = 2.0, tokens: int = 60) -> Candidate:
    return Candidate(page_id, score, evidence, tokens)


def ids(*proposed: Candidate, pages: int = 9, tokens: int = 9_999, asked: bool = True, alone: bool = False) -> list[str]:
    prefetcher = Prefetcher(pages, tokens, asked, alone)
    chosen = prefetcher.choose(proposed, lambda c, left: c.tokens if c.tokens <= left else None)
    return [candidate.page_id for candidate in chosen]


@examples(25)
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
    assert not chosen or any(candidate.evidence >= ASKED_EVIDENCE for candidate in proposed)
    assert Prefetcher(pages, tokens).choose(reversed(proposed), price) == chosen
    told = Prefetcher(pages, tokens, asked=False).choose(proposed, price)
    assert all(candidate.evidence >= MIN_EVIDENCE for candidate in told)


def test_what_is_far_below_the_best_is_left_out() -> None:
    proposed = of("msg_0001", 10.0), of("msg_0002", 4.0), of("msg_0003", 1.9)
    assert ids(*proposed) == ["msg_0001", "msg_0002"]
    told = of("msg_0001", 10.0, evidence=5.0), of("msg_0002", 4.0, evidence=5.0)
    assert ids(*told, asked=False) == ["msg_0001"]


def test_a_long_page_has_to_be_nearer_to_the_best_and_the_best_is_shown_however_long_it_is() -> None:
    best = of("msg_0001", 10.0, tokens=900)
    assert ids(best, of("msg_0002", 4.0, tokens=60), of("msg_0003", 4.0, tokens=120)) == ["msg_0001", "msg_0002"]
    long = of("msg_0002", 9.0, tokens=900), of("msg_0003", 6.0, tokens=900)
    assert ids(best, *long) == ["msg_0001", "msg_0002"]
    assert ids(best, *long, alone=True) == ["msg_0001", "msg_0002", "msg_0003"]  # nobody can search for the rest


def test_nothing_is_shown_for_words_that_many_pages_have() -> None:
    proposed = of("msg_0001", 10.0, evidence=0.3), of("msg_0002", 9.0, evidence=0.3)
    assert ids(*proposed) == []
    asked = of("msg_0001", 10.0, evidence=0.6)
    assert ids(asked) == ["msg_0001"] and ids(asked, asked=False) == []
    assert ids(*proposed, of("msg_0003", 9.5, evidence=1.0)) == ["msg_0001", "msg_0003", "msg_0002"]


def test_evidence_grows_with_the_window_and_is_bounded_by_a_small_model() -> None:
    assert evidence_tokens(4000) == 1333 < evidence_tokens(32_000) < evidence_tokens(128_000) < 128_000 // 4
    assert evidence_tokens(32_000, 0.5) == 600 < evidence_tokens(32_000, 3.0) < evidence_tokens(32_000, 70.0)


def test_of_two_pages_that_say_as_much_the_shorter_is_first() -> None:
    proposed = of("msg_0001", 9.0, tokens=900), of("msg_0002", 9.0), of("msg_0003", 10.0, tokens=90)
    assert ids(*proposed) == ["msg_0003", "msg_0002", "msg_0001"]
    assert ids(*proposed, pages=2) == ["msg_0003", "msg_0002"]


def test_a_page_too_large_for_what_is_left_makes_room_for_the_next() -> None:
    proposed = of("msg_0001", 12.0, tokens=60), of("msg_0002", 9.0, tokens=60), of("msg_0003", tokens=40)
    assert ids(*proposed, tokens=100) == ["msg_0001", "msg_0003"]


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


@examples(90)
@given(st.text("abdé1_ -", max_size=40), st.text("abdé1_ -", max_size=60))
def test_a_page_was_used_by_the_words_that_both_have(answer: str, page: str) -> None:
    """However the words are looked for: never for a part of another word."""
    fresh = fresh_terms("", answer)
    shared = fresh & fresh_terms("", page)
    told = len(shared) >= 2 or any(c.isdigit() for term in shared for c in term)
    assert was_used(page, fresh) is told


def test_page_is_shown_for_what_is_told_in_its_own_words() -> None:
    """A request without a question mark: it has the words of what it asks for, where news have others."""
    meant, news = of("msg_0001", evidence=2.0), of("msg_0002", evidence=2.0)
    assert ids(meant._replace(words=3.0), asked=False) == ["msg_0001"]
    assert ids(news._replace(words=9.0), asked=False) == []
