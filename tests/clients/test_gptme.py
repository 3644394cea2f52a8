"""gptme runs commands and writes a file on llm-pager as it does on upstream.

It has no tools in the request: commands stand in code blocks, and their outputs come back as system
messages in the middle of the history.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.clients.programs import (
    MODEL,
    Model,
    Step,
    Where,
    check_program,
    files_of,
    needs_python,
    python_of,
)
from tests.clients.tasks import AGENT_QUESTION, DEPOTS, RECALL_SEAL, SEAL, ledger
from tests.e2e.harness import message_of

pytestmark = needs_python("app-gptme")


def shell(command: str) -> dict[str, Any]:
    return message_of(f"I run a command.\n\n```shell\n{command}\n```")


def write(found: re.Match[str] | None) -> dict[str, Any]:
    seal = found[1] if found else "unknown"
    return message_of(f"I write it down.\n\n```save seal.txt\nThe seal is {seal}.\n```")


def model() -> Model:
    reads = [Step(shell(f"cat ledgers/{n}.txt")) for n in range(DEPOTS)]
    done = Step(message_of("It is written.\n\n```complete\n```"))
    return Model([*reads, Step(write, RECALL_SEAL.needs, RECALL_SEAL.query), done])


def run(at: Where) -> Any:
    (at.home / "ledgers").mkdir()
    for depot in range(DEPOTS):
        (at.home / "ledgers" / f"{depot}.txt").write_text(ledger(depot) + "\n")
    gptme = python_of("app-gptme").with_name("gptme")
    code, _ = at.run_python(
        "app-gptme", gptme, "--non-interactive", "--model", f"openai/{MODEL}", "--name", "talk", "--no-workspace",
        "--system", "short", "--tools", "shell,save,complete", "--tool-format", "markdown",
        f"{AGENT_QUESTION} Write it to seal.txt.",
    )  # fmt: skip
    (log,) = files_of(at.home, ".local/share/gptme/logs/*/conversation.jsonl").values()
    said = [json.loads(line) for line in log.splitlines()]
    return [code, files_of(at.home, "*.txt"), [[m["role"], m["content"]] for m in said]]


def test_gptme(tmp_path: Path) -> None:
    played = check_program(tmp_path, run, model, l0_tokens=4000, reserve_tokens=1000)
    code, files, said = played.seen
    assert code == 0 and files == {"seal.txt": f"{SEAL}\n"}
    assert sum(role == "system" for role, _ in said) > DEPOTS
