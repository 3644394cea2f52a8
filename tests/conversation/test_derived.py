"""What derives from a path: a value that grows by segments and never changes what it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.derived import NO_DERIVED, Derived
from proxy.memory.segments import Segment, close_segment
from proxy.memory.sentences import SegmentDoc
from tests.examples import examples

SAID = (
    "Our deadline is March 3.",
    "Our deadline is April 9.",
    "I'd prefer aisle seats.",
    "I'd prefer window seats.",
    "My name is Ines.",
    "The port is 8443.",
    "The port is 5433.",
    "Nothing much happened on the way to the lake.",
)
segments = st.lists(st.lists(st.sampled_from(SAID), min_size=1, max_size=4), max_size=6)


def segment_of(derived: Derived, texts: list[str]) -> Segment:
    docs = [SegmentDoc(f"msg_{derived.end + n:04d}", "user", "", t) for n, t in enumerate(texts, 1)]
    return close_segment(
        derived.segments + 1, docs, derived.claims, derived.claims_made + 1, derived.segments, len
    )


def grow(derived: Derived, texts: list[str], max_claims: int = 128) -> Derived:
    return derived.with_segment(segment_of(derived, texts), derived.end + len(texts), max_claims)


def said(derived: Derived) -> dict[str, str]:
    return {page_id: derived.text(page_id) for page_id in derived.pages}


@examples(60)
@given(segments, st.integers(1, 5))
def test_it_grows_by_segments_and_never_changes_what_it_was(made: list[list[str]], most: int) -> None:
    steps = [NO_DERIVED]
    before = [said(NO_DERIVED)]
    for texts in made:
        steps.append(grow(steps[-1], texts, most))
        before.append(said(steps[-1]))
    assert [said(step) for step in steps] == before
    last = steps[-1]
    assert last.segments == len(made) and last.end == sum(map(len, made))
    claims = {i for i in last.pages if i.startswith("claim_")}
    assert claims == {claim.claim_id for claim in last.claims} and len(claims) <= most
    assert {f"summary_seg_{n:02d}" for n in range(1, len(made) + 1)} <= set(last.pages)
    assert last.claims_made >= len(claims)


@examples(60)
@given(segments)
def test_every_page_rests_on_messages_that_name_it_in_turn(made: list[list[str]]) -> None:
    derived = NO_DERIVED
    for texts in made:
        derived = grow(derived, texts)
    for page_id, page in derived.pages.items():
        ground = derived.provenance.justifies(page_id)
        assert ground and ground == list(dict.fromkeys(page.provenance))
        for message in ground:
            assert message.startswith("msg_") and int(message[4:]) <= derived.end
            assert page_id in derived.provenance.derived(message)


def test_a_claim_whose_place_was_taken_says_so() -> None:
    first = grow(NO_DERIVED, ["Our deadline is March 3."])
    assert said(first)["claim_0001"] == "User: Our deadline is March 3 [msg_0001]"
    second = grow(first, ["Our deadline is April 9."])
    assert second.superseded == {"claim_0001": "claim_0002"}
    assert second.text("claim_0001").startswith("(superseded by claim_0002) User: Our deadline is March 3")
    assert second.text("claim_0002") == "User: Our deadline is April 9 [msg_0002]"
    assert first.superseded == {} and "superseded" not in first.text("claim_0001")


def test_a_claim_said_again_rests_on_more_and_weighs_more() -> None:
    first = grow(NO_DERIVED, ["My name is Ines."])
    again = grow(grow(first, ["Call me Ines please."]), ["My name is Ines."])
    assert list(again.pages["claim_0001"].provenance) == ["msg_0001", "msg_0002", "msg_0003"]
    assert again.pages["claim_0001"].importance > first.pages["claim_0001"].importance
    assert again.claims_made == 1 and again.text("claim_0001").endswith("[msg_0001, msg_0002]")
    assert "claim_0001" in again.provenance.derived("msg_0003")


def test_beyond_its_limit_the_superseded_claims_go_first() -> None:
    derived = grow(NO_DERIVED, ["The port is 8443.", "My name is Ines."])
    derived = grow(derived, ["The port is 5433."], max_claims=2)
    assert [claim.text for claim in derived.claims] == ["User: My name is Ines", "User: The port is 5433"]
    assert "claim_0001" not in derived.pages and derived.claims_made == 3
    with pytest.raises(KeyError):
        derived.text("claim_0001")


def test_a_search_finds_summaries_and_claims_but_no_index() -> None:
    derived = grow(NO_DERIVED, ["Our deadline is March 3.", "My name is Ines."])
    found = [page_id for page_id, *_ in derived.words.ranked("deadline March")]
    assert set(found) == {"summary_seg_01", "claim_0001"} and "index_seg_01" in derived.pages
