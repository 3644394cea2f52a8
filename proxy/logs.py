"""The process's log: on stderr, one line an entry, as text or as JSON.

Promises: levels are ours for our own entries, warnings and worse for other libraries'; an entry's
`fields`, if it has some, are keys of its JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        whole, ms = divmod(int(record.created * 1000), 1000)
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{ms:03}Z",
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
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure(form: str, level: str) -> None:
    """Set this process's log up. `form`: text or json; `level`: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else logging.Formatter(_TEXT))
    root = logging.getLogger()
    for other in root.handlers[:]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.getLogger("proxy").setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):  # its own handler and format
        uvicorns = logging.getLogger(name)
        uvicorns.handlers.clear()
        uvicorns.propagate = True
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
