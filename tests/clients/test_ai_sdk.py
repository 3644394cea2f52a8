"""The AI SDK's chats and agents end on llm-pager as they do on upstream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.programs import DRIVERS, NODE, Where, check_program, every, needs_node
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

pytestmark = needs_node("@ai-sdk/openai-compatible")


@pytest.mark.parametrize(
    ("what", "stream"),
    every([("chat", False), ("chat", True), ("agent", False), ("agent", True)], [("chat", True), ("agent", False)]),
)
def test_ai_sdk(tmp_path: Path, what: str, stream: bool) -> None:
    agent = what == "agent"
    task = given(what, [AGENT_QUESTION] if agent else [*NOTES, QUESTION], stream)

    def run(at: Where) -> object:
        code, out = at.run("node", DRIVERS / "run_ai_sdk.mjs", NODE, stdin=json.dumps(task))
        assert code == 0, out
        return json.loads(out.splitlines()[-1])

    played = check_program(
        tmp_path, run, agent_model if agent else chat_model,
        l0_tokens=L0_TOKENS, reserve_tokens=RESERVE_TOKENS,
    )  # fmt: skip
    said, finish, _ = played.seen[-1]
    assert [said, finish] == [SEAL if agent else CODE, "stop"]
