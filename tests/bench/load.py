"""The load generator of the overhead bench: raw sockets, so that two cores are enough.

Promises: nothing here is counted (the bench reads the CPU clock of the gateway's processes); one
connection per worker with keep-alive; every answer is read to its end and a status other than 200
stops the bench with the gateway's own words.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.texts import Texts

API_KEY = "sk-" + secrets.token_hex(32)  # of this run; LiteLLM does not start without one


class Growing:
    """One conversation as its client sends it: it grows by the answer and the next question."""

    def __init__(self, seed: str, model: str, messages: int, message_chars: int = 340) -> None:
        self.texts, self.model, self.chars = Texts(seed), model, message_chars
        self._messages = bytearray()
        for i in range(messages - 1 + messages % 2):  # ends with a user message
            self._add("assistant" if i % 2 else "user", self.texts.text(message_chars))

    def _add(self, role: str, text: str) -> None:
        if self._messages:
            self._messages += b","
        message = {"role": role, "content": text}
        self._messages += json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()

    def body(self, stream: bool = False) -> bytes:
        """The request as the openai client writes it: messages first, compact."""
        tail = b',"stream":true}' if stream else b"}"
        return b'{"messages":[%b],"model":"%b"%b' % (self._messages, self.model.encode(), tail)

    def answered(self, text: str) -> None:
        """The client got this; its user asks on."""
        self._add("assistant", text)
        self._add("user", self.texts.text(self.chars))


@dataclass
class Answered:
    body: bytes  # without the transfer encoding
    first_byte_s: float  # from the request's last byte to the answer's first body byte

    @property
    def text(self) -> str:
        """The assistant's text of a plain answer."""
        return str(json.loads(self.body)["choices"][0]["message"]["content"])


class Connection:
    """One HTTP/1.1 connection to a gateway."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def open(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self.port, limit=2**20
        )
        return self

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()

    async def chat(self, body: bytes) -> Answered:
        self.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            b"authorization: Bearer %b\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % (API_KEY.encode(), len(body))
        )
        self.writer.write(body)
        await self.writer.drain()
        started = time.perf_counter()
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        out, first = await self._read_body(head)
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"the gateway answered {head[:40]!r}: {out[:800]!r}")
        return Answered(out, first - started)

    async def _read_body(self, head: bytes) -> tuple[bytes, float]:
        at = head.find(b"content-length:")
        if at >= 0:
            length = int(head[at + 15 : head.index(b"\r\n", at)])
            out = await self.reader.readexactly(length)
            return out, time.perf_counter()
        out, first = bytearray(), 0.0
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            out += (await self.reader.readexactly(size + 2))[:-2]
            first = first or time.perf_counter()
        await self.reader.readexactly(2)
        return bytes(out), first or time.perf_counter()


async def many(port: int, bodies: Sequence[bytes], at_once: int) -> list[Answered]:
    """All bodies, `at_once` of them in flight; the answers in the order of the bodies."""
    answers: list[Answered | None] = [None] * len(bodies)
    todo = iter(enumerate(bodies))

    async def worker() -> None:
        connection = await Connection(port).open()
        for i, body in todo:
            answers[i] = await connection.chat(body)
        await connection.close()

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return [a for a in answers if a is not None]


async def turns(port: int, conversation: Growing, count: int) -> list[Answered]:
    """`count` consecutive turns of one conversation, each with the answer before it appended."""
    connection = await Connection(port).open()
    out = []
    for _ in range(count):
        got = await connection.chat(conversation.body())
        conversation.answered(got.text)
        out.append(got)
    await connection.close()
    return out
