"""Local servers that speak other providers' protocols, strict about their rules.

Promises: what came over the socket is recorded; a request that breaks a rule of the provider's API
is answered with the provider's own 400; what the model says is planned in neutral terms (`Said`)
and put into each protocol, streamed in small pieces when the request asks for a stream.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.answers import Answer, Response, Stream
from tests.e2e.recording import Recorded, RecordingUpstream
from tests.e2e.rules import count_text

PIECE_CHARS = 60
Json = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One tool call of the model; `input` is what the tool is called with."""

    id: str
    name: str
    input: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Said:
    """What the model says in one round. `thinking` is text that it signs (None: it does not think).
    `stop`: the provider's own word for a stop that is not the usual one."""

    text: str = ""
    calls: Sequence[Call] = ()
    thinking: str | None = None
    stop: str | None = None


Round = Said | Answer | Callable[[Json], "Said | Answer"]


class ProviderServer(RecordingUpstream, ABC):
    """One protocol's server; a subclass knows the paths, the rules and the shapes.

    `plan` says what the model does in the next calls; after that it says `Answer <index>.`
    """

    def __init__(self) -> None:
        super().__init__()
        self._rounds: list[Round] = []

    def plan(self, *rounds: Round) -> None:
        self._rounds = list(rounds)
        self.calls.clear()

    def check(self) -> None:
        """No request broke a rule, every planned round was asked for, and no round raised."""
        assert not self.failures, self.failures[0]
        assert not self.violations, self.violations[:3]
        assert not self._rounds, f"never asked for: {self._rounds}"

    def bodies(self) -> list[Json]:
        return [call.json for call in self.calls]

    # -- what a protocol says about itself

    @abstractmethod
    def is_chat(self, path: str) -> bool: ...

    @abstractmethod
    def broken_rules(self, request: Recorded) -> list[str]: ...

    @abstractmethod
    def put(self, request: Recorded, said: Said) -> Answer: ...

    @abstractmethod
    def refuse(self, status: int, message: str, kind: str | None = None) -> Response: ...

    # -- RecordingUpstream's door

    async def handle(self, connection: Any, request: Recorded) -> None:
        with contextlib.suppress(ValueError):
            request.json = json.loads(request.body)
        if not self.is_chat(request.target.partition("?")[0]):
            self.others.append(request)
            await connection.send(request, self.refuse(404, f"no {request.target}"))
            return
        request.index = len(self.calls)
        request.violations = self.broken_rules(request)
        self.calls.append(request)
        async with self._arrived:
            self._arrived.notify_all()
        if request.violations:
            await connection.send(request, self.refuse(400, "; ".join(request.violations)))
            return
        planned = self._rounds.pop(0) if self._rounds else Said(f"Answer {request.index}.")
        said = planned(request.json) if callable(planned) else planned
        if isinstance(said, Awaitable):
            said = await said
        await connection.send(request, self.put(request, said) if isinstance(said, Said) else said)


def pieces(text: str) -> Iterator[str]:
    for at in range(0, len(text), PIECE_CHARS):
        yield text[at : at + PIECE_CHARS]


def json_response(body: Json, status: int = 200, *headers: tuple[bytes, bytes]) -> Response:
    return Response(
        json.dumps(body).encode(), status, ((b"content-type", b"application/json"), *headers)
    )


def events_stream(events: Sequence[Json], *, named: bool) -> Stream:
    """Server-sent events; `named`: each with its type as the event's name."""
    out = []
    for event in events:
        name = f"event: {event['type']}\n" if named else ""
        out.append(f"{name}data: {json.dumps(event)}\n\n".encode())
    return Stream(out)


def unknown_keys(where: str, value: Json, allowed: Sequence[str]) -> list[str]:
    extra = sorted(set(value) - set(allowed))
    return [f"{where}: extra inputs are not permitted: {', '.join(extra)}"] if extra else []


def tokens_of(value: Any) -> int:
    """Tokens of every text in it, so that a bill is near what the proxy counts."""
    return sum(count_text(text) + 1 for text in texts_of(value))


def texts_of(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_of(item)
