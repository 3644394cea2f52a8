"""Claims: what a conversation came to, one short sentence each; and what its user marked as to be kept.

Promises: nothing is claimed by our own reading of a text. A claim is a configured model's, taken from its
answer about a closed segment, or nobody's; a user's own mark ("From now on ...", "I prefer ...") pins the message
that bears it, word for word. Pure; every list and every text has a bound.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from proxy.memory.compressor import clip
from proxy.memory.models import SYSTEM_ROLES, MemoryPage, PageType, StorageTier

# -- what the user marks (English). A standing instruction rules every later answer, and so does a preference; both
# share no word with the questions that they rule, so no search would find them in time.

PIN_TOKENS = 128  # a longer message is not pinned as a whole

# Looked for before the patterns, which cost more than all of these.
_STANDING_WORDS = (
    "always", "never", "from now on", "going forward", "future", "whenever", "every time",
    "each time", "remember", "keep in mind", "ever",
)  # fmt: skip
_PREFERENCE_WORDS = ("prefer", "rather", "favo", "allergic", "call me", "my name")
_STANDING = re.compile(
    r"(?:^|[.!?:\n]\s*)(?:and |so |also |but )?(?:please,? )?"
    r"(?:always|never|from now on|going forward|in (?:the )?future|whenever|every time|each time"
    r"|remember (?:that|to|not)|keep in mind|do not ever|don't ever|make sure (?:to|you) always)\b"
)
_PREFERENCE = re.compile(
    r"\bi(?:'d| would)? (?:much )?(?:prefer|rather|favou?r)\b|\bmy (?:preference|favou?rite)\b"
    r"|\bi(?:'m| am) allergic\b|\bcall me\b|\bmy name is\b"
)


def is_standing(role: str, text: str, tokens: int) -> bool:
    """A short message for all later answers: an instruction of the user's or of the application's, or what
    the user says of their own preferences."""
    if role not in ("user", *SYSTEM_ROLES) or tokens > PIN_TOKENS:
        return False
    low = text.lower()
    if any(word in low for word in _STANDING_WORDS) and _STANDING.search(low):
        return True
    own = role == "user" and any(word in low for word in _PREFERENCE_WORDS)
    return own and bool(_PREFERENCE.search(low))


# -- what a model claims

CLAIMS_PER_SEGMENT = 16
CLAIM_TOKENS = 64
CLAIM_IMPORTANCE = 0.8
MAX_SOURCES = 16  # page ids that one claim keeps as its provenance
_SUBJECT_CHARS = 80
_FENCE = "```"


class Claim(NamedTuple):
    """One statement: what it is about, what it says, and the page that it stands on ("": not said)."""

    subject: str
    text: str
    source: str = ""


def read_claims(answer: str) -> tuple[str, list[Claim]]:
    """(summary, claims) of a model's answer about a segment: each line that is a JSON object with a `subject`
    and a `text` is a claim, the others are the summary. The claims stand for a summary that is not there.
    """
    words: list[str] = []
    claims: list[Claim] = []
    for line in answer.splitlines():
        claim = _claim(line.strip().lstrip("-* ").rstrip(", "))
        if claim is not None:
            claims.append(claim)
        elif not line.startswith(_FENCE):
            words.append(line)
    del claims[CLAIMS_PER_SEGMENT:]
    summary = "\n".join(words).strip() or " ".join(claim.text for claim in claims)
    return summary, claims


def _claim(line: str) -> Claim | None:
    if not line.startswith("{"):
        return None
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    subject, text, source = (said.get(name) for name in ("subject", "text", "source"))
    if not isinstance(subject, str) or not isinstance(text, str) or not text.strip():
        return None
    return Claim(subject, " ".join(text.split()), source if isinstance(source, str) else "")


def claim_page(
    number: int, claim: Claim, sources: Collection[str], turn: int, count: Callable[[str], int]
) -> MemoryPage:
    """`claim_0007`. It rests on the page that the claim names where that is one of `sources`, else on the first
    and the last of these; a later claim about the same subject takes its place."""
    text = clip(claim.text, CLAIM_TOKENS, count)
    ids = list(sources)
    return MemoryPage(
        page_id=f"claim_{number:04d}",
        page_type=PageType.CLAIM,
        content=text,
        storage_tier=StorageTier.L2,
        size_tokens=count(text),
        provenance=[claim.source] if claim.source in sources else list(dict.fromkeys((ids[0], ids[-1]))),
        importance=CLAIM_IMPORTANCE,
        metadata={"turn": turn, "subject": " ".join(claim.subject.casefold().split())[:_SUBJECT_CHARS]},
    )
