"""What bills teach: convergence, calm, robustness, and the detection of a cut prompt."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.calibration import (
    MAX_RATIO,
    MAX_SAMPLES,
    MIN_RATIO,
    MIN_SAMPLES,
    STEPS,
    Calibration,
)
from tests.examples import examples

some = examples(60)
bills = st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 40_000)), max_size=80)


def learn(ratios: list[float], start: Calibration | None = None, counted: int = 10_000) -> Calibration:
    now = start or Calibration()
    for ratio in ratios:
        now = now.observe(counted, round(counted * ratio))
    return now


def noisy(true: float, count: int, seed: int, noise: float = 0.04) -> list[float]:
    random_ = random.Random(seed)
    return [true * (1 + random_.uniform(-noise, noise)) for _ in range(count)]


@some
@given(st.floats(0.7, 3.5), st.integers(0, 10_000))
def test_it_converges_within_2_percent_of_a_hidden_ratio_under_noise(true: float, seed: int) -> None:
    factor = learn(noisy(true, 128, seed)).factor
    assert abs(factor - true) <= 0.02 * max(true, 1.0)


@some
@given(st.floats(0.7, 3.5), st.integers(0, 10_000))
def test_after_convergence_the_factor_is_constant(true: float, seed: int) -> None:
    now = learn(noisy(true, 128, seed))
    settled, seen = now.factor, set()
    for ratio in noisy(true, 400, seed + 1):
        now = learn([ratio], now)
        seen.add(now.factor)
    # One small correction is allowed to 400 bills, back and forth is not.
    assert len(seen) <= 2
    assert all(abs(factor - settled) <= 0.02 * max(true, 1.0) for factor in seen)


@some
@given(st.floats(0.7, 3.0), st.integers(0, 1000), st.lists(st.floats(0.3, 3.9), max_size=6), st.randoms())
def test_the_order_of_a_few_outliers_does_not_matter_much(
    true: float, seed: int, outliers: list[float], shuffler: random.Random
) -> None:
    ratios = noisy(true, 64 - len(outliers), seed)
    early, late = [*outliers, *ratios], [*ratios, *outliers]
    mixed = list(early)
    shuffler.shuffle(mixed)
    clean = learn(noisy(true, 64, seed)).factor
    for order in (late, mixed):
        assert abs(learn(order).factor - clean) <= 0.06 * max(true, 1.0)


def test_it_says_nothing_before_five_bills_and_moves_only_at_its_looks() -> None:
    now, changes, factor = Calibration(), [], 1.0
    for index, ratio in enumerate(noisy(1.3, 300, 7, noise=0.3), start=1):
        now = learn([ratio], now)
        if now.factor != factor:
            factor = now.factor
            changes.append(index)
    assert changes and changes[0] == MIN_SAMPLES
    assert set(changes) <= {5, 8, 16, 32, 64, 128, 192, 256}


@pytest.mark.parametrize(("counted", "billed"), [(199, 300), (1000, 0), (1000, -5), (1000, 4001), (1000, 249)])
def test_small_requests_and_absurd_bills_teach_nothing(counted: int, billed: int) -> None:
    now = Calibration()
    assert now.observe(counted, billed) is now


@some
@given(bills, st.booleans())
def test_it_round_trips_and_stays_bounded(pairs: list[tuple[int, int]], exact: bool) -> None:
    now = Calibration(exact=exact)
    for counted, billed in pairs * 6:
        now = now.observe(counted, billed)
        assert MIN_RATIO <= now.factor <= MAX_RATIO
        assert (now.factor * STEPS).is_integer()
    assert Calibration.decode(now.encode()) == now
    assert sum(count for _, count in now.bins) <= MAX_SAMPLES


@pytest.mark.parametrize(
    "data",
    [{}, {"exact": True}, [1, "x", 1.0, []], [False, 0, 9.0, []], [False, 1, 1.0, [[0, 5]]],
     [False, 1, math.nan, []]],
)  # fmt: skip
def test_what_is_no_calibration_is_refused(data: object) -> None:
    with pytest.raises(ValueError):
        Calibration.decode(msgspec.msgpack.encode(data))


def test_invariant_03_an_exact_encoding_goes_below_one_only_when_nearly_every_bill_does() -> None:
    some_low = [0.8, 0.8, 0.8, 1.0] * 16  # a quarter of the requests cost what we count
    all_low = noisy(0.85, 64, 3)
    assert learn(some_low, Calibration(exact=True)).factor == 1.0
    assert learn(some_low, Calibration(exact=False)).factor < 0.9
    assert learn(all_low[:8], Calibration(exact=True)).factor == 1.0
    assert learn(all_low, Calibration(exact=True)).factor == pytest.approx(0.85, abs=0.02)
    assert learn(noisy(1.2, 64, 3), Calibration(exact=True)).factor == pytest.approx(1.2, abs=0.02)


def test_it_follows_a_tokenizer_that_changed() -> None:
    before = learn(noisy(1.0, 512, 1))
    after = learn(noisy(1.3, 512, 2), before)
    assert (before.factor, after.factor) == (1.0, pytest.approx(1.3, abs=0.03))


def test_a_cut_prompt_is_noticed_and_not_learned_from() -> None:
    now = learn([1.3] * 8)
    assert now.truncated(10_000, 4_096) and not now.truncated(10_000, 12_000)
    assert now.truncated(10_000, 7_700)  # 13,000 were expected
    assert not now.truncated(150, 40)  # too small to tell
    assert not now.truncated(10_000, 0)  # no bill
    # A server that cuts at 4,096 whatever it is sent must not talk us into sending more.
    for counted in range(8_000, 40_000, 1_000):
        now = now.observe(counted, 4_096)
    assert now.factor == learn([1.3] * 8).factor


def test_odd_bills_among_the_first_do_not_make_all_true_ones_look_cut() -> None:
    assert learn([3.0, 3.0, *[0.75] * 62]).factor == pytest.approx(0.75, abs=0.02)
