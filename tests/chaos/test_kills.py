"""Some rounds of `python -m tests.chaos.kills`, which says what is counted (invariants 5, 6 and 7). `.ci/run` has a hundred more."""

from __future__ import annotations

import os

from tests.chaos import kills
from tests.services import Postgres

SEED = 20_261_128  # of the plans; when a kill falls, the machine decides


async def test_invariants_5_and_7_kills_lose_halve_and_change_nothing() -> None:
    done = await killed(20, kills.LANES, kills.Lane)
    assert done["disk full"]


async def test_invariants_5_and_7_kills_on_postgresql_lose_halve_and_change_nothing(postgres: Postgres) -> None:
    if os.environ.get("TEST_STORE") == "postgres":
        await killed(100, kills.LANES, kills.OnPostgres)
    else:
        await killed(5, ("two",), Few)


class Few(kills.OnPostgres):
    talks_at_once = 3


async def killed(rounds: int, lanes: tuple[str, ...], make: type[kills.Lane]) -> kills.Counter[str]:
    tally = await kills.run(rounds, SEED, lanes, say=False, make=make)
    kills.report(tally, SEED)
    assert tally.passed, "\n".join(tally.said)
    assert tally.counts["kills"] == rounds
    done = {name: tally.counts[name] for name in ("answers read", "sessions read whole", "histories counted")}
    assert all(done.values()), f"nothing was looked at: {done}"
    return tally.counts
