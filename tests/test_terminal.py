"""What commands show: other people's text cannot command a terminal, a table's row is a line."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from proxy import terminal
from proxy.readable import harmless
from proxy.terminal import Told, tell_json, tell_table

HOSTILE = "\x1b]0;title\x07 \x9b31m [bold]not bold[/bold] a\nb\tc 日本語"


def test_text_of_others_cannot_command_the_terminal() -> None:
    assert harmless(HOSTILE) == "\\u001b]0;title\\u0007 \\u009b31m [bold]not bold[/bold] a\nb\tc 日本語"


def test_json_says_what_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    tell_json({"text": HOSTILE + "\\u009b"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"text": HOSTILE + "\\u009b"} and not {"\x1b", "\x9b", "\x07"} & {*out} and out.count("\n") == 1


def test_a_row_is_a_line_and_only_its_last_column_is_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["865ca5bf743d", "12", HOSTILE * 9], ["177decde32b1", "3", "short"]]
    tell_table(["conversation", "turns", "begins with"], rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].count("not bold") == 9, "nothing is cut where no terminal is"
    assert lines[2] == "177decde32b1      3  short"
    monkeypatch.setattr(terminal, "_WIDE", 40)
    tell_table(["conversation", "turns", "begins with"], rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "conversation  turns  begins with" and lines[1].startswith("865ca5bf743d     12  \\u001b]0;title")
    assert lines[1].endswith("…") and len(lines[1]) == 40 and len(lines) == 3


def test_lines_come_as_they_are_told_or_together(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json, expected in ((False, "found      one\n"), (True, "")):
        tell = Told(as_json)
        tell("found", "one")
        assert capsys.readouterr().out == expected
        tell.end(result="sound")
    assert json.loads(capsys.readouterr().out) == {"result": "sound", "lines": [{"what": "found", "told": "one"}]}


@pytest.mark.parametrize(("variables", "colours"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], colours: bool) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True, write=len, flush=os.getpid, fileno=lambda: 1, encoding="utf-8"))
    to = terminal.console()
    with to.capture() as captured:
        to.print("[red]", style="red")
    assert ("\x1b[31m" in captured.get()) is colours and "[red]" in captured.get()
