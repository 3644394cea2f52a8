"""Haystack's agent and pipeline end on llm-pager as they do on upstream."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import check_program, every, needs_python
from tests.clients.tasks import (
    AGENT_QUESTION,
    CODE,
    L0_TOKENS,
    NOTES,
    QUESTION,
    RESERVE_TOKENS,
    SEAL,
    agent_model,
    chat_model,
    given,
)

pytestmark = needs_python("app-libraries")


@pytest.mark.parametrize(
    ("what", "stream"),
    every([("chat", True), ("agent", False), ("agent", True)], [("chat", True), ("agent", False)]),
)
def test_haystack(tmp_path: Path, what: str, stream: bool) -> None:
    agent = what == "agent"
    task = given(what, [AGENT_QUESTION] if agent else [*NOTES, QUESTION], stream)
    played = check_program(
        tmp_path,
        lambda at: at.drive("app-libraries", "run_haystack.py", task),
        agent_model if agent else chat_model,
        l0_tokens=L0_TOKENS,
        reserve_tokens=RESERVE_TOKENS,
    )
    messages, streamed = played.seen
    wanted = SEAL if agent else CODE
    assert messages[-1][:2] == ["assistant", wanted]
    assert streamed.endswith(wanted) is stream
