"""Hostile media, which the tests make: what each costs the process that decodes it, and the server.

CPU and RSS are the kernel's figures: of the processes that decode, and of this one, which is the server here.
"""

from __future__ import annotations

import asyncio
import io
import os
import resource
import signal
import struct
import sys
import time
import zlib
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import pytest
from PIL import Image

from proxy.api.decoding import Decoders, Killed, Patience
from proxy.config import Config, load_config
from proxy.media.decoders import Codec
from tests.media import samples

TENANT = b"a tenant"
CPU_S, MEMORY_MB = 0.4, 96
_BASE_MB = 110  # Python with a codec: 35 (pypdf) to 70 (PyAV and Pillow), and what is shared
_START_CPU_S = 0.6  # until a codec is imported, on a slow machine


@asynccontextmanager
async def decoders(**limits: object) -> AsyncIterator[Measured]:
    settings = {"cpu_s": CPU_S, "memory_bytes": MEMORY_MB << 20, "timeout_s": 20.0, "processes": 1, **limits}
    found = Measured(load_config(None, {}, {f"decoders.{name}": value for name, value in settings.items()}))
    try:
        yield found
    finally:
        await found.close()


# ---------------------------------------------------------------- what is hostile


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, colour: int, *before: bytes, rows: bytes | None = None) -> bytes:
    """`colour`: PNG's type, 8 bits a channel; all black."""
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    row = bytes(1 + width * {0: 1, 2: 3, 3: 1, 6: 4}[colour])
    if rows is None:
        packer = zlib.compressobj(9)
        rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + b"".join(before) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _image(mode: str, side: int, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, format, **options)
    return out.getvalue()


def _frames(format: str) -> bytes:
    out = io.BytesIO()
    still = [Image.new("P", (500, 500), n % 250) for n in range(60)]
    still[0].save(out, format, save_all=True, append_images=still[1:])
    return out.getvalue()


def _pdf(*objects: bytes, root: int = 1) -> bytes:
    out, at = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        at.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in at)
    return out + b"xref\n0 %d\n0000000000 65535 f \n%strailer <</Size %d /Root %d 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1, table, len(objects) + 1, root, len(out),
    )  # fmt: skip


def _stream(data: bytes, filters: bytes = b"/FlateDecode", extra: bytes = b"") -> bytes:
    return b"<</Length %d /Filter %s %s>>\nstream\n%s\nendstream" % (len(data), filters, extra, data)


_PAGE = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F1 3 0 R>>/XObject<</X 4 0 R>>>>/Contents 4 0 R>>"
_FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"


def _pages(content: bytes, count: int = 1) -> bytes:
    kids = b" ".join(b"%d 0 R" % (5 + n) for n in range(count))
    return _pdf(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, count), _FONT, content,
                *[_PAGE] * count)  # fmt: skip


def _mp4_of(claim: int) -> bytes:
    film = bytearray(samples.mp4(2, 0.5, width=64, height=48))
    for box in (b"stsz", b"stco", b"stts", b"stsc"):  # its tables are gigabytes long
        at = film.find(box)
        film[at + 8 : at + 12] = struct.pack(">I", claim)
    return bytes(film)


def _film_of_jpegs(width: int, height: int, frames: int) -> bytes:
    still, out = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (width, height)).save(still, "JPEG")
    with av.open(out, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        for number in range(frames):
            packet = av.Packet(still.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
            container.mux(packet)
    return out.getvalue()


_WORDS = b"BT /F1 12 Tf " + b"(a) Tj " * 10_000 + b"ET"


@cache
def _zeros() -> bytes:
    return zlib.compress(bytes(200 << 20), 9)


HOSTILE: dict[str, tuple[Codec, Callable[[], bytes]]] = {
    "pages that share a stream": ("pdf", lambda: _pages(_stream(zlib.compress(_WORDS, 9)), 200)),
    "a stream that inflates a thousandfold": ("pdf", lambda: _pages(_stream(_zeros()))),
    "filters upon filters": ("pdf", lambda: _pages(_stream(zlib.compress(zlib.compress(_zeros())), b"[" + b"/FlateDecode " * 300 + b"]"))),
    "a form that shows itself": ("pdf", lambda: _pages(_stream(zlib.compress(b"/X Do " * 9), extra=b"/Subtype/Form/Resources<</XObject<</X 4 0 R>>>>"))),
    "a tree of pages that is a circle": ("pdf", lambda: _pdf(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[2 0 R 2 0 R]/Count 9>>")),
    "arrays within arrays": ("pdf", lambda: _pages(_stream(zlib.compress(b"[" * 400_000)))),
    "an index that goes on with itself": ("pdf", lambda: _pages(_stream(b"")).replace(b"trailer <<", b"trailer <</Prev 9 ")),
    "a million objects": ("pdf", lambda: b"%PDF-1.7\n" + b"1 0 obj\n<<>>\nendobj\n" * 300_000),
    "a gif of 62 megapixels": ("image", lambda: _image("P", 7900, "GIF")),
    "a gif of many frames": ("image", lambda: _frames("GIF")),
    "a gif of comments": ("image", lambda: b"GIF89a\x10\0\x10\0\0\0\0" + b"!\xfe" + b"\x01a" * 2_000_000),
    "a png of 39 megapixels, with colours": ("image", lambda: _png(6250, 6250, 2)),
    "a png of 39 megapixels, transparent": ("image", lambda: _png(6250, 6250, 6)),
    "a png that claims the largest sides": ("image", lambda: _png(2**31 - 1, 2**31 - 1, 2, rows=b"")),
    "a png of texts": ("image", lambda: _png(8, 8, 2, *[_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000)))] * 300)),
    "a png of many frames": ("image", lambda: _frames("PNG")),
    "a webp of the largest sides": ("image", lambda: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0/" + b"\xff" * 4 + bytes(9)),
    "a tiff of 36 megapixels": ("image", lambda: _image("L", 6000, "TIFF", compression="tiff_adobe_deflate")),
    "a progressive jpeg of many scans": ("image", lambda: _many_scans()),
    "an 8K film": ("video", lambda: _film_of_jpegs(7680, 4320, 8)),
    "a film whose tables claim gigabytes": ("video", lambda: _mp4_of(0x7FFFFFFF)),
    "an avi that claims an hour": ("video", lambda: samples.mp4(2, 1.0, format="avi").replace(struct.pack("<I", 20), struct.pack("<I", 90_000))),
    "a film of noise": ("video", lambda: samples.mp4(1, 0.5, codec="libx264", format="matroska")[:900] + os.urandom(2 << 20)),
}  # fmt: skip


def _many_scans() -> bytes:
    """Each scan goes over all blocks again, whatever it holds."""
    plain = _image("L", 4000, "JPEG", progressive=True)
    start = plain.rindex(b"\xff\xda")
    return plain[:start] + plain[start:-2] * 3000 + b"\xff\xd9"


class Measured(Decoders):
    """Knows its processes, and the most RAM that they took."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.pids: set[int] = set()
        self.peak_mb = 0

    async def _process(self) -> Process | None:
        process = await super()._process()
        if process is not None and process.pid not in self.pids:
            self.pids.add(process.pid)
            self.watching = asyncio.ensure_future(self.watch(process.pid))
        return process

    async def watch(self, pid: int) -> None:
        with suppress(OSError, IndexError):  # until it has ended
            while True:
                said = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2]
                self.peak_mb = max(self.peak_mb, int(said.split()[0]) >> 10)
                await asyncio.sleep(0.01)

    def spent_s(self) -> float:
        """CPU of the processes, of those that have ended, too."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        ticks = 0
        for pid in self.pids:
            with suppress(OSError, IndexError):
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("codec", ["pdf", "image", "video"])
async def test_invariant_10_no_medium_costs_more_than_its_limits(codec: Codec) -> None:
    async with decoders() as here:
        for name, (_, make) in ((n, kind) for n, kind in HOSTILE.items() if kind[0] == codec):
            data, spent_s, own_mb = make(), here.spent_s(), _rss_mb()
            own_s = time.process_time()
            assert await here.decode(TENANT, codec, data) is not None, name
            assert here.spent_s() - spent_s < CPU_S + 2 + _START_CPU_S, f"{name} was not ended"
            assert time.process_time() - own_s < 0.5, f"the server paid for {name}"
            assert _rss_mb() - own_mb < 10 + (2 * len(data) >> 20), f"the server paid for {name}"
            assert 0 < here.peak_mb < _BASE_MB + MEMORY_MB, name
        words = [f"Still here, {number}." for number in range(3)]  # on a busy machine one may take more than its CPU
        again = [await here.decode(TENANT, "pdf", samples.pdf([one])) for one in words]
        assert any(found == {"text": one} for found, one in zip(again, words, strict=True))


def _rss_mb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


# ---------------------------------------------------------------- processes


async def test_what_can_be_decoded_is() -> None:
    async with decoders() as here:
        images = await here.decode(TENANT, "image", samples.png(800, 600))
        frames = await here.decode(TENANT, "video", samples.mp4(2, 0.5))
        words = await here.decode(TENANT, "pdf", samples.pdf(["Some words."]))
        assert images and len(images["images"]) == 5
        assert frames and len(frames["frames"][0][1]) == 3
        assert words == {"text": "Some words."}
        assert await here.decode(TENANT, "pdf", b"%PDF-nothing") == {}
        assert len(here._idle) == 1  # the same process, all the time


async def test_one_that_hangs_is_killed_and_replaced() -> None:
    async with decoders(timeout_s=1.0) as here:
        (process,) = here._idle = [await here._process()]
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(Killed, match=r"a medium \(pdf, \d+ bytes\) took more than 1 seconds"):
            await here.decode(TENANT, "pdf", samples.pdf(["Nobody reads it."]))
        assert await process.wait() == -signal.SIGKILL
        here._config = load_config(None, {}, {}).decoders
        assert await here.decode(TENANT, "pdf", samples.pdf(["Read."])) == {"text": "Read."}


async def test_one_that_nobody_waits_for_ends() -> None:
    async with decoders() as here:
        await here.decode(TENANT, "pdf", b"")
        (process,) = here._idle
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with Patience(0.05):
                await here.decode(TENANT, "pdf", b"")
        await asyncio.wait_for(process.wait(), 5)
        assert await here.decode(TENANT, "pdf", samples.pdf(["Read."])) == {"text": "Read."}


async def test_processes_end_when_there_is_nothing_to_do() -> None:
    async with decoders(idle_s=0.05) as here:
        assert not here._idle, "started before it was needed"
        await here.decode(TENANT, "pdf", b"")
        (process,) = here._idle
        await asyncio.wait_for(process.wait(), 5)


async def test_a_failure_of_ours_is_no_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    here = Decoders(load_config(None, {}, {}))
    assert await here.decode(TENANT, "pdf", samples.pdf(["Words."])) is None
    assert "a process that decodes media fails" in caplog.text
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert await here.decode(TENANT, "pdf", samples.pdf(["Words."])) is None
    assert "can be started" in caplog.text
