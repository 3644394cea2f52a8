"""One round's tool calls: which are ours, and what answers ours. Pure.

Promises: a call is the VM's only while the VM tools are listed; each VM call that is kept has exactly
one result, under an id of its own, in a bounded number per round; media follow the results in a
user message; the exchange fits the window: a result leaves room for those that come after it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import msgspec

from proxy.conversation.channel import Channel
from proxy.conversation.compose import as_input
from proxy.conversation.effects import Effect
from proxy.conversation.faults import NO_ROOM, FaultServer, Room, Served
from proxy.conversation.paging import TurnWindow
from proxy.conversation.window import VM, Entry
from proxy.memory.context_packer import context_parts
from proxy.memory.vm_prompts import PAGE_FAULT, SEARCH_PAGES

_CALLS_PER_ROUND = 8  # VM calls answered in one round; a model that makes more repeats itself
_ERROR_TOKENS = 64  # a VM result that says no
_MEDIA_NOTICE = "The media of the pages just loaded, in the order of the calls:"
_json = msgspec.json.encode
Call = dict[str, Any]


def split_calls(message: Mapping[str, Any], channel: Channel) -> tuple[list[Call], list[Call]]:
    """A message's tool calls: the VM's and the client's."""
    ours = channel.listed_names
    vm: list[Call] = []
    client: list[Call] = []
    for call in message.get("tool_calls") or ():
        name = (call.get("function") or {}).get("name")
        (vm if name in ours else client).append(call)
    return vm, client


class VMCalls:
    """One per turn: answers the VM calls of its rounds within the turn's window."""

    def __init__(self, paging: TurnWindow) -> None:
        self._paging = paging
        self._counter = paging.counter
        self._names = {name: tool for tool, name in paging.channel.names.items()}
        self.server = FaultServer(
            paging.pages, paging.table, paging.counter, paging.limits, paging.turn, paging.apply,
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
        said = as_input({**message, "tool_calls": kept})
        if self._counter.message(said) > self._paging.result_room:
            ours = {id(call) for call in served}
            short = [_without_arguments(c) if id(c) in ours else c for c in kept]
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
        body = call.get("function") or {}
        tool = PAGE_FAULT if self._names[body["name"]] == PAGE_FAULT else SEARCH_PAGES
        arguments = body.get("arguments")
        text = arguments if isinstance(arguments, str) else _json(arguments).decode()
        return (yield from self.server.serve(tool, text, room, media))

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


def _without_arguments(call: Call) -> Call:
    """A call too long to stay in the window; its result still says what came of it."""
    body = call.get("function")
    return {**call, "function": {**body, "arguments": "{}"}} if isinstance(body, dict) else call
