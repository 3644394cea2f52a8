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
    message_of,
)
from tests.e2e.talk import CHAT, body, config, raw, read_stream

PORT = free_port()
TURNS = 14
SAID = [f"delta-said-{turn}" for turn in range(TURNS)]
DELTA = {"x-llm-pager-session": "d"}
DATABASE = "cache.db"


def words(seed: int) -> str:
    return " ".join(random.Random(seed).choices("amber birch cedar delta ember fjord grove heath".split(), k=90))


class Clients:
    """Both clients of one server."""

    def __init__(self, client: httpx.AsyncClient, upstream: RecordingUpstream, history: list[dict[str, Any]]) -> None:
        self.client = client
        self.upstream = upstream
        self.history = history

    async def whole(self, stream: bool = False) -> tuple[str, str]:
        """What `x-llm-pager-memory` said of an answered turn of the whole history, and the body."""
        asked = [*self.history, {"role": "user", "content": f"turn {len(self.history)}: {words(len(self.history))}"}]
        before = len(self.upstream.calls)
        if stream:
            text, ended = await read_stream(self.client, body(asked, stream=True))
            assert ended and "[DONE]" in text and "answered" in text, text
            memory = "lost" if "x-llm-pager-memory: lost" in text else ""
        else:
            response = await self.client.post(CHAT, json=body(asked))
            assert response.status_code == 200, response.text
            text, memory = response.text, response.headers.get("x-llm-pager-memory", "")
            said = response.json()["choices"][0]["message"]
            self.history = [*asked, {"role": "assistant", "content": said["content"]}]
        assert len(self.upstream.calls) == before + 1
        return memory, text

    async def delta(self, turn: int) -> httpx.Response:
        """The answer to a new message; when there was one, upstream had all that was said before."""
        before = len(self.upstream.calls)
        asked = [{"role": "user", "content": f"{SAID[turn % TURNS]} {turn}"}]
        response = await self.client.post(CHAT, json=body(asked), headers=DELTA)
        assert len(self.upstream.calls) == before + (response.status_code == 200)
        return response


@asynccontextmanager
async def clients(server: ServerProcess, history: list[dict[str, Any]]) -> AsyncIterator[Clients]:
    def respond(request: dict[str, Any], number: int) -> Any:
        short = "delta-said" in json.dumps(request["messages"][-1])  # all of it fits the window
        return answer(request, message_of("noted" if short else f"answered {number} {words(number)}"))

    upstream = RecordingUpstream(respond)
    upstream.port = PORT
    async with upstream, raw(server.base_url, "sk-storage") as client:
        yield Clients(client, upstream, history)
    assert not upstream.failures, upstream.failures


@pytest.fixture(scope="module")
def before() -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """A directory in which both have talked for a while, and what the first has said."""

    async def talk(server: ServerProcess) -> list[dict[str, Any]]:
        async with clients(server, []) as both:
            for turn in range(TURNS):
                assert await both.whole() is not None
                assert (await both.delta(turn)).status_code == 200
            return both.history

    with tempfile.TemporaryDirectory() as kept, ServerProcess(config(PORT)) as server:
        history = asyncio.run(talk(server))
        server.stop()
        shutil.copytree(server.dir / "data", Path(kept) / "data")
        yield Path(kept) / "data", history


# ---------------------------------------------------------------- what may become of the files


def pages_of(database: Path, numbers: Callable[[int], list[int]], fill: Callable[[], bytes]) -> None:
    data = bytearray(database.read_bytes())
    for number in numbers(len(data) // 4096):
        data[number * 4096 : (number + 1) * 4096] = fill()
    database.write_bytes(data)


def statement(text: str, *values: object) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        with closing(sqlite3.connect(directory / DATABASE, isolation_level=None)) as database:
            assert database.execute(text, values).rowcount != 0

    return run


def zeros(numbers: Callable[[int], list[int]]) -> Callable[[Path], None]:
    return lambda directory: pages_of(directory / DATABASE, numbers, lambda: bytes(4096))


def noise(numbers: Callable[[int], list[int]]) -> Callable[[Path], None]:
    return lambda directory: pages_of(directory / DATABASE, numbers, lambda: random.Random(7).randbytes(4096))


def truncated(directory: Path) -> None:
    data = (directory / DATABASE).read_bytes()
    (directory / DATABASE).write_bytes(data[: len(data) * 2 // 3 + 100])


def garbage(directory: Path) -> None:
    (directory / DATABASE).write_bytes(random.Random(1).randbytes(20_000))


def emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


WITH = "substr(key, 1, 1) = ?"
ODD = "rowid % 2 = 1 AND " + WITH
DAMAGES: dict[str, Callable[[Path], None]] = {
    "first page zeroed": zeros(lambda count: [0]),
    "each page but the first zeroed in turn": zeros(lambda count: list(range(3, count, 3))),
    "root of the table zeroed": zeros(lambda count: [1]),
    "root of the index zeroed": zeros(lambda count: [2]),
    "last pages scribbled over": noise(lambda count: [count - 1, count - 2, count - 3]),
    "some pages scribbled over": noise(lambda count: list(range(5, count, 4))),
    "cut": truncated,
    "records of zeros": statement(f"UPDATE Cache SET value = zeroblob(length(value)) WHERE {ODD}", b"n"),
    "records exchanged": statement(
        f"UPDATE Cache SET value = (SELECT value FROM Cache WHERE {WITH} ORDER BY rowid LIMIT 1) WHERE {ODD}", b"n", b"n"
    ),
    "records missing": statement(f"DELETE FROM Cache WHERE {ODD}", b"n"),
    "all records missing": statement(f"DELETE FROM Cache WHERE {WITH}", b"n"),
    "blocks missing": statement(f"DELETE FROM Cache WHERE {WITH}", b"t"),
    "heads of sessions of zeros": statement(f"UPDATE Cache SET value = zeroblob(16) WHERE {WITH}", b"s"),
    "secret of zeros": statement("UPDATE Cache SET value = zeroblob(32) WHERE typeof(key) = 'text'"),
    "garbage": garbage,
    "emptied": emptied,
}
GONE = ("garbage", "emptied")  # nothing is left by which a session could be told from a new one


@pytest.mark.parametrize("name", DAMAGES)
async def test_invariant_6_damaged_files_are_a_miss(before: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    server = ServerProcess(config(PORT))
    shutil.copytree(before[0], server.dir / "data")
    DAMAGES[name](server.dir / "data")
    with server:
        async with clients(server, before[1]) as both:
            for turn in range(2):
                response = await both.delta(TURNS + turn)
                if response.status_code == 200:
                    seen = json.dumps(both.upstream.calls[-1].json)
                    missing = [said for said in SAID if said not in seen]
                    print(name, "delta", response.status_code, "missing", len(missing))
                    assert name in GONE or not missing, missing
                else:
                    print(name, "delta", response.status_code, response.text[:200])
                    assert response.json()["error"]["code"] in ("storage_damaged", "storage_unavailable")
                memory, _ = await both.whole(stream=turn == 0)
                print(name, "whole", memory)
            ready = await both.client.get("/ready")
            print(name, ready.status_code, ready.text)
            assert ready.status_code == 200
            memory, _ = await both.whole()
            assert memory == ""
        print(server.log[-3000:])


def deleted(directory: Path) -> None:
    shutil.rmtree(directory)


def files_deleted(directory: Path) -> None:
    for path in directory.glob(f"{DATABASE}*"):
        path.unlink()


def without(suffix: str) -> Callable[[Path], None]:
    return lambda directory: (directory / f"{DATABASE}{suffix}").unlink()


def older(directory: Path) -> None:
    for path in directory.glob(f"{DATABASE}*"):
        path.unlink()
    shutil.copytree(directory.parent / "older", directory, dirs_exist_ok=True)


def older_database(directory: Path) -> None:
    shutil.copy(directory.parent / "older" / DATABASE, directory / "copy")
    (directory / "copy").replace(directory / DATABASE)


def older_in_place(directory: Path) -> None:
    shutil.copyfile(directory.parent / "older" / DATABASE, directory / DATABASE)


WHILE_IT_RUNS: dict[str, Callable[[Path], None]] = {
    "directory deleted": deleted,
    "files deleted": files_deleted,
    "log deleted": without("-wal"),
    "shared memory deleted": without("-shm"),
    "directory replaced by an older copy": older,
    "database replaced by an older copy": older_database,
    "database overwritten by an older copy": older_in_place,
    "page zeroed": zeros(lambda count: [3, 4]),
    "all pages zeroed": zeros(lambda count: list(range(count))),
    "cut": truncated,
    "garbage": garbage,
}


@pytest.mark.parametrize("name", WHILE_IT_RUNS)
async def test_invariant_6_trouble_while_it_runs(before: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    server = ServerProcess(config(PORT))
    shutil.copytree(before[0], server.dir / "data")
    shutil.copytree(before[0], server.dir / "older")
    with server:
        async with clients(server, before[1]) as both:
            assert (await both.delta(TURNS)).status_code == 200
            assert (await both.whole())[0] == ""
            WHILE_IT_RUNS[name](server.dir / "data")
            for turn in range(3):
                memory, _ = await both.whole(stream=turn == 1)
                print(name, "whole", memory)
                response = await both.delta(TURNS + 1 + turn)
                seen = json.dumps(both.upstream.calls[-1].json)
                print(name, "delta", response.status_code, response.headers.get("x-llm-pager-memory"), sum(s not in seen for s in SAID), response.text[:200] if response.status_code != 200 else "")
            said = 0

            async def remembered() -> bool:
                nonlocal said
                said += 1
                new = {"x-llm-pager-session": f"new {said}"}
                message = {"role": "user", "content": f"{SAID[0]} kept-mark {said}"}
                response = await both.client.post(CHAT, json=body([message]), headers=new)
                return response.status_code == 200 and "x-llm-pager-memory" not in response.headers

            for _ in range(30):
                if await remembered():
                    break
                await asyncio.sleep(0.2)
            print(name, "new session", said)
            assert (await both.whole())[0] == ""
            server.kill()
            await asyncio.to_thread(server.restart)
            new = {"x-llm-pager-session": f"new {said}"}
            response = await both.client.post(CHAT, json=body([{"role": "user", "content": f"{SAID[1]} again"}]), headers=new)
            assert response.status_code == 200, response.text
            print(name, "kept after a kill:", f"kept-mark {said}" in json.dumps(both.upstream.calls[-1].json))
            assert f"kept-mark {said}" in json.dumps(both.upstream.calls[-1].json)
        print(server.log[-3000:])
