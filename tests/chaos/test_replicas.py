"""Four rounds of `python -m tests.chaos.replicas`, which says what is counted (invariants 5, 6 and 7)."""

from __future__ import annotations

from tests.chaos import kills
from tests.chaos.replicas import Few, replicas
from tests.services import Postgres

SEED = 20_261_128  # of the plans; when an event falls, the machine decides


async def test_invariants_5_6_and_7_replicas_on_one_database_are_as_one_process(postgres: Postgres, pgbouncer: object) -> None:
    tally = await replicas(4, SEED, say=False, lane=Few)
    kills.report(tally, SEED)
    assert tally.passed, "\n".join(tally.said)
    done = {name: tally.counts[name] for name in ("answers read", "turns compared", "branches at once", "commits cut")}
    assert all(done.values()), f"nothing was looked at: {done}"
