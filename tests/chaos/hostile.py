"""Requests that cost a server far more than they cost who sends them. Each is unlike the one before it.

Promises: `KINDS[name](n)` gives the n-th request's fields (`messages`, sometimes `tools`); it makes its
files itself, in at most a second; each is valid for the API. The hostile part is old enough that a small
window has to show something smaller in its place.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from tests.e2e.answers import call
from tests.e2e.script import filler

Fields = dict[str, Any]
Message = dict[str, Any]


def _behind(n: int, *first: Message) -> Fields:
    """The hostile messages, and talk behind them that fills a small window."""
    talk: list[Message] = []
    for i in range(6):
        role = "user" if i % 2 else "assistant"
        talk.append({"role": role, "content": filler(f"{n}/{i}", 300)})
    return {"messages": [*first, *talk]}


def _file(n: int, kind: str, data: bytes) -> Fields:
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    part: Message
    if kind == "application/pdf":
        part = {"type": "file", "file": {"filename": f"{n}.pdf", "file_data": url}}
    elif kind.startswith("audio/"):
        part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    else:
        part = {"type": "image_url", "image_url": {"url": url}}
    return _behind(n, {"role": "user", "content": [{"type": "text", "text": f"Read this, {n}."}, part]})


def _result(n: int, content: str) -> Fields:
    asks = {"role": "assistant", "content": None, "tool_calls": [call(f"call_{n}", "get", {"n": n})]}
    answers = {"role": "tool", "tool_call_id": f"call_{n}", "content": content}
    return _behind(n, {"role": "user", "content": f"Get it, {n}."}, asks, answers)


# -- files


def pdf(objects: list[bytes]) -> bytes:
    """A PDF of these objects; the first is its catalog."""
    out, at = b"%PDF-1.5\n", []
    for i, made in enumerate(objects, 1):
        at.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (i, made)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in at)
    size = len(objects) + 1
    trailer = b"trailer <</Size %d /Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (size, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + trailer


def _stream(data: bytes, more: bytes = b"") -> bytes:
    packed = zlib.compress(data, 9)
    return b"<</Length %d /Filter /FlateDecode%b>>\nstream\n%b\nendstream" % (len(packed), more, packed)


_FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
_FORM = b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]"


@functools.cache
def _pdf_of_pages(pages: int = 200, words: int = 150_000) -> bytes:
    """Pages that share one long content: 30 KB."""
    kids = b" ".join(b"%d 0 R" % (5 + i) for i in range(pages))
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F1 3 0 R>>>>/Contents 4 0 R>>"
    content = _stream(b"BT /F1 12 Tf " + b"(a) Tj " * words + b"ET")
    return pdf([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%b]/Count %d>>" % (kids, pages), _FONT,
                content, *[page] * pages])  # fmt: skip


@functools.cache
def _pdf_of_forms(depth: int = 9, times: int = 10) -> bytes:
    """Forms that show the next form ten times each, 10^9 words in 3 KB; the page's content is the first."""
    forms = []
    for i in range(depth):
        below = b"/Resources<</XObject<</X %d 0 R>>>>" % (6 + i)
        forms.append(_stream(b"/X Do " * times, _FORM + below))
    forms.append(_stream(b"BT /F1 9 Tf (word) Tj ET", _FORM + b"/Resources<</Font<</F1 3 0 R>>>>"))
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</XObject<</X 5 0 R>>>>/Contents 5 0 R>>"
    return pdf([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[4 0 R]/Count 1>>", _FONT, page, *forms])


@functools.cache
def _gif(side: int = 7900, frames: int = 3) -> bytes:
    """62 megapixels, four times, in 47 KB."""
    image, out = Image.new("P", (side, side)), io.BytesIO()
    image.save(out, "GIF", save_all=True, append_images=[image.copy() for _ in range(frames)])
    return out.getvalue()


@functools.cache
def _png(side: int = 30_000) -> bytes:
    """900 megapixels in black and white: 110 KB."""
    rows = zlib.compressobj(9)
    line = b"\0" + bytes((side + 7) // 8)
    data = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@functools.cache
def _wav(seconds: int = 4_000_000) -> bytes:
    """A header that says four million seconds, and a second of sound."""
    size = min(seconds * 16_000, 2**32 - 100)
    head = b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt "
    return head + struct.pack("<IHHIIHH", 16, 1, 1, 8_000, 16_000, 2, 16) + b"data" + struct.pack("<I", size) + bytes(16_000)


# -- the kinds


def _tiny(n: int, count: int = 20_000) -> Fields:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{n} {i}"} for i in range(count)]
    return {"messages": [*messages, {"role": "user", "content": "and now?"}]}


def _long(n: int, count: int = 2_000) -> Fields:
    messages = [{"role": ("user", "assistant")[i % 2], "content": filler(f"{n}/{i}", 60)} for i in range(count)]
    return {"messages": [*messages, {"role": "user", "content": f"What was {n}/7?"}]}


def _calls(n: int, count: int = 10_000) -> Fields:
    calls = [call(f"c{n}_{i}", "get", {"i": i}) for i in range(count)]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": f"{n} {i}"} for i, c in enumerate(calls)]
    asks: Message = {"role": "assistant", "content": None, "tool_calls": calls}
    return _behind(n, {"role": "user", "content": "Get them all."}, asks, *results)


def _tools(n: int, count: int = 20_000) -> Fields:
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": f"t{n}_{i}", "parameters": schema}} for i in range(count)]
    return {**_behind(n, {"role": "user", "content": "hello"}), "tools": tools}


def _parts(n: int, count: int = 50_000) -> Fields:
    return _behind(n, {"role": "user", "content": [{"type": "text", "text": f"{n} {i}"} for i in range(count)]})


def _word(n: int, chars: int = 3_000_000) -> Fields:
    text = random.Random(n).randbytes(chars // 2).hex()
    return _behind(n, {"role": "user", "content": text})


KINDS: dict[str, Callable[[int], Fields]] = {
    "first sight, 2,000 messages": _long,
    "first sight, 20,000 tiny messages": _tiny,
    "a PDF of shared pages": lambda n: _file(n, "application/pdf", _pdf_of_pages() + b"%%%d" % n),
    "a PDF of nested forms": lambda n: _file(n, "application/pdf", _pdf_of_forms() + b"%%%d" % n),
    "a GIF of 62 megapixels": lambda n: _file(n, "image/gif", _gif() + b"%d" % n),
    "a PNG of 900 megapixels": lambda n: _file(n, "image/png", _png() + b"%d" % n),
    "a WAV of 46 days": lambda n: _file(n, "audio/wav", _wav() + b"%d" % n),
    "JSON, 100,000 deep": lambda n: _result(n, f'{{"n": {n}, "a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "JSON of 300,000 keys": lambda n: _result(n, json.dumps({f"k{n}_{i}": i for i in range(300_000)})),
    "a JSON result of 4 MB": lambda n: _result(n, json.dumps([{"id": i, "text": filler(f"{n}{i}", 12)} for i in range(35_000)])),
    "a word of 3 MB": _word,
    "a message of 50,000 parts": _parts,
    "a message of 10,000 tool calls": _calls,
    "20,000 tools": _tools,
}
