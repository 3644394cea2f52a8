"""`llm-pager bench`: what a request costs on this machine: sent straight to an upstream, forwarded alone, and with the memory.

Promises: no network, no key, nothing of the configured storage; the server is the one that `serve` starts, in a process of its own, on a
directory that is gone afterwards; "forwarded" is the same body through the same server to a path that has no memory. All three take
turns, one request at a time. Times are medians; CPU is the mean of the server's process, from the kernel's account (Linux).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count, cycle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proxy.demo.play import conversation
from proxy.errors import StartError
from proxy.terminal import progress, tell_json, tell_table

_ROUNDS = 5
_LONG_MESSAGES, _WINDOW_TOKENS = 1000, 32_000
_LONG_SHARE = 5  # a fifth of the requests are long ones
_CHAT, _OTHER = "/v1/chat/completions", "/v1/others"
_START_S = 60.0
_ANSWER = "That is noted: answer {}."

Message = dict[str, str]


def run(requests: int, as_json: bool) -> int:
    """Raises StartError."""
    rows = asyncio.run(_measured(requests, not as_json))
    if as_json:
        tell_json({"requests": rows})
        return 0
    lines = []
    for row in rows:
        for what, unit in (("ms", "ms"), ("cpu_ms", "ms of CPU")):
            if None not in (paged := row["llm_pager"][what], forwarded := row["forwarded"][what]):
                direct = row["direct"][what] or 0.0
                lines.append([f"{row['what']}, {unit}", f"{direct:.2f}", f"{forwarded:.2f}", f"{paged:.2f}", f"{paged - direct:.2f}",
                              f"{paged / forwarded:.1f} times" if forwarded else "–"])  # fmt: skip
    tell_table(["a request", "direct", "forwarded", "llm-pager", "added", "of forwarded"], lines)
    print("forwarded: by the same server, to a path without memory. Other gateways, recall, bill, scale: python -m tests.bench.*\n"
          "in a checkout; tests/bench/README.md says how.")  # fmt: skip
    return 0


async def _measured(requests: int, shown: bool) -> list[dict[str, Any]]:
    texts = [turn["user"] for turn in conversation()]
    rows: list[dict[str, Any]] = []
    async with _upstream() as upstream, _served(upstream) as (server, pid):
        long_requests = max(1, requests // _LONG_SHARE)
        with progress("requests", shown) as advance:
            done, total = 0, _ROUNDS * 3 * (requests + long_requests)
            for what, chat, of_each in (("new chat", _NewChats, requests), (f"{_LONG_MESSAGES:,} messages", _LongChat, long_requests)):
                ways = [_Way(url, path, chat(texts), its) for url, path, its in ((upstream, _CHAT, None), (server, _OTHER, pid), (server, _CHAT, pid))]
                for way in ways:  # unmeasured: connections, first sights
                    await way.send(2)
                    way.forget()
                for _ in range(_ROUNDS):
                    for way in ways:
                        await way.send(of_each)
                        advance(done := done + of_each, total)
                names = ("direct", "forwarded", "llm_pager")
                rows.append({"what": what, "bytes": ways[-1].size_bytes, "requests": _ROUNDS * of_each,
                             **{name: way.told() for name, way in zip(names, ways, strict=True)}})  # fmt: skip
                for way in ways:
                    way.close()
    return rows


class _NewChats:
    """Each request is the first of a conversation."""

    def __init__(self, texts: list[str]) -> None:
        self._words, self._number = cycle(texts), count(1)

    def body(self) -> bytes:
        return _body([{"role": "user", "content": f"{next(self._number)}. {next(self._words)} {next(self._words)}"}])

    def answered(self, answer: bytes) -> None:
        pass


class _LongChat:
    """Each request is the next of one conversation, as its client sends it."""

    def __init__(self, texts: list[str]) -> None:
        self._words, self._messages = cycle(texts), list[Message]()
        for at in range(_LONG_MESSAGES - 1):
            self._say("assistant" if at % 2 else "user", next(self._words))

    def _say(self, role: str, words: str) -> None:
        self._messages.append({"role": role, "content": f"{len(self._messages)}. {words}"})

    def body(self) -> bytes:
        return _body(self._messages)

    def answered(self, answer: bytes) -> None:
        self._messages.append(json.loads(answer)["choices"][0]["message"])
        self._say("user", next(self._words))


def _body(messages: list[Message]) -> bytes:
    return json.dumps({"model": "gpt-4o", "messages": messages}, separators=(",", ":")).encode()


class _Way:
    """A connection over which requests are sent one after the other to a path; `pid`: of the server, whose CPU is counted."""

    def __init__(self, url: str, path: str, chat: _NewChats | _LongChat, pid: int | None) -> None:
        self._port, self._path, self._chat, self._pid = urlsplit(url).port, path, chat, pid
        self.size_bytes = 0  # of the last one
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.forget()

    def forget(self) -> None:
        self._seconds: list[float] = []
        self._cpu_s: float | None = None if self._pid is None else 0.0

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()

    async def send(self, times: int) -> None:
        reader, writer = self._streams = self._streams or await asyncio.open_connection("127.0.0.1", self._port)
        before_s = _cpu_s(self._pid)
        for _ in range(times):
            data = self._chat.body()
            self.size_bytes = len(data)
            head = (f"POST {self._path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer bench\r\n"
                    f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n").encode()  # fmt: skip
            began_s = time.perf_counter()
            writer.write(head + data)
            told, answer = await _message(reader)
            self._seconds.append(time.perf_counter() - began_s)
            if not told.startswith(b"HTTP/1.1 200"):
                status = told.splitlines()[0].decode()
                raise StartError(f"A request of the bench was answered with {status}.")
            self._chat.answered(answer)
        after_s = _cpu_s(self._pid)
        if self._cpu_s is not None:
            self._cpu_s = None if after_s is None or before_s is None else self._cpu_s + after_s - before_s

    def told(self) -> dict[str, float | None]:
        cpu_ms = None if self._cpu_s is None else round(1e3 * self._cpu_s / len(self._seconds), 3)
        return {"ms": round(1e3 * statistics.median(self._seconds), 3), "cpu_ms": cpu_ms}


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of a request, or of an answer that has a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.partition(b":")[2]) for line in head.lower().splitlines() if line.startswith(b"content-length:"))
    return head, await reader.readexactly(length)


def _cpu_s(pid: int | None) -> float | None:
    """Of a process so far; None where the kernel does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def _upstream() -> AsyncIterator[str]:
    """The URL of one that answers at once, whatever it is sent."""
    numbers = count(1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                _, body = await _message(reader)
                number = next(numbers)
                message = {"role": "assistant", "content": _ANSWER.format(number)}
                answer = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": 1_700_000_000, "model": "gpt-4o",
                          "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                          "usage": {"prompt_tokens": len(body) // 4, "completion_tokens": 8, "total_tokens": len(body) // 4 + 8}}  # fmt: skip
                data = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


@asynccontextmanager
async def _served(upstream: str) -> AsyncIterator[tuple[str, int]]:
    """The base URL of a server in front of it, and its process."""
    with tempfile.TemporaryDirectory(prefix="llm-pager-bench-") as state:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_PAGER_")}
        settings = {"LLM_PAGER_TIERS__L2__PATH": state, "LLM_PAGER_TIERS__L0__TOKENS": str(_WINDOW_TOKENS), "LLM_PAGER_LOG__LEVEL": "error"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "serve", "--json", "--port", "0", "--upstream", upstream, "--config", os.devnull,
            env={**environment, **settings}, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), _START_S)
            if not line:
                raise StartError("The server did not start; its reason is above.")
            yield json.loads(line)["base_url"], process.pid
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
