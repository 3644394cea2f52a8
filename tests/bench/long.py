"""One conversation without end: what a turn costs at its depth, and what is found there.

Promises: the real server over sockets, CPU and RAM by the kernel's account of its process; the text is different in
every message; a fact that was said once is asked for by name, from every tenth of the conversation, and counts as
found when its words stand in the request that went upstream.

    python -m tests.bench.long [--tokens 10000000] [--chars 2000] [--l0 32000]
    python -m tests.bench.long --conversations 1000     RAM of so many conversations of 100 messages

Each row is a tenth of the way. `new`: CPU ms of a turn whose client sends only its new message, on the average;
`whole`: of one that sends all of the history, its second at that depth (the first is the one that nobody has seen),
beside `MB`, the size of its body. `RSS`: MB of the server. `disk`: bytes of the store for each of text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from pathlib import Path

from tests.bench.gateways import cpu_seconds, rss_mb
from tests.bench.texts import Texts
from tests.e2e.processes import ServerProcess, free_port

TOKEN_CHARS = 4.3  # of the texts
ROWS = 10
FACT_EVERY = 5  # turns
ASKED = 20  # facts of each tenth
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Upstream(asyncio.Protocol):
    """Answers what it was last told, and keeps the last request's body."""

    answer = b""
    body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._buffer = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        length = re.search(rb"content-length: *(\d+)", bytes(self._buffer[:end]).lower())
        size = int(length[1]) if length else 0
        if len(self._buffer) >= end + size:
            Upstream.body = bytes(self._buffer[end : end + size])
            del self._buffer[: end + size]
            assert isinstance(self._transport, asyncio.Transport)
            self._transport.write(_HEAD % len(Upstream.answer) + Upstream.answer)


class Client:
    """One connection; `chat` is a request and its answer."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        return self

    def close(self) -> None:
        self._writer.close()

    async def chat(self, messages: bytes, answer: str, session: bool = True, key: str = "k") -> float:
        """Seconds."""
        Upstream.answer = _completion(answer)
        body = b'{"model":"gpt-4o","messages":[%b]}' % messages
        header = b"x-llm-pager-session: long\r\n" if session else b""
        started = time.perf_counter()
        self._writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer %b\r\n%b"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % (key.encode(), header, len(body))
        )
        self._writer.write(body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: *(\d+)", head)
        assert length, head
        got = await self._reader.readexactly(int(length[1]))
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{head[:40]!r}: {got[:800]!r}")
        return time.perf_counter() - started


def _message(role: str, text: str) -> bytes:
    return json.dumps({"role": role, "content": text}, separators=(",", ":")).encode()


def _completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}).encode()


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def config(l0_tokens: int, upstream_port: int) -> dict[str, object]:
    return {
        "tiers": {"l0": {"tokens": l0_tokens}},
        "upstream": {"base_url": f"http://127.0.0.1:{upstream_port}/v1"},
    }


class Long:
    """The conversation, as its client has it."""

    def __init__(self, server: ServerProcess, chars: int) -> None:
        self.server, self.chars = server, chars
        self.texts, self.random = Texts("long"), random.Random("facts")
        self.history = bytearray()
        self.text_bytes = 0
        self.facts: list[tuple[str, str]] = []  # a name, and what was said of it
        self.turns = 0

    def _name(self) -> str:
        syllables = ("ka", "ro", "mi", "tu", "ves", "lon", "dri", "pa", "zet", "quo", "bel", "nim")
        return "".join(self.random.choice(syllables) for _ in range(4))

    def next(self) -> tuple[bytes, str]:
        """A message, and the answer to it."""
        text = self.texts.text(self.chars)
        if self.turns % FACT_EVERY == 0:
            name, code = self._name(), f"{self.random.randrange(10**6):06}"
            self.facts.append((name, code))
            text += f" The locker {name} opens with {code}."
        self.turns += 1
        return _message("user", text), self.texts.text(self.chars)

    def said(self, message: bytes, answer: str) -> None:
        more = message + b"," + _message("assistant", answer)
        self.text_bytes += len(more)
        self.history += b"," + more if self.history else more

    async def grow(self, client: Client, until_bytes: float) -> tuple[float, list[float]]:
        """CPU ms of a turn, and each one's seconds."""
        begun, cpu, seconds = self.turns, cpu_seconds(self.server.pid), list[float]()
        while self.text_bytes < until_bytes:
            message, answer = self.next()
            seconds.append(await client.chat(message, answer))
            self.said(message, answer)
        return (cpu_seconds(self.server.pid) - cpu) * 1e3 / max(1, self.turns - begun), seconds

    async def whole(self, client: Client) -> float:
        """CPU ms of a turn with the whole history."""
        history = bytes(self.history)
        for number in range(3):
            message, answer = _message("user", f"{number}: {self.texts.text(200)}"), self.texts.text(200)
            history += b"," + message
            cpu = cpu_seconds(self.server.pid)
            await client.chat(history, answer, session=False)
            spent = cpu_seconds(self.server.pid) - cpu
            history += b"," + _message("assistant", answer)
        return spent * 1e3

    async def recall(self, client: Client, tenth: int) -> float:
        """Of the facts of that tenth, the share that is in the request that asks for it."""
        first, last = (len(self.facts) * n // ROWS for n in (tenth, tenth + 1))
        asked = self.random.sample(self.facts[first:last], min(ASKED, last - first))
        found = 0
        for name, code in asked:
            message = _message("user", f"What does the locker {name} open with?")
            await client.chat(message, "It is written above.")
            found += code.encode() in Upstream.body
        return found / max(1, len(asked))


async def long(tokens: int, chars: int, l0_tokens: int) -> None:
    """The table."""
    port = free_port()
    upstream = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    with ServerProcess(config(l0_tokens, port)) as server:
        talk, client = Long(server, chars), await Client(server.port).open()
        print(f"one conversation of {tokens:,} tokens, messages of {chars} characters, {l0_tokens:,} tokens of L0")
        print(f"{'turns':>7}{'new':>8}{'median':>8}{'worst':>8}{'whole':>8}{'MB':>7}{'RSS':>7}{'disk':>7}   (ms, MB)")
        for row in range(1, ROWS + 1):
            cpu_ms, seconds = await talk.grow(client, tokens * TOKEN_CHARS * row / ROWS)
            disk = disk_bytes(server.dir / "data") / talk.text_bytes
            rss, whole = rss_mb(server.pid), await talk.whole(client)
            median, worst = statistics.median(seconds) * 1e3, max(seconds) * 1e3
            print(
                f"{talk.turns:7,}{cpu_ms:8.1f}{median:8.1f}{worst:8.0f}{whole:8.0f}{len(talk.history) / 1e6:7.1f}"
                f"{rss:7.0f}{disk:7.2f}", flush=True,
            )  # fmt: skip
        shares = [await talk.recall(client, tenth) for tenth in range(ROWS)]
        print("found, by tenth, the oldest first:", *(f"{share:.0%}" for share in shares))
        client.close()
        server.kill()
        server.restart()
        client = await Client(server.port).open()
        cpu = cpu_seconds(server.pid)
        name, code = talk.facts[0]
        took = await client.chat(_message("user", f"And what does the locker {name} open with?"), "As I said.")
        cpu = cpu_seconds(server.pid) - cpu
        print(f"first answer after SIGKILL and start: {took:.2f} s, {cpu:.2f} s of CPU; the first fact is"
              f" {'there' if code.encode() in Upstream.body else 'not there'}; RSS {rss_mb(server.pid):.0f} MB")
        client.close()
    upstream.close()


async def many(conversations: int, l0_tokens: int) -> None:
    """RAM of many conversations of 100 messages."""
    port, texts = free_port(), Texts("many")
    upstream = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    with ServerProcess(config(l0_tokens, port)) as server:
        client, before = await Client(server.port).open(), rss_mb(server.pid)
        for number in range(conversations):
            history = [_message("assistant" if i % 2 else "user", texts.text(400)) for i in range(97)]
            for _ in range(2):
                answer = texts.text(400)
                await client.chat(b",".join(history), answer, session=False, key=f"k{number % 50}")
                history += [_message("assistant", answer), _message("user", texts.text(400))]
        rss, text = rss_mb(server.pid), conversations * 100 * 400
        disk = disk_bytes(server.dir / "data")
        print(f"{conversations:,} conversations of 100 messages of 400 characters, {l0_tokens:,} tokens of L0: RSS"
              f" {rss:.0f} MB ({before:.0f} at the start), disk {disk / text:.2f} bytes for each of text")
        client.close()
    upstream.close()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--chars", type=int, default=2000)
    parser.add_argument("--l0", type=int, default=32_000)
    parser.add_argument("--conversations", type=int, default=0)
    asked = parser.parse_args()
    if asked.conversations:
        asyncio.run(many(asked.conversations, asked.l0))
    else:
        asyncio.run(long(asked.tokens, asked.chars, asked.l0))


if __name__ == "__main__":
    main()
