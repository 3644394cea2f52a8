"""One round's tool calls: which are ours, and what answers ours. Pure.

Promises: a call is the VM's by what its name means (`Channel.tool`), and so is a call of nobody's tool
where the client has none; each VM call that is kept has exactly one result, under a listed name, under an id of its own, in a bounded number per round; media follow the results in a
user message; the exchange fits the window: a result leaves room for those that come after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from proxy.conversation.channel import Channel
from proxy.conversation.compose import as_input
from proxy.conversation.effects import Effect, Said
from proxy.conversation.faults import NO_ROOM, NO_TOOL, FaultServer, Room, Served
from proxy.conversation.textcalls import (
    as_message,
    as_tool_calls,
    calls_in,
    said_text,
    unwrapped,
)
from proxy.conversation.turn_window import TurnWindow
from proxy.conversation.window import VM, Entry
from proxy.memory.context_packer import context_parts
from proxy.memory.vm_args import FaultArgs, SearchArgs, parse_fault_args, parse_search_args
from proxy.memory.vm_prompts import PAGE_FAULT, SEARCH_PAGES

_CALLS_PER_ROUND = 8  # VM calls answered in one round; a model that makes more repeats itself
_NAME_CHARS = 64  # of a function's name, by the API
_ERROR_TOKENS = 64  # a VM result that says no
_MEDIA_NOTICE = "The media of the pages just loaded, in the order of the calls:"
_json = msgspec.json.encode
Call = dict[str, Any]


def split_calls(message: Mapping[str, Any], channel: Channel) -> tuple[list[Call], list[Call]]:
    """A message's tool calls: the VM's and the client's."""
    vm: list[Call] = []
    client: list[Call] = []
    for call in message.get("tool_calls") or ():
        ours = not channel.client_calls
        if not ours and "custom" not in call:
            ours = channel.tool((call.get("function") or {}).get("name")) is not None
        (vm if ours else client).append(call)
    return vm, client


def understood(said: Said, channel: Channel, talked: Callable[[], bool]) -> Said:
    """A round with the VM calls that it made in other words (as text, within another call, as an old
    function call) as calls of its message; a streamed round's text was read by the sieve."""
    message = as_tool_calls(said.messages[0], channel)
    calls: list[Call] = []
    for call in message.get("tool_calls") or ():
        body = call.get("function") or {}
        known = body.get("name") in channel.client or channel.tool(body.get("name"))
        inner = [] if known else unwrapped(body.get("arguments"), channel)
        calls += as_message({}, inner, channel)["tool_calls"] if inner else [call]
    if calls:
        message = {**message, "tool_calls": calls}
    unread = said.unread
    if said.response is not None:
        spoken = calls_in(said_text(message), channel, talked)
        if spoken:
            message = as_message(message, spoken, channel)
        unread = spoken == []
    if message is said.messages[0] and unread == said.unread:
        return said
    return replace(said, messages=[message, *said.messages[1:]], unread=unread)


class VMCalls:
    """One per turn: answers the VM calls of its rounds within the turn's window."""

    def __init__(self, paging: TurnWindow) -> None:
        self._paging = paging
        self._counter = paging.context.counter
        self.server = FaultServer(
            paging.pages, paging.table, paging.context.counter, paging.limits, paging.turn, paging.apply,
            paging.fault_reason,
        )

    def takes(self, message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> bool:
        """The window could take these calls with at least an error for each."""
        served = calls[:_CALLS_PER_ROUND]
        said = self._counter.message(as_input({**message, "tool_calls": list(served)}))
        least = sum(self._reply(call, NO_ROOM).tokens for call in served)
        if said + least > self._paging.spare:  # their ids may be long
            return False
        return said + _ERROR_TOKENS * len(served) <= self._paging.left

    def serve(
        self, message: Mapping[str, Any], calls: Sequence[Call], number: int
    ) -> Generator[Effect, Any, list[Entry]]:
        """The exchange of round `number`: the model's message as it made it, and the VM results."""
        served = calls[:_CALLS_PER_ROUND]
        dropped = {id(call) for call in calls[_CALLS_PER_ROUND:]}
        kept = [call for call in message["tool_calls"] if id(call) not in dropped]
        ids = [call.get("id") for call in kept]
        for index, call in enumerate(served):
            if not call.get("id") or ids.count(call["id"]) > 1:  # some servers give none, or one
                call["id"] = f"call_vm_{self._paging.turn}_{number}_{index}"
        own = {id(call): self._listed(call) for call in served}
        said = as_input({**message, "tool_calls": [own.get(id(call), call) for call in kept]})
        if self._counter.message(said) > self._paging.result_room:
            ours = {id(call) for call in served}
            short = [_without_arguments(own[id(c)]) if id(c) in ours else c for c in kept]
            said = {**said, "content": None, "tool_calls": short}
        exchange = [self._entry(said)]
        alone = len(served) == len(kept)  # else the client's results follow, and nothing else may
        media: list[dict[str, Any]] = []
        for index, call in enumerate(served):
            given = sum(entry.tokens for entry in exchange)
            room = self._paging.result_room - given
            room -= sum(self._counter.part(part) for part in media)
            spare = self._paging.spare if alone else self._paging.room_for_messages
            spare -= given + sum(e.tokens for e in self._following(media))
            spare -= sum(self._reply(later, NO_ROOM).tokens for later in served[index + 1 :])
            spare -= self._reply(call, "").tokens
            result = yield from self._result(call, Room(room, spare), alone)
            media += result.parts
            exchange.append(self._reply(call, result.content))
        return exchange + self._following(media)

    def _result(self, call: Call, room: Room, media: bool) -> Generator[Effect, Any, Served]:
        return (yield from self.server.serve(self._tool(call), _arguments(call), room, media))

    def _tool(self, call: Call) -> str:
        """The VM tool that a call means: by its name, else by its arguments."""
        tool = self._paging.channel.tool((call.get("function") or {}).get("name"))
        if tool is None:
            text = _arguments(call)
            page = isinstance(parse_fault_args(text), FaultArgs)
            search = isinstance(parse_search_args(text), SearchArgs)
            tool = PAGE_FAULT if page else SEARCH_PAGES if search else NO_TOOL
        return tool

    def _listed(self, call: Call) -> Call:
        """A call of ours under the name that the request lists: an API takes no other spelling."""
        body = call.get("function")
        body = body if isinstance(body, dict) else {}
        name = self._paging.channel.names.get(self._tool(call))
        if name is None:  # of no tool that there is
            name = re.sub(r"[^A-Za-z0-9_-]", "_", str(body.get("name") or "unknown"))[:_NAME_CHARS]
        if body.get("name") == name:
            return call
        rest = {k: v for k, v in call.items() if k != "custom"}
        named = {"arguments": _arguments(call), **body, "name": name}
        return {**rest, "type": "function", "function": named}

    def _reply(self, call: Mapping[str, Any], content: str) -> Entry:
        return self._entry({"role": "tool", "tool_call_id": call.get("id"), "content": content})

    def _following(self, media: Sequence[dict[str, Any]]) -> list[Entry]:
        """The media of a round in a message behind its results: a tool message takes only text."""
        if not media:
            return []
        about = {"type": "text", "text": _MEDIA_NOTICE}
        return [self._entry({"role": "user", "content": context_parts([about, *media])})]

    def _entry(self, message: dict[str, Any]) -> Entry:
        return Entry(_json(message), self._counter.message(message), -1, VM)


def _arguments(call: Call) -> str:
    arguments = (call.get("function") or {}).get("arguments")
    return arguments if isinstance(arguments, str) else _json(arguments).decode()


def _without_arguments(call: Call) -> Call:
    """A call too long to stay in the window; its result still says what came of it."""
    body = call.get("function")
    return {**call, "function": {**body, "arguments": "{}"}} if isinstance(body, dict) else call
