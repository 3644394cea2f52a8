"""The upstream of the overhead bench: as little work as possible, in a process of its own.

Promises: every chat request gets one of 512 different short answers, at once, billed a token for each
four bytes; a streamed one gets
50 chunks, one every CHUNK_GAP_S, each in a packet of its own, so that a gateway has to pass 50
chunks on and cannot take them in one gulp. `python -m tests.bench.upstream PORT`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import cast

from tests.bench.texts import Texts

ANSWERS = 512
CHUNKS = 50
CHUNK_GAP_S = 0.001
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n"


def _plain(i: int, text: str) -> tuple[bytes, bytes]:
    """What stands before and behind the bill."""
    payload = {
        "id": f"chatcmpl-{i}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "gpt-4o",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {"completion_tokens": 80, "prompt_tokens": _BILL},
    }
    body = json.dumps(payload, separators=(",", ":")).encode()
    head = HEAD % (b"application/json", b"content-length: %d\r\n" % len(body))
    before, _, behind = (head + body).partition(b"%d" % _BILL)
    return before, behind


_BILL = 999_999_999  # where the bill stands, as wide


def _chunks(i: int, text: str) -> list[bytes]:
    words = text.split(" ")
    step = -(-len(words) // (CHUNKS - 2))
    pieces = [" ".join(words[j : j + step]) + " " for j in range(0, len(words), step)]
    pieces += ["."] * (CHUNKS - 2 - len(pieces))
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": p}, None) for p in pieces] + [({}, "stop")]
    out = []
    for delta, finish in deltas:
        event = {
            "id": f"chatcmpl-{i}",
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": "gpt-4o",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
        data = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
        out.append(b"%x\r\n%b\r\n" % (len(data), data))
    done = b"data: [DONE]\n\n"
    out[-1] += b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)
    return out


class Upstream(asyncio.Protocol):
    """One connection with keep-alive; requests with a content-length or in chunks."""

    served = 0

    def __init__(self, plain: list[tuple[bytes, bytes]], streamed: list[list[bytes]]) -> None:
        self.plain, self.streamed = plain, streamed
        self.buffer = bytearray()
        self.total = self.size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while self.buffer:
            if not self.total:
                end = self.buffer.find(b"\r\n\r\n") + 4
                if end < 4:
                    return
                head = bytes(self.buffer[:end]).lower()
                at = head.find(b"content-length:")
                if at >= 0:
                    self.total = end + int(head[at + 15 : head.index(b"\r\n", at)])
                elif b"transfer-encoding: chunked" in head:
                    stop = self.buffer.find(b"\r\n0\r\n\r\n", end - 2)
                    if stop < 0:
                        return
                    self.total = stop + 7
                else:
                    self.total = end
            if len(self.buffer) < self.total:
                return
            head = bytes(self.buffer[: min(self.total, 65536)])
            del self.buffer[: self.total]
            self.size = self.total
            self.total = 0
            self.answer(head)

    def answer(self, request: bytes) -> None:
        Upstream.served += 1
        i = Upstream.served % ANSWERS
        if b'"stream":true' in request or b'"stream": true' in request:
            self.transport.write(
                HEAD % (b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked\r\n")
            )
            self.send_next(iter(self.streamed[i]))
        else:
            before, behind = self.plain[i]
            self.transport.write(b"%b%9d%b" % (before, self.size // 4, behind))

    def send_next(self, chunks: Iterator[bytes]) -> None:
        chunk = next(chunks, None)
        if chunk is None or self.transport.is_closing():
            return
        self.transport.write(chunk)
        asyncio.get_running_loop().call_later(CHUNK_GAP_S, self.send_next, chunks)


async def serve(port: int) -> None:
    texts = Texts("upstream")
    answers = [texts.text(380) for _ in range(ANSWERS)]
    plain = [_plain(i, t) for i, t in enumerate(answers)]
    streamed = [_chunks(i, t) for i, t in enumerate(answers)]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Upstream(plain, streamed), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(int(sys.argv[1])))
