"""The process's log: on stderr, one line an entry, as text or as JSON.

Promises: levels are ours for our own entries, warnings and worse for other libraries'; an entry's
`fields`, if it has some, are keys of its JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
import time

_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


class _Clock:
    """The time of day as text: most entries share their second with the one before."""

    def __init__(self) -> None:
        self._second, self._text = -1, ""

    def utc(self, created_s: float) -> str:
        second = int(created_s)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{int((created_s - second) * 1000):03}Z"


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self._clock.utc(record.created)} {record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self._clock.utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            entry.update(fields)
        if fields is not record.args:  # else it is said already
            entry["message"] = record.getMessage()
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _encode(entry)


def configure(form: str, level: str) -> None:
    """Set this process's log up. `form`: text or json; `level`: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
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
