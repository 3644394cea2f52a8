"""How many examples a property is tried on: in the suite some, always the same ones, on however slow a machine. With
LLM_PAGER_EXAMPLES=N it is N, and others each time."""

from __future__ import annotations

import os

from hypothesis import settings

ASKED = int(os.environ.get("LLM_PAGER_EXAMPLES", "0"))


def examples(count: int) -> settings:
    """A decorator beside `given`, or what a state machine's settings begin with; what is found is not stored."""
    return settings(max_examples=ASKED or count, deadline=None, derandomize=not ASKED, database=None)
