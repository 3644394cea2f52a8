"""What a history costs when it is seen for the first time: CPU of one process, and which functions it goes to.

    python -m tests.bench.sight [--messages 1000,10000] [--times 5] [--profile]

Promises: the program's own path from a request's bytes to the stored answer (application, pool, directory), with an
upstream in the same process that costs nothing; each history is new, of another tenant, and made before the clock
starts. CPU is that of all threads. `--profile` adds the shares, by function (they make it slower: no figure of it counts).
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from proxy.api.pool import Pool
from proxy.app import App
from proxy.config import load_config
from proxy.process import tune
from proxy.upstream import CHAT_PATH, BytesReply, Header, Reply, Upstream
from tests.bench.gateways import WINDOW_TOKENS
from tests.bench.load import Growing

SIZES = (1_000, 10_000)
TIMES = 5
SHOWN = 45  # functions


class _Answers(Upstream):
    """Answers at once."""

    async def chat(
        self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = CHAT_PATH
    ) -> Reply:
        message = {"role": "assistant", "content": "That is noted."}
        usage = {"completion_tokens": 4, "prompt_tokens": len(body) // 4}
        answer = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": "gpt-4o",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage,
        }  # fmt: skip
        return BytesReply(200, [(b"content-type", b"application/json")], json.dumps(answer).encode())

    async def forward(
        self, method: str, path: str, query: bytes, headers: Sequence[Header],
        body: AsyncIterator[bytes] | None,
    ) -> Reply:  # fmt: skip
        return BytesReply(404, [], b"")


async def ask(app: App, body: bytes, key: str) -> None:
    """One request through the application; RuntimeError when it is not answered with 200."""
    sent, status = [{"type": "http.request", "body": body}], 0
    forever = asyncio.Event()

    async def receive() -> Any:
        if sent:
            return sent.pop()
        await forever.wait()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"}, "http_version": "1.1",
    }  # fmt: skip
    await app(scope, receive, send)
    if status != 200:
        raise RuntimeError(f"answered with {status}")


async def measure(app: App, messages: int, times: int) -> list[float]:
    """CPU milliseconds of the first sight of each of so many histories."""
    spent = []
    for number in range(times):
        body = Growing(f"sight/{messages}/{number}", "gpt-4o", messages).body()
        gc.collect()
        before = time.process_time()
        await ask(app, body, f"key-{messages}-{number}")
        spent.append(1e3 * (time.process_time() - before))
        app.memory.forget()
    return spent


async def run(sizes: Sequence[int], times: int, profiled: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="sight-") as state:
        flags: dict[str, object] = {"tiers.l2.path": state, "tiers.l0.tokens": WINDOW_TOKENS}
        app = App(load_config(Path(os.devnull), {}, flags), upstream=_Answers())
        app.memory.start()
        await measure(app, 200, 2)  # what a process loads once
        for messages in sizes:
            spent = await measure(app, messages, times)
            shown = " ".join(f"{ms:.0f}" for ms in spent)
            print(f"{messages:7,} messages: {statistics.median(spent):7.1f} ms of CPU (median of {shown})", flush=True)
            if profiled:
                await _profiled(app, messages)
        await app.memory.close()


async def _profiled(app: App, messages: int) -> None:
    """Prints the shares. Work of the pool is done at once, on the thread that is profiled."""

    async def at_once(self: Pool, whose: bytes, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    pooled, Pool.run = Pool.run, at_once  # type: ignore[method-assign]
    profile = cProfile.Profile()
    body = Growing(f"sight/{messages}/profile", "gpt-4o", messages).body()
    try:
        profile.enable()
        await ask(app, body, f"key-{messages}-profile")
        profile.disable()
    finally:
        Pool.run = pooled  # type: ignore[method-assign]
    pstats.Stats(profile).sort_stats("tottime").print_stats(SHOWN).sort_stats("cumtime").print_stats(SHOWN)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sight")
    parser.add_argument("--messages", default=",".join(map(str, SIZES)))
    parser.add_argument("--times", type=int, default=TIMES)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    tune()
    asyncio.run(run([int(size) for size in options.messages.split(",")], options.times, options.profile))


if __name__ == "__main__":
    main()
