"""What turns ask of the one database of many replicas, and where ten thousand of them a second break it first.

    python -m tests.bench.fleet [--rounds 3]              measured: the real store, counted on the wire
    python -m tests.bench.fleet --simulate [--rps 10000]  on paper, from the figures at the end of this file

Promises: the replicas are `llm-pager serve`, on one PostgreSQL, behind a relay that counts what passes: a round trip is a
message to the server after one from it. No two turns in a row of a conversation are one replica's, so what a turn
needs of the one before it comes from the database, as with twenty replicas and a balancer without a memory. CPU is the
kernel's account of the replicas and of the database's processes.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proxy.config import Config, load_config
from tests.bench.gateways import cpu_seconds
from tests.bench.making import Conversation, body, completion, make, message
from tests.bench.scale import L0_TOKENS, Client, Model
from tests.e2e.processes import ServerProcess

SOMEBODY = [(b"authorization", b"Bearer somebody")]
REPLICAS = 4
IDLE_S = 5.0
CONVERSATIONS = 100
ROUNDS = 3  # turns of each conversation that are measured, of each kind


class Relay:
    """Between the replicas and the database, in a thread of its own. `url` goes through it; `trips`; `asked` and
    `answered`, in bytes."""

    def __init__(self, url: str) -> None:
        self._to = to = urlsplit(url)
        self.trips = self.asked = self.answered = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        port = server.sockets[0].getsockname()[1]
        self.url = f"postgresql://{to.username}:{to.password}@127.0.0.1:{port}{to.path}?sslmode=disable"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._to.hostname, self._to.port)
        answered = True

        async def ask() -> None:
            nonlocal answered
            while data := await reader.read(1 << 20):
                self.trips += answered
                answered, self.asked = False, self.asked + len(data)
                back.write(data)
            back.close()

        async def answer() -> None:
            nonlocal answered
            while data := await there.read(1 << 20):
                answered, self.answered = True, self.answered + len(data)
                writer.write(data)
            writer.close()

        await asyncio.gather(ask(), answer(), return_exceptions=True)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


@dataclass
class Asked:
    """Of one kind of turn, on the average."""

    trips: float
    asked_bytes: float
    answered_bytes: float
    wal_bytes: float
    replica_cpu_s: float
    database_cpu_s: float


class Fleet:
    """Replicas on one database, and clients whose turns go round them."""

    def __init__(self, database: Any, url: str, relay: Relay, servers: Sequence[ServerProcess], clients: Sequence[Client]) -> None:
        self.database, self.url, self.relay, self.servers, self.clients = database, url, relay, servers, clients
        self.said: dict[int, list[bytes]] = {number: [] for number in range(CONVERSATIONS)}
        self.turns = 0

    def _counts(self) -> list[float]:
        (row,) = self.database.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn AS wal", url=self.url)
        return [
            self.relay.trips, self.relay.asked, self.relay.answered, float(row["wal"]),
            sum(cpu_seconds(server.pid) for server in self.servers), cpu_seconds(self.database.pid),
        ]  # fmt: skip

    async def measure(self, whole: bool, rounds: int) -> Asked:
        """`whole`: the clients send their histories, else only what is new."""

        async def work() -> None:
            for _ in range(rounds):
                for number, said in self.said.items():
                    await self.turn(number, said, whole)
                self.turns += 1

        return await self._asked(rounds * len(self.said), work)

    async def short(self, rounds: int) -> Asked:
        """First messages, which fit their window."""

        async def work() -> None:
            for i in range(rounds * CONVERSATIONS):
                question = f"{i}. " + Conversation(i).texts[0]
                said = completion({"role": "assistant", "content": Conversation(i).texts[1]})
                await self.clients[i % len(self.clients)].chat(body([message("user", question)]), SOMEBODY, said)

        return await self._asked(rounds * CONVERSATIONS, work)

    async def _asked(self, turns: int, work: Callable[[], Awaitable[None]]) -> Asked:
        """What `work` asked, without what all these processes do when nobody asks."""
        await asyncio.sleep(1)  # what they do behind the last answers
        counts, at_s = [self._counts()], [time.monotonic()]
        for doing in (asyncio.sleep(IDLE_S), work()):
            await doing
            counts.append(self._counts())
            at_s.append(time.monotonic())
        idle, busy = ([b - a for a, b in zip(*counts[i : i + 2], strict=True)] for i in (0, 1))
        times = (at_s[2] - at_s[1]) / (at_s[1] - at_s[0])
        return Asked(*(max(0.0, b - i * times) / turns for i, b in zip(idle, busy, strict=True)))

    async def turn(self, number: int, said: list[bytes], whole: bool) -> None:
        conversation = Conversation(number)
        said.append(message("user", f"Is there anything that I should know about the {self.turns}. of them, {number}?"))
        headers, request = conversation.headers, said[-1:]
        if whole:
            headers, request = headers[:1], [*conversation.messages, *said]
        text = conversation.texts[self.turns % len(conversation.texts)]
        client = self.clients[(number + self.turns) % len(self.clients)]
        await client.chat(body(request), headers, completion({"role": "assistant", "content": text}))
        said.append(message("assistant", text))


async def measured(rounds: int) -> dict[str, Asked]:
    """By kind of turn."""
    from tests.services import Postgres

    async with AsyncExitStack() as running:
        database = running.enter_context(Postgres({"fsync": "on", "shared_buffers": "256MB"}))
        url = database.new_database()
        relay = Relay(url)
        running.callback(relay.close)
        model = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", 0)
        running.callback(model.close)
        tiers = {"l0": {"tokens": L0_TOKENS}, "l2": {"url": relay.url}}
        with tempfile.TemporaryDirectory() as folder:
            await make(_config(Path(folder), tiers), range(CONVERSATIONS))
        upstream = {"base_url": f"http://127.0.0.1:{model.sockets[0].getsockname()[1]}/v1"}
        settings = {"tiers": tiers, "upstream": upstream, "log": {"level": "warning"}}
        servers = [running.enter_context(ServerProcess(settings)) for _ in range(REPLICAS)]
        clients = [await Client(server.port).open() for server in servers]
        fleet = Fleet(database, url, relay, servers, clients)
        found = {
            "a first message, which fits": await fleet.short(rounds),
            "its history, first on this replica": await fleet.measure(True, 1),
            "its history, here three turns ago": (await fleet.measure(True, REPLICAS - 1), await fleet.measure(True, rounds))[1],
            "what is new, here three turns ago": await fleet.measure(False, rounds),
        }
        for client in clients:
            client.close()
        return found


def _config(folder: Path, tiers: dict[str, Any]) -> Config:
    (folder / "config.yaml").write_text(json.dumps({"tiers": tiers}))
    return load_config(folder / "config.yaml", {}, {})


def table(found: dict[str, Asked]) -> str:
    lines = ["| a turn whose client sends | round trips | KB read | KB written | KB of WAL | replica's CPU ms | database's CPU ms |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {kind} | {a.trips:.1f} | {a.answered_bytes / 1e3:.1f} | {a.asked_bytes / 1e3:.1f} | {a.wal_bytes / 1e3:.1f}"
        f" | {1e3 * a.replica_cpu_s:.1f} | {1e3 * a.database_cpu_s:.2f} |"
        for kind, a in found.items()
    ]  # fmt: skip
    return "\n".join(lines)


# -- on paper

# By `measured`: what the table of docs/scale.md has, of a first message and of a history that was here three turns ago.
FITS = Asked(trips=2.5, asked_bytes=2_300, answered_bytes=300, wal_bytes=6_000, replica_cpu_s=0.0025, database_cpu_s=0.0021)
PAGED = Asked(trips=3.1, asked_bytes=3_000, answered_bytes=58_100, wal_bytes=9_000, replica_cpu_s=0.0129, database_cpu_s=0.0032)
NETWORK_S = 0.0005  # of a round trip between a replica and the database
LATE_S = 0.25  # that the fleet may add to one turn in a hundred
SECONDS = 2.0  # of the simulated time
FLEETS = ((20, 16), (40, 16), (80, 16), (80, 32), (160, 32), (160, 64))  # processes, the database's cores


@dataclass
class Queue:
    """Servers that take who comes first."""

    servers: int
    busy: int = 0
    waiting: deque[tuple[float, Turn]] = field(default_factory=deque)
    used_s: float = 0.0  # of what has begun


@dataclass
class Turn:
    """One on its way: which steps it has still to take, each some seconds at a queue."""

    began_s: float
    steps: deque[tuple[Queue | None, float]]


def simulate(rps: float, share_paged: float, processes: int, database_cores: int, seconds: float = SECONDS) -> dict[str, float]:
    """The busy shares and the latency that the fleet adds, in a queueing model: each turn works on its process, and
    waits for a round trip to the database in between. Arrivals are random, each at a random process."""
    chance = random.Random(0)
    database = Queue(database_cores)
    replicas = [Queue(1) for _ in range(processes)]
    events: list[tuple[float, int, Turn, Queue | None]] = []  # when a step ends, whose and where
    number = count()
    took_s: list[float] = []

    def go_on(now_s: float, turn: Turn) -> None:
        if not turn.steps:
            took_s.append(now_s - turn.began_s)
            return
        queue, work_s = turn.steps.popleft()
        if queue is None:
            heapq.heappush(events, (now_s + work_s, next(number), turn, None))
        elif queue.busy < queue.servers:
            queue.busy += 1
            queue.used_s += work_s
            heapq.heappush(events, (now_s + work_s, next(number), turn, queue))
        else:
            queue.waiting.append((work_s, turn))

    arrives_s = 0.0
    while arrives_s < seconds:
        arrives_s += chance.expovariate(rps)
        kind = PAGED if chance.random() < share_paged else FITS
        process = chance.choice(replicas)
        trips = max(1, round(kind.trips + chance.uniform(-0.5, 0.5)))
        steps: deque[tuple[Queue | None, float]] = deque()
        for _ in range(trips):
            steps.append((process, chance.expovariate((trips + 1) / kind.replica_cpu_s)))
            steps.append((None, NETWORK_S))
            steps.append((database, chance.expovariate(trips / kind.database_cpu_s)))
        steps.append((process, chance.expovariate((trips + 1) / kind.replica_cpu_s)))
        heapq.heappush(events, (arrives_s, next(number), Turn(arrives_s, steps), None))
    while events:
        now_s, _, turn, queue = heapq.heappop(events)
        if now_s > seconds:
            break
        go_on(now_s, turn)
        if queue is not None:
            queue.busy -= 1
            if queue.waiting:
                work_s, next_turn = queue.waiting.popleft()
                next_turn.steps.appendleft((queue, work_s))
                go_on(now_s, next_turn)
    ordered = sorted(took_s)
    return {
        "replicas busy": sum(process.used_s for process in replicas) / seconds / processes,
        "database busy": database.used_s / seconds / database_cores,
        "p50 ms": 1e3 * statistics.median(ordered),
        "p99 ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
    }


def papers(rps: float, share_paged: float) -> str:
    """What so many turns a second ask, by arithmetic, and what fleets of several sizes carry."""
    kinds = ((share_paged, PAGED), (1 - share_paged, FITS))

    def of_turn(name: str) -> float:
        return sum(share * float(getattr(kind, name)) for share, kind in kinds)

    lines = [
        f"{rps:,.0f} turns a second, {share_paged:.0%} of them paged: {rps * of_turn('trips'):,.0f} round trips,"
        f" {rps * of_turn('answered_bytes') / 1e6:,.0f} MB read, {rps * of_turn('asked_bytes') / 1e6:,.0f} MB written,"
        f" {rps * of_turn('wal_bytes') / 1e6:,.0f} MB of WAL; {rps * of_turn('replica_cpu_s'):,.0f} cores of replicas,"
        f" {rps * of_turn('database_cpu_s'):,.1f} of the database", "",
        f"| processes | database's cores | turns a second with p99 below {LATE_S * 1e3:.0f} ms | processes busy | database busy | p50 ms |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for processes, cores in FLEETS:
        most = min(processes / of_turn("replica_cpu_s"), cores / of_turn("database_cpu_s"))
        for rate in (most * percent / 100 for percent in range(95, 0, -5)):
            out = simulate(rate, share_paged, processes, cores)
            if out["p99 ms"] <= 1e3 * LATE_S:
                break
        lines.append(
            f"| {processes} | {cores} | {rate:,.0f} | {out['replicas busy']:.0%} | {out['database busy']:.0%} | {out['p50 ms']:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fleet")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each conversation that are measured")
    parser.add_argument("--simulate", action="store_true", help="on paper, from what was measured before")
    parser.add_argument("--rps", type=float, default=10_000, help="turns a second")
    options = parser.parse_args()
    if not options.simulate:
        print(table(asyncio.run(measured(options.rounds))))
        return
    for share in (0.1, 1.0):
        print(papers(options.rps, share), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
