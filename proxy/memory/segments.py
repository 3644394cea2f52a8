"""What a conversation keeps beside its messages: of a closed segment one line that says what it was about, and
a model's summary and claims; and what rests on what.

Promises: pure and deterministic; every derived page names the pages that it was made from; every list and every
text has a bound. Nothing is claimed by our own reading of a text: a claim is a configured model's, taken from its
answer about a closed segment, or nobody's. By page type a segment makes: index at once; summary (one) and claims when a model
has written them. Transcript and artifact pages are the messages themselves; nobody makes procedure pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from proxy.memory.compressor import clip, compress_text
from proxy.memory.models import CompressionLevel, MemoryPage, PageType, StorageTier

_Count = Callable[[str], int]  # tokens of a text

# -- of a closed segment

INDEX_TOKENS = 48
_READ_CHARS = 8_000  # of a segment, in equal shares of its messages, for its topics
_NUMBER = re.compile(r"\b\d+\b")
_DERIVED_IMPORTANCE = 0.7
CLAIMS_PER_SEGMENT = 16
CLAIM_TOKENS = 64
_CLAIM_IMPORTANCE = 0.8
MAX_SOURCES = 16  # page ids that one claim keeps as its provenance
_SUBJECT_CHARS = 80
_FENCE = "```"


def index_id(number: int) -> str:
    return f"index_seg_{number:02d}"


def summary_id(number: int) -> str:
    return f"summary_seg_{number:02d}"


def index_page(number: int, ids: Sequence[str], texts: Sequence[str], count: _Count) -> MemoryPage:
    """`seg 03 (msg_0040-msg_0088): Postgres, deadline, migration`, for the manifest. Segments count from 1; `ids`
    are its first and its last page's, `texts` its messages', at least one."""
    share = max(80, _READ_CHARS // len(texts))
    read = "\n".join(_NUMBER.sub(" ", text[:share]) for text in texts)
    topics = compress_text(read, CompressionLevel.REFERENCE, None, count)
    line = clip(f"seg {number:02d} ({ids[0]}-{ids[-1]}): {topics}".rstrip(": "), INDEX_TOKENS, count)
    return _derived(index_id(number), PageType.INDEX, line, [ids[0], ids[-1]], count)


def summary_page(number: int, text: str, sources: Sequence[str], count: _Count) -> MemoryPage:
    """What a model wrote of the segment whose messages are `sources`."""
    return _derived(summary_id(number), PageType.SUMMARY, text, list(sources), count)


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


def claim_page(number: int, claim: Claim, sources: Collection[str], count: _Count) -> MemoryPage:
    """`claim_0007`. It rests on the page that the claim names where that is one of `sources`, else on the first
    and the last of these; a later claim about the same subject takes its place."""
    ids = list(sources)
    named = [claim.source] if claim.source in sources else list(dict.fromkeys((ids[0], ids[-1])))
    text = clip(claim.text, CLAIM_TOKENS, count)
    page = _derived(f"claim_{number:04d}", PageType.CLAIM, text, named, count, _CLAIM_IMPORTANCE)
    page.metadata["subject"] = " ".join(claim.subject.casefold().split())[:_SUBJECT_CHARS]
    return page


def _derived(
    page_id: str, page_type: PageType, text: str, sources: list[str], count: _Count,
    importance: float = _DERIVED_IMPORTANCE,
) -> MemoryPage:  # fmt: skip
    return MemoryPage(
        page_id=page_id,
        page_type=page_type,
        content=text,
        storage_tier=StorageTier.L2,
        size_tokens=count(text),
        provenance=sources,
        importance=importance,
    )


# -- what rests on what

MAX_WALK = 4096  # pages in one answer
MAX_DEPTH = 16


class ProvenanceGraph:
    """Pages and the pages that they derive from, walked both ways: what msg_0042 led to, what justifies
    claim_0007. Answers are in a fixed order (nearest first, then as added); a cycle is walked once around."""

    def __init__(self, pages: Iterable[MemoryPage] = ()) -> None:
        self._sources: dict[str, dict[str, None]] = {}
        self._derived: dict[str, dict[str, None]] = {}
        for page in pages:
            self.add_page(page)

    def add_page(self, page: MemoryPage) -> None:
        """Enter a page with its `provenance`; a page never derives from itself."""
        for source in page.provenance:
            if source != page.page_id:
                self._sources.setdefault(page.page_id, {})[source] = None
                self._derived.setdefault(source, {})[page.page_id] = None

    def derives_from(self, page_id: str) -> list[str]:
        """What the page was made from."""
        return list(self._sources.get(page_id, ()))

    def derived(self, page_id: str) -> list[str]:
        """What was made from the page."""
        return list(self._derived.get(page_id, ()))

    def justifies(self, page_id: str) -> list[str]:
        """The pages that the claim rests on in the end: its ancestors that derive from nothing themselves."""
        return [p for p in _walk(self._sources, page_id) if p not in self._sources]


def _walk(edges: Mapping[str, Mapping[str, None]], start: str) -> list[str]:
    """Breadth first from `start`, which is not in the answer."""
    found: list[str] = []
    layer, seen = [start], {start}
    for _ in range(MAX_DEPTH):
        layer = list(dict.fromkeys(other for page in layer for other in edges.get(page, ()) if other not in seen))
        seen.update(layer)
        found += layer
    return found[:MAX_WALK]
