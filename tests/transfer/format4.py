"""Makes format4.zip: a store of format 4 as version a81357c wrote it, and what that one sent upstream next.

    git worktree add --detach /tmp/a81357c a81357c && cd /tmp/a81357c
    PYTHONPATH=/tmp/a81357c python .../tests/transfer/format4.py /tmp/format4.zip     # with that version's packages
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from proxy.conversation import turn_window
from tests.api.test_chat import Client, answered, client
from tests.api.test_damage import L0, answer, calling, question

Message = dict[str, Any]
A, B = (b"authorization", b"Bearer key-a"), (b"authorization", b"Bearer key-b")
DELTA = (b"x-llm-pager-session", b"delta-1")
NEXT = {"role": "user", "content": "And what of the harbour on turn 3?"}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


async def ask(one: Client, messages: list[Message], text: str, *headers: Any, **fields: Any) -> list[Message]:
    """The history after one more answer."""
    one.upstream.replies = [*one.upstream.replies, answered(text)]
    status, said = await one.ask({"model": "gpt-4o", "messages": messages, **fields}, *headers)
    assert status == 200, said
    return [*messages, said["choices"][0]["message"]]


async def until(one: Client, turns: int, *headers: Any, **fields: Any) -> list[Message]:
    history: list[Message] = []
    for turn in range(turns):
        history = await ask(one, [*history, question(turn)], answer(turn), *headers, **fields)
    return history


async def talked(directory: Path) -> dict[str, list[Message]]:
    """What each client has of its conversation."""
    said: dict[str, list[Message]] = {}
    async with client(directory, **{"tiers.l0": L0}) as one:
        paged = await until(one, 40, A, (b"x-session-id", b"notes"))
        one.upstream.replies = [calling("page_fault", page_id="msg_0002")]
        said["paged"] = await ask(one, [*paged, user("Bring message two back.")], "It was about turn 0.", A)
        said["fork"] = await ask(one, [*paged[:20], user("Another way: what of the zebra?")], "It is striped.", A)
        said["short"] = await ask(one, [user("A short one: my cat is Minka.")], "Noted: Minka.", A)
        said["ann"] = await until(one, 16, A, user="ann")
        clock: list[Message] = []
        for turn in range(6):  # its first message is another one in every request, behind it the same
            first = user(f"It is {turn} o'clock. " + "Be brief. " * 20)
            asked = user(f"Clock question {turn}: " + "tell me more of it " * 60)
            clock = await ask(one, [first, *clock[1:], asked], f"Clock answer {turn}. " + "It ticks. " * 120, A)
        said["clock"] = clock
        trimmed: list[Message] = []
        for turn in range(14):  # it sends its newest messages
            trimmed.append(user(f"Trimmed question {turn}, about something else than before."))
            text = f"Trimmed answer {turn}: it goes on and on, and is longer than a greeting is."
            trimmed.append((await ask(one, trimmed[-9:], text, A))[-1])
        said["trimmed"] = trimmed[-8:]
        said["bob"] = await ask(one, [user("Bob here: the code word is walrus.")], "Walrus it is.", B, user="bob")
        for turn in range(3):
            await ask(one, [user(f"Delta question {turn}.")], f"Delta answer {turn}.", A, DELTA)
        said["delta"] = []
    return said


async def following(directory: Path, messages: list[Message], *headers: Any, **fields: Any) -> str:
    """What goes upstream for one more question."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        async with client(Path(copy), **{"tiers.l0": L0}) as one:
            await ask(one, [*messages, NEXT], "Next.", *headers, **fields)
            return one.upstream.bodies[0].decode()


async def main(out: Path) -> None:
    turn_window.CHECKPOINT = 0  # blocks of page tables, too
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        said = await talked(directory)
        late = [user("It is late."), *said["clock"][1:]]
        sent = {
            **{name: await following(directory, said[name], A) for name in ("paged", "fork", "trimmed")},
            "clock": await following(directory, late, A),
            "ann": await following(directory, said["ann"], A, user="ann"),
            "delta": await following(directory, [], A, DELTA),
        }
        database = directory / "data" / "cache.db"
        connection = sqlite3.connect(database)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM")
        connection.close()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            archive.write(database, "cache.db")
            archive.writestr("expected.json", json.dumps({"conversations": said, "next": sent, "question": NEXT}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
