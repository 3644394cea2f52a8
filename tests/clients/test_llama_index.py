"""LlamaIndex's chat engine and function agent end on llm-pager as they do on upstream."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import check_program, needs_python
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


def test_chat_engine(tmp_path: Path) -> None:
    task = given("chat", [*NOTES, QUESTION])
    played = check_program(
        tmp_path,
        lambda at: at.drive("app-libraries", "run_llama_index.py", task),
        chat_model,
        l0_tokens=L0_TOKENS,
        reserve_tokens=RESERVE_TOKENS,
    )
    assert played.seen[-1] == CODE


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_function_agent(tmp_path: Path, stream: bool) -> None:
    task = given("agent", [AGENT_QUESTION], stream)
    played = check_program(
        tmp_path,
        lambda at: at.drive("app-libraries", "run_llama_index.py", task),
        agent_model,
        l0_tokens=L0_TOKENS,
        reserve_tokens=RESERVE_TOKENS,
    )
    assert played.seen[-1] == SEAL
