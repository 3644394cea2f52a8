"""What a store of a million pages costs a request, beside one of ten thousand.

    python -m tests.bench.scale [--conversations 100,1000,10000] [--engines sqlite,postgres] [--folder KEPT] [--results FILE]
    ... --only list,home,conversation      a part of the rows, beside the others of the results
    python -m tests.bench.scale --draw docs/scale.svg --results FILE

Promises: the store is what the proxy makes (tests/bench/making.py), conversations of 100 pages, each larger than its
window; what is made stands in the folder, and a copy of it is measured, so that it can be measured again. The server is
`llm-pager serve` over sockets, started anew before each block of rows and for each hundred conversations, so that every
conversation is cold: none of it in the process's RAM (the system's own cache of files is as it is). The same work for each
size, request by request in turns; it is small beside the store.

start      seconds of CPU until the server answers /health; RSS then, and after all the work
cold       a turn of a session that this process has not seen: CPU ms, median and p99 ms
turn       its next one
whole      one whose client sends its whole history
           (CPU is the server's, and the database's: on a busy machine it is what can be compared)
fault L2   from the model's page_fault to the request with its page, of a conversation that is cold; of its text in the store
fault L1   likewise of a page whose text is in RAM
fault L4   likewise of a conversation that stands in packs of objects (a directory's) alone; `from L4`: the whole turn
search     from the model's search_pages to the request with what it found, of a conversation that is cold
again      likewise the second search of a conversation
list       a page of /vm/conversations, fifty of them, as who sees all asks for it; `home`: /vm/ui; `conversation`: one of those,
           as the dashboard shows it (all of the CPU). A list reads the last use of all: it grows, and has a limit, 200 ms
disk       bytes stored for a page (of 400 characters)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

from proxy import keys
from proxy.api.caller import caller_of
from proxy.config import Config, load_config
from proxy.conversation.tree import Identity
from proxy.storage import open_store
from proxy.storage.demotion import Demotion
from proxy.storage.sqlite import DATABASE
from tests.bench.chart import small_multiples
from tests.bench.gateways import cpu_seconds, rss_mb
from tests.bench.making import MESSAGES, Conversation, body, completion, make, message
from tests.e2e.processes import ServerProcess
from tests.services import Postgres

L0_TOKENS = 4000
SAMPLE = 100  # conversations of a row that one server is asked for,
LIVES = 2  # and how many servers are
WITHIN = 2.0  # times the smallest size
TURNS = ("cold", "turn", "whole")
SEEN = {"list": "/vm/conversations", "home": "/vm/ui", "conversation": "/vm/ui/conversations"}
SEEN_MS = 200.0  # of CPU, at most
# What is done in one life of a server: none of it is known at the first.
PROCESSES = (TURNS, ("fault L2",), ("search", "search again", "fault L1"), tuple(SEEN), ("fault L4",))
CHARTED = {
    "turn, CPU ms": "turn, CPU ms", "first turn here, CPU ms": "cold, CPU ms", "whole history, CPU ms": "whole, CPU ms",
    "first search, CPU ms": "search, CPU ms", "fault from disk, CPU ms": "fault L2, CPU ms",
    "list of conversations, CPU ms": "list, CPU ms", "RSS at the end, MB": "RSS after the work, MB", "bytes a page": "bytes on disk a page",
}  # fmt: skip
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_LENGTH = re.compile(rb"content-length: *(\d+)")
_known = lru_cache(SAMPLE * LIVES * 3)(Conversation)


def call(name: str, **arguments: object) -> bytes:
    """The model calls one of the memory's tools."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    said = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    return completion(said, "tool_calls")


class Model(asyncio.Protocol):
    """Says what is in `script`, one answer a request. `body`: the last request's; `gap_s` and `gap_cpu_s`: the time to it
    from the answer before it in the script, and the CPU's that each of the servers `pids` spent in it."""

    script: ClassVar[list[bytes]] = []
    body = b""
    gap_s = 0.0
    gap_cpu_s: ClassVar[list[float]] = []
    pids: ClassVar[list[int]] = []
    _called_s = 0.0
    _called_cpu_s: ClassVar[list[float]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._buffer = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        length = _LENGTH.search(bytes(self._buffer[:end]).lower())
        size = int(length[1]) if length else 0
        if len(self._buffer) < end + size:
            return
        if Model._called_s:
            Model.gap_s = time.perf_counter() - Model._called_s
            Model.gap_cpu_s = spent(Model.pids, Model._called_cpu_s)
        Model.body = bytes(self._buffer[end : end + size])
        self._buffer.clear()
        answer = Model.script.pop(0)
        Model._called_cpu_s = spent(Model.pids) if Model.script else []
        Model._called_s = time.perf_counter() if Model.script else 0.0
        self._transport.write(_HEAD % len(answer) + answer)


def spent(pids: Sequence[int], before: Sequence[float] = ()) -> list[float]:
    """Seconds of CPU of each of these processes with its children, since."""
    return [cpu_seconds(pid) - (before[n] if before else 0.0) for n, pid in enumerate(pids)]


class Client:
    """One connection to the server."""

    def __init__(self, port: int) -> None:
        self._port = port

    def close(self) -> None:
        self._writer.close()

    async def open(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        return self

    async def chat(self, request: bytes, headers: Sequence[tuple[bytes, bytes]], *script: bytes) -> float:
        """Seconds of a turn in which the model says that."""
        Model.script = list(script)
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        answer, seconds = await self._asked(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n%bcontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (head, len(request), request)
        )
        if Model.script:
            raise RuntimeError(f"the model was not asked: {answer[:800]!r}")
        return seconds

    async def get(self, path: str) -> tuple[bytes, float]:
        return await self._asked(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())

    async def _asked(self, request: bytes) -> tuple[bytes, float]:
        """What is answered, and after how many seconds."""
        started = time.perf_counter()
        self._writer.write(request)
        got = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = _LENGTH.search(got)
        assert length, got
        answer = await self._reader.readexactly(int(length[1]))
        seconds = time.perf_counter() - started
        if not got.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{got[:40]!r}: {answer[:800]!r}")
        return answer, seconds


@dataclass
class Row:
    """What one size costs, in seconds, bytes and megabytes; a list has a value a request."""

    pages: int
    start_s: float = 0.0
    rss_mb: tuple[float, float] = (0.0, 0.0)  # at the start, after the work
    page_bytes: float = 0.0
    cpu_s: dict[str, list[list[float]]] = field(default_factory=dict)  # by kind: the server's, and the database's
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def took(self, kind: str, seconds: float, cpu_s: list[float] | None = None) -> None:
        self.seconds.setdefault(kind, []).append(seconds)
        if cpu_s is not None:
            self.cpu_s.setdefault(kind, []).append([sum(cpu_s)] if kind in SEEN else cpu_s)

    def figures(self) -> dict[str, float]:
        """By name, in the unit that it is shown in."""
        out = {"start, CPU s": self.start_s, "RSS at the start, MB": self.rss_mb[0], "RSS after the work, MB": self.rss_mb[1]}
        for kind, seconds in self.seconds.items():
            for name, spent_s in zip(("CPU", "database's CPU"), zip(*self.cpu_s.get(kind, ()), strict=True), strict=False):
                out[f"{kind}, {name} ms"] = 1e3 * statistics.fmean(spent_s)
            ordered = sorted(seconds)
            out[f"{kind}, p50 ms"] = 1e3 * statistics.median(ordered)
            out[f"{kind}, p99 ms"] = 1e3 * ordered[round(0.99 * (len(ordered) - 1))]
        return {**out, "bytes on disk a page": self.page_bytes}


class Engine:
    """Where the store is. `tiers`: the configuration's section; `pids`: of the database's server."""

    def __init__(self, name: str, tiers: dict[str, Any], disk_bytes: Callable[[], int], pids: Sequence[int] = ()) -> None:
        self.name, self.disk_bytes, self.pids = name, disk_bytes, pids
        self.tiers = {"l0": {"tokens": L0_TOKENS}, **tiers}

    def config(self, folder: Path) -> Config:
        file = folder / f"{self.name}.yaml"
        file.write_text(json.dumps({"tiers": self.tiers}))
        return load_config(file, {}, {})


def made(folder: Path, size: int) -> Path:
    """The directory with a store of so many conversations: each processor makes some of them, with the same secret."""
    path, parts = folder / f"sqlite-{size}", [folder / f"making-{n}" for n in range(os.cpu_count() or 1)]
    if path.exists():
        return path
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    asyncio.run(open_store(_at(parts[0])).close())
    for part in parts[1:]:
        shutil.copytree(parts[0], part)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_make_part, parts, [range(n, size, len(parts)) for n in range(len(parts))]))
    with closing(sqlite3.connect(parts[0] / DATABASE, isolation_level=None)) as first:
        for part in parts[1:]:
            first.execute("ATTACH ? AS part", (str(part / DATABASE),))
            rows = "key, raw, mode, tag, value"
            first.execute(f"INSERT INTO Cache ({rows}) SELECT {rows} FROM part.Cache WHERE typeof(key) = 'blob'")
            first.execute("DETACH part")
            shutil.rmtree(part)
    return parts[0].rename(path)


def _make_part(path: Path, numbers: Sequence[int]) -> None:
    asyncio.run(make(_at(path), numbers))


def _at(path: Path) -> Config:
    return Engine(path.name, {"l2": {"path": str(path)}}, int).config(path.parent)


@contextmanager
def sqlite(folder: Path, sizes: Sequence[int]) -> Iterator[list[Engine]]:
    """Copies of stores of so many conversations."""
    engines = []
    for size in sizes:
        path = folder / f"measured-{size}"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(made(folder, size), path)
        engines.append(Engine(f"sqlite-{size}", {"l2": {"path": str(path)}}, partial(_directory_bytes, path)))
    yield engines


def _directory_bytes(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


@contextmanager
def postgres(folder: Path, sizes: Sequence[int]) -> Iterator[list[Engine]]:
    """The same stores, migrated into databases of one server."""
    from proxy.cli import main as llm_pager

    settings = {"fsync": "on", "shared_buffers": "256MB", "max_wal_size": "4GB"}
    with Postgres(settings, folder / "postgres") as server:
        engines = []
        for size in sizes:
            if not server.execute(f"SELECT FROM pg_database WHERE datname = 'scale_{size}'"):
                server.execute("DROP DATABASE IF EXISTS making")
                url = server.new_database("making")
                if llm_pager(["migrate", str(made(folder, size)), url]):
                    raise RuntimeError(f"the store of {size} conversations could not be migrated")
                server.execute("VACUUM ANALYZE", url=url)
                server.execute(f"ALTER DATABASE making RENAME TO scale_{size}")
            server.execute(f"DROP DATABASE IF EXISTS measured_{size}")
            server.execute(f"CREATE DATABASE measured_{size} TEMPLATE scale_{size} STRATEGY file_copy")
            url = server.url(f"measured_{size}")
            engines.append(Engine(f"postgres-{size}", {"l2": {"url": url}}, partial(_table_bytes, server, url), [server.pid]))
        yield engines


def _table_bytes(server: Postgres, url: str) -> int:
    tables = "FROM pg_class WHERE relname LIKE 'llm_pager_%' AND relkind = 'r'"
    (row,) = server.execute(f"SELECT sum(pg_total_relation_size(oid)) AS bytes {tables}", url=url)
    return int(row["bytes"])


ENGINES = {"sqlite": sqlite, "postgres": postgres}
NAMES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}


class Bench:
    """One size's server and client."""

    def __init__(self, engine: Engine, conversations: int, model_port: int) -> None:
        self.engine = engine
        self.row = Row(conversations * MESSAGES)
        self.random = random.Random(f"{conversations}")
        self.numbers = self.random.sample(range(conversations), min(SAMPLE, conversations))
        self.names: list[str] = []  # of the conversations that a list had, which is read from page to page
        self.cursor = ""
        upstream = {"base_url": f"http://127.0.0.1:{model_port}/v1"}
        self.config = {
            "tiers": engine.tiers, "upstream": upstream, "log": {"level": "warning"},
            "memory": {"tools": "always"},  # a model that seldom calls would lose them
        }  # fmt: skip
        self.histories: dict[int, list[bytes]] = {}  # what was said since
        self.starts_s: list[float] = []

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """A server that has seen nothing yet, started as its users do."""
        with ServerProcess(self.config, env={"PYTHONHASHSEED": "0"}, forked=False) as server:
            self.pids = [server.pid, *self.engine.pids]
            self.starts_s.append(cpu_seconds(server.pid))
            self.row.start_s = statistics.median(self.starts_s)
            begun_mb = rss_mb(server.pid)
            self.client = await Client(server.port).open()
            yield
            self.client.close()
            self.row.rss_mb = (begun_mb, max(self.row.rss_mb[1], rss_mb(server.pid)))

    async def turn(self, kind: str, number: int) -> None:
        """A turn of that conversation."""
        conversation, said = _known(number), self.histories.setdefault(number, [])
        said.append(message("user", f"Go on, {kind}."))
        headers, request = conversation.headers, said[-1:]
        if kind == "whole":
            headers, request = headers[:1], [*conversation.messages, *said]
        before = spent(self.pids)
        seconds = await self.client.chat(body(request), headers, self.says(said))
        self.row.took(kind, seconds, spent(self.pids, before))
        if b"<VM:RULES>" not in Model.body:
            raise RuntimeError(f"{kind}: conversation {number} is not known: {Model.body[:2000]!r}")

    def says(self, said: list[bytes]) -> bytes:
        text = f"It goes on, {len(said)}."
        said.append(message("assistant", text))
        return completion({"role": "assistant", "content": text})

    async def call(self, kind: str, number: int) -> None:
        """The model calls once in that conversation, and what it wanted is in its next request."""
        conversation, said = _known(number), self.histories.setdefault(number, [])
        at = self.random.randrange(MESSAGES // 2)
        if kind.startswith("search"):
            words = " ".join(conversation.texts[at].split()[:12])
            made, wanted = call("search_pages", query=words), f"msg_{at + 1:04d}"
        else:
            made, wanted = call("page_fault", page_id=f"msg_{at + 1:04d}"), conversation.texts[at][:60]
        said.append(message("user", f"Look, {kind}."))
        Model.pids = self.pids[:1]  # the database's is other work's: a round hardly asks it
        seconds = await self.client.chat(body(said[-1:]), conversation.headers, made, self.says(said))
        if wanted.encode() not in Model.body:
            raise RuntimeError(f"{kind} of conversation {number} did not bring {wanted!r}: {Model.body[-3000:]!r}")
        self.row.took(kind, Model.gap_s, Model.gap_cpu_s)
        if kind == "fault L4":
            self.row.took("a turn with it", seconds)

    async def see(self, kind: str, number: int) -> None:
        """A page of the dashboard, or of what it shows."""
        path = SEEN[kind] + (f"?cursor={self.cursor}" if kind == "list" else f"/{self.names.pop()}" if kind == "conversation" else "")
        before = spent(self.pids)
        answer, seconds = await self.client.get(path)
        self.row.took(kind, seconds, spent(self.pids, before))
        if kind == "list":
            found = json.loads(answer)
            self.names, self.cursor = [row["conversation"] for row in found["conversations"]], found["next_cursor"] or ""

    async def archive(self, folder: Path) -> None:
        """The conversations leave L2, as after `tiers.l2.days`."""
        archive = folder / f"archive-{self.engine.name}"
        shutil.rmtree(archive, ignore_errors=True)
        self.engine.tiers["l4"] = {"url": str(archive)}
        config = self.engine.config(folder)
        store = open_store(config)
        identity, demotion = Identity(store.secret()), Demotion(store, 1.0, None, None)
        for number in self.numbers:
            who = caller_of(_known(number).headers, (), config.sessions)
            head = store.get(identity.session(identity.tenant(who.credentials, who.person), str(number))) or b""
            copied, _ = await demotion.copy(head[: keys.OWNER_BYTES])
            assert copied
            await store.engine.commit((), drops=copied)
        await store.close()


async def run(engines: Sequence[Engine], sizes: Sequence[int], folder: Path, only: Sequence[str] = ()) -> list[Row]:
    """A row for each size, each on an engine of its own. They take turns, so that a noisy machine is one to all of them."""
    model = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", 0)
    port = model.sockets[0].getsockname()[1]
    benches = [Bench(engine, size, port) for engine, size in zip(engines, sizes, strict=True)]
    for bench in benches:
        bench.row.page_bytes = bench.engine.disk_bytes() / bench.row.pages
    for kinds in (tuple(kind for kind in kinds if not only or kind in only) for kinds in PROCESSES):
        if "fault L4" in kinds:
            for bench in benches:
                await bench.archive(folder)
        for _ in range(LIVES if kinds else 0):
            async with AsyncExitStack() as running:
                for bench in benches:
                    await running.enter_async_context(bench.served())
                for i, kind, bench in product(range(SAMPLE), kinds, benches):
                    work = bench.see if kind in SEEN else bench.turn if kind in TURNS else bench.call
                    await work(kind, bench.numbers[i % len(bench.numbers)])
    model.close()
    return [bench.row for bench in benches]


Results = dict[str, dict[str, list[float]]]  # by engine and figure, a value for each size; the sizes are "pages"


def table(name: str, figures: dict[str, list[float]]) -> str:
    """In Markdown, with what the largest costs for each of the smallest."""
    pages = figures["pages"]
    lines = [f"| {name} | " + " | ".join(f"{count:,.0f} pages" for count in pages) + " | times |", "|---" * (len(pages) + 2) + "|"]
    for figure, values in figures.items():
        if figure == "pages":
            continue
        times, (kind, _, unit) = values[-1] / values[0], figure.partition(", ")
        over = (max(values) > SEEN_MS) * (unit == "CPU ms") if kind in SEEN else times > WITHIN
        lines.append(f"| {figure} | " + " | ".join(f"{value:.3g}" for value in values) + f" | {times:.2f}{' **over**' if over else ''} |")
    return "\n".join(lines)


def chart(results: Results) -> str:
    """The figures that people ask for first."""
    pages = next(iter(results.values()))["pages"]
    ticks = [f"{count / 1e3:,.0f}k" if count < 1e6 else f"{count / 1e6:g}M" for count in pages]
    panels = {name: {NAMES[engine]: figures[figure] for engine, figures in results.items()} for name, figure in CHARTED.items()}
    return small_multiples("What a request costs as its store grows (pages)", ticks, [NAMES[engine] for engine in results], panels)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale")
    parser.add_argument("--conversations", default="100,1000,10000")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--folder", type=Path, help="where the stores are made and kept (default: a temporary one)")
    parser.add_argument("--results", type=Path, help="a file that keeps the figures, beside those of other runs")
    parser.add_argument("--only", default="", help="a part of the rows, such as list,home,conversation; the others of the results stay")
    parser.add_argument("--draw", type=Path, help="the chart of the results, instead of measuring")
    options = parser.parse_args()
    results: Results = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    if options.draw:
        options.draw.write_text(chart(results), encoding="utf-8")
        return
    sizes, only = [int(size) for size in options.conversations.split(",")], [kind for kind in options.only.split(",") if kind]
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as temporary:
        folder: Path = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name in options.engines.split(","):
            with ENGINES[name](folder, sizes) as engines:
                rows = asyncio.run(run(engines, sizes, folder, only))
            shown = [{"pages": row.pages, **row.figures()} for row in rows]
            measured = {figure: [values[figure] for values in shown] for figure in shown[0] if not only or figure.partition(",")[0] in only}
            results[name] = {**results.get(name, {}), "pages": [row.pages for row in rows], **measured}
            print(table(NAMES[name], results[name]), flush=True)
            if options.results:
                options.results.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
