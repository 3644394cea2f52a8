"""What the READMEs point at is there, and the tree in the README is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(([^)#:]+)\)")
_FILE = re.compile(r"\b[a-z_0-9]+(?:\*)?\.py\b")


@pytest.mark.parametrize("file", ["README.md", "proxy/memory/README.md"])
def test_links_lead_somewhere(file: str) -> None:
    path = ROOT / file
    links = _LINK.findall(path.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (path.parent / link).exists()] == []


def test_tree_names_every_file_of_the_package_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2].partition("tests/  ")[0]
    named = {name for pattern in _FILE.findall(text) for name in _matching(pattern)}
    there = {p.name for p in (ROOT / "proxy").rglob("*.py") if not p.name.startswith("__")}
    rooms = {p.name for room in ("tokens", "media", "demo") for p in (ROOT / "proxy" / room).glob("*.py")}
    assert there - named - rooms == set(), "a file that the README's tree does not name"
    assert named - there == set(), "a file in the README's tree that is not there"


def _matching(pattern: str) -> set[str]:
    found = {p.name for p in (ROOT / "proxy").rglob(pattern)}
    return found or {pattern}
