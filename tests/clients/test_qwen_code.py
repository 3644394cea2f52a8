"""qwen-code reads and writes files on llm-pager as it does on upstream.

Its instructions and tools are 16,000 tokens and it asks for 8,000 of answer; beside the conversation
it sends a request of a second agent, which has the history, other instructions and fewer tools.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.clients.programs import (
    MODEL,
    NODE,
    Model,
    Step,
    Where,
    check_program,
    files_of,
    needs_node,
)
from tests.clients.tasks import AGENT_QUESTION, DEPOTS, RECALL_SEAL, SEAL, ledger
from tests.e2e.harness import call, message_of

pytestmark = needs_node("@qwen-code/qwen-code")

SECOND_AGENT = "You are now acting as the managed memory extraction subagent"


def made(call_id: str, tool: str, **arguments: Any) -> dict[str, Any]:
    return message_of(None, [call(call_id, tool, arguments)])


def test_qwen_code(tmp_path: Path) -> None:
    home = tmp_path / "home"

    def write(found: re.Match[str] | None) -> dict[str, Any]:
        text = f"The seal is {found[1] if found else 'unknown'}.\n"
        return made("call_write", "write_file", file_path=str(home / "seal.txt"), content=text)

    def model() -> Model:
        files = [str(home / f"{n}.txt") for n in range(DEPOTS)]
        reads = [Step(made(f"call_{n}", "read_file", file_path=f)) for n, f in enumerate(files)]
        find = Step(write, RECALL_SEAL.needs, RECALL_SEAL.query)
        asides = {SECOND_AGENT: message_of("Nothing to remember.")}
        return Model([*reads, find, Step(message_of("It is written."))], asides)

    def run(at: Where) -> Any:
        for depot in range(DEPOTS):
            more = " ".join(ledger(depot).partition(". ")[2] for _ in range(5))
            (home / f"{depot}.txt").write_text(f"{ledger(depot)} {more}\n")
        code, out = at.run(
            "node", NODE / "node_modules" / ".bin" / "qwen", "--auth-type", "openai", "--model", MODEL,
            "--yolo", "--output-format", "json", "-p", f"{AGENT_QUESTION} Write it to seal.txt.",
            HTTP_PROXY="", HTTPS_PROXY="",  # it does not read NO_PROXY
        )  # fmt: skip
        said = [e["message"]["content"] for e in json.loads(out) if "message" in e]
        return [code, files_of(home, "seal.txt"), said]

    played = check_program(tmp_path, run, model, l0_tokens=32000, reserve_tokens=8000)
    code, files, said = played.seen
    assert code == 0 and files == {"seal.txt": f"{SEAL}\n"}
    assert said[-1] == [{"type": "text", "text": "It is written."}]
