"""Who speaks, where no `name` says it: a name in front of what is said, as applications for several people have it.

Promises: pure; a label is told by its form alone; a text without one stays as it is.
"""

from __future__ import annotations

import re

_LABEL_CHARS = 3 * 32 + 1
# One to three words that are no sentence's: none is in small letters.
_LABEL = re.compile(r"((?:[^\W\d_][\w.'’-]{0,30} ?){1,3}):\s")


def speaker_label(text: str) -> str:
    """The name that a text begins with; "" for none."""
    found = _LABEL.match(text) if ":" in text[:_LABEL_CHARS] else None
    return found[1] if found and not any(word.islower() for word in found[1].split()) else ""
