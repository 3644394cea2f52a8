"""Two rankings in one: what each adds, and what evidence stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.ids import Hit
from proxy.search.fusion import SHARE, fuse, merge
from tests.examples import examples


def test_what_is_near_rises_and_what_is_only_near_is_no_evidence() -> None:
    lexical = [Hit(1, 0, 10.0, 2.0), Hit(2, 0, 8.0, 1.0), Hit(3, 0, 1.0, 0.5)]
    fused = fuse(lexical, [Hit(2, 0, 7.0), Hit(9, 0, 3.5)])
    assert fused == [
        Hit(2, 0, 8.0 + 10.0 * SHARE, 1.0),
        Hit(1, 0, 10.0, 2.0),
        Hit(9, 0, 5.0 * SHARE, 0.0),
        Hit(3, 0, 1.0, 0.5),
    ]


def test_a_question_without_a_word_in_common_has_the_near_pages_alone() -> None:
    assert fuse([], [Hit(4, 2, 8.0), Hit(5, 0, 4.0)]) == [Hit(4, 2, SHARE), Hit(5, 0, SHARE / 2)]


def test_of_several_questions_a_page_has_what_it_is_worth_to_the_best() -> None:
    merged = merge([[Hit(1, 0, 10.0), Hit(2, 0, 1.0)], [], [Hit(2, 0, 2.0), Hit(3, 0, 1.0)]])
    assert merged == [Hit(1, 0, 10.0), Hit(2, 0, 2.0), Hit(3, 0, 1.0)] and merge([]) == []


hits = st.lists(
    st.builds(Hit, st.integers(0, 9), st.integers(0, 2), st.floats(0.1, 100), st.floats(0, 3)),
    unique_by=lambda hit: (hit.position, hit.part),
).map(lambda found: sorted(found, key=lambda hit: -hit.score))


@examples(15)
@given(hits, hits, st.floats(0.5, 50))
def test_invariant_07_neither_list_has_a_unit_and_without_the_second_the_first_stays(
    lexical: list[Hit], near: list[Hit], times: float
) -> None:
    assert fuse(lexical, []) == lexical
    scaled = fuse(lexical, [hit._replace(score=hit.score * times) for hit in near])
    fused = fuse(lexical, near)
    assert {hit[:2] for hit in fused} == {hit[:2] for hit in (*lexical, *near)}
    assert all(abs(a.score - b.score) < 1e-6 for a, b in zip(sorted(scaled), sorted(fused), strict=True))
    assert fused == sorted(fused, key=lambda hit: (-hit.score, -hit.position, hit.part))
