"""The suite on `llm-pager`, one test per case; on `bare`, its own upstream, once a night.

Promises: a gateway's selected cases are played together once, so `-k` plays only what it selects.
A check of four variants is played in two, short and long, whole and streamed, the next check in the
two others; `LLM_PAGER_E2E_FULL=1` and `python -m tests.contract` play all.
"""

from __future__ import annotations

import os

import pytest

from tests.contract import suite
from tests.contract.expectation import Outcomes, expect_passed
from tests.contract.model import ALL, Case

FULL = os.environ.get("LLM_PAGER_E2E_FULL") == "1"


def _played() -> list[Case]:
    cases = suite.cases()
    numbers = {check: n for n, check in enumerate(dict.fromkeys(case.check.id for case in cases))}

    def in_turn(case: Case) -> bool:
        diagonal = (case.variant.long + case.variant.stream + numbers[case.check.id]) % 2 == 0
        return FULL or case.check.variants != ALL or diagonal

    return [case for case in cases if in_turn(case)]


@pytest.mark.parametrize("gateway", ["llm-pager"])
@pytest.mark.parametrize("case", _played(), ids=lambda case: case.id)
def test_llm_pager_keeps_every_promise(outcomes: Outcomes, gateway: str, case: Case) -> None:
    expect_passed(outcomes(gateway), case)


if FULL:  # once a night: the reference against itself

    @pytest.mark.parametrize("gateway", ["bare"])
    @pytest.mark.parametrize("case", [c for c in suite.cases() if not c.check.needs], ids=lambda case: case.id)
    def test_bare_keeps_every_promise(outcomes: Outcomes, gateway: str, case: Case) -> None:
        """By construction: a check that fails here is wrong."""
        expect_passed(outcomes(gateway), case)
