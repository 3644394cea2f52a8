"""What the libraries are asked in `tests/clients/apps`, and what the model does.

Promises: two tasks, both larger than BUDGET_TOKENS. `chat`: notes, then a question about one of the
first; `agent`: eight ledgers read with a tool, then a question about the second.
"""

from __future__ import annotations

import re
from typing import Any

from tests.clients.programs import MODEL, Model, Step
from tests.clients.scenes import SYSTEM, opening
from tests.e2e.harness import call, message_of

L0_TOKENS, RESERVE_TOKENS = 4000, 1000
DEPOTS = 8
NOTES = [m["content"] for m in opening() if m["role"] == "user"]
ANSWERS = [m["content"] for m in opening() if m["role"] == "assistant"]
QUESTION = "Which code was noted for depot 1?"
AGENT_QUESTION = "Read all ledgers, one by one. Then tell me the seal that Birkdale has."


def ledger(depot: int) -> str:
    """About 500 tokens of which one sentence matters."""
    lines = [
        f"Entry {j}: {(depot * 31 + j * 17) % 97} crates of {_WARES[(depot + j) % 6]}."
        for j in range(36)
    ]
    lines.insert(0, f"The seal of {_NAMES[depot]} is s{(depot + 3) * 7919}.")
    return " ".join(lines)


_NAMES = "Ashford Birkdale Corby Denham Epworth Filey Goole Hexham".split()
_WARES = "amber birch cedar fleece grain hemp".split()


def given(what: str, texts: list[str], stream: bool = False, **more: Any) -> dict[str, Any]:
    """What a driver reads from stdin."""
    ledgers = [ledger(depot) for depot in range(DEPOTS)]
    head = {"what": what, "model": MODEL, "system": SYSTEM, "stream": stream}
    return {**head, "texts": texts, "ledgers": ledgers, **more}


def noted() -> list[Step]:
    return [Step(message_of(text)) for text in ANSWERS]


def told_code(found: re.Match[str] | None) -> dict[str, Any]:
    return message_of(f"It is {found[1]}." if found else "I do not know.")


RECALL = Step(told_code, r"code of depot 1 is (c\d+)", "code of depot 1")
CODE = "It is c7919."


def chat_model() -> Model:
    return Model([*noted(), RECALL])


CHECKS = 4


def long_chat() -> list[str]:
    """The chat of a client that drops its oldest messages: it goes on after the last note."""
    return [*NOTES, *(f"Is note {n} right?" for n in range(5, 5 + CHECKS)), QUESTION]


def long_chat_model() -> Model:
    checked = [
        f"Note {n} is right: I compared it with the list of the depots."
        for n in range(5, 5 + CHECKS)
    ]
    return Model([*noted(), *(Step(message_of(text)) for text in checked), RECALL])


SEAL = "The seal is s31676."


def told_seal(found: re.Match[str] | None) -> dict[str, Any]:
    return message_of(f"The seal is {found[1]}." if found else "I do not know.")


RECALL_SEAL = Step(told_seal, r"seal of Birkdale is (s\d+)", "seal of Birkdale")


def read(*depots: int) -> dict[str, Any]:
    """The model reads these ledgers, in one message."""
    return message_of(None, [call(f"call_{n}", "ledger", {"depot": n}) for n in depots])


READS = [Step(read(0, 1)), *(Step(read(n)) for n in range(2, DEPOTS))]


def agent_model() -> Model:
    return Model([*READS, RECALL_SEAL])
