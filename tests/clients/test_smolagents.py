"""smolagents' agents end on llm-pager as they do on upstream.

The agent that calls tools forces one in every request, so that no memory tool can be offered: what
its last question is about has to come unasked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import Model, Step, check_program, every, needs_python
from tests.clients.tasks import (
    AGENT_QUESTION,
    DEPOTS,
    RECALL_SEAL,
    SEAL,
    given,
    read,
    told_seal,
)
from tests.e2e.harness import call, message_of

pytestmark = needs_python("app-libraries")

AGAIN = "Which seal has Birkdale, did you say?"
L0_TOKENS = {"tools": 4500, "code": 6000}  # the first has the shorter instructions
RESERVE_TOKENS = 1000


def code(thought: str, line: str) -> dict[str, Any]:
    return message_of(f"Thought: {thought}\n<code>\n{line}\n</code>")


def final(found: Any) -> dict[str, Any]:
    text = told_seal(found)["content"]
    return message_of(None, [call("call_final", "final_answer", {"answer": text})])


def final_code(found: Any) -> dict[str, Any]:
    return code("I know it.", f"final_answer({told_seal(found)['content']!r})")


def tools_model() -> Model:
    end = Step(final, RECALL_SEAL.needs)
    return Model([*(Step(read(n)) for n in range(DEPOTS)), Step(final_all()), end])


def final_all() -> dict[str, Any]:
    return message_of(None, [call("call_read", "final_answer", {"answer": "All are read."})])


def code_model() -> Model:
    reads = [Step(code(f"Ledger {n} is next.", f"print(ledger(depot={n}))")) for n in range(DEPOTS)]
    end = Step(final_code, RECALL_SEAL.needs, RECALL_SEAL.query)
    return Model([*reads, Step(code("All are read.", 'final_answer("All are read.")')), end])


@pytest.mark.parametrize(
    ("what", "stream"),
    every([("tools", False), ("tools", True), ("code", False), ("code", True)], [("tools", True), ("code", False)]),
)
def test_smolagents(tmp_path: Path, what: str, stream: bool) -> None:
    task = given(what, [AGENT_QUESTION, AGAIN], stream)
    played = check_program(
        tmp_path,
        lambda at: at.drive("app-libraries", "run_smolagents.py", task),
        code_model if what == "code" else tools_model,
        l0_tokens=L0_TOKENS[what],
        reserve_tokens=RESERVE_TOKENS,
    )
    answers, _ = played.seen
    assert answers == ["All are read.", SEAL]
