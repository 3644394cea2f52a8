"""How many examples a property is tried on: always the same ones, on however slow a machine."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> settings:
    """A decorator beside `given`: `count` examples, drawn from the test itself and not stored."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)
