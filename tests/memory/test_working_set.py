import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxy.memory.working_set import TokenBudget, WorkingSetConfig, watermarks


@given(st.integers(-10_000, 10_000_000), st.floats(0.01, 1), st.floats(0.01, 1))
def test_invariant_03_watermarks_stay_within_the_room(room: int, a: float, b: float) -> None:
    config = WorkingSetConfig(eviction_threshold=max(a, b), target_utilization=min(a, b))
    high, low = watermarks(room, config)
    assert 0 <= low <= high <= max(0, room)


def test_defaults_are_the_designs() -> None:
    assert watermarks(1000, WorkingSetConfig()) == (900, 500)


@pytest.mark.parametrize(
    "values",
    [
        {"eviction_threshold": 0.4, "target_utilization": 0.5},
        {"max_l0_tokens": 0},
        {"max_l1_pages": -1},
        {"eviction_threshold": 1.1},
        {"unknown": 1},
    ],
)
def test_bad_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        WorkingSetConfig.model_validate(values)


def test_a_budget_counts() -> None:
    budget = TokenBudget(total_limit=1_000, reserved=400, used=150)
    assert (budget.available, budget.remaining, budget.utilization) == (600, 450, 0.25)
    assert budget.can_fit(450) and not budget.can_fit(451)
    over = TokenBudget(total_limit=100, reserved=400, used=5)
    assert (over.available, over.remaining, over.utilization) == (0, 0, 1.0)
    assert not over.can_fit(1) and TokenBudget(total_limit=100, reserved=0).can_fit(100)
