"""The same suite on `llm-pager` in front of servers that speak other protocols than Chat Completions.

Promises: a check is left out only where `wires/absences.py` says why the protocol has no place for
it; most checks are played.
"""

from __future__ import annotations

import pytest

from tests.contract import suite
from tests.contract.gateways import PROVIDERS, WIRES
from tests.contract.judge import Outcomes, judge
from tests.contract.model import Case

CASES = suite.cases()
LEAST_PLAYED = 0.55  # of the checks: what is left out is mostly OpenAI's framing and fields


def _played(gateway: str) -> list[Case]:
    wire = WIRES[gateway.partition("/")[2]]()
    return [case for case in CASES if not wire.why_absent(case.check.id, case.id)]


PLAYED = [(gateway, case) for gateway in PROVIDERS for case in _played(gateway)]


@pytest.mark.parametrize(("gateway", "case"), PLAYED, ids=[f"{g}-{c.id}" for g, c in PLAYED])
def test_llm_pager_keeps_every_promise_at(outcomes: Outcomes, gateway: str, case: Case) -> None:
    judge(outcomes(gateway), case)


@pytest.mark.parametrize("gateway", PROVIDERS)
def test_every_absence_is_of_a_check_that_there_is_and_most_checks_are_played(gateway: str) -> None:
    absent = WIRES[gateway.partition("/")[2]]().absent
    checks = {case.check.id for case in CASES}
    known = checks | {case.id for case in CASES} | {f"{id.partition('.')[0]}." for id in checks}
    assert set(absent) <= known
    played = {case.check.id for case in _played(gateway)}
    assert len(played) >= LEAST_PLAYED * len(checks)
