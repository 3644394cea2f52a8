"""Storage trouble loses memory, never an answer (invariant 6): real files damaged, replaced, locked and full under
`llm-pager serve`, with a client that sends its whole history and one that sends only what is new.

Promises: whatever became of the files, the first is answered, whole and streamed, upstream being asked once for each;
the second is answered with all that it ever said in front of the model, or is refused before upstream is asked.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.harness import (
    RecordingUpstream,
    ServerProcess,
    answer,
    free_port,
    in_process_server,
    message_of,
)
from tests.e2e.talk import CHAT, body, config, raw, read_stream

PORT = free_port()
TURNS = 14
SAID = [f"delta-said-{turn}" for turn in range(TURNS)]
DATABASE = "cache.db"


def words(seed: int) -> str:
    return " ".join(random.Random(seed).choices("amber birch cedar delta ember fjord grove heath".split(), k=90))


class Clients:
    """Both clients of one server."""

    def __init__(self, client: httpx.AsyncClient, upstream: RecordingUpstream, history: list[dict[str, Any]]) -> None:
        self.client = client
        self.upstream = upstream
        self.history = history

    async def whole(self, stream: bool = False) -> str:
        """What was said of its memory in an answered turn of the whole history."""
        asked = [*self.history, {"role": "user", "content": f"turn {len(self.history)}: {words(len(self.history))}"}]
        before = len(self.upstream.calls)
        if stream:
            text, ended = await read_stream(self.client, body(asked, stream=True))
            assert ended and "[DONE]" in text and "answered" in text, text
            memory = "lost" if "x-llm-pager-memory: lost" in text else ""
        else:
            response = await self.client.post(CHAT, json=body(asked))
            assert response.status_code == 200, response.text
            memory = response.headers.get("x-llm-pager-memory", "")
            said = response.json()["choices"][0]["message"]
            self.history = [*asked, {"role": "assistant", "content": said["content"]}]
        assert len(self.upstream.calls) == before + 1
        return memory

    async def delta(self, turn: int, session: str = "d") -> httpx.Response:
        """The answer to a new message; upstream was asked only when there was one."""
        before = len(self.upstream.calls)
        asked = [{"role": "user", "content": f"{SAID[turn % TURNS]} {turn}"}]
        response = await self.client.post(CHAT, json=body(asked), headers={"x-llm-pager-session": session})
        assert len(self.upstream.calls) == before + (response.status_code == 200)
        return response


@asynccontextmanager
async def clients(base_url: str, history: list[dict[str, Any]]) -> AsyncIterator[Clients]:
    def respond(request: dict[str, Any], number: int) -> Any:
        short = "delta-said" in json.dumps(request["messages"][-1])  # all of it fits the window
        return answer(request, message_of("noted" if short else f"answered {number} {words(number)}"))

    upstream = RecordingUpstream(respond)
    upstream.port = PORT
    async with upstream, raw(base_url, "sk-storage") as client:
        yield Clients(client, upstream, history)
    assert not upstream.failures, upstream.failures


def stored_in(directory: Path) -> dict[str, Any]:
    settings = config(PORT)
    return {**settings, "tiers": {**settings["tiers"], "l2": {"path": str(directory), "url": None}}}


@pytest.fixture(scope="module")
def before() -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """A directory in which both have talked for a while, and what the first has said."""

    async def talk(base_url: str) -> list[dict[str, Any]]:
        async with clients(base_url, []) as both:
            for turn in range(TURNS):
                assert await both.whole() == ""
                assert (await both.delta(turn)).status_code == 200
            return both.history

    with tempfile.TemporaryDirectory() as kept:
        data = Path(kept) / "data"
        with in_process_server(stored_in(data)) as base_url:
            history = asyncio.run(talk(base_url))
        yield data, history


# ---------------------------------------------------------------- what may become of the files


def pages(which: Callable[[int], list[int]], noise: bool = False) -> Callable[[Path], None]:
    """Zero these pages of so many, or scribble over them."""

    def run(directory: Path) -> None:
        data = bytearray((directory / DATABASE).read_bytes())
        for number in which(len(data) // 4096):
            data[number * 4096 : (number + 1) * 4096] = random.Random(7).randbytes(4096) if noise else bytes(4096)
        (directory / DATABASE).write_bytes(data)

    return run


def statement(text: str, *values: object) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        with closing(sqlite3.connect(directory / DATABASE, isolation_level=None)) as database:
            assert database.execute(text, values).rowcount

    return run


def cut(directory: Path) -> None:
    data = (directory / DATABASE).read_bytes()
    (directory / DATABASE).write_bytes(data[: len(data) * 2 // 3 + 100])


def garbage(directory: Path) -> None:
    (directory / DATABASE).write_bytes(random.Random(1).randbytes(20_000))


def emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


MADE_ANEW, DAMAGED = "has been made anew", "is damaged:"
ODD = "rowid % 2 = 1 AND substr(key, 1, 1) = ?"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {  # and what the log says
    "first page zeroed": (pages(lambda count: [0]), MADE_ANEW),
    "pages zeroed": (pages(lambda count: list(range(3, count, 3))), MADE_ANEW),
    "pages scribbled over": (pages(lambda count: list(range(5, count, 4)), noise=True), MADE_ANEW),
    "cut": (cut, MADE_ANEW),
    "records exchanged": (
        statement(f"UPDATE Cache SET value = (SELECT value FROM Cache WHERE {ODD}) WHERE {ODD}", b"n", b"n"),
        DAMAGED,
    ),
    "all but the last records missing": (
        statement(
            "DELETE FROM Cache WHERE substr(key, 1, 1) = ? AND rowid NOT IN"
            " (SELECT max(rowid) FROM Cache WHERE substr(key, 1, 1) = ? GROUP BY substr(key, 2, 18))", b"n", b"n",
        ),
        "begins anew",
    ),
    "heads of sessions of zeros": (
        statement("UPDATE Cache SET value = zeroblob(16) WHERE substr(key, 1, 1) = ?", b"s"), DAMAGED,
    ),
    "garbage": (garbage, MADE_ANEW),
    "emptied": (emptied, "is empty"),
}  # fmt: skip
GONE = ("garbage", "emptied")  # nothing is left by which a session could be told from a new one


@pytest.mark.parametrize("name", DAMAGES)
async def test_invariant_6_damaged_files_are_a_miss(
    before: tuple[Path, list[dict[str, Any]]], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(before[0], tmp_path / "data")
    damage, said = DAMAGES[name]
    damage(tmp_path / "data")
    with caplog.at_level("INFO"), in_process_server(stored_in(tmp_path / "data")) as base_url:
        async with clients(base_url, before[1]) as both:
            for turn in range(2):
                response = await both.delta(TURNS + turn)
                if response.status_code == 200:
                    seen = json.dumps(both.upstream.calls[-1].json)
                    assert name in GONE or all(one in seen for one in SAID)
                else:
                    assert response.json()["error"]["code"] in ("storage_damaged", "storage_unavailable")
                await both.whole(stream=turn == 0)
            async with asyncio.timeout(30):
                while (ready := await both.client.get("/ready")).status_code != 200:  # it is being repaired
                    await asyncio.sleep(0.05)
            assert await both.whole() == ""
    assert ready.status_code == 200 and caplog.text.count(said) in (1, 2), caplog.text
    assert name in GONE or said == "begins anew" or {"damaged", "repaired"} & ready.json().keys()


# ---------------------------------------------------------------- while it runs


def deleted(directory: Path) -> None:
    shutil.rmtree(directory)


def older(directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(directory.parent / "older", directory)


@pytest.mark.parametrize("become", [deleted, older])
async def test_a_directory_that_is_deleted_or_replaced_under_it(
    before: tuple[Path, list[dict[str, Any]]], become: Callable[[Path], None]
) -> None:
    """No answer is lost, none that is remembered is said to be lost, and no session goes on without what it said."""
    server = ServerProcess(config(PORT, tiers={"l2": {"url": None}}))
    for name in ("data", "older"):
        shutil.copytree(before[0], server.dir / name)
    with server:
        async with clients(server.base_url, before[1]) as both:
            assert (await both.delta(TURNS)).status_code == 200 and await both.whole() == ""
            become(server.dir / "data")
            response = await both.delta(TURNS + 1)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert await both.whole() == await both.whole(stream=True) == "lost"
            assert (await both.client.get("/ready")).status_code == 200  # it looks again
            assert await both.whole() == ""
            response = await both.delta(TURNS + 2)
            assert (response.status_code, response.json()["error"]["code"]) == (500, "storage_damaged")
            assert (await both.delta(TURNS + 3, session="new")).status_code == 200
            server.kill()
            await asyncio.to_thread(server.restart)
            assert (await both.delta(TURNS + 4, session="new")).status_code == 200
            assert f"{TURNS + 3}" in json.dumps(both.upstream.calls[-1].json)
        assert "was deleted or replaced" in server.log and "can be written again" in server.log


async def test_a_lock_that_another_process_holds(before: tuple[Path, list[dict[str, Any]]]) -> None:
    server = ServerProcess(config(PORT, tiers={"l2": {"url": None}}))
    shutil.copytree(before[0], server.dir / "data")
    with server, closing(sqlite3.connect(server.dir / "data" / DATABASE, isolation_level=None)) as other:
        async with clients(server.base_url, before[1]) as both:
            other.execute("BEGIN IMMEDIATE")
            assert await both.whole(stream=True) == "lost"  # it has waited for a while, the others do not
            began_s = time.monotonic()
            assert await both.whole() == "lost"
            assert (await both.delta(TURNS)).status_code == 503
            assert time.monotonic() - began_s < 2
            other.execute("ROLLBACK")
            assert (await both.client.get("/ready")).status_code == 200
            assert (await both.delta(TURNS)).status_code == 200
            assert await both.whole() == ""
