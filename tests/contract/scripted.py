"""The scripted upstream: every play has its own script on one port.

Promises: a request finds its script by a tag that stands in a header and in the conversation, so
gateways that drop headers are served too; what is offered beside the client's own tools is the
gateway's, and a script may have the model call it before its final answer.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.contract import say
from tests.contract.wires import Wire, WireUpstream
from tests.e2e.answers import Answer, Response, Stream
from tests.e2e.recording import Recorded

SIDE_MODEL = "contract-side"  # what gateways call for themselves (summaries): in no play's script
TAG_HEADER = "x-contract-tag"
_TAG = re.compile(r"\[contract ([a-z0-9-]+)\]")
Json = dict[str, Any]
Step = Json | Answer | Callable[[Json], "Answer | Awaitable[Answer]"]


def tag_text(tag: str) -> str:
    """What stands in a message so that its request is recognised."""
    return f"[contract {tag}]"


@dataclass
class Script:
    """What the model says in one play.

    `final`: the answers to requests in which it calls no tool of the gateway's; the last one is
    repeated. `inner`: how many rounds of each client request it calls one first, where it can.
    """

    tag: str
    inner_call: Callable[[Json, str], Json | None]
    final: list[Step] = field(default_factory=list)
    inner: int = 0
    inner_message: Json = field(default_factory=dict)  # keys beside its tool call
    inner_step: Callable[[Json, Json], Answer] | None = None  # plays an inner round differently
    client_tools: set[str] = field(default_factory=set)
    calls: list[Recorded] = field(default_factory=list)
    inner_calls: list[Recorded] = field(default_factory=list)
    others: list[Recorded] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    raised: list[Exception] = field(default_factory=list)  # mistakes of the script itself
    _left: int = 0
    _answered: int = 0

    def begin(self) -> None:
        """A new client request."""
        self._left = self.inner
        self.arrived.clear()

    @property
    def final_calls(self) -> list[Recorded]:
        return [c for c in self.calls if c not in self.inner_calls]

    def respond(self, recorded: Recorded) -> Answer | Awaitable[Answer]:
        request, number = recorded.json, len(self.calls)
        self.calls.append(recorded)
        self.arrived.set()
        if not isinstance(request, dict):
            return say.error(400, "We could not parse the JSON body of your request.")
        if self._left > 0:
            made = self.inner_call(request, f"call_inner_{number}")
            if made is not None:
                self._left -= 1
                self.inner_calls.append(recorded)
                if self.inner_step is not None:
                    return self.inner_step(request, made)
                message = say.calling(made, **self.inner_message)
                return say.answer(request, message, number)
        step = self.final[min(self._answered, len(self.final) - 1)] if self.final else say.text("Ok.")
        self._answered += 1
        if isinstance(step, dict):
            return say.answer(request, step, number)
        return step(request) if callable(step) else step

    def own_tools(self, request: Json) -> list[str]:
        """Names of function tools that the client did not send."""
        names = []
        for tool in request.get("tools") or ():
            name = (tool.get("function") or {}).get("name")
            if isinstance(name, str) and name not in self.client_tools:
                names.append(name)
        return names


class ScriptedUpstream:
    """One server for all plays; use as an async context manager."""

    def __init__(self, port: int = 0, wire: Wire | None = None) -> None:
        self.scripts: dict[str, Script] = {}
        self.strays: list[Recorded] = []
        self.wire = wire or Wire()
        self.upstream = WireUpstream(self.wire, respond=self._respond, other=self._other)
        self.upstream.port = port

    @property
    def port(self) -> int:
        return self.upstream.port

    @property
    def base_url(self) -> str:
        return self.upstream.base_url

    async def __aenter__(self) -> ScriptedUpstream:
        await self.upstream.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.upstream.stop()

    def _find(self, recorded: Recorded) -> Script | None:
        tag = recorded.header(TAG_HEADER)
        if tag is None:
            found = _TAG.findall(recorded.body.decode("utf-8", "replace") + recorded.target)
            tag = found[-1] if found else None
        return self.scripts.get(tag or "")

    async def _respond(self, request: Json, index: int) -> Answer:
        recorded = self.upstream.calls[index]
        if isinstance(request, dict) and request.get("model") == SIDE_MODEL:
            return say.answer(request, say.text("A depot has a code."))
        script = self._find(recorded)
        if script is None:
            self.strays.append(recorded)
            return say.answer(request or {}, say.text("Nobody asked."))
        try:
            reply = script.respond(recorded)
            return await reply if isinstance(reply, Awaitable) else reply
        except Exception as error:  # noqa: BLE001 (the play says it at its end)
            script.raised.append(error)
            return say.error(500, f"the script raised {error!r}")

    def _other(self, recorded: Recorded) -> Answer:
        script = self._find(recorded)
        if script is None:
            self.strays.append(recorded)
            return Response(json.dumps({"object": "list", "data": []}).encode())
        script.others.append(recorded)
        script.arrived.set()
        step = script.final[0] if script.final else {"object": "list", "data": []}
        if isinstance(step, (Response, Stream)):
            return step
        reply = step(recorded.json or {}) if callable(step) else step
        assert isinstance(reply, (Response, Stream, dict))
        return reply


def tool_names(tools: Sequence[Json]) -> set[str]:
    """What a client's tools are called."""
    bodies = [t.get("function") or t.get("custom") or {} for t in tools]
    return {body["name"] for body in bodies if "name" in body}
