"""`llm-pager export`: which conversations, to which file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from proxy.cli import main
from tests.api.test_chat import answered, client

ANN = (b"authorization", b"Bearer ann"), (b"x-user-id", b"1")
BOB = ((b"authorization", b"Bearer bob"),)
HIS = "His. " * 500  # in an object


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two conversations of Ann's, one of Bob's."""
    path = tmp_path_factory.mktemp("store")

    async def talk() -> None:
        async with client(path, **{"tiers.l3": {"url": str(path / "objects"), "min_bytes": 1024}}) as one:
            for headers, text in ((ANN, "Mine"), (ANN, "Also mine"), (BOB, HIS)):
                one.upstream.replies = [answered()]
                body = b'{"model": "gpt-4o", "messages": [{"role": "user",\n  "content": "%s"}]}' % text.encode()
                assert (await one.ask(body, *headers))[0] == 200

    asyncio.run(talk())
    return path / "data"


@pytest.fixture
def here(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(store))
    monkeypatch.setenv("LLM_PAGER_TIERS__L3__URL", str(store.parent / "objects"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(*arguments: str, out: str = "out.jsonl") -> list[dict[str, Any]]:
    assert main(["export", "--out", out, *arguments]) == 0
    data = Path(out).read_bytes()
    if out.endswith(".zst"):
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return [json.loads(line) for line in data.splitlines()]


def asked(lines: list[dict[str, Any]]) -> set[str]:
    return {line["message"]["content"] for line in lines if "message" in line} - {"hi"}


def test_all_of_a_store_or_of_a_tenant_or_one_conversation(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = exported(out="all.jsonl.zst")
    assert asked(everything) == {"Mine", "Also mine", HIS} and len(everything[0]["tenants"]) == 2
    assert (here / "all.jsonl.zst").stat().st_mode & 0o777 == 0o600
    (here / "headers").write_text("Authorization: Bearer ann\nX-User-Id: 1\n")
    anns = exported("--header", "@headers")
    assert asked(anns) == {"Mine", "Also mine"} == asked(exported("--tenant", anns[0]["tenants"][0]))
    for line in anns[1:]:
        if "conversation" in line:
            assert len(asked(exported(line["conversation"]))) == 1
    assert main(["export", "--out", "-", "--header", "authorization: Bearer bob", "--json"]) == 0


def test_what_is_not_there_writes_no_file(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (["0123456789ab"], ["--header", "authorization: Bearer ann"], ["--tenant", "00"], ["--header", "no colon"]):
        assert main(["export", "--out", "out.jsonl", *wrong]) == 2
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(here / "nothing"))
    assert main(["export", "--out", "out.jsonl"]) == 2
    assert [path.name for path in here.iterdir()] == []
