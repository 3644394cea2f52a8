"""The client's end of the wire: raw requests, bytes with their times, server-sent events.

Promises: nothing is decoded, retried, decompressed or followed; events are split as the standard
for server-sent events says (LF, CRLF and CR, several data lines, comments); chunks of any provider
assemble to the message that a whole answer would have.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
from yarl import URL

from tests.contract.model import Failed, quote

Headers = Sequence[tuple[str, str]]
Json = dict[str, Any]
TIMEOUT_S = 10.0  # for a head or for the next bytes


@dataclass
class Reply:
    """A response as it came: `pieces` are the body's bytes with the second each arrived at."""

    status: int
    headers: list[tuple[str, str]]  # names in lower case
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    broken: str | None = None  # why the body ended too early

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def ok(self) -> Self:
        """Itself when it is a whole 200; fails otherwise."""
        if self.status != 200:
            raise Failed(f"the client got status {self.status}: {quote(self.text)}")
        if self.broken:
            raise Failed(f"the client's response broke off ({self.broken}): {quote(self.text)}")
        return self

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise Failed(f"the client got no JSON: {quote(self.text)}") from None

    def events(self) -> list[str]:
        """The data of each event, [DONE] included."""
        return [data for data in events_of(self.text) if data is not None]

    def chunks(self) -> list[Json]:
        """The stream's chunks; fails where one is not a JSON object."""
        out = []
        for data in self.events():
            if data == "[DONE]":
                continue
            try:
                chunk = json.loads(data)
            except ValueError:
                raise Failed(f"an event is not JSON: {quote(data)}") from None
            if not isinstance(chunk, dict):
                raise Failed(f"an event is not an object: {quote(data)}")
            out.append(chunk)
        return out

    def streamed(self) -> bool:
        return (self.header("content-type") or "").startswith("text/event-stream")

    def choices(self) -> list[Json]:
        """The choices of a whole answer, or those that a stream assembles to."""
        if self.streamed():
            return assemble(self.chunks())
        whole = self.json()
        choices = whole.get("choices") if isinstance(whole, dict) else None
        if not choices:
            raise Failed(f"the answer has no choices: {quote(self.text)}")
        return list(choices)

    def message(self, index: int = 0) -> Json:
        """One choice's message."""
        choices = self.choices()
        if len(choices) <= index:
            raise Failed(f"choice {index} is missing: {quote(self.text)}")
        message: Json = choices[index]["message"]
        return message

    def finish(self, index: int = 0) -> str | None:
        reason: str | None = self.choices()[index].get("finish_reason")
        return reason

    def content(self, index: int = 0) -> str | None:
        content: str | None = self.message(index).get("content")
        return content


class NoAnswer(Failed):
    """The connection ended without a response head."""


class Live:
    """A response that is still being read."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        headers = [(k.decode().lower(), v.decode("latin-1")) for k, v in response.raw_headers]
        self.reply = Reply(response.status, headers)

    async def more(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """The next bytes, b"" at the end. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            data = await self.response.content.readany()
        if data:
            self.reply.pieces.append((time.perf_counter(), data))
        return data

    async def until(self, wanted: str, timeout_s: float = TIMEOUT_S) -> None:
        """Reads until the body contains `wanted`; fails when it does not come in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while wanted not in self.reply.text:
                    if not await self.more(timeout_s):
                        break
        except TimeoutError:
            pass
        if wanted not in self.reply.text:
            so_far = quote(self.reply.text[-300:])
            raise Failed(f"{quote(wanted)} did not reach the client within {timeout_s:g} s: {so_far}")

    async def rest(self) -> Reply:
        """Reads to the end, whatever end it is."""
        try:
            while await self.more():
                pass
        except (aiohttp.ClientError, OSError) as error:
            self.reply.broken = repr(error)
        except TimeoutError:
            self.reply.broken = f"no end and no byte for {TIMEOUT_S:g} s"
        return self.reply

    def leave(self) -> None:
        """Closes the connection, whatever is still to come."""
        self.response.close()


class Client:
    """Raw HTTP over one pool of connections."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=60),
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def open(
        self, url: str, body: bytes | AsyncIterator[bytes] | None, headers: Headers, method: str = "POST"
    ) -> Live:
        """Sends a request; returns when the response's head is there. Fails where none comes."""
        assert self._session is not None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                response = await self._session.request(
                    method,
                    URL(url, encoded=True),
                    data=body,
                    headers=list(headers),
                    allow_redirects=False,
                    skip_auto_headers=("User-Agent", "Accept-Encoding"),
                )
        except TimeoutError:
            raise Failed(f"no response head within {TIMEOUT_S:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise NoAnswer(f"the connection ended without a response: {error!r}") from None
        return Live(response)


# ---------------------------------------------------------------- server-sent events


def events_of(text: str) -> list[str | None]:
    """The data of each event; None for one without data. An unfinished last event counts."""
    out: list[str | None] = []
    data: list[str] = []
    some = False
    for line in [*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""]:
        if not line:
            if some:
                out.append("\n".join(data) if data else None)
            data, some = [], False
        elif line.startswith(":"):
            some = True
        else:
            name, _, value = line.partition(":")
            some = True
            if name == "data":
                data.append(value.removeprefix(" "))
    return out


def assemble(chunks: Sequence[Json]) -> list[Json]:
    """The choices that a stream's chunks make, in the order of their index."""
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for choice in chunk.get("choices") or ():
            made = choices.setdefault(
                choice.get("index") or 0, {"message": {"content": None}, "finish_reason": None}
            )
            made["finish_reason"] = choice.get("finish_reason") or made["finish_reason"]
            for key, value in choice.items():
                if key not in ("index", "delta", "finish_reason"):
                    _merge(made, key, value)
            for key, value in (choice.get("delta") or {}).items():
                if key == "tool_calls":
                    if value:
                        _add_calls(made["message"].setdefault("tool_calls", []), value)
                elif key == "role":
                    made["message"]["role"] = value or made["message"].get("role")
                else:
                    _merge(made["message"], key, value)
    for made in choices.values():
        for call in made["message"].get("tool_calls") or ():
            call.pop("_index", None)
            call.pop("index", None)
    return [choices[index] for index in sorted(choices)]


def _add_calls(calls: list[Json], deltas: Sequence[Mapping[str, Any]]) -> None:
    for delta in deltas:
        index = delta.get("index")
        if isinstance(index, int):
            call = next((c for c in calls if c["_index"] == index), None)
        elif delta.get("id"):
            call = next((c for c in calls if c.get("id") == delta["id"]), None)
        else:
            call = calls[-1] if calls else None
        if call is None:
            call = {"_index": index if isinstance(index, int) else len(calls)}
            calls.append(call)
        for key, value in delta.items():
            if key in ("id", "type"):
                call[key] = value or call.get(key)
            elif key != "index":
                _merge(call, key, value)
    calls.sort(key=lambda c: int(c["_index"]))


def _merge(into: Json, key: str, value: Any) -> None:
    old = into.get(key)
    if old is None:
        into[key] = dict(value) if isinstance(value, dict) else value
    elif type(old) is type(value) and _grows(key, old):
        into[key] = old + value
    elif isinstance(old, dict) and isinstance(value, dict):
        for inner, piece in value.items():
            _merge(old, inner, piece)
    elif value is not None:
        into[key] = value


def _grows(key: str, value: Any) -> bool:
    """Whether later pieces are added to it: texts and lists, but no names."""
    return isinstance(value, list) or (
        isinstance(value, str) and key not in ("name", "id", "type")
    )
