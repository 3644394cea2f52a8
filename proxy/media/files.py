"""The words of a file.

Promises: text, JSON and PDF only; at most MAX_PDF_PAGES pages and MAX_CHARS characters; nothing
raises on broken or hostile data; None means that there are no words to be had.
"""

from __future__ import annotations

import io
from contextlib import suppress

MAX_CHARS = 1_000_000
MAX_PDF_PAGES = 200
MAX_PDF_BYTES = 50_000_000
_TEXT_MIMES = frozenset(
    """
    application/json application/xml application/javascript application/x-yaml application/yaml
    application/toml application/sql application/x-sh application/x-ndjson application/csv
    image/svg+xml
    """.split()
)
_TEXT_ENDINGS = frozenset(
    """
    txt md markdown rst csv tsv json jsonl ndjson yaml yml toml ini cfg conf log xml html htm svg
    css js mjs ts tsx jsx py pyi rb go rs java kt c h cc cpp hpp cs php sh sql tex diff patch
    """.split()
)


def file_text(data: bytes, mime: str, filename: str | None) -> str | None:
    """The words of a text, JSON or PDF file; None for any other kind, or when it has none.

    What the bytes are decides for PDF; for text the type, or the name's ending.
    """
    if data[:1024].lstrip()[:5] == b"%PDF-":
        return _pdf_text(data)
    kind = mime.partition(";")[0].strip().lower()
    ending = (filename or "").rpartition(".")[2].lower()
    known = kind.startswith("text/") or kind in _TEXT_MIMES or kind.endswith(("+json", "+xml"))
    if not known and ending not in _TEXT_ENDINGS:
        return None
    return _decoded(data[: MAX_CHARS * 4])


def _decoded(data: bytes) -> str | None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", "replace")
    elif b"\0" in data[:4096]:
        return None  # binary, whatever its name says
    else:
        text = data.decode("utf-8-sig", "replace")
    return text[:MAX_CHARS] if text.strip() else None


def _pdf_text(data: bytes) -> str | None:
    if len(data) > MAX_PDF_BYTES:
        return None
    pieces: list[str] = []
    # The parser meets hostile bytes here: whatever it raises ends the text where it stands.
    with suppress(Exception):
        from pypdf import PdfReader

        reader = PdfReader(io.BytesIO(data), strict=False)
        left = MAX_CHARS
        for index in range(min(len(reader.pages), MAX_PDF_PAGES)):
            words = reader.pages[index].extract_text()[:left].strip()
            pieces.append(words)
            left -= len(words)
            if left <= 0:
                break
    return "\n\n".join(piece for piece in pieces if piece) or None
