"""The protocol that the upstream speaks: OpenAI's own, or another provider's behind the same script.

Promises: a script reads every request in OpenAI's words and answers in them, whatever stands on the
wire; a request that breaks a rule of the provider's is a violation of the play; a check whose
subject the protocol does not have is not applicable, with the reason that stands here and nowhere
else.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import brotli
import zstandard

from tests.contract.wire import events_of
from tests.e2e.answers import Answer, Response, Step, Stream
from tests.e2e.recording import Recorded, RecordingUpstream, messages_span
from tests.e2e.rules import check_openai_rules, count_request_tokens

Json = dict[str, Any]
DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "identity": bytes, "gzip": gzip.decompress, "deflate": zlib.decompress, "br": brotli.decompress,
    "zstd": zstandard.decompress,
}
_FUNCTION = ("name", "description", "parameters")
ABSENT = "<absent>"  # the value of a field that a request does not have


class Wire:
    """OpenAI's Chat Completions: nothing is put into other words.

    `absent`: why a check (its id, the beginning of it, or a case's id) has no subject here.
    """

    name: ClassVar[str] = "openai"
    absent: ClassVar[Mapping[str, str]] = {}
    verbatim: ClassVar[bool] = True  # requests and answers may be what was written, byte for byte
    verbatim_errors: ClassVar[bool] = True  # so may errors, and what is no answer of the API's

    def is_chat(self, recorded: Recorded) -> bool:
        parts = [part for part in recorded.target.partition("?")[0].split("/") if part]
        return recorded.method == "POST" and parts[-2:] == ["chat", "completions"]

    def broken_rules(self, recorded: Recorded) -> list[str]:
        return check_openai_rules(recorded.json)

    def heard(self, recorded: Recorded) -> Any:
        """The request in OpenAI's words; what is no JSON stays as it is."""
        return recorded.json

    def said(self, recorded: Recorded, reply: Answer) -> Answer:
        """The script's answer in the provider's words. `recorded.json` is in OpenAI's here."""
        return reply

    # -- what the protocol keeps of what OpenAI's says

    def field(self, name: str, value: Any) -> tuple[str, Any]:
        """What a request's field is called and has to be in `heard`."""
        return name, value

    def tools(self, tools: Sequence[Json]) -> list[Json]:
        """A client's tools."""
        return list(tools)

    def calls(self, calls: Sequence[Json] | None) -> list[Json] | None:
        """Tool calls."""
        return None if calls is None else list(calls)

    def error(self, error: Json) -> Json:
        """An error object: the keys that have to reach the client."""
        return error

    def usage(self, usage: Json) -> Json:
        """A usage object: the keys that have to reach the client."""
        return usage

    def key(self, recorded: Recorded) -> str | None:
        """The credential that came with a request."""
        return (recorded.header("authorization") or "").removeprefix("Bearer ") or None

    def model(self, name: str) -> str:
        """What upstream calls the model that the client asks for."""
        return name

    def tokens(self, request: Json) -> int:
        """What upstream charges for a request, by the provider's published rules."""
        return count_request_tokens(request)

    def prompt(self, recorded: Recorded) -> str:
        """What a later request has to begin with so that the provider's cache has it."""
        return messages_span(recorded.body)[:-1]

    def messages(self, messages: Sequence[Json]) -> list[Json]:
        """Messages, as far as the protocol tells them apart."""
        return list(messages)

    def cached_share(self, before: Recorded, after: Recorded) -> float:
        """How much of what stands before one request's newest user message the provider's cache has for a later
        request: here whatever both begin with."""
        first, second = self.prompt(before), self.prompt(after)
        asked = max(start for start, _, item in items_of(first) if item.get("role") == "user")
        return min(1.0, len(os.path.commonprefix([first, second])) / asked)

    def why_absent(self, check: str, case: str) -> str:
        """Why a case cannot be asked here; "": it can."""
        for id, reason in self.absent.items():
            if case == id or check == id or (id.endswith(".") and check.startswith(id)):
                return reason
        return ""


class WireUpstream(RecordingUpstream):
    """A recording upstream whose `respond` hears and says OpenAI's words over another wire."""

    def __init__(self, wire: Wire, **settings: Any) -> None:
        super().__init__(**settings)
        self.wire = wire

    async def handle(self, connection: Any, request: Recorded) -> None:
        with contextlib.suppress(ValueError):
            request.json = json.loads(decoded(request))
        if not self.wire.is_chat(request):
            request.index = len(self.others)
            self.others.append(request)
            await connection.send(request, self.other(request))
            return
        request.index = len(self.calls)
        request.violations = self.wire.broken_rules(request)
        request.json = self.wire.heard(request)
        self.calls.append(request)
        found = self.respond(request.json, request.index)
        reply = await found if isinstance(found, Awaitable) else found
        await connection.send(request, self.wire.said(request, reply))


def items_of(prompt: str) -> Iterator[tuple[int, int, Json]]:
    """What stands in a prompt (an array without its end), each with where it begins and ends."""
    decoder, at = json.JSONDecoder(), 1
    while at < len(prompt):
        start = at + len(prompt[at:]) - len(prompt[at:].lstrip(", \n"))
        item, at = decoder.raw_decode(prompt, start)
        yield start, at, item


def decoded(request: Recorded) -> bytes:
    """A request's body without its encoding: a server may read compressed ones. Raises ValueError."""
    encoding = (request.header("content-encoding") or "identity").lower()
    try:
        return DECODERS[encoding](request.body)
    except (KeyError, OSError, EOFError, zlib.error, brotli.error, zstandard.ZstdError) as error:
        raise ValueError(f"the body is no {encoding}") from error


class ProviderWire(Wire, ABC):
    """A provider's protocol; a subclass says a whole message and a stream's pieces in its words."""

    verbatim = False
    verbatim_errors = False

    def field(self, name: str, value: Any) -> tuple[str, Any]:
        return name, ABSENT if value is None else value

    def tools(self, tools: Sequence[Json]) -> list[Json]:
        """Functions by name, description and parameters, which are always there."""
        empty = {"type": "object", "properties": {}}
        made = [{"parameters": empty, **tool["function"]} for tool in tools]
        return [{k: v for k, v in f.items() if k in _FUNCTION} for f in made]

    def error(self, error: Json) -> Json:
        return {"message": error["message"]}

    def usage(self, usage: Json) -> Json:
        return {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}

    def model(self, name: str) -> str:
        return name.partition("/")[2]

    def prompt(self, recorded: Recorded) -> str:
        """Without cache markers, which are no part of the prompt."""
        return json.dumps(recorded.json["messages"])[:-1]

    def said(self, recorded: Recorded, reply: Answer) -> Answer:
        if isinstance(reply, Stream):
            if reply.status != 200:
                return reply
            return Stream(list(in_pieces(self.pieces(recorded), reply.steps)), 200, reply.headers)
        if isinstance(reply, dict):
            reply = Response(json.dumps(reply).encode())
        if not isinstance(reply, Response):
            return reply
        try:
            body = json.loads(reply.body)
        except ValueError:
            return reply
        if reply.status == 200 and "choices" in body:
            made = self.whole(recorded, body)
        elif reply.status != 200 and isinstance(body.get("error"), dict):
            made = self.refusal(reply.status, body["error"])
        else:  # it is no answer of OpenAI's either
            return reply
        return Response(json.dumps(made).encode(), reply.status, reply.headers)

    # -- a protocol's own

    @abstractmethod
    def whole(self, recorded: Recorded, body: Json) -> Json:
        """A chat.completion in the provider's words."""

    @abstractmethod
    def refusal(self, status: int, error: Json) -> Json:
        """An error object in the provider's words."""

    @abstractmethod
    def pieces(self, recorded: Recorded) -> Pieces:
        """One stream's translator."""


class Pieces(ABC):
    """Puts a stream's events, one by one, into the provider's words. Keeps what is open."""

    @abstractmethod
    def event(self, data: str) -> bytes:
        """What stands on the wire for one event's data; b"" when nothing does."""


def in_pieces(pieces: Pieces, steps: Sequence[Step]) -> Iterator[Step]:
    """A script's steps (of whole events) in other words, its pauses and comments where they were."""
    for step in steps:
        if not isinstance(step, bytes) or step.startswith(b":"):
            yield step
            continue
        out = b"".join(pieces.event(data) for data in events_of(step.decode()) if data)
        if out:
            yield out


def sse(payload: Json, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(payload)}\n\n".encode()


def parsed(arguments: str) -> Any:
    """A call's arguments as the object that they are; what is no JSON stays text."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


__all__ = [
    "ABSENT",
    "Json",
    "Pieces",
    "ProviderWire",
    "Wire",
    "WireUpstream",
    "in_pieces",
    "items_of",
    "parsed",
    "sse",
]
