"""What a user's message is worth keeping for: standing instructions and preferences outlive their turn.

Promises: deterministic, a few regular expressions, English; a miss only costs a fault later. A
standing instruction ("Always cite sources", "From now on answer in French") rules every later
answer and shares no word with the questions that it rules, so no search would find it in time.
"""

from __future__ import annotations

import re

from proxy.memory.models import DEFAULT_IMPORTANCE

PREFERENCE_IMPORTANCE = 0.9
PIN_TOKENS = 128  # a longer message is not pinned as a whole
_READ_CHARS = 4000

# Looked for before the patterns, which cost more than all of these.
_STANDING_WORDS = (
    "always", "never", "from now on", "going forward", "future", "whenever", "every time",
    "each time", "remember", "keep in mind", "ever",
)  # fmt: skip
_PREFERENCE_WORDS = ("prefer", "rather", "favo", "preference", "allergic", "call me", "my name")

# Shared with the rules of claims: how an instruction for all later answers begins, in lower case.
STANDING_OPENING = (
    r"(?:please,? )?"
    r"(?:always|never|from now on|going forward|in (?:the )?future|whenever|every time|each time"
    r"|remember (?:that|to|not)|keep in mind|do not ever|don't ever|make sure (?:to|you) always)\b"
)
PREFERENCE_VERB = r"(?:prefer|rather|favou?r)"

_STANDING = re.compile(rf"(?:^|[.!?:\n]\s*)(?:and |so |also |but )?{STANDING_OPENING}")
_PREFERENCE = re.compile(
    rf"\bi(?:'d| would)? (?:much )?{PREFERENCE_VERB}\b|\bmy (?:preference|favou?rite)\b"
    r"|\bi(?:'m| am) allergic\b|\bcall me\b|\bmy name is\b"
)


def is_standing(role: str, text: str, tokens: int) -> bool:
    """A short message of the user's, or of the application's, that gives an instruction for all later
    answers."""
    if role not in ("user", "system", "developer") or tokens > PIN_TOKENS:
        return False
    low = text.lower()
    return any(word in low for word in _STANDING_WORDS) and bool(_STANDING.search(low))


def importance_of(role: str, text: str) -> float:
    """0..1 for a new page."""
    if role == "user":
        low = text[:_READ_CHARS].lower()
        if any(word in low for word in _PREFERENCE_WORDS) and _PREFERENCE.search(low):
            return PREFERENCE_IMPORTANCE
    return DEFAULT_IMPORTANCE
