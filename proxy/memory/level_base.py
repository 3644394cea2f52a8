"""What every compressor promises, and the one loop that keeps the promise.

Promises: a compressed page keeps its id, modality, type and provenance, and says its level and its
tokens; the page that it was made from is never changed; each level costs at most what the level
above it costs, whatever the content; the same page gives the same result; asking for more detail
than a page has returns the page itself.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from proxy.memory.compressor import ABSTRACT_TOKENS
from proxy.memory.models import CompressionLevel, Counts, MemoryPage


class Compressor(Protocol):
    """Makes lower levels of the pages of one modality."""

    def compress(
        self,
        page: MemoryPage,
        level: CompressionLevel | int,
        counts: Counts,
        max_tokens: int | None = None,
    ) -> MemoryPage:
        """`page` at `level` (0..3, else ValueError), at most `max_tokens` above level 0."""


class Step(NamedTuple):
    """One step down. `limit` is the most tokens that the result may have; `is_last` is False when
    only the size of this level matters, for the bound on the next one.
    """

    level: CompressionLevel
    limit: int
    counts: Counts
    is_last: bool


class StepCompressor(ABC):
    """Goes down level by level, so that no level can cost more than the one above it."""

    def compress(
        self,
        page: MemoryPage,
        level: CompressionLevel | int,
        counts: Counts,
        max_tokens: int | None = None,
    ) -> MemoryPage:
        """`page` at `level`; see `Compressor`."""
        target = CompressionLevel(level)
        if target <= page.compression_level:
            return page
        is_full = page.compression_level == CompressionLevel.FULL
        learned = self.learned(page) if is_full else {}
        source = page.model_copy(update={"metadata": {**page.metadata, **learned}})
        limit = page.size_tokens or content_tokens(page.content, counts)
        if max_tokens is not None:
            limit = min(limit, max(0, max_tokens))
        content: Any = page.content
        for number in range(page.compression_level + 1, target + 1):
            step = Step(CompressionLevel(number), limit, counts, number == target)
            content = self.content_at(source, step)
            if content is None:  # too dear to make for its size alone
                limit = min(limit, ABSTRACT_TOKENS)
            else:
                limit = min(limit, content_tokens(content, counts))
        return source.model_copy(
            update={"content": content, "compression_level": target, "size_tokens": limit}
        )

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """Metadata that a full page's lower levels need and their content will not tell."""
        return {}

    @abstractmethod
    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """The content of `page` at `step.level`, within `step.limit`.

        None is allowed when `not step.is_last`, and then promises that the level would cost at
        least min(step.limit, ABSTRACT_TOKENS).
        """


def content_tokens(content: Any, counts: Counts) -> int:
    """Tokens of a page's content: a text, a content part, a list of parts, or a JSON value."""
    if content is None:
        return 0
    if isinstance(content, str):
        return counts.text(content)
    if isinstance(content, dict) and isinstance(content.get("type"), str):
        return counts.part(content)
    if isinstance(content, list) and content and all(_is_part(item) for item in content):
        return sum(counts.part(item) for item in content)
    return counts.text(json_text(content))


def _is_part(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") in ("text", "image_url")


def json_text(value: Any) -> str:
    """A value as compact JSON; "" for what cannot be JSON (cycles, keys that are no strings)."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except (TypeError, ValueError, RecursionError):
        return ""


def words_of(content: Any) -> str:
    """A content as text, whatever it is."""
    if content is None:
        return ""
    return content if isinstance(content, str) else json_text(content)


def said(metadata: Mapping[str, Any], *keys: str) -> str:
    """The first of `keys` in the metadata that has words; "" when none has."""
    for key in keys:
        value = metadata.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""
