"""The process: its log, its memory allocation and garbage collection.

Promises: the log is on stderr, one line an entry, as text or as JSON; levels are ours for our own entries,
warnings and worse for other libraries'; an entry's `fields`, if it has some, are keys of its JSON object.
Tuning changes speed only.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TextIO

_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode

# Bodies of megabytes come and go with every request: glibc would map and unmap each, and the kernel would zero
# every page of it again. mallopt's parameters, from malloc.h:
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_BYTES = 32 << 20  # glibc's own limit for the mmap threshold
_KEPT_FREE_BYTES = 128 << 20  # freed memory that stays with the process
_PAD_BYTES = 16 << 20

# Every collection stops all threads: for some milliseconds for 10,000 objects. Pages and nodes are long-lived and hold
# no cycles; what does hold them (a request's tasks and errors) dies young, nearly always. So old objects, which grow with
# what is cached, are looked at only now and then (`collect_now_and_then`), and where that can be, when nobody waits.
_YOUNG_OBJECTS, _MIDDLE, _OLD = 10_000, 1, 1_000_000_000
_COLLECT_S = 600  # between two looks, and as long again at most for a moment without a request

# How long the event loop waits for the interpreter's lock while a thread of the pool computes: each of its wakes
# does, several times a request. Shorter ones cost the pool more switches, and nothing where it is idle.
_SWITCH_S = 0.0005


class _Formatter(logging.Formatter):
    """As text or, with `as_json`, as JSON."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._second, self._text = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        time_utc = self._utc(record.created)
        exception = self.formatException(record.exc_info) if record.exc_info else None
        if not self._as_json:
            line = f"{time_utc} {record.levelname} {record.name}: {record.getMessage()}"
            return line if exception is None else f"{line}\n{exception}"
        entry = {"time": time_utc, "level": record.levelname.lower(), "logger": record.name}
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            entry.update(fields)
        if fields is not record.args:  # else it is said already
            entry["message"] = record.getMessage()
        if exception is not None:
            entry["exception"] = exception
        return _encode(entry)

    def _utc(self, created_s: float) -> str:
        """The time of day as text: most entries share their second with the one before."""
        second = int(created_s)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{int((created_s - second) * 1000):03}Z"


class _Handler(logging.StreamHandler[TextIO]):
    """Entries of requests that end together are written together, before the event loop does anything else; what
    is worse than information, and what other threads say, at once."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
            loop = asyncio._get_running_loop() if record.levelno <= logging.INFO else None
            if loop is None:
                self.flush()
            elif len(self._lines) == 1:
                loop.call_soon(self._flush_soon)
        except Exception:  # noqa: BLE001 - as every handler: what cannot be logged stops nothing
            self.handleError(record)

    def _flush_soon(self) -> None:
        with suppress(OSError, ValueError):  # stderr is gone: nobody reads
            self.flush()

    def flush(self) -> None:
        with self.lock or nullcontext():
            if self._lines:
                lines, self._lines = self._lines, []
                self.stream.write("".join(lines))
            self.stream.flush()


def configure(form: str, level: str) -> None:
    """Set this process's log up. `form`: text or json; `level`: debug, info, warning or error."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter(form == "json"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.getLogger("proxy").setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):  # its own handler and format
        uvicorns = logging.getLogger(name)
        uvicorns.handlers.clear()
        uvicorns.propagate = True
    # Nothing here is printed, and it is half of an entry's cost (docs.python.org, logging: optimization).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def tune() -> None:
    """Apply them to this process; without glibc only the collector's."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, _MIDDLE, _OLD)
    gc.enable()  # what starts a server may have done without
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
        mallopt(_M_TOP_PAD, _PAD_BYTES)


async def collect_now_and_then(is_idle: Callable[[], bool]) -> None:
    """Look for old objects that only hold each other; never returns. `is_idle`: no request is being served."""
    while True:
        await asyncio.sleep(_COLLECT_S)
        for _ in range(_COLLECT_S):
            if is_idle():
                break
            await asyncio.sleep(1)
        gc.collect()
