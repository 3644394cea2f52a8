"""Pages as lines of <VM:CONTEXT>: `U (msg_0042): "..."`, data that can never become structure.

Promises: one page is one line; the quoted part is a JSON string whose value is exactly the page's
text; no line can contain something that opens or closes a `<VM:` tag, whatever the page says; the
output is valid Unicode even where the page's text is not. Packing is deterministic. Media of a page
at level 0 or 1 travel as content parts right behind the line that names them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from proxy.memory.caches import PackCache, PackedLine
from proxy.memory.message_text import prefix_of
from proxy.memory.models import (
    CompressionLevel,
    Counts,
    MemoryPage,
    Modality,
    estimate_text_tokens,
)

CONTEXT_OPEN = "<VM:CONTEXT>"
CONTEXT_CLOSE = "</VM:CONTEXT>"

# Anything that a reader could take for "VM:" after a "<", with whitespace, slashes or invisible
# characters between.
_TAG_NAME = re.compile(r"v[\W_]*m[\W_]*:", re.IGNORECASE)
# Line breaks that JSON leaves alone, control characters, and halves of surrogate pairs (not
# encodable as UTF-8).
_UNSAFE = re.compile("[\x80-\x9f\u2028\u2029\ud800-\udfff]")
_ANGLES = re.compile("[<\uff1c\ufe64\u2039\u27e8\u3008]")
_SAFE_ID = re.compile(r"[A-Za-z0-9_.\-]+")
_encode_string = json.JSONEncoder(ensure_ascii=False).encode
_encode_value = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def quote(text: str) -> str:
    """`text` as a JSON string on one line, with every `<` escaped where the text could form a
    `<VM:` tag.
    """
    return _defuse(_encode_string(text), text)


def quote_json(value: Any) -> str:
    """Any JSON value, compact, under the same guarantee."""
    encoded = _encode_value(value)
    return _defuse(encoded, encoded)


def _defuse(encoded: str, text: str) -> str:
    """Escape inside an encoded JSON text; both characters that matter here only ever stand inside
    its strings.
    """
    if text.isascii():
        if "<" not in text:
            return encoded
        probe = text
    else:
        encoded = _UNSAFE.sub(_unicode_escape, encoded)
        if _ANGLES.search(text) is None:
            return encoded
        probe = unicodedata.normalize("NFKC", text)
    if (
        "\\" in probe
    ):  # `quote_json` probes encoded text, where a line break is the two characters \n
        probe = re.sub(r"\\(?:u[0-9a-fA-F]{4}|.)", " ", probe) + "\n" + probe
    if _TAG_NAME.search(probe) is None:
        return encoded
    return _ANGLES.sub(_unicode_escape, encoded)


def _unicode_escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"


def context_line(
    page_id: str,
    role: str,
    text: str,
    level: CompressionLevel | int = 0,
    modality: Modality = Modality.TEXT,
) -> str:
    """One page as a line; a level above 0 is named. `page_id` is one of ours (other characters
    become `_`).
    """
    if _SAFE_ID.fullmatch(page_id) is None:
        page_id = re.sub(r"[^A-Za-z0-9_.\-]", "_", page_id)
    shown = f"({page_id}, level {int(level)})" if level else f"({page_id})"
    return f"{prefix_of(role, modality).value} {shown}: {quote(text)}"


def context_block(lines: Iterable[str]) -> str:
    """The lines between <VM:CONTEXT> tags; "" when there are none."""
    body = "\n".join(lines)
    return f"{CONTEXT_OPEN}\n{body}\n{CONTEXT_CLOSE}" if body else ""


# What words about a medium are called in a page's metadata, the most telling first.
_WORDS_ABOUT = ("caption", "summary", "topic")
_MEDIUM_TOKENS = 1_105  # gpt-4o's tile rule for a 1024-pixel square


class _Estimates:
    """`Counts` for callers that have no counter: texts by their length, media all alike."""

    def text(self, text: str) -> int:
        return estimate_text_tokens(text)

    def part(self, part: dict[str, Any]) -> int:
        words = part.get("text")
        return estimate_text_tokens(words) if isinstance(words, str) else _MEDIUM_TOKENS


ESTIMATES: Counts = _Estimates()


def page_tokens(page: MemoryPage, counts: Counts) -> int:
    """Tokens of what a page shows: its words and its media."""
    return counts.text(page_words(page)) + sum(counts.part(part) for part in page_parts(page))


def page_parts(page: MemoryPage) -> list[dict[str, Any]]:
    """The page's media as Chat Completions content parts, in order; none for a page of words."""
    if page.modality is Modality.STRUCTURED:
        return []
    return [part for part in _content_parts(page) if part["type"] != "text"]


def page_words(page: MemoryPage) -> str:
    """What a line says of the page: its text; for media the words about them, or `image:{id}`."""
    parts = _content_parts(page)
    if page.modality is Modality.STRUCTURED or not any(p["type"] != "text" for p in parts):
        return page.text()
    said = [str(part.get("text") or "") for part in parts if part["type"] == "text"]
    about = (page.metadata.get(key) for key in _WORDS_ABOUT)
    first = next((words for words in about if isinstance(words, str) and words), None)
    words = "\n".join(text for text in (first, *said) if text)
    kind = "file" if parts[0]["type"] == "file" else page.modality.value
    return words or f"{kind}:{page.page_id}"


def _content_parts(page: MemoryPage) -> list[dict[str, Any]]:
    """The content as parts, when that is what it is; else none."""
    found = page.content if isinstance(page.content, list) else [page.content]
    parts = [p for p in found if isinstance(p, dict) and isinstance(p.get("type"), str)]
    return parts if len(parts) == len(found) else []


def context_parts(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`PackedContext.parts` between <VM:CONTEXT> tags, for the content of a user message."""
    if not parts:
        return []
    tagged = [dict(part) for part in parts]
    if tagged[0]["type"] != "text":
        tagged.insert(0, {"type": "text", "text": ""})
    if tagged[-1]["type"] != "text":
        tagged.append({"type": "text", "text": ""})
    first, last = tagged[0], tagged[-1]
    first["text"] = f"{CONTEXT_OPEN}\n{first['text']}"
    last["text"] = f"{last['text']}\n{CONTEXT_CLOSE}" if last["text"] else CONTEXT_CLOSE
    return tagged


class PackedContext(BaseModel):
    """The packed pages.

    `content`: their lines, without the tags. `parts`: the same lines as text parts with the media
    that they name behind them; one text part when there are none (`context_parts` adds the tags).
    `tokens_est`: lines and media together.
    """

    content: str = ""
    tokens_est: int = 0
    parts: list[dict[str, Any]] = Field(default_factory=list)


class ContextPacker:
    """Packs pages into the lines of <VM:CONTEXT>.

    `cache` keeps packed lines, and may be shared by packers with different `counts`.
    """

    def __init__(self, counts: Counts = ESTIMATES, cache: PackCache | None = None) -> None:
        self._counts = counts
        self._cache = PackCache() if cache is None else cache

    def pack(self, pages: Sequence[MemoryPage]) -> PackedContext:
        """All pages in the order given."""
        packed = [self._packed(page) for page in pages]
        parts: list[dict[str, Any]] = []
        lines: list[str] = []
        for page, (line, _) in zip(pages, packed, strict=True):
            lines.append(line)
            media = page_parts(page)
            if media:
                parts += [{"type": "text", "text": "\n".join(lines)}, *media]
                lines = []
        if lines:
            parts.append({"type": "text", "text": "\n".join(lines)})
        content = "\n".join(line for line, _ in packed)
        return PackedContext(content=content, tokens_est=sum(n for _, n in packed), parts=parts)

    def _packed(self, page: MemoryPage) -> PackedLine:
        # The speaker, or the page's type: a summary, a claim or an index speaks for nobody.
        role = str(page.metadata.get("role", page.page_type.value))
        about = (page.metadata.get(key) for key in _WORDS_ABOUT)
        beside = role, page.modality, *(words for words in about if isinstance(words, str))
        key = (page.page_id, page.version, beside, int(page.compression_level), self._counts)
        known = self._cache.lookup(key)
        if known is not None:
            return known
        level, modality = page.compression_level, page.modality
        line = context_line(page.page_id, role, page_words(page), level, modality)
        media = sum(self._counts.part(part) for part in page_parts(page))
        return self._cache.keep(key, PackedLine(line, self._counts.text(line + "\n") + media))
