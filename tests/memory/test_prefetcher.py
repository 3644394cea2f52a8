"""One decision over all sources, one budget; what asks back, and what was of use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.prefetcher import (
    MIN_EVIDENCE,
    Candidate,
    Prefetcher,
    PrefetchSource,
    asks_back,
    fresh_terms,
    points_back,
    was_used,
)
from tests.examples import examples

candidates = st.lists(
    st.builds(
        Candidate,
        st.sampled_from([f"msg_{n:04d}" for n in range(1, 9)] + ["claim_0001", "summary_seg_01"]),
        st.sampled_from(PrefetchSource),
        st.floats(0.1, 50),
        st.floats(0, 4),
        st.integers(0, 900),
    ),
    max_size=30,
)


def of(page_id: str, source: PrefetchSource = PrefetchSource.SEARCH, score: float = 5.0, evidence: float = 2.0,
       tokens: int = 100) -> Candidate:  # fmt: skip
    return Candidate(page_id, source, score, evidence, tokens)


@examples(80)
@given(candidates, st.integers(0, 6), st.integers(0, 1500), st.integers(1, 3))
def test_what_is_chosen_fits_one_budget_whatever_the_sources(
    proposed: list[Candidate], pages: int, tokens: int, cut: int
) -> None:
    def price(candidate: Candidate) -> int | None:
        return None if candidate.tokens % 7 == 0 else candidate.tokens // cut

    prefetcher = Prefetcher()
    prefetcher.propose(proposed)
    chosen = prefetcher.choose(pages, tokens, price)
    ids = [candidate.page_id for candidate in chosen]
    prices = [price(candidate) for candidate in chosen]
    assert len(chosen) <= pages and len(set(ids)) == len(ids)
    assert None not in prices and sum(p or 0 for p in prices) <= tokens
    assert all(candidate.evidence >= MIN_EVIDENCE for candidate in chosen)
    left = tokens - sum(p or 0 for p in prices)
    if len(chosen) < pages:  # nothing that fits was left behind
        others = [c for c in prefetcher.ranked() if c not in chosen]
        assert all((p := price(c)) is None or p > left for c in others)


@examples(80)
@given(candidates, st.randoms(use_true_random=False))
def test_invariant_07_the_ranking_depends_on_what_was_proposed_not_on_when(proposed: list[Candidate], rng: object) -> None:
    best = {}
    for candidate in proposed:
        known = best.get(candidate.page_id)
        if known is None or candidate.evidence > known.evidence:
            best[candidate.page_id] = candidate
    one, other = Prefetcher(), Prefetcher()
    one.propose(proposed)
    for candidate in reversed(list(best.values())):
        other.propose([candidate])
    assert one.ranked() == other.ranked()


def test_a_page_is_proposed_once_by_the_source_that_knows_best() -> None:
    prefetcher = Prefetcher()
    prefetcher.propose([of("msg_0001", evidence=1.0), of("msg_0002")])
    prefetcher.propose([of("msg_0001", PrefetchSource.TOOL, evidence=3.0)])
    prefetcher.propose([of("msg_0001", PrefetchSource.RECALL, evidence=2.0)])
    assert {(c.page_id, c.source) for c in prefetcher.ranked()} == {
        ("msg_0001", PrefetchSource.TOOL), ("msg_0002", PrefetchSource.SEARCH)
    }  # fmt: skip


def test_of_two_pages_that_say_as_much_the_shorter_is_first() -> None:
    prefetcher = Prefetcher()
    prefetcher.propose([of("msg_0001", tokens=900), of("msg_0002", tokens=60), of("msg_0003", score=20.0, tokens=900)])
    assert [c.page_id for c in prefetcher.ranked()] == ["msg_0003", "msg_0002", "msg_0001"]


def test_a_page_too_large_for_what_is_left_makes_room_for_the_next() -> None:
    prefetcher = Prefetcher()
    prefetcher.propose([of("msg_0001", score=50.0), of("msg_0002", score=9.0), of("msg_0003", score=5.0)])
    sizes = {"msg_0001": 60, "msg_0002": 60, "msg_0003": 40}
    chosen = prefetcher.choose(5, 100, lambda candidate: sizes[candidate.page_id])
    assert [c.page_id for c in chosen] == ["msg_0001", "msg_0003"]


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
