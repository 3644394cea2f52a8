"""What upstream's bill says: of our count (one factor per model), and of a prompt that it cut
silently. Learned from `usage`. Pure.

Promises: the factor says nothing (1.0) before MIN_SAMPLES bills; it moves in steps of 1/64, is
looked at anew only after 5, 8, 16, 32, 64 and then each 64 bills, and moves only when the evidence
left its step clearly: budgets follow it, and prompts must not flap. It does not depend on the order
of the bills between two looks. Memory is bounded. A cut is believed only where no honest bill looks
like it: bills grow with their prompts, whatever the tokenizer.

Which way to err: counting too much wastes window; counting too little breaks the window's budget
(invariant 3), or makes upstream cut a prompt silently. So above 1.0 the factor follows the evidence
for every model. Below 1.0 it follows it only for a model whose encoding we guessed; where we know
the encoding (`exact`), a low bill mostly means one kind of request (a tool array billed below its
rule), and the factor goes below 1.0 only when nine bills in ten are clearly below our count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

LEAST_WINDOW_TOKENS = 512  # no window is smaller: who says so, or bills so, speaks of something else
TOKENS_FACTOR = "tokens_factor"  # of what is learned of a model: billed tokens per counted one
MIN_TOKENS = 200  # smaller requests are mostly overhead, and say little about the encoding
MIN_RATIO, MAX_RATIO = 0.25, 4.0  # outside: not this model's bill, or not a bill at all
MIN_SAMPLES = 5
MIN_SAMPLES_TO_LOWER = 16  # of an exact encoding
MAX_SAMPLES = 256  # then the histogram is halved: older bills fade
STEPS = 64  # the factor is a multiple of 1/64
_DEAD_BAND = 0.75 / STEPS  # relative above 1.0; half a step would flap between two neighbours
_BINS_PER_E = 256  # ratios are kept as a histogram of their logarithm: bins of 0.4%
TRUNCATED_BELOW = 0.6  # no tokenizer is that much denser than the one that we count with
SERIES = 8  # bills of one conversation that are looked at, with the newest
_READ_SHARE = 0.8  # a bill below this share of the largest one is no window: more was read before
_SAME = 1.02  # bills within 2% are the same for a prompt that grew much; so much growth is enough ...
_SAME_TOKENS = 2  # ... when the bill stayed the same to the token; in a row of three, to two tokens
_LEAST_GROWTH_TOKENS = 12  # over three bills, as upstream counts

_replace = msgspec.structs.replace


class Bill(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """What a turn's last request was counted and billed, in tokens (0: not known), and the factor that
    the next turn of the conversation begins with. `counted` is a guess for what was surely small. `calls`: its
    next epoch has the VM tools."""

    model: str
    factor: float = 1.0
    counted: int = 0
    billed: int = 0
    calls: bool = True


class Calibration(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    """Bills of one model over our counts. `bins` are (log bin, how many), sorted; `samples` is how
    many bills were taken in all; `factor` is billed / counted, to multiply counts (or divide
    budgets) by. `most` is the largest bill, `dense` the lowest ratio that was no cut, `window_tokens`
    what upstream reads of a longer prompt (0: none was cut).
    """

    exact: bool = False
    samples: int = 0
    factor: float = 1.0
    bins: tuple[tuple[int, int], ...] = ()
    most: int = 0
    dense: float = MAX_RATIO
    window_tokens: int = 0

    @property
    def ratio(self) -> float:
        """The estimate behind the factor: the mean of the middle half of the bills' ratios."""
        return _middle_mean(self.bins) if self.bins else 1.0

    def learn(self, bill: Bill, earlier: Sequence[Bill], known_window: bool, guessed: bool = False) -> Calibration:
        """With a turn's bill, and whether it shows a cut. `earlier`: those of the turns before it, the
        newest first; `known_window`: the model's window is not a guess of ours; `guessed`: the count is.

        A bill far below our count is believed at once where the window is a guess, else when it
        repeats; but never where more was read before, where it grows with the prompt, or where it is
        what was added to the prompt.
        """
        counted, billed = bill.counted, bill.billed
        if billed > MAX_RATIO * max(counted, MIN_TOKENS):
            return self  # not a bill at all
        same_model = bool(earlier) and earlier[0].model == bill.model
        before = earlier[0] if same_model and earlier[0].billed else Bill(bill.model)
        low = not guessed and self.truncated(counted, billed)
        repeated = before.counted < counted and self.truncated(before.counted, before.billed)
        added = (counted - before.counted) * before.billed / max(1, before.counted)  # as billed before
        grew = repeated and billed - before.billed > max(_SAME_TOKENS, added / 2)
        if low and not repeated and before.billed:  # the conversation itself may be that dense
            low = billed * before.counted < TRUNCATED_BELOW * counted * before.billed
        most = max([self.most, *(other.billed for other in earlier if same_model)])
        cut = plateau(bill, earlier)
        now = self
        if cut is None and low:
            within = 0 < counted <= self.window_tokens or 0 < self.window_tokens < billed / _SAME
            if grew or within or billed < LEAST_WINDOW_TOKENS:
                dense = max(min(self.dense, billed / counted), 1 / counted)
                now = _replace(self, dense=dense, window_tokens=0)
            elif billed >= _READ_SHARE * most and (repeated or not _alike(billed, added)):
                same = repeated and billed >= before.billed / _SAME
                cut = billed if same or not known_window else None
        if cut is not None:
            now = _replace(now, window_tokens=min(cut, self.window_tokens or cut))
        elif not low:
            now = now if guessed else now.observe(counted, billed)
            if 0 < now.window_tokens < billed:
                now = _replace(now, window_tokens=0 if grew else billed)
        return now if now.most >= billed else _replace(now, most=billed)

    def observe(self, counted_tokens: int, billed_tokens: int) -> Calibration:
        """With one more bill; `self` when it teaches nothing: small, absurd, or truncated."""
        if counted_tokens < MIN_TOKENS or billed_tokens < 1:
            return self
        ratio = billed_tokens / counted_tokens
        # Not by a factor above 1: two odd bills among the first would make all true ones look cut.
        cut = ratio < TRUNCATED_BELOW * min(1.0, self.factor)
        if not MIN_RATIO <= ratio <= MAX_RATIO or cut:
            return self
        bins = dict(self.bins)
        at = round(math.log(ratio) * _BINS_PER_E)
        bins[at] = bins.get(at, 0) + 1
        if sum(bins.values()) > MAX_SAMPLES:
            bins = _halved(bins)
        more = _replace(self, samples=self.samples + 1, bins=tuple(sorted(bins.items())))
        if more.samples < STEPS:  # looks grow rarer
            look = more.samples in (MIN_SAMPLES, 8, 16, 32)
        else:
            look = more.samples % STEPS == 0
        return _replace(more, factor=more._decided()) if look else more

    def truncated(self, counted_tokens: int, billed_tokens: int) -> bool:
        """Whether upstream may have cut the prompt silently: it billed far less than was sent."""
        if counted_tokens < MIN_TOKENS or billed_tokens < 1:
            return False  # a bill of 0 is a missing one
        return billed_tokens < TRUNCATED_BELOW * counted_tokens * min(self.factor, self.dense)

    def doubt(self, before: Calibration, bill: Bill) -> str:
        """What an operator should know of the bill that made this of `before`; "" when it is fine."""
        told = f"upstream billed {bill.billed} tokens for a prompt of about {bill.counted}"
        advice = "set models.<name>.window_tokens to what it really takes"
        if self.window_tokens and self.window_tokens != before.window_tokens:
            return f"{told}: it reads {self.window_tokens} of a longer one and cuts the rest; {advice}"
        odd = self.dense != before.dense or bill.billed >= _READ_SHARE * before.most
        low = odd and not self.window_tokens and before.truncated(bill.counted, bill.billed)
        return f"{told}; does it cut prompts? If so, {advice}" if low else ""

    def encode(self) -> bytes:
        return _encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Calibration:
        """The calibration of `encode`. ValueError for anything else."""
        out = _decode(data)
        if not MIN_RATIO <= out.factor <= MAX_RATIO or out.samples < sum(n for _, n in out.bins):
            raise ValueError("not a calibration: values out of range")
        return out

    def _decided(self) -> float:
        target = min(MAX_RATIO, max(MIN_RATIO, self.ratio))
        if self.exact and target < 1.0:
            low = self.samples >= MIN_SAMPLES_TO_LOWER and _quantile(self.bins, 0.9) <= 1.0 - 1.0 / STEPS
            target = target if low else 1.0
        if abs(target - self.factor) <= _DEAD_BAND * max(1.0, target):
            return self.factor
        return round(target * STEPS) / STEPS


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Calibration).decode


def _alike(billed_tokens: int, added_tokens: float) -> bool:
    """The bill may be for what was added alone."""
    return 0.8 * added_tokens <= billed_tokens <= 1.3 * added_tokens


def plateau(newest: Bill, earlier: Iterable[Bill]) -> int | None:
    """The bill that a conversation stopped at while its prompts went on growing, or None.

    Twice the same to the token for a prompt that is larger by 2%; or three times and more no higher
    than it was, by clearly less than the prompt grew (whole messages are cut, so it wobbles). Never
    where what was added would be the greater part of the bill: some bill only what is new to them.
    """
    if newest.billed < LEAST_WINDOW_TOKENS:
        return None
    low = high = newest.billed
    after, bills = newest, 1
    for bill in earlier:
        added = after.counted - bill.counted
        if bill.model != newest.model or bill.counted < 1 or bill.billed < 1:
            return None
        if added <= 0 or 2 * added * max(1.0, bill.billed / bill.counted) >= after.billed:
            return None
        bills += 1
        if bills == 2 and bill.billed == high and newest.counted >= _SAME * bill.counted:
            return high
        level = high <= bill.billed + _SAME_TOKENS
        low, high = min(low, bill.billed), max(high, bill.billed)
        grown = (newest.counted - bill.counted) * bill.billed / bill.counted
        if bills > 2 and level and grown >= 2 * (high - low) + _LEAST_GROWTH_TOKENS:
            return high
        after = bill
    return None


def _halved(bins: Mapping[int, int]) -> dict[int, int]:
    """Every second bill in order of ratio: the same distribution, half as heavy."""
    out: dict[int, int] = {}
    passed = 0
    for at, count in sorted(bins.items()):
        kept = (passed + count) // 2 - passed // 2
        passed += count
        if kept:
            out[at] = kept
    return out


def _ratios(bins: Iterable[tuple[int, int]]) -> Iterable[tuple[float, int]]:
    return ((math.exp(at / _BINS_PER_E), count) for at, count in bins)


def _middle_mean(bins: tuple[tuple[int, int], ...]) -> float:
    """Mean without the lowest and the highest quarter; a bin is cut where a quarter ends."""
    total = sum(count for _, count in bins)
    low, high = total / 4, total * 3 / 4
    weight = amount = passed = 0.0
    for ratio, count in _ratios(bins):
        inside = min(high, passed + count) - max(low, passed)
        if inside > 0:
            weight += inside
            amount += inside * ratio
        passed += count
    return amount / weight


def _quantile(bins: tuple[tuple[int, int], ...], share: float) -> float:
    total = sum(count for _, count in bins)
    passed = 0
    for ratio, count in _ratios(bins):
        passed += count
        if passed >= share * total:
            return ratio
    return 1.0
