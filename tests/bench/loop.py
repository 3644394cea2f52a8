"""Nobody waits: how long the server's event loop is held while one tenant sends what is large.

Promises: `llm-pager serve` as its users run it, in a process of its own, with one task more on its event loop that
wakes every millisecond; a small streamed upstream; real HTTP. A gap between two wakes counts as held only as far as
the process itself ran: what the loop's thread waited for a core is taken off (its schedstat), and so is what the
process did not compute (its CPU clock): what remains is what our own code did to the loop, by running on it or by
keeping the interpreter's lock. Beside it another tenant sends small requests all the time.

    python -m tests.bench.loop [--kinds first-sight,tiny,...] [--most-ms 20]

Prints a line for each kind: the longest hold, CPU seconds, the small requests' and /health's latency. Exits 1 when a
kind held the loop for longer than `--most-ms`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.gateways import Process, cpu_seconds, start_upstream
from tests.bench.load import Connection
from tests.bench.texts import Texts
from tests.e2e.processes import free_port

WAKE_S = 0.001
MOST_MS = 20.0
L0_TOKENS = 16_000
PATH = "/health/loop"  # of the probe, in this bench's server only
Message = dict[str, Any]


# -- within the server


class Probe:
    """Wakes every millisecond; remembers the longest times in which it could not."""

    def __init__(self) -> None:
        self.held_ms: list[float] = []
        self.wall_ms = 0.0

    async def run(self) -> None:
        stat = open(f"/proc/self/task/{_thread_id()}/schedstat", "rb", buffering=0)  # noqa: SIM115
        wall, cpu, waited = time.perf_counter(), time.process_time(), _waited_s(stat)
        while True:
            await asyncio.sleep(WAKE_S)
            now = time.perf_counter()
            gap = now - wall - WAKE_S
            if gap > 0.002:
                cpu_now, waited_now = time.process_time(), _waited_s(stat)
                held = min(gap - (waited_now - waited), cpu_now - cpu)
                self.wall_ms = max(self.wall_ms, 1e3 * gap)
                self.held_ms = sorted([*self.held_ms, 1e3 * held])[-5:]
                now = time.perf_counter()
            wall, cpu, waited = now, time.process_time(), _waited_s(stat)

    def told(self) -> bytes:
        """The five longest holds, and the longest gap whoever's fault it was; forgotten then."""
        out = json.dumps({"held_ms": self.held_ms[::-1], "wall_ms": self.wall_ms}).encode()
        self.held_ms, self.wall_ms = [], 0.0
        return out


def _thread_id() -> int:
    import threading

    return threading.get_native_id()


def _waited_s(stat: Any) -> float:
    stat.seek(0)
    return int(stat.read().split()[1]) / 1e9


def serve(arguments: list[str]) -> int:
    """`llm-pager serve` with the probe."""
    import proxy.app
    import proxy.cli

    make = proxy.app.app_from_env
    probe = Probe()

    def probed() -> Any:
        app = make()
        running: list[asyncio.Task[None]] = []

        async def asgi(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                running.append(asyncio.ensure_future(probe.run()))
            if scope.get("path") == PATH:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": probe.told()})
                return
            await app(scope, receive, send)

        return asgi

    proxy.app.app_from_env = probed
    return proxy.cli.main(["serve", *arguments])


# -- the server from outside


class Server:
    """One probed server on a directory of its own, which can be started again."""

    def __init__(self, upstream_port: int) -> None:
        self.port = free_port()
        self._dir = tempfile.TemporaryDirectory(prefix="bench-loop-")
        config = {
            "server": {"host": "127.0.0.1", "port": self.port, "drain_s": 0},
            "upstream": {"base_url": f"http://127.0.0.1:{upstream_port}/v1"},
            "tiers": {"l0": {"tokens": L0_TOKENS}, "l2": {"path": str(Path(self._dir.name) / "data")}},
            "log": {"level": "warning"},
        }
        file = Path(self._dir.name) / "config.yaml"
        file.write_text(json.dumps(config))
        self._command = [sys.executable, "-m", "tests.bench.loop", "--serve", "--config", str(file)]
        self.start()

    def start(self) -> None:
        self._process = Process("loop", self.port, self._command, {}).wait("/health", 60)

    @property
    def pid(self) -> int:
        return self._process.pid

    def restart(self) -> None:
        self._process.stop()
        self.start()

    def stop(self) -> None:
        self._process.stop()
        self._dir.cleanup()

    def probe(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", PATH)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found


def sender(port: int, bodies: list[bytes], at_once: int = 1, timeout_s: float = 300) -> subprocess.Popen[bytes]:
    """A process that sends these bodies for the tenant `large`: the bench's own loop only watches."""
    files = []
    for body in bodies:
        with tempfile.NamedTemporaryFile(prefix="bench-loop-", suffix=".json", delete=False) as file:
            file.write(body)
        files.append(file.name)
    command = [sys.executable, "-m", "tests.bench.loop", "--send", str(port), str(at_once), *files]
    return subprocess.Popen(command, env={**os.environ})


def send(port: int, at_once: int, files: list[str]) -> int:
    async def worker(todo: Iterator[str]) -> None:
        for file in todo:
            connection = await Connection(port).open()
            await connection.chat(Path(file).read_bytes())
            await connection.close()
            Path(file).unlink()

    async def run() -> None:
        todo = iter(files)
        await asyncio.gather(*(worker(todo) for _ in range(at_once)))

    asyncio.run(run())
    return 0


# -- what is sent


def chat_body(messages: list[Message], **fields: Any) -> bytes:
    body = {"model": "gpt-4o", "messages": messages, **fields}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def history(count: int, chars: int, seed: str = "history") -> list[Message]:
    """`count` messages, the last of the user's."""
    texts = Texts(seed)
    roles = ("user", "assistant") if count % 2 else ("assistant", "user")
    return [{"role": roles[i % 2], "content": texts.text(chars)} for i in range(count)]


def asking(*messages: Message) -> list[Message]:
    return [*messages, {"role": "assistant", "content": "Seen."}, {"role": "user", "content": "And what was the harbour code?"}]


def unspaced(unit: str, size_bytes: int) -> str:
    """Text without spaces that does not repeat itself."""
    low = ord(unit)
    import random

    r = random.Random(unit)
    per = len(unit.encode())
    return "".join(chr(low + r.randrange(40)) for _ in range(size_bytes // per))


def result(size_bytes: int) -> list[Message]:
    """A tool's result of that much JSON."""
    texts, rows, size = Texts("rows"), [], 0
    while size < size_bytes:
        rows.append({"id": len(rows), "name": texts.text(20), "note": texts.text(120), "tags": ["a", "b"], "score": 0.5})
        size += 230
    call = {"id": "call_1", "type": "function", "function": {"name": "list_rows", "arguments": "{}"}}
    return [
        {"role": "user", "content": "List the rows."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(rows)},
    ]


def grown(count: int, turns: int, chars: int) -> list[bytes]:
    """The bodies of `turns` turns over `count` messages, each with two messages more, which are of so many characters."""
    whole = [*history(count, 340, "old"), *history(2 * turns + 1, chars, "grown")[1:]]
    first = count
    return [chat_body(whole[: first + 2 * i]) for i in range(turns)]


@dataclass
class Kind:
    """`before` is sent unwatched; then `bodies`, `at_once` of them in flight. `again`: the server is started again in
    between."""

    bodies: Callable[[], list[bytes]]
    before: Callable[[], list[bytes]] = list
    at_once: int = 1
    again: bool = False


def turns_after(messages: list[Message], turns: int) -> list[bytes]:
    """Small turns of a conversation that has these in its past."""
    more = [*history(2 * turns + 1, 200, "after")[1:]]
    return [chat_body([*asking(*messages), *more[: 2 * i]], tools=_TOOL) for i in range(turns)]


_TOOL = [{"type": "function", "function": {"name": "list_rows", "parameters": {}}}]
KINDS = {
    "first-1k": Kind(lambda: [chat_body(history(1_001, 400))]),
    "first-10k": Kind(lambda: [chat_body(history(10_001, 340))]),
    "tiny-150k": Kind(lambda: [chat_body(history(150_001, 2))]),
    "one-3MB": Kind(lambda: [chat_body(asking({"role": "user", "content": unspaced("a", 3_000_000)}))]),
    "newest-3MB": Kind(lambda: [chat_body([{"role": "user", "content": unspaced("A", 3_000_000)}])]),
    "prose-3MB": Kind(lambda: [chat_body(asking({"role": "user", "content": Texts("p").text(3_000_000)}))]),
    "CJK-3MB": Kind(lambda: [chat_body(asking({"role": "user", "content": unspaced("世", 3_000_000)}))]),
    "Thai-3MB": Kind(lambda: [chat_body(asking({"role": "user", "content": unspaced("ก", 3_000_000)}))]),
    "result-4MB": Kind(lambda: [chat_body(asking(*result(4_000_000)), tools=_TOOL)]),
    "result-newest-4MB": Kind(lambda: [chat_body(result(4_000_000), tools=_TOOL)]),
    "after-4MB": Kind(lambda: turns_after(result(4_000_000), 6)[1:], lambda: turns_after(result(4_000_000), 1)),
    "restart-4MB": Kind(
        lambda: turns_after(result(4_000_000), 6)[1:], lambda: turns_after(result(4_000_000), 1), again=True
    ),
    "system-2MB": Kind(lambda: [chat_body([{"role": "system", "content": Texts("s").text(2_000_000)}, *history(3, 100)])]),
    "epochs-10k": Kind(lambda: grown(10_001, 24, 2_400)[1:], lambda: grown(10_001, 24, 2_400)[:1]),
    "restart-10k": Kind(lambda: grown(10_001, 3, 340)[1:2], lambda: grown(10_001, 3, 340)[:1], again=True),
    "twenty-1k": Kind(lambda: [chat_body(history(1_001, 400, f"t{i}")) for i in range(20)], at_once=20),
}


@dataclass
class Seen:
    held_ms: float
    wall_ms: float
    cpu_s: float
    small_ms: list[float]
    health_ms: list[float]
    answered: bool


async def watch(port: int, stop: asyncio.Event, small: list[float], health: list[float]) -> None:
    """The other tenant's small requests, and /health, one after the other."""
    loop, number = asyncio.get_running_loop(), 0
    connection = await Connection(port).open()
    while not stop.is_set():
        number += 1
        began = loop.time()
        await connection.chat(chat_body([{"role": "user", "content": f"small {number}"}], user="small"))
        small.append(1e3 * (loop.time() - began))
        began = loop.time()
        connection.writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        head = await connection.reader.readuntil(b"\r\n\r\n")
        await connection._read_body(head.lower())
        health.append(1e3 * (loop.time() - began))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.01)
    await connection.close()


async def measure(server: Server, kind: Kind) -> Seen:
    if before := kind.before():
        await asyncio.to_thread(sender(server.port, before).wait)
    if kind.again:
        await asyncio.to_thread(server.restart)
    bodies = kind.bodies()
    stop, small, health = asyncio.Event(), list[float](), list[float]()
    watching = asyncio.ensure_future(watch(server.port, stop, small, health))
    while len(small) < 5:  # what a process does once is not what is measured
        await asyncio.sleep(0.1)
    small.clear(), health.clear()
    await asyncio.to_thread(server.probe)
    cpu = cpu_seconds(server.pid)
    code = await asyncio.to_thread(sender(server.port, bodies, kind.at_once).wait)
    await asyncio.sleep(0.3)
    stop.set()
    await watching
    told = await asyncio.to_thread(server.probe)
    held = max(told["held_ms"], default=0.0)
    return Seen(held, told["wall_ms"], cpu_seconds(server.pid) - cpu, small, health, code == 0)


def share(values: list[float], at: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * at))] if values else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.loop")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--most-ms", type=float, default=MOST_MS)
    options = parser.parse_args()
    upstream = start_upstream()
    good = True
    print(f"{'':18}{'held ms':>9}{'gap ms':>9}{'CPU s':>8}{'small p99':>11}{'most':>8}{'health p99':>12}{'most':>8}")
    try:
        for name in options.kinds.split(","):
            server = Server(upstream.port)
            try:
                seen = asyncio.run(measure(server, KINDS[name]))
            finally:
                server.stop()
            good &= seen.answered and seen.held_ms <= options.most_ms
            print(
                f"{name:18}{seen.held_ms:9.1f}{seen.wall_ms:9.1f}{seen.cpu_s:8.2f}{share(seen.small_ms, 0.99):11.1f}"
                f"{max(seen.small_ms):8.1f}{share(seen.health_ms, 0.99):12.1f}{max(seen.health_ms):8.1f}"
                f"{'' if seen.answered else '  NOT ANSWERED'}",
                flush=True,
            )
    finally:
        upstream.stop()
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2:]))
    if sys.argv[1:2] == ["--send"]:
        sys.exit(send(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
    sys.exit(main())
