"""Who speaks, where no `name` says it: a name in front of what is said, as applications for several people have it.

Promises: pure; a label is told by its form alone; a text without one stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# One to three words that are no sentence's: none is in small letters.
_LABEL = re.compile(r"((?:[^\W\d_][\w.'’-]{0,30} ?){1,3}):\s")
_WORD = re.compile(r"[^\W_]+")
_LEAST_PAGES = 2  # that a speaker has


def speaker_label(text: str) -> str:
    """The name that a text begins with; "" for none."""
    found = _LABEL.match(text)
    return found[1] if found and not any(word.islower() for word in found[1].split()) else ""


def without_speakers(text: str, labels: Iterable[str]) -> str:
    """A question without the names that stand in front of pages; as it is when it has nothing else. `labels`:
    of each page that has one."""
    times: dict[str, int] = {}
    for label in labels:
        times[label] = times.get(label, 0) + 1
    names = {
        word for label, pages in times.items() if pages >= _LEAST_PAGES
        for word in _WORD.findall(label.casefold())
    }  # fmt: skip
    words = text.split()
    return " ".join(w for w in words if names.isdisjoint(_WORD.findall(w.casefold()))) or text
