"""A crew of crewAI ends on llm-pager as it does on upstream."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import Model, Step, check_program, every, how, needs_python
from tests.clients.tasks import AGENT_QUESTION, READS, RECALL_SEAL, SEAL, given
from tests.e2e.harness import message_of

pytestmark = needs_python("app-crewai")

SUMMARY = "Write one sentence about it."


@pytest.mark.parametrize("stream", every([False, True], [True]), ids=how)
def test_crew(tmp_path: Path, stream: bool) -> None:
    task = given("crew", [AGENT_QUESTION, SUMMARY], stream)
    played = check_program(
        tmp_path,
        lambda at: at.drive("app-crewai", "run_crewai.py", task),
        lambda: Model([*READS, RECALL_SEAL, Step(message_of("It was read."))]),
        l0_tokens=4000,
        reserve_tokens=1000,
    )
    assert played.seen == [[SEAL, "It was read."], "It was read."]
