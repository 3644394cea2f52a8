"""The limits of one request: what cannot be paged, and the answer, against the room for messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.limits import Limits, least_room, stretched
from proxy.conversation.model_facts import within
from proxy.memory import WorkingSetConfig
from tests.conversation.player import limits_of


def limits(l0: int, reserve: int, window: int, known: bool, beside: bool = False) -> Limits:
    working_set = WorkingSetConfig(max_l0_tokens=l0, reserved_tokens=reserve)
    return limits_of(0, working_set=working_set, window_tokens=window, window_known=known, answer_beside=beside)


def room(of: Limits, fixed: int) -> int:
    return of.budget_tokens - fixed


def test_a_coding_agents_prompt_and_long_answers_fit_a_small_window_together() -> None:
    """16,000 tokens of tools and max_tokens 8,000, in a window of 24,000 of a model of 128,000."""
    found = stretched(limits(24_000, 4096, 128_000, True), 16_055, 8000)
    assert found.working_set.reserved_tokens == 4096
    assert room(found, 16_055) == 6000 == least_room(24_000)


def test_the_answer_is_given_what_is_left_beside_the_least_room() -> None:
    small = limits(8000, 1000, 128_000, True)
    assert stretched(small, 0, 3000).working_set.reserved_tokens == 3000
    assert stretched(small, 0, 7000).working_set.reserved_tokens == 4000  # half
    assert stretched(small, 3500, 7000).working_set.reserved_tokens == 2500
    assert stretched(small, 5000, 7000) is small
    assert stretched(small, 0, None) is small and stretched(small, 0, -5) is small


def test_the_answer_has_its_room_beside_l0_where_the_model_has_more() -> None:
    assert limits(8000, 2000, 128_000, True, beside=True).budget_tokens == 8000
    assert limits(8000, 2000, 9000, True, beside=True).budget_tokens == 7000
    assert limits(8000, 2000, 8000, True, beside=True).budget_tokens == 6000
    assert limits(8000, 2000, 128_000, False, beside=True).budget_tokens == 6000  # nobody said so
    assert stretched(limits(8000, 2000, 10_000, True, beside=True), 0, 5000).budget_tokens == 5000
    assert stretched(limits(8000, 2000, 128_000, True, beside=True), 7000, 5000).budget_tokens == 9000
    smaller = within(limits(8000, 2000, 128_000, True, beside=True), 4000)  # as it was learned
    assert smaller.budget_tokens == 3000


@given(
    st.integers(1000, 200_000), st.integers(1, 50_000), st.integers(1000, 400_000), st.booleans(), st.booleans(),
    st.integers(0, 500_000), st.one_of(st.none(), st.integers(-10, 10**9)),
)  # fmt: skip
def test_it_stretches_only_by_what_is_missing_and_never_past_a_known_window(
    l0: int, reserve: int, window: int, known: bool, beside: bool, fixed: int, asked: int | None
) -> None:
    given = limits(l0, min(reserve, l0 // 4), window, known, beside)
    found = stretched(given, fixed, asked)
    total = found.working_set.max_l0_tokens
    assert total >= l0 and found.working_set.reserved_tokens >= 0
    if known:
        assert total <= max(l0, window)
        assert found.budget_tokens + found.working_set.reserved_tokens <= max(l0, window)  # the answer has its room
    if not known or fixed + 2 * l0 <= window:  # nothing stands in its way
        assert room(found, fixed) >= least_room(l0) or not fixed
    if total > l0:
        assert room(found, fixed) <= least_room(l0)
        assert found.working_set.reserved_tokens <= given.working_set.reserved_tokens
    again = stretched(given, fixed, asked)
    assert again == found


def test_limits_of_a_model_that_does_not_call_give_the_tools_tokens_to_evidence() -> None:
    limits = limits_of(4000)
    assert not limits.uncalled().calls and limits.uncalled().evidence_tokens > limits.evidence_tokens
    assert limits_of(4000, prefetch_tokens=0).uncalled().evidence_tokens == 0  # nothing is shown unasked
