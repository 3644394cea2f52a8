"""The log of a process, as its operator reads it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.test_cli import ROOT

CODE = """
import logging, sys
from proxy.logs import configure
configure(sys.argv[1], sys.argv[2])
ours, theirs = logging.getLogger("proxy.api.chat"), logging.getLogger("somebody")
ours.info("a %s", "word", extra={"fields": {"status": 200, "name": "\\u00e9\\nx"}})
fields = {"channel": "tools", "ms": 1.5}
logging.getLogger("proxy.request").info("%s", fields, extra={"fields": fields})
theirs.info("chatter")
theirs.warning("trouble")
logging.getLogger("uvicorn.error").warning("of the server")
try:
    1 / 0
except ZeroDivisionError:
    ours.exception("it failed")
"""


def logged(form: str, level: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, form, level], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_one_object_a_line_with_the_entries_fields() -> None:
    entries = [json.loads(line) for line in logged("json", "info")]
    assert [entry["logger"] for entry in entries] == [
        "proxy.api.chat", "proxy.request", "somebody", "uvicorn.error", "proxy.api.chat",
    ]  # fmt: skip
    assert entries[0]["message"] == "a word" and entries[0]["status"] == 200
    assert (entries[1]["channel"], entries[1]["ms"], "message" in entries[1]) == ("tools", 1.5, False)
    assert "ZeroDivisionError" in entries[-1]["exception"]
    assert all(entry["time"].endswith("Z") and entry["level"] for entry in entries)


def test_text_is_time_level_place_and_message() -> None:
    lines = logged("text", "info")
    assert lines[0].endswith(" INFO proxy.api.chat: a word")
    assert "trouble" in lines[2] and "chatter" not in "\n".join(lines)
    assert lines[-1].startswith("ZeroDivisionError")


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_higher_level_leaves_the_requests_out(level: str) -> None:
    text = "\n".join(logged("text", level))
    assert "a word" not in text and "it failed" in text
    assert ("trouble" in text) == (level == "warning")
