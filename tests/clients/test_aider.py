"""aider edits files on llm-pager as it does on upstream.

It sends the whole text of its files two messages before the end of every request, a reminder as a
system message behind them, and has no tools. The model reads the line that it changes.
"""

from __future__ import annotations

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
from tests.clients.tasks import CODE, NOTES, QUESTION, RECALL
from tests.e2e.harness import message_of

pytestmark = needs_python("app-aider")

EDITS = 6
FILE = "harbour.py"
SOURCE = "\n\n".join(
    f"def fee_{n}(amount: int) -> int:\n    return amount * {n * 7 + 2}\n" for n in range(12)
)
OPTIONS = """--no-fancy-input --no-pretty --yes-always --no-check-update --analytics-disable
    --no-show-release-notes --no-show-model-warnings --no-suggest-shell-commands --no-detect-urls
    --no-gitignore --no-auto-commits --no-git --map-tokens 0 --max-chat-history-tokens 100000""".split()


def edit(found: re.Match[str] | None) -> dict[str, Any]:
    """The factor of the function raised by one thousand."""
    if not found:
        return message_of("I do not see this function.")
    old = found[0]
    new = old.replace(f"* {found[1]}", f"* {int(found[1]) + 1000}")
    block = f"{FILE}\n```python\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n```\n"
    return message_of(f"I raise it.\n\n{block}")


def model() -> Model:
    line = r"def fee_{n}\(amount: int\) -> int:\n    return amount \* (\d+)"
    steps = [Step(edit, line.replace("{n}", str(n)), f"def fee_{n}") for n in range(EDITS)]
    return Model([*steps, RECALL])


def run(at: Where) -> Any:
    (at.home / FILE).write_text(SOURCE)
    wishes = [f"Raise fee_{n}. {NOTES[n]} {NOTES[n + 2]} {NOTES[n + 4]}" for n in range(EDITS)]
    aider = python_of("app-aider").with_name("aider")
    code, out = at.run_python(
        "app-aider", aider, "--model", f"openai/{MODEL}", "--weak-model", f"openai/{MODEL}", *OPTIONS, FILE,
        stdin="".join(f"{wish}\n" for wish in [*wishes, QUESTION]), LITELLM_LOCAL_MODEL_COST_MAP="True",
    )  # fmt: skip
    said = [line for line in out.splitlines() if not line.startswith("Tokens: ")]
    return [code, said, files_of(at.home, "*.py")]


def test_aider(tmp_path: Path) -> None:
    played = check_program(tmp_path, run, model, l0_tokens=6500, reserve_tokens=1500)
    code, said, files = played.seen
    assert code == 0 and CODE in said
    factors = [int(n) for n in re.findall(r"amount \* (\d+)", files[FILE])]
    assert factors == [n * 7 + 2 + (1000 if n < EDITS else 0) for n in range(12)]
