"""Load, and nobody waits: fifty tenants, slow readers, hostile files, first sights and kills at once.

    python -m tests.chaos.soak --seconds 120 [--seed N] [--only "a PDF of shared pages,..."] [--no-kills]

One server, its upstream and a prober, each a process. What has to hold:

    small request   its 99th percentile under load is told beside the aim: at most 5 times that of quiet seconds
                    before, plus what the machine itself added (the same percentile of requests straight to the
                    upstream); above `MOST_P99_MS` it fails
    RSS             of the server and its helpers: no more in the last quarter than in the one before, but for
                    `GROWTH_SHARE` and `GROWTH_MB`; kills end in the first third, so that both are of one process
    nothing lost    every request of a tenant that says what it has been told goes upstream with it, also after a
                    kill, and every request is answered
    no other's      no upstream request holds another tenant's marks

The report names what was sent when small requests were slowest. Exit status 0: all hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.hostile import KINDS
from tests.e2e.answers import CREATED
from tests.e2e.processes import ServerProcess, free_port, wait_for_health
from tests.e2e.recording import Recorded, RecordingUpstream, _Connection
from tests.e2e.script import SYSTEM, filler

TENANTS = 50
THINK_S = (1.0, 3.0)
SLOW_READERS, SLOW_BYTES_PER_S, LONG_STREAM_BYTES = 60, 4_000, 840_000
UNFINISHED = 40
HOSTILE_EVERY_S = 2.5
KILL_EVERY_S = 8.0
PROBE_EVERY_S = 0.05
QUIET_S = 12.0
TIMES_QUIET = 5.0
# Two cores that all of this shares, restarts among it, come to a second: what is small waits for the commits of what is
# large (20,000 records are one transaction), and for the interpreter's lock.
MOST_P99_MS = 4_000.0
GROWTH_SHARE, GROWTH_MB = 0.25, 24.0  # peaks are of hostile requests that meet by chance
PATIENCE_S = 60.0
EXPECTS = "x-soak-expects"
CUT = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError, asyncio.IncompleteReadError)
Message = dict[str, Any]


# -- the upstream, a process of its own


class Judge(RecordingUpstream):
    """Answers at once, and reads each request for what must be in it and what must not."""

    def __init__(self, port: int) -> None:
        super().__init__(bursts=True)
        self.port = port
        self.requests = 0
        self.foreign: list[str] = []
        self.lost: list[str] = []

    async def handle(self, connection: _Connection, request: Recorded) -> None:
        if request.method == "GET":
            said = {"requests": self.requests, "foreign": self.foreign, "lost": self.lost}
            return await connection.send(request, {"object": "list", "data": [], **said})
        self.requests += 1
        tenant = (request.header("authorization") or "").removeprefix("Bearer ").encode()
        others = {mark for mark in re.findall(rb"(tenant\d+)mark", request.body) if mark != tenant}
        if others:
            self.foreign.append(f"{sorted(others)[:3]} in a request of {tenant!r}")
        expected = request.header(EXPECTS)
        if expected and expected.encode() not in request.body:
            self.lost.append(f"{expected} of {tenant!r}: {request.body[-200:]!r}")
        answer = f"Noted {tenant.decode()}mark{self.requests}z. {filler(str(self.requests), 40)}"
        if b'"stream": true' in request.body or b'"stream":true' in request.body:
            if b"at great length" in request.body[-4000:]:
                return await self._at_length(connection)
            parts = [answer[i : i + 40] for i in range(0, len(answer), 40)]
            return self._stream(connection, parts)
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": len(request.body) // 4, "completion_tokens": 60, "total_tokens": 60}
        head = {"id": "chatcmpl-soak", "object": "chat.completion", "created": CREATED, "model": "house-model"}
        await connection.send(request, {**head, "choices": [choice], "usage": usage})

    def _stream(self, connection: _Connection, parts: list[str]) -> None:
        connection.transport.write(_STREAM_HEAD + b"".join(map(_event, parts)) + _STREAM_END)

    async def _at_length(self, connection: _Connection) -> None:
        """As fast as it is read: a reader that is slow should slow us, too."""
        gate = asyncio.Event()
        gate.set()
        connection.pause_writing, connection.resume_writing = gate.clear, gate.set  # type: ignore[method-assign]
        connection.transport.write(_STREAM_HEAD)
        event = _event("long " * 200)
        for _ in range(LONG_STREAM_BYTES // len(event)):
            await gate.wait()
            if connection.transport.is_closing():
                return
            connection.transport.write(event)
            await asyncio.sleep(0)
        connection.transport.write(_STREAM_END)


_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_HEAD = {"id": "chatcmpl-soak", "object": "chat.completion.chunk", "created": CREATED, "model": "house-model"}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if finish is None else {}, "finish_reason": finish}
    return _chunk(b"data: " + json.dumps({**_HEAD, "choices": [choice]}).encode() + b"\n\n")


_STREAM_END = _event("", "stop") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def _judge(port: int) -> None:
    await Judge(port).start()
    await asyncio.Event().wait()


# -- the prober, a process of its own


async def _probe(port: int, upstream_port: int) -> None:
    """Small requests at a steady pace, whether those before are answered or not: by turns to the server and
    to the upstream. One line each: when it was sent, to whom, milliseconds (null: the connection broke)."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as client:

        async def one(n: int) -> None:
            to, where = (("server", port), ("upstream", upstream_port))[n % 2]
            body = {"model": "house-model", "messages": [{"role": "user", "content": f"{n} {filler(str(n), 100)}"}]}
            headers = {"authorization": "Bearer prober"}
            sent, ms = time.monotonic(), None
            with contextlib.suppress(*CUT):
                async with client.post(f"http://127.0.0.1:{where}/v1/chat/completions", json=body, headers=headers) as r:
                    await r.read()
                    if r.status == 200:
                        ms = 1e3 * (time.monotonic() - sent)
            print(json.dumps([sent, to, ms]), flush=True)

        running: set[asyncio.Task[None]] = set()
        for n in itertools.count():
            task = asyncio.ensure_future(one(n))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(PROBE_EVERY_S / 2)


# -- the load


class Load:
    def __init__(self, server: ServerProcess, seed: int, kinds: list[str]) -> None:
        self.server, self.kinds = server, kinds
        self.chance = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.refused: list[str] = []
        self.sent: list[tuple[float, float, str]] = []  # of what is heavy: from, to, its name
        self.up = asyncio.Event()
        self.up.set()

    async def post(self, client: aiohttp.ClientSession, tenant: str, body: Message, headers: dict[str, str]) -> str:
        """The answer's text, however often the connection is cut on the way to it."""
        headers = {"authorization": f"Bearer {tenant}", "content-type": "application/json", **headers}
        raw = await asyncio.to_thread(lambda: json.dumps(body).encode()) if len(body["messages"]) > 99 else json.dumps(body).encode()
        while True:
            await self.up.wait()
            with contextlib.suppress(*CUT):
                async with client.post(f"{self.server.base_url}/chat/completions", data=raw, headers=headers) as r:
                    text = await r.text()
                    self.counts[f"status {r.status}"] += 1
                    if r.status >= 400:
                        return f"refused: {r.status} {text[:200]}"
                    if body.get("stream"):
                        if not text.rstrip().endswith("[DONE]"):
                            raise ConnectionError
                        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
                        return "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
                    return str(json.loads(text)["choices"][0]["message"]["content"])
            self.counts["answers cut"] += 1
            await asyncio.sleep(0.05)

    async def tenant(self, client: aiohttp.ClientSession, number: int) -> None:
        """Conversations of one tenant: whole histories, or new messages only."""
        name, chance = f"tenant{number}", random.Random(number)
        for conversation in itertools.count():
            session = (number + conversation) % 2 == 0
            history: list[Message] = [SYSTEM]
            told = ""
            for turn in range(chance.randint(15, 40)):
                await asyncio.sleep(chance.uniform(*THINK_S))
                text = f"Note {name}mark{conversation}u{turn}z. {filler(f'{name}{turn}', 60)}"
                history.append({"role": "user", "content": text})
                messages = [SYSTEM, history[-1]] if session else history
                body = {"model": "house-model", "messages": messages, "stream": chance.random() < 0.4}
                headers = {EXPECTS: told} if told else {}
                if session:
                    headers["x-llm-pager-session"] = f"{name}-{conversation}"
                answer = await self.post(client, name, body, headers)
                if answer.startswith("refused"):
                    self.refused.append(f"{name}: {answer}")
                    break
                told = answer.split()[1]
                history.append({"role": "assistant", "content": answer})

    async def hostile(self, client: aiohttp.ClientSession) -> None:
        """One after another, each begun whether the one before is answered or not."""
        async with asyncio.TaskGroup() as running:
            for n in itertools.count():
                kind = self.kinds[n % len(self.kinds)]
                fields = await asyncio.to_thread(KINDS[kind], n)
                running.create_task(self._heavy(client, kind, {"model": "house-model", **fields}))
                await asyncio.sleep(HOSTILE_EVERY_S)

    async def _heavy(self, client: aiohttp.ClientSession, kind: str, body: Message) -> None:
        begun, came = time.monotonic(), "open at the end"
        try:
            answer = await self.post(client, "attacker", body, {})
            came = "refused" if answer.startswith("refused") else "answered"
        finally:
            self.counts[f"{kind}: {came}"] += 1
            self.sent.append((begun, time.monotonic(), kind))

    async def slow_reader(self, number: int) -> None:
        """A client that reads a long answer at 4 KB a second, and leaves before its end."""
        body = {"model": "house-model", "stream": True, "messages": [{"role": "user", "content": f"{number} at great length"}]}
        raw = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer slow%d\r\n" % number
        while True:
            await self.up.wait()
            with contextlib.suppress(*CUT):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port, limit=4096)
                writer.write(head + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
                until = time.monotonic() + 20 + number % 10
                with contextlib.closing(writer):
                    async with asyncio.timeout(PATIENCE_S):
                        while time.monotonic() < until and await reader.read(SLOW_BYTES_PER_S // 2):
                            await asyncio.sleep(0.5)
            await asyncio.sleep(0.5)

    async def unfinished(self, number: int) -> None:
        """A request that never ends."""
        start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        if number % 4 == 0:
            start += b"content-length: 9000000\r\n\r\n" + b"x" * 1_000_000
        while True:
            await self.up.wait()
            with contextlib.suppress(*CUT):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
                with contextlib.closing(writer):
                    writer.write(start)
                    async with asyncio.timeout(15):
                        await reader.read(1)
            await asyncio.sleep(1)

    async def kills(self, until: float) -> None:
        while time.monotonic() + KILL_EVERY_S < until:
            await asyncio.sleep(KILL_EVERY_S * self.chance.uniform(0.7, 1.3))
            self.up.clear()
            begun = time.monotonic()
            os.killpg(self.server.pid, signal.SIGKILL)
            await asyncio.to_thread(self.server.kill)
            await asyncio.to_thread(self.server.restart)
            self.up.set()
            self.counts["kills"] += 1
            self.sent.append((begun, time.monotonic() + 1, "a restart"))


# -- measuring


def rss_mb(pid: int) -> float:
    """Resident memory of a process and what it started."""
    pages, todo = 0, [pid]
    while todo:
        p = todo.pop()
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{p}/statm").read_text().split()[1])
            for task in Path(f"/proc/{p}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Probes:
    """What the prober said."""

    def __init__(self, port: int, upstream_port: int) -> None:
        command = [sys.executable, "-m", "tests.chaos.soak", "--probe", str(port), str(upstream_port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.all: list[tuple[float, str, float | None]] = []

    def read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.all.append(tuple(json.loads(line)))

    def between(self, begin: float, end: float, to: str) -> list[float]:
        return [ms for sent, whom, ms in self.all if begin <= sent < end and whom == to and ms is not None]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


@contextlib.contextmanager
def _upstream() -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.chaos.soak", "--upstream", str(port)])
    try:
        wait_for_health(port, 30, lambda: process.poll() is None, "/v1/models")
        yield port
    finally:
        process.kill()
        process.wait()


async def run(seconds: float, seed: int, kinds: list[str], with_kills: bool = True) -> bool:
    with _upstream() as upstream_port:
        config = {
            "server": {"history_cache_bytes": 32 << 20},  # small caches: they are full before the end
            "upstream": {"base_url": f"http://127.0.0.1:{upstream_port}/v1"},
            "tiers": {"l0": {"tokens": 4000, "reserve_tokens": 500}, "l1": {"tokens": 200_000}},
            "search": {"index_pages": 10_000},
            "log": {"level": "warning"},
        }
        with ServerProcess(config) as server:
            probes = Probes(server.port, upstream_port)
            reading = asyncio.ensure_future(asyncio.to_thread(probes.read))
            load = Load(server, seed, kinds)
            rss: list[tuple[float, float]] = []
            try:
                await asyncio.sleep(3)  # the first requests are slower
                begun = time.monotonic()
                await asyncio.sleep(QUIET_S)
                loaded = time.monotonic()
                await _under_load(load, seconds, with_kills, rss)
                ended = time.monotonic()
            finally:
                probes.stop()
                await reading
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as client:
                async with client.get(f"http://127.0.0.1:{upstream_port}/v1/models") as r:
                    judged = await r.json()
            return _report(load, probes, rss, judged, begun, loaded, ended)


async def _under_load(load: Load, seconds: float, with_kills: bool, rss: list[tuple[float, float]]) -> None:
    end = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as client:
        work: list[Coroutine[Any, Any, None]] = [load.tenant(client, n) for n in range(TENANTS)]
        work += [load.hostile(client)] if load.kinds else []
        work += [load.slow_reader(n) for n in range(SLOW_READERS)]
        work += [load.unfinished(n) for n in range(UNFINISHED)]
        if with_kills:
            work.append(load.kills(time.monotonic() + seconds / 3))
        tasks = [asyncio.ensure_future(w) for w in work]
        try:
            while time.monotonic() < end:
                await asyncio.sleep(0.5)
                if load.up.is_set():  # between a kill and the restart there is no process to measure
                    rss.append((time.monotonic(), rss_mb(load.server.pid)))
                for task in tasks:
                    if task.done() and not task.cancelled() and (failure := task.exception()) is not None:
                        raise failure
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=PATIENCE_S)


def _report(
    load: Load, probes: Probes, rss: list[tuple[float, float]], judged: Message, begun: float, loaded: float, ended: float
) -> bool:
    quiet, busy = probes.between(begun, loaded, "server"), probes.between(loaded, ended, "server")
    machine = [p99(probes.between(a, b, "upstream")) for a, b in ((begun, loaded), (loaded, ended))]
    allowed = TIMES_QUIET * p99(quiet) + max(0.0, machine[1] - machine[0])
    quarter = (ended - loaded) / 4
    third = max((mb for t, mb in rss if ended - 2 * quarter <= t < ended - quarter), default=0.0)
    last = max((mb for t, mb in rss if t >= ended - quarter), default=0.0)
    grown = third * (1 + GROWTH_SHARE) + GROWTH_MB
    checks: list[tuple[str, bool, str]] = [
        ("small request, p99", p99(busy) <= max(allowed, MOST_P99_MS),
         f"{'as aimed at' if p99(busy) <= allowed else 'more than aimed at'}: "
         f"{p99(busy):.0f} ms under load (median {statistics.median(busy):.1f}, worst {max(busy):.0f}), quiet {p99(quiet):.1f}"
         f" ({statistics.median(quiet):.1f}); straight to the upstream {machine[1]:.1f}, quiet {machine[0]:.1f}; aim {allowed:.0f}, at most {MOST_P99_MS:.0f}"),
        ("RSS settles", last <= grown, f"peak {last:.0f} MB in the last quarter, {third:.0f} in the one before; at most {grown:.0f}"),
        ("nothing lost", not judged["lost"], f"{len(judged['lost'])} of {judged['requests']} requests; {judged['lost'][:1]}"),
        ("everybody answered", not load.refused, f"{len(load.refused)} refused; {load.refused[:2]}"),
        ("no other's marks", not judged["foreign"], f"{len(judged['foreign'])}; {judged['foreign'][:2]}"),
    ]  # fmt: skip
    print("\nwhat was sent, and the slowest small request meanwhile (ms):")
    worst: dict[str, list[float]] = defaultdict(list)
    for since, until, kind in load.sent:
        worst[kind].append(max(probes.between(since, until + 0.2, "server"), default=float("nan")))
    for kind, values in sorted(worst.items(), key=lambda item: -max(item[1])):
        print(f"  {kind:36} {max(values):8.0f}   ({len(values)} times, median {statistics.median(values):.0f})")
    print("\n" + ", ".join(f"{n} {name}" for name, n in sorted(load.counts.items())))
    for name, ok, text in checks:
        print(f"{'PASS' if ok else 'FAIL'}  {name:20} {text}")
    return all(ok for _, ok, _ in checks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--seconds", type=float, default=120, help="of load, beside a quiet quarter of a minute")
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--only", default=",,".join(KINDS), help="kinds of hostile requests, with two commas between them; none: ''")
    parser.add_argument("--no-kills", action="store_true")
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--probe", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        asyncio.run(_judge(options.upstream))
    elif options.probe:
        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            asyncio.run(_probe(*options.probe))
    else:
        kinds = [kind for kind in options.only.split(",,") if kind]
        if unknown := set(kinds) - set(KINDS):
            parser.error(f"unknown: {sorted(unknown)}; there are {', '.join(KINDS)}")
        sys.exit(0 if asyncio.run(run(options.seconds, options.seed, kinds, not options.no_kills)) else 1)


if __name__ == "__main__":
    main()
