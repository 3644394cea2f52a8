"""One case's outcome as a test's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from tests.contract.model import Case, Outcome

Outcomes = Callable[[str], Mapping[str, Outcome]]


def expect_passed(found: Mapping[str, Outcome], case: Case) -> None:
    """Fails with the promise and what was seen; skips what could not be asked, with the reason."""
    outcome = found[case.id]
    if outcome.status == "n/a":
        pytest.skip(outcome.note)
    assert outcome.status == "passed", f"{case.check.promise}\n{outcome.note}"
