"""The demo's accounts are right."""

from typing import Any

import pytest

from proxy.demo.bill import Ledger
from proxy.tokens import get_counter


def test_the_ledger_bills_a_cached_prefix_at_a_tenth_and_slides_within_the_budget() -> None:
    counter = get_counter("demo")
    ledger = Ledger(counter, budget_tokens=1500)
    messages: list[dict[str, Any]] = []
    for number in range(60):
        text = f"Plank {number} of larch cost {number + 3} pounds and was late. " * 4
        messages.append({"role": "user", "content": text})
        ledger.turn(messages, None)
        ledger.ours.book({"messages": messages[-3:]})
    assert ledger.full.hit_rate > 0.8 and ledger.sliding.hit_rate < 0.3
    assert ledger.sliding.largest_tokens <= 1500 < ledger.full.largest_tokens
    assert ledger.full.billed_tokens == pytest.approx(
        ledger.full.prompt_tokens - 0.9 * ledger.full.cached_tokens
    )
    assert ledger.ours.cached_tokens == 0
