"""Pages as lines of <VM:CONTEXT>: `U (msg_0042): "..."`, data that can never become structure.

Promises: one page is one line; the quoted part is a JSON string whose value is exactly the page's
text; no line can contain something that opens or closes a `<VM:` tag, whatever the page says; the
output is valid Unicode even where the page's text is not. Packing is deterministic and keeps the
order it was given.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, Field

from proxy.memory.models import CompressionLevel, MemoryPage, Modality, estimate_text_tokens
from proxy.memory.pages import prefix_of

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


class PackedContext(BaseModel):
    """The packed lines (without the tags), the ids of the pages in them, and their tokens."""

    content: str = ""
    page_ids: list[str] = Field(default_factory=list)
    tokens_est: int = 0


class ContextPacker:
    """Packs pages into the lines of <VM:CONTEXT>; `count` counts tokens (default: an estimate by
    length).
    """

    def __init__(self, count: Callable[[str], int] = estimate_text_tokens) -> None:
        self._count = count

    def pack(self, pages: Sequence[MemoryPage], token_budget: int | None = None) -> PackedContext:
        """All pages in the order given; under `token_budget` the last ones have the first claim."""
        kept: list[tuple[str, str]] = []
        used = 0
        for page in reversed(pages):
            line = context_line(
                page.page_id,
                _role_of(page),
                page.text(),
                page.compression_level,
                page.modality,
            )
            tokens = self._count(line + "\n")
            if token_budget is not None and used + tokens > token_budget:
                continue
            used += tokens
            kept.append((page.page_id, line))
        kept.reverse()
        return PackedContext(
            content="\n".join(line for _, line in kept),
            page_ids=[page_id for page_id, _ in kept],
            tokens_est=used,
        )


def _role_of(page: MemoryPage) -> str:
    role = page.metadata.get("role", page.page_type.value)
    return role if isinstance(role, str) else ""
