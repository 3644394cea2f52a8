"""What bills teach: convergence, calm, robustness, and the detection of a cut prompt."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.calibration import (
    LEAST_WINDOW_TOKENS,
    MAX_RATIO,
    MAX_SAMPLES,
    MIN_RATIO,
    MIN_SAMPLES,
    SERIES,
    STEPS,
    Bill,
    Calibration,
)
from tests.examples import examples

some = examples(20)
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
def test_order_of_a_few_outliers_does_not_matter_much(
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


def test_invariant_03_exact_encoding_goes_below_one_only_when_nearly_every_bill_does() -> None:
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


def test_cut_prompt_is_noticed_and_not_learned_from() -> None:
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


# -- a prompt that was cut silently

MODEL = "house-model"


def told(
    sizes: list[tuple[int, int]], known: bool = False, start: Calibration | None = None
) -> list[Calibration]:
    """What a conversation's turns, each counted and billed so, taught one after the other."""
    now, before, out = start or Calibration(), list[Bill](), list[Calibration]()
    for counted, billed in sizes:
        bill = Bill(MODEL, now.factor, counted, billed)
        now = now.learn(bill, before[: SERIES - 1], known)
        before.insert(0, bill)
        out.append(now)
    return out


@st.composite
def conversations(
    draw: st.DrawFn, least: float, most: float, noise: tuple[float, float] = (0.7, 1.4), first: int = 4
) -> list[tuple[int, int]]:
    """(counted, really) after each turn: what is said once stays, and costs what it cost. Each message
    has its own ratio around the tokenizer's."""
    factor = draw(st.floats(least, most))
    counted = draw(st.integers(first, 8000))
    really = max(1, round(counted * factor))
    out = [(counted, really)]
    for added in draw(st.lists(st.integers(12, 1200), min_size=5, max_size=40)):
        counted += added
        really += max(4, round(added * factor * draw(st.floats(*noise))))
        out.append((counted, really))
    return out


@some
@given(conversations(0.9, 4.0), st.booleans())
def test_honest_bill_is_never_taken_for_a_cut(turns: list[tuple[int, int]], known: bool) -> None:
    assert not any(now.window_tokens for now in told(turns, known))


@some
@given(conversations(0.25, 0.7))
def test_tokenizer_much_denser_than_ours_is_doubted_only_until_its_bills_grow(
    turns: list[tuple[int, int]],
) -> None:
    """The first bill of all may look like a cut, where the conversation was never small."""
    for (_, billed), now in zip(turns, told(turns), strict=True):
        first = turns[0][1]
        doubted = first >= LEAST_WINDOW_TOKENS and billed <= first * 1.02 + 2
        assert now.window_tokens == 0 or doubted
    assert not any(now.window_tokens for now in told(turns, known=True))


@some
@given(st.floats(0.65, 3.0), st.integers(600, 60_000), st.floats(0.01, 0.019), st.integers(0, 2), st.booleans(), st.randoms())
def test_cut_is_found_within_three_turns_of_slow_growth(
    factor: float, window: int, growth: float, wobble: int, known: bool, chance: random.Random
) -> None:
    turns, cut = [], 0
    counted = window / factor * 0.9
    while cut < 3:
        counted += max(12 / factor + 1, counted * growth * chance.uniform(0.9, 1.1))
        really = counted * factor
        cut += really > window + wobble
        turns.append((round(counted), round(min(really, window - chance.randint(0, wobble)))))
    found = told(turns, known)
    assert not any(now.window_tokens for now in found[:-3])
    assert abs(found[-1].window_tokens - window) <= 2 * wobble + 0.02 * window


@pytest.mark.parametrize("known", [False, True])
def test_server_that_cuts_whole_messages_is_found_though_its_bills_wobble(known: bool) -> None:
    turns = [(3000 + 90 * i, 3000 + 90 * i) for i in range(12)]
    turns += [(4080 + 90 * i, 4090 - wobble) for i, wobble in enumerate((10, 60, 30, 70, 0, 50))]
    found = told(turns, known)
    assert not any(now.window_tokens for now in found[:12])
    assert found[-1].window_tokens == 4090


def test_bill_far_below_the_count_is_believed_at_once_where_the_window_is_a_guess() -> None:
    (now,) = told([(9000, 4096)])
    assert now.window_tokens == 4096
    assert "cuts the rest" in now.doubt(Calibration(), Bill(MODEL, 1.0, 9000, 4096))
    first, second = told([(9000, 4096), (9150, 4096)], known=True)
    assert (first.window_tokens, second.window_tokens) == (0, 4096)
    assert "does it cut" in first.doubt(Calibration(), Bill(MODEL, 1.0, 9000, 4096))
    assert second.factor == 1.0 and not second.samples, "a cut says nothing of the tokenizer"


@pytest.mark.parametrize("constant", [1, 10, 100])
def test_bill_that_is_always_the_same_small_number_is_no_window(constant: int) -> None:
    sizes = [(300 * 2**i, constant) for i in range(8)]
    assert not any(now.window_tokens or now.factor != 1.0 for now in told(sizes))


@some
@given(conversations(0.8, 1.5, noise=(0.9, 1.1), first=3000), st.booleans())
def test_bill_of_what_was_not_cached_is_no_cut(turns: list[tuple[int, int]], known: bool) -> None:
    """Some bill the whole first prompt, and of each later one what is new in it."""
    new = [turns[0], *((c, b - before) for (c, b), (_, before) in zip(turns[1:], turns, strict=False))]
    assert not any(now.window_tokens for now in told(new, known))


def test_bill_of_a_large_addition_alone_is_no_cut() -> None:
    assert not any(now.window_tokens for now in told([(200, 210), (2100, 1900), (4700, 2600)]))
    assert told([(2000, 2000), (9000, 4096)])[-1].window_tokens == 4096  # 7,000 were added


def test_absurd_bill_teaches_nothing() -> None:
    start = told([(3000, 3000)])[-1]
    assert told([(3000, 3000), (3100, 2_000_000)])[-1] == start
    assert told([(9000, 4096), (4000, 50_000)])[-1].window_tokens == 4096


def test_question_asked_again_and_a_window_made_smaller_show_no_cut() -> None:
    again = [(5000, 4000)] * 6
    rebuilt = [(9000, 9000), (4000, 4100), (3990, 4100), (3980, 4100), (3970, 4100)]
    for sizes in (again, rebuilt):
        assert not any(now.window_tokens for now in told(sizes))


def test_window_that_a_later_bill_disproves_is_believed_no_more() -> None:
    """The model's template drops a large array of tools: few of the counted tokens are billed."""
    found = told([(11_000, 1000), (11_100, 1100), (11_200, 1200), (11_900, 1900)])
    assert [now.window_tokens for now in found] == [1000, 0, 0, 0]
    # A server that cut whole messages reads a little more than its first bill said.
    found = told([(9000, 3900), (3800, 4020)])
    assert found[-1].window_tokens == 4020


@some
@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 40_000)), max_size=40), st.booleans())
def test_whatever_is_billed_the_lessons_round_trip(pairs: list[tuple[int, int]], known: bool) -> None:
    for now in told(pairs, known):
        assert Calibration.decode(now.encode()) == now
        assert now.window_tokens == 0 or now.window_tokens >= LEAST_WINDOW_TOKENS
