"""A hundred kills of `python -m tests.chaos.kills`, which says what is counted (invariants 5, 6 and 7)."""

from __future__ import annotations

from tests.chaos import kills

ROUNDS = 100
SEED = 20_261_128  # of the plans; when a kill falls, the machine decides


class Few(kills.Lane):
    """Half of the conversations, and of the answers between two kills."""

    talks_at_once = kills.TALKS_AT_ONCE // 2
    progress = kills.PROGRESS // 2


async def test_invariants_5_and_7_a_hundred_kills_lose_halve_and_change_nothing() -> None:
    tally = await kills.run(ROUNDS, SEED, say=False, make=Few)
    kills.report(tally, SEED)
    assert tally.passed, "\n".join(tally.said)
    assert tally.counts["kills"] == ROUNDS
    done = {name: tally.counts[name] for name in ("answers read", "sessions read whole", "histories counted", "disk full")}
    assert all(done.values()), f"nothing was looked at: {done}"
