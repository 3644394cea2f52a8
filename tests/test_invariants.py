"""Each invariant of proxy/memory/__init__.py has at least one test that carries its number."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

import proxy.memory

TESTS = Path(__file__).parent
_NAMED = re.compile(r"def (test_invariant_(\d+)_\w+)\(")


def _named() -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        if "bench" in path.parts:
            continue
        for name, number in _NAMED.findall(path.read_text()):
            found[int(number)].append(f"{path.relative_to(TESTS)}::{name}")
    return found


def test_the_invariants_are_numbered_one_to_ten() -> None:
    numbers = re.findall(r"^ ?(\d+)\. ", proxy.memory.__doc__ or "", re.MULTILINE)
    assert [int(n) for n in numbers] == list(range(1, 11))


@pytest.mark.parametrize("number", range(1, 11))
def test_each_invariant_has_a_test_with_its_number(number: int) -> None:
    assert _named()[number]


def test_no_test_names_an_invariant_that_is_not_there() -> None:
    assert set(_named()) <= set(range(1, 11))
