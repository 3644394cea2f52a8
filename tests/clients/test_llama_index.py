"""LlamaIndex's chat engine and function agent end on llm-pager as they do on upstream."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import check_program, every, how, needs_python, play_twice
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
from tests.e2e.harness import count_request_tokens

pytestmark = needs_python("app-libraries")

KEEP_TOKENS = 1500


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


def test_what_a_memory_buffer_dropped_is_found(tmp_path: Path) -> None:
    """The buffer keeps what fits its own limit: with llm-pager the application is better off."""
    task = given("chat", [*NOTES, QUESTION], keep_tokens=KEEP_TOKENS)
    bare, paged = play_twice(
        tmp_path,
        lambda at: at.drive("app-libraries", "run_llama_index.py", task),
        chat_model,
        l0_tokens=L0_TOKENS,
        reserve_tokens=RESERVE_TOKENS,
    )
    assert all(count_request_tokens(c.json) < 1.1 * KEEP_TOKENS for c in bare.model.calls)
    assert paged.seen[:-1] == bare.seen[:-1]
    assert [bare.seen[-1], paged.seen[-1]] == ["I do not know.", CODE]


@pytest.mark.parametrize("stream", every([False, True], [False]), ids=how)
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
