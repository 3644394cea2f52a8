"""Conversations of elsewhere become a tenant's: found, paged and answered from when its client goes on with them."""

from __future__ import annotations

import asyncio
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from proxy.api.caller import caller
from proxy.cli import main
from proxy.conversation.records import deepest_record
from tests.api.test_chat import Client, answered, client
from tests.api.test_damage import L0, Talk, answer, question

KEY = (b"authorization", b"Bearer mine")
MINE = ("--header", "authorization: Bearer mine")
TURNS = 40
Message = dict[str, Any]


def history(turns: int = TURNS) -> list[Message]:
    return [m for turn in range(turns) for m in (question(turn), {"role": "assistant", "content": answer(turn)})]


def chatgpt(messages: Sequence[Message], name: str = "c1", title: str = "Harbours") -> dict[str, Any]:
    """As an account's export has it, with what it puts in front of a conversation."""
    nodes: dict[str, Any] = {"root": {"id": "root", "message": None, "parent": None, "children": []}}
    said = [({"role": "system"}, {"content_type": "text", "parts": [""]})]
    said += [({"role": m["role"]}, {"content_type": "text", "parts": [m["content"]]}) for m in messages]
    parent = "root"
    for number, (author, content) in enumerate(said):
        message = {"id": f"m{number}", "author": author, "create_time": 1.7e9 + number, "content": content,
                   "recipient": "all", "metadata": {}}  # fmt: skip
        nodes[f"m{number}"] = {"id": f"m{number}", "message": message, "parent": parent, "children": []}
        nodes[parent]["children"].append(f"m{number}")
        parent = f"m{number}"
    return {"title": title, "conversation_id": name, "update_time": 1.7e9, "current_node": parent, "mapping": nodes}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def branches(file: str) -> set[tuple[str, int, bool]]:
    """Every message of an export's conversations, as all that was said up to it; when; whether it is a head."""
    found: set[tuple[str, int, bool]] = set()
    said: dict[int | None, str] = {}
    for line in map(json.loads, Path(file).read_text().splitlines()):
        if "conversation" in line:
            said = {None: ""}
        elif "message" in line:
            said[line["n"]] = said[line.get("parent")] + json.dumps(line["message"])
            found.add((said[line["n"]], line["seen_s"], line.get("head", False)))
    return found


async def ran(*arguments: str) -> int:
    return await asyncio.to_thread(main, list(arguments))


async def imported(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = await ran("import", *arguments, "--json")
    return status, json.loads(capsys.readouterr().out)


async def next_request(one: Client, messages: Sequence[Message], *headers: tuple[bytes, bytes]) -> str:
    one.upstream.replies = [answered("Next.")]
    status, said = await one.ask({"model": "gpt-4o", "messages": list(messages)}, *headers)
    assert status == 200, said
    return one.upstream.bodies[-1].decode()


async def said_first(one: Client, messages: Sequence[Message]) -> int:
    """When the first message of a history was first seen, as the store has it (Unix time)."""
    who = caller([KEY])
    path = one.memory.identity.extend(
        one.memory.identity.tenant(who.credentials, who.person), [], [(json.dumps(m).encode(), m) for m in messages]
    )
    record = deepest_record(path, one.memory.get_record)
    assert record is not None
    return one.memory.load_path(record)[0].seen_s


async def test_an_imported_conversation_goes_on_by_its_messages_and_by_its_session(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "export").write_text(json.dumps([chatgpt(history())]))
    status, told = await imported(capsys, "export", *MINE, "--session-prefix", "gpt/")
    assert (status, told["conversations"], told["answers"]) == (0, 1, TURNS)
    asked = {"role": "user", "content": "What was the answer on turn 3?"}
    async with client(store, **{"tiers.l0": L0}) as one:
        whole = await next_request(one, [*history(), asked], KEY)
        assert "VM:MANIFEST" in whole and str(3 * 7919) in whole  # paged, with the evidence
        assert await said_first(one, [*history(), asked]) == 1_700_000_001
        for session in (b"gpt/Harbours", b"gpt/c1"):
            new = await next_request(one, [asked], KEY, (b"x-llm-pager-session", session))
            assert str(3 * 7919) in new and question(TURNS - 1)["content"] in new
        for stranger in ((b"authorization", b"Bearer other"),), (KEY, (b"x-user-id", b"u")):
            new = await next_request(one, [asked], *stranger, (b"x-llm-pager-session", b"gpt/c1"))
            assert "harbour" not in new


async def test_an_import_that_is_repeated_stores_nothing_and_sets_nothing_back(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "export").write_text(json.dumps([chatgpt(history(3))]))
    await imported(capsys, "export", *MINE)
    session = KEY, (b"x-llm-pager-session", b"c1")
    async with client(store) as one:
        await next_request(one, [{"role": "user", "content": "I moved to Oslo."}], *session)
        assert (await imported(capsys, "export", *MINE))[1]["answers"] == 0
        assert "Oslo" in await next_request(one, [{"role": "user", "content": "Where?"}], *session)
        (store / "export").write_text(json.dumps([chatgpt(history(5), name="c2")]))  # a later export, and a longer one
        assert (await imported(capsys, "export", *MINE))[1]["answers"] == 2
        longer = await next_request(one, [{"role": "user", "content": "And?"}], KEY, (b"x-llm-pager-session", b"c2"))
        assert question(4)["content"] in longer and "Oslo" not in longer


async def test_what_cannot_be_read_is_told_and_left_out(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = chatgpt(history(2), title="Broken")
    broken["mapping"]["m1"]["message"]["author"] = None
    silent = chatgpt([question(0)], title="Silent")
    (store / "export").write_text(json.dumps([broken, chatgpt(history(2)), silent, {"title": "Alien"}]))
    status, told = await imported(capsys, "export", *MINE)
    assert (status, told["conversations"], [each["title"] for each in told["left_out"]]) == (3, 1, ["Broken", "Silent", "Alien"])
    for content in ("[]", "{}", "nothing", '{"a": [1]}', "[1, 2]"):
        (store / "export").write_text(content)
        assert await ran("import", "export", *MINE) == 2
        assert "is no export of llm-pager, ChatGPT or Claude" in capsys.readouterr().err
    assert await ran("import", "export") == 2 and "--header" in capsys.readouterr().err


async def test_an_archive_is_read_whatever_its_files_are_called(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(store / "export.bin", "w") as archive:
        archive.writestr("x/conversations-000.json", json.dumps([chatgpt(history(2))]))
        archive.writestr("x/conversations-001.json", json.dumps([chatgpt(history(3), "c2")]))
        archive.writestr("x/user.json", json.dumps({"id": "user"}))
        archive.writestr("x/chat.html", "<html>")
    status, told = await imported(capsys, "export.bin", *MINE)
    assert (status, told["conversations"], told["answers"]) == (0, 2, 3)


async def test_an_export_is_imported_elsewhere_with_its_branches(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.storage.sqlite.os.urandom", lambda size: bytes(size))  # one secret: the cache's name
    async with client(store / "first", **{"tiers.l0": L0}) as one:
        talk = Talk(one)
        await talk.until(TURNS)
        fork = [*talk.history[:20], {"role": "user", "content": "What of the zebra?"}]
        one.upstream.replies = [answered("It is striped.")]
        await one.ask({"model": "gpt-4o", "messages": fork})
        said = talk.history
    first = {"LLM_PAGER_TIERS__L2__PATH": str(store / "first" / "data")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*next(iter(first.items())))
        assert await ran("export", "--out", "a.jsonl.zst") == 0
    status, told = await imported(capsys, "a.jsonl.zst", *MINE)
    assert (status, told["answers"], told["unanswered"]) == (0, TURNS + 1, 0)
    assert await ran("export", "--out", "b.jsonl", *MINE) == 0
    assert await ran("import", "a.jsonl.zst", "--to", "c.jsonl") == 0

    assert branches("b.jsonl") == branches("c.jsonl") and len(branches("b.jsonl")) == 2 * TURNS + 2
    asked = {"role": "user", "content": "What was the answer on turn 3?"}
    forked = [*fork, {"role": "assistant", "content": "It is striped."}]
    async with client(store, **{"tiers.l0": L0}) as one, client(store / "new", **{"tiers.l0": L0}) as new:
        for path in (said, forked):
            request = await next_request(one, [*path, asked], KEY)
            assert str(3 * 7919) in request
            # As it goes where its client had come with the whole history.
            assert request == await next_request(new, [*path, asked], KEY)
