"""Levels of text, files and JSON.

Promises: text in the page's own words (`compress_text`); JSON stays JSON at level 1, is its key
facts at level 2 and its shape at level 3; a file is the words in it. See `level_base` for what
holds for every compressor.
"""

from __future__ import annotations

from typing import Any

from proxy.media.files import file_text
from proxy.media.parts import Medium, read_part
from proxy.memory.compressor import ABSTRACT_TOKENS, clip, compress_text
from proxy.memory.level_base import Step, StepCompressor, said, words_of
from proxy.memory.level_json import SHAPE_TOKENS, key_facts, parse_json, shape, truncated
from proxy.memory.models import CompressionLevel, MemoryPage

_NAME_CHARS = 80


class TextCompressor(StepCompressor):
    """Text: a third of it, key points, topic tags. A `file` part: its words, then `file:{name}`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """A file's name and what is known of it."""
        medium = _medium(page)
        if medium is None:
            return {}
        name = medium.name or page.page_id
        return {"file_name": name[:_NAME_CHARS], "facts": _file_line(medium, page)}

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `level_base`."""
        count = step.counts.text
        name = said(page.metadata, "file_name")
        if name and step.level == CompressionLevel.REFERENCE:
            reference = f"file:{name}"
            if count(reference) <= step.limit:  # else the few words themselves say more
                return reference
        medium = _medium(page)
        if medium is None:
            return text_at(words_of(page.content), step)
        words = said(page.metadata, "summary") if step.level == CompressionLevel.ABSTRACT else ""
        if not words and medium.data is not None:
            words = file_text(medium.data, medium.mime, medium.name) or ""
        if not words:
            words = said(page.metadata, "summary", "caption", "facts")
            return clip(words, min(step.limit, ABSTRACT_TOKENS), count)
        return reduced(words, step)


class StructuredCompressor(StepCompressor):
    """JSON: fewer items of the same schema, key facts, shape. Any other text: as text."""

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `level_base`."""
        return reduced(words_of(page.content), step)


def reduced(words: str, step: Step) -> str:
    """`words` at a level, as JSON when they are an object or an array, else as text."""
    is_json, value = parse_json(words)
    if not is_json:
        return text_at(words, step)
    count = step.counts.text
    if step.level == CompressionLevel.REDUCED:
        short = truncated(value, words, step.limit, count)
        if short is not None:
            return short
        return words if count(words) <= step.limit else _outline(value, step.limit, step)
    if step.level == CompressionLevel.ABSTRACT:
        limit = min(step.limit, ABSTRACT_TOKENS)
        return key_facts(value, limit, count) or _outline(value, limit, step)
    return _outline(value, min(step.limit, SHAPE_TOKENS), step)


def _outline(value: Any, limit: int, step: Step) -> str:
    return shape(value, limit, step.counts.text) or clip("{…}", limit, step.counts.text)


def text_at(words: str, step: Step) -> str:
    """`words` at a level by `compress_text`."""
    return compress_text(words, step.level, step.limit, step.counts.text)


def _medium(page: MemoryPage) -> Medium | None:
    """The medium that the page still has; a JSON value of another kind is none."""
    return read_part(page.content) if isinstance(page.content, dict) else None


def _file_line(medium: Medium, page: MemoryPage) -> str:
    pieces = [medium.kind, (medium.name or page.page_id)[:_NAME_CHARS], medium.mime]
    if medium.data is not None:
        pieces.append(size_shown(len(medium.data)))
    return " ".join(piece for piece in pieces if piece)


def size_shown(size_bytes: int) -> str:
    """A size for people: "812 B", "85 kB", "3.4 MB"."""
    if size_bytes < 1_000:
        return f"{size_bytes} B"
    if size_bytes < 1_000_000:
        return f"{size_bytes / 1_000:.0f} kB"
    return f"{size_bytes / 1_000_000:.1f} MB"
