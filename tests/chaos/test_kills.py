"""Thirty kills of `python -m tests.chaos.kills`, which says what is counted (invariants 5, 6 and 7): a part of them on
PostgreSQL, with TEST_STORE=postgres all."""

from __future__ import annotations

import os

from tests.chaos import kills
from tests.services import skipped_where_missing

ROUNDS = 30
FULL_SHARE = 0.2  # of so few
SEED = 20_261_128  # of the plans; when a kill falls, the machine decides


async def test_invariants_5_and_7_kills_lose_halve_and_change_nothing() -> None:
    with skipped_where_missing():
        store = kills.STORES[os.environ.get("TEST_STORE", "directory")]
        lane = type("Lane", (store,), {"full_share": FULL_SHARE})
        tally = await kills.run(ROUNDS, SEED, say=False, make=lane, share=0.5)
    kills.report(tally, SEED)
    assert tally.passed, "\n".join(tally.said)
    assert tally.counts["kills"] == ROUNDS
    done = {name: tally.counts[name] for name in ("answers read", "sessions read whole", "histories counted", "disk full")}
    assert all(done.values()), f"nothing was looked at: {done}"
