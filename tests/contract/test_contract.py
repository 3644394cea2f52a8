"""The suite on `bare` (the reference) and on `llm-pager`, one test per case.

Promises: a gateway's selected cases are played together once, so `-k` plays only what it selects.
"""

from __future__ import annotations

import pytest

from tests.contract import suite
from tests.contract.expectation import Outcomes, expect_passed
from tests.contract.model import Case

CASES = suite.cases()


@pytest.mark.parametrize("gateway", ["bare"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.check.needs], ids=lambda case: case.id)
def test_bare_keeps_every_promise(outcomes: Outcomes, gateway: str, case: Case) -> None:
    """By construction: a check that fails here is wrong."""
    expect_passed(outcomes(gateway), case)


@pytest.mark.parametrize("gateway", ["llm-pager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_llm_pager_keeps_every_promise(outcomes: Outcomes, gateway: str, case: Case) -> None:
    expect_passed(outcomes(gateway), case)
