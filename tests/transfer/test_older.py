"""A store that version a81357c wrote (format4.zip, by format4.py), and what it sent next."""

from __future__ import annotations

import asyncio
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import main
from tests.api.test_chat import answered, client
from tests.api.test_damage import L0

A, B = (b"authorization", b"Bearer key-a"), (b"authorization", b"Bearer key-b")
FIXTURE = Path(__file__).with_name("format4.zip")
EXPECTED: dict[str, Any] = json.loads(zipfile.ZipFile(FIXTURE).read("expected.json"))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    zipfile.ZipFile(FIXTURE).extract("cache.db", tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "old"


def converted(old: Path, *more: str) -> tuple[int, Path]:
    new = old.parent / "new" / "data"
    return main(["migrate", str(old), str(new), *more]), new.parent


def said(body: str, anew: bool) -> str:
    """A request but for the name of its cache, which was made of an id that has another form now, and for what each
    version chooses itself: what is shown unasked (a message that has it is written compactly), and all that is quoted
    where the window is made `anew`."""
    begins = "" if anew else '(?<=")'
    quoted = begins + r"<VM:CONTEXT>\\n.*?</VM:CONTEXT>(?:\\n)*"
    return re.sub('"prompt_cache_key":"[0-9a-f]+"|' + quoted, "", body).replace('": "', '":"').replace('", "', '","')


async def following(new: Path, name: str, *headers: tuple[bytes, bytes], **fields: Any) -> str:
    """What goes upstream when the client of the conversation asks the question that it asked the old version."""
    async with client(new, **{"tiers.l0": L0}) as one:
        messages = [*EXPECTED["conversations"][name], EXPECTED["question"]]
        if name == "clock":
            messages[0] = {"role": "user", "content": "It is late."}
        one.upstream.replies = [answered("Next.")]
        status, _ = await one.ask({"model": "gpt-4o", "messages": messages, **fields}, *headers)
        assert status == 200
        return said(one.upstream.bodies[0].decode(), name == "clock")


async def test_a_store_of_format_4_goes_on_as_if_nothing_had_happened(old: Path) -> None:
    status, new = await asyncio.to_thread(converted, old, "--header", "authorization: Bearer key-a", "--user", "ann")
    assert status == 3  # Bob's is not claimed
    for name, headers, fields in (
        ("paged", (A,), {}), ("fork", (A,), {}), ("ann", (A,), {"user": "ann"}),
        ("clock", (A,), {}), ("trimmed", (A,), {}), ("delta", (A, (b"x-llm-pager-session", b"delta-1")), {}),
    ):  # fmt: skip
        assert await following(new, name, *headers, **fields) == said(EXPECTED["next"][name], name == "clock"), name


def test_what_is_proved_to_be_nobodys_known_is_a_file_for_import(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, new = converted(old)
    assert status == 3 and "2 conversations of clients that are not known" in capsys.readouterr().out
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(new / "data"))
    file = new / "data" / "unclaimed.jsonl"
    assert main(["import", str(file), "--header", "authorization: Bearer key-b", "--user", "bob"]) == 2  # two tenants
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    at = next(at for at, line in enumerate(lines) if line.get("message") == EXPECTED["conversations"]["bob"][0])
    bob = ["--header", "authorization: Bearer key-b", "--user", "bob", "--tenant", lines[at - 1]["tenant"]]
    assert main(["import", str(file), *bob, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == 1


def test_a_converted_store_is_sound_and_is_converted_once(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = ["--header", "authorization: Bearer key-a", "--user", "ann"]
    _, new = converted(old, *everybody)
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(new / "data"))
    capsys.readouterr()
    assert main(["check", "--storage"]) == 0
    assert "block of a page table" in capsys.readouterr().out
    assert converted(old, *everybody)[0] == 1
    assert "is whole" in capsys.readouterr().err


def test_an_older_directory_is_refused_with_the_command_that_converts_it(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(old))
    assert main(["export", "--out", "all.jsonl"]) == 1
    assert f"llm-pager migrate {old} NEW_DIRECTORY" in capsys.readouterr().err
