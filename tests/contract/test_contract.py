"""The suite on `llm-pager` and on `bare` (the reference), one test per case.

Promises: a gateway's selected cases are played together once, so `-k` plays only what it selects.
What the reference does in every variant is asked once a night (`LLM_PAGER_E2E_FULL=1`), else in one.
"""

from __future__ import annotations

import os

import pytest

from tests.contract import suite
from tests.contract.expectation import Outcomes, expect_passed
from tests.contract.model import Case

CASES = suite.cases()
FULL = os.environ.get("LLM_PAGER_E2E_FULL") == "1"
BARE = [c for c in CASES if not c.check.needs]
BARE = BARE if FULL else list({c.check.id: c for c in BARE}.values())


@pytest.mark.parametrize("gateway", ["bare"])
@pytest.mark.parametrize("case", BARE, ids=lambda case: case.id)
def test_bare_keeps_every_promise(outcomes: Outcomes, gateway: str, case: Case) -> None:
    """By construction: a check that fails here is wrong."""
    expect_passed(outcomes(gateway), case)


@pytest.mark.parametrize("gateway", ["llm-pager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_llm_pager_keeps_every_promise(outcomes: Outcomes, gateway: str, case: Case) -> None:
    expect_passed(outcomes(gateway), case)
