"""The process: its log, its memory allocation and garbage collection, and HTTP/1.0 for its server.

Promises: the log is on stderr, one line an entry, as text or as JSON; levels are ours for our own entries,
warnings and worse for other libraries'; an entry's `fields`, if it has some, are keys of its JSON object.
Tuning changes speed only. A client that speaks HTTP/1.0 gets no chunks, which it does not know: a body whose
length is not told ends with the connection, and streams until then.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGISendEvent

_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode

# Bodies of megabytes come and go with every request: glibc would map and unmap each, and the kernel would zero
# every page of it again. Pages and nodes are long-lived and hold no cycles, so full collections find nothing
# and cost more the more is cached. mallopt's parameters, from malloc.h:
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_BYTES = 32 << 20  # glibc's own limit for the mmap threshold
_KEPT_FREE_BYTES = 128 << 20  # freed memory that stays with the process
_PAD_BYTES = 16 << 20

_YOUNG_OBJECTS, _MIDDLE, _OLD = 20_000, 20, 100


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


def configure(form: str, level: str) -> None:
    """Set this process's log up. `form`: text or json; `level`: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
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
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, _MIDDLE, _OLD)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
        mallopt(_M_TOP_PAD, _PAD_BYTES)


class Protocol(HttpToolsProtocol):
    """uvicorn's, with another cycle for HTTP/1.0."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            cycle.__class__ = _UntilClose
        super()._start_asgi_task(cycle, app)


class _UntilClose(RequestResponseCycle):
    """One request and its answer, whose end may be the connection's."""

    async def send(self, message: ASGISendEvent) -> None:
        event: Any = message
        if event["type"] == "http.response.start":
            names = {name.lower() for name, _ in event.get("headers", ())}
            if b"content-length" not in names and event["status"] not in (204, 304):
                self.chunked_encoding = False
                self.expected_content_length = sys.maxsize
        elif self.expected_content_length > sys.maxsize // 2 and not event.get("more_body", False):
            self.expected_content_length = len(event.get("body", b""))
        await super().send(message)
