import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxy.memory import WorkingSetConfig, watermarks


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
        {"eviction_threshold": 1.1},
        {"unknown": 1},
    ],
)
def test_bad_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        WorkingSetConfig.model_validate(values)
