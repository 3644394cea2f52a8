"""The same suite on `llm-pager` in front of servers that speak other protocols than Chat Completions.

Promises: a check is left out only where `wires/absences.py` says why the protocol has no place for
it. To stay in the suite's time each check is played in one of its variants at one of the gateways, the
next check at the next; what is decided before the wire is left to test_contract.
`LLM_PAGER_E2E_FULL=1` and `python -m tests.contract` play all.
"""

from __future__ import annotations

import itertools
import os

import pytest

from tests.contract import suite
from tests.contract.expectation import Outcomes, expect_passed
from tests.contract.gateways import PROVIDERS, WIRES
from tests.contract.model import Case

FULL = os.environ.get("LLM_PAGER_E2E_FULL") == "1"
BEFORE_THE_WIRE = ("identity", "isolation", "sizes")  # decided before a request is put into other words
CASES = [c for c in suite.cases() if FULL or c.check.category not in BEFORE_THE_WIRE]
LEAST_PRESENT = 0.55  # of the checks: what is left out is mostly OpenAI's framing and fields


def _present(gateway: str) -> list[Case]:
    wire = WIRES[gateway.partition("/")[2]]()
    return [case for case in CASES if not wire.why_absent(case.check.id, case.id)]


def _played(gateway: str, offset: int) -> list[Case]:
    """All of them, or one variant of each check that is this gateway's."""
    out: list[Case] = []
    for n, (_, same) in enumerate(itertools.groupby(_present(gateway), key=lambda case: case.check.id)):
        cases = list(same)
        if FULL:
            out += cases
        elif n % len(PROVIDERS) == offset:
            out.append(cases[n // len(PROVIDERS) % len(cases)])
    return out


PLAYED = [(gateway, case) for n, gateway in enumerate(PROVIDERS) for case in _played(gateway, n)]


@pytest.mark.parametrize(("gateway", "case"), PLAYED, ids=[f"{g}-{c.id}" for g, c in PLAYED])
def test_llm_pager_keeps_every_promise_at(outcomes: Outcomes, gateway: str, case: Case) -> None:
    expect_passed(outcomes(gateway), case)


@pytest.mark.parametrize("gateway", PROVIDERS)
def test_absences_are_of_checks_that_there_are_and_most_are_present(gateway: str) -> None:
    absent = WIRES[gateway.partition("/")[2]]().absent
    every = suite.cases()
    known = {c.id for c in every} | {c.check.id for c in every} | {f"{c.check.category}." for c in every}
    assert set(absent) <= known
    checks = {case.check.id for case in CASES}
    present = {case.check.id for case in _present(gateway)}
    played = {case.check.id for at, case in PLAYED if at == gateway}
    assert played <= present and len(played) >= len(present) // (1 if FULL else len(PROVIDERS))
    assert len(present) >= LEAST_PRESENT * len(checks)
