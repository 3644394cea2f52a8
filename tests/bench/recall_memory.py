"""PageIndex in the shape that the recall measure of the shared folder wants.

Run from the repository's root, side by side with the baselines (they need numpy and PyStemmer):

  for data in locomo beam; do
    python ../shared/bench/recall.py --data $data --by headline \\
      --memory baselines:FTS5 --memory baselines:StemmedBM25 \\
      --memory tests.bench.recall_memory:Paged
  done

`search` is PageIndex.search, pages of one message counting once. `window` is the last few messages,
then results by score per token (`density` softens the division), skipping what does not fit.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol

from proxy.search.fts import Doc, PageIndex

TAIL_MESSAGES = 4
PAGE_CHARS = 4096  # about 1,024 tokens, as pages.max_tokens
WINDOW_RESULTS = 200


class Message(Protocol):
    id: int
    role: str
    content: str
    name: str
    tokens: int
    time: datetime | None  # when the proxy saw it


class Paged:
    """One conversation, indexed page by page as its messages arrive."""

    def __init__(self, density: float = 0.4) -> None:
        self._density = density
        self._index = PageIndex()
        self._messages: list[Message] = []

    def add(self, msg: Message) -> None:
        self._messages.append(msg)
        texts = _split(msg.content)
        first = 1 if len(texts) > 1 else 0
        self._index.extend(
            Doc(msg.id, part, msg.role, msg.name, text) for part, text in enumerate(texts, first)
        )

    def _seen_s(self, position: int) -> int:
        time = self._messages[position].time
        return int(time.replace(tzinfo=UTC).timestamp()) if time else 0

    def search(self, query: str, limit: int) -> list[int]:
        hits = self._index.search(query, 3 * limit, None, self._seen_s)
        return list(dict.fromkeys(hit.position for hit in hits))[:limit]

    def window(self, question: str, budget: int) -> list[int]:
        messages = self._messages
        chosen: list[int] = []
        used = 0
        value: dict[int, float] = {}
        for hit in self._index.search(question, WINDOW_RESULTS, None, self._seen_s):
            tokens = messages[hit.position].tokens
            value.setdefault(hit.position, hit.score / tokens**self._density)
        ranked = sorted(value, key=lambda position: (-value[position], -position))
        newest = range(len(messages) - 1, -1, -1)
        for position in dict.fromkeys([*newest[:TAIL_MESSAGES], *ranked, *newest]):
            if used + messages[position].tokens <= budget:
                chosen.append(position)
                used += messages[position].tokens
        return chosen


def _split(text: str) -> list[str]:
    """Parts of at most PAGE_CHARS, cut at a line's end or a space where there is one."""
    parts = []
    while len(text) > PAGE_CHARS:
        cut = max(text.rfind("\n", PAGE_CHARS // 2, PAGE_CHARS), 0)
        cut = cut or max(text.rfind(" ", PAGE_CHARS // 2, PAGE_CHARS), 0) or PAGE_CHARS
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]
