"""What the drivers share. A driver runs in the environment of its library, which has nothing of ours:
it reads its task from stdin and prints what it saw as one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

BASE_URL, API_KEY = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
given: Any = json.load(sys.stdin)
MODEL: str = given["model"]


def ledger(depot: int) -> str:
    """The ledger of a depot.

    Args:
        depot: The number of the depot.
    """
    return str(given["ledgers"][depot])


def show(seen: Any) -> None:
    """The last line of the output."""
    print("\n" + json.dumps(seen), flush=True)
