"""The suite on `bare` (the reference) and on `llm-pager`, one test per case.

Promises: all selected cases are played together once, so `-k` plays only what it selects.
"""

from __future__ import annotations

import pytest

from tests.contract import suite
from tests.contract.model import Case, Outcome

CASES = suite.cases()


def _played(gateway: str) -> list[Case]:
    """The cases that a gateway of that kind can be asked."""
    return [case for case in CASES if gateway != "bare" or not case.check.needs]


def _check(outcome: Outcome, promise: str) -> None:
    if outcome.status == "n/a":
        pytest.skip(outcome.note)
    assert outcome.status == "passed", f"{promise}\n{outcome.note}"


@pytest.mark.parametrize("gateway", ["bare"])
@pytest.mark.parametrize("case", _played("bare"), ids=lambda case: case.id)
def test_bare_keeps_every_promise(
    outcomes: dict[tuple[str, str], Outcome], gateway: str, case: Case
) -> None:
    """By construction: a check that fails here is wrong."""
    _check(outcomes[gateway, case.id], case.check.promise)


@pytest.mark.parametrize("gateway", ["llm-pager"])
@pytest.mark.parametrize("case", _played("llm-pager"), ids=lambda case: case.id)
def test_llm_pager_keeps_every_promise(
    outcomes: dict[tuple[str, str], Outcome], gateway: str, case: Case
) -> None:
    _check(outcomes[gateway, case.id], case.check.promise)
