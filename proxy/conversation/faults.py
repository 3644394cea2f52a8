"""The VM calls of one round: which are ours, what answers them, and what that may cost. Pure.

Promises: a call is the VM's by what its name means (`Channel.tool`), and so is a call of nobody's tool
where the client has none. Each VM call that is kept has exactly one result that the model can use, an
error included, under a listed name, under an id of its own, in a bounded number per round; media follow
the results in a user message, which the API takes them in. What a turn may load is bounded in pages and
tokens, and the exchange fits the window: no result is longer, as the JSON that it is, than the window
can take, and each leaves room for those that come after it. A page that is already in front of the
model costs nothing; only pages of this path can be named or found (invariant 6).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import msgspec

from proxy.conversation.channel import Channel
from proxy.conversation.compose import as_input
from proxy.conversation.effects import Effect, Said, Search
from proxy.conversation.report import FaultReport, SearchReport
from proxy.conversation.textcalls import (
    as_message,
    as_tool_calls,
    calls_in,
    said_text,
    unwrapped,
)
from proxy.conversation.timeline import Timeline
from proxy.conversation.turn_window import TurnWindow
from proxy.conversation.window import VM, Entry
from proxy.memory.context import context_parts, quote_json
from proxy.memory.faults import PageFaultHandler, Room
from proxy.memory.ids import Hit
from proxy.memory.message_text import prefix_of
from proxy.memory.models import (
    Actor,
    CompressionLevel,
    FaultReason,
    Modality,
    MutationType,
    PageMutation,
    StorageTier,
)
from proxy.memory.passages import passage
from proxy.memory.vm_tools import (
    PAGE_FAULT,
    SEARCH_PAGES,
    FaultArgs,
    FurtherPage,
    SearchArgs,
    SearchResultEntry,
    SearchToolResult,
    error_result,
    parse_fault_args,
    parse_search_args,
)

NO_ROOM = error_result("There is no room left; answer with what you have.")
_NO_TOOL = "There is no such tool; answer in words."
_CALLS_PER_ROUND = 8  # VM calls answered in one round; a model that makes more repeats itself
_NAME_CHARS = 64  # of a function's name, by the API
_ERROR_TOKENS = 64  # a VM result that says no
_SEARCH_SHARE = 1 / 2  # of what a page may take: so that in a small window another call has room, too, without an epoch
_RESULT_SIZE = 1.5  # in snippets, of each result that was asked for, with what is shown beside the results
_LEADS, _LEADS_SHARE = 3, 4  # results come first in 1/4 of that, or so many as a turn may fault; then short pages whole
_FOUND = 200  # pages that a search looks at
_SHOWN_SHARE = 8  # the best result, where it is evidence already, has 1/8 of the room
_DERIVED_RESULTS = 2  # summaries and claims in a search's results, beside the messages asked for
_LINE_TOKENS = 16  # of a short page's line, beside its text
_MOST_CHARS_PER_TOKEN = 16
_LEAST_SNIPPET_TOKENS = 24  # of a result, however little room there is
_MEDIA_OVERHEAD = 48  # the message around a page's media, and its notice
_MEDIA_NOTICE = "The media of the pages just loaded, in the order of the calls:"
_json = msgspec.json.encode
Call = dict[str, Any]
# What a call asks for: its tool (None: one that nobody has), and its arguments or a sentence on them.
Asked = tuple[str | None, FaultArgs | SearchArgs | str]
# A tool message's content, and the media that go in a user message after it.
Served = tuple[str, Sequence[dict[str, Any]]]


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
    """One per turn: answers the VM calls of its rounds within the turn's window and limits."""

    def __init__(self, paging: TurnWindow) -> None:
        self._paging = paging
        self._pages, self._table = paging.pages, paging.table
        self._counter, self._limits = paging.context.counter, paging.limits
        self.faults: list[FaultReport] = []
        self.searches: list[SearchReport] = []

    @cached_property
    def _handler(self) -> PageFaultHandler:  # most turns call for nothing
        return PageFaultHandler(
            self._table,
            max_faults_per_turn=self._limits.faults_per_turn,
            max_tokens_per_turn=self._limits.fault_tokens,
            locate=self._pages.expand,
            apply=self._paging.apply,
            registry=self._pages.registry,
            counts=self._counter,
            turn=self._paging.turn,
        )

    @property
    def exhausted(self) -> bool:
        """The turn may load nothing more."""
        if not (self.faults or self.searches):
            return not (self._limits.faults_per_turn and self._limits.fault_tokens)
        return not self._handler.can_fault()

    @property
    def helped(self) -> bool:
        """A call brought a page, or a search found one."""
        return any(fault.tokens for fault in self.faults) or any(search.results for search in self.searches)

    # -- a round

    def takes(self, message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> bool:
        """The window could take these calls with at least an error for each."""
        served = calls[:_CALLS_PER_ROUND]
        said = self._counter.message(as_input({**message, "tool_calls": list(served)}))
        if said + self._least(served) > self._paging.spare:  # their ids may be long
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
        asked = [self.read(call) for call in served]
        listed = {id(c): self._listed(c, tool) for c, (tool, _) in zip(served, asked, strict=True)}
        said = as_input({**message, "tool_calls": [listed.get(id(c), c) for c in kept]})
        if self._counter.message(said) > self._paging.result_room:
            short = [_without_arguments(listed[id(c)]) if id(c) in listed else c for c in kept]
            said = {**said, "content": None, "tool_calls": short}
        exchange = [self._entry(said)]
        alone = len(served) == len(kept)  # else the client's results follow, and nothing else may
        media: list[dict[str, Any]] = []
        for index, call in enumerate(served):
            used = sum(entry.tokens for entry in exchange)
            room = self._paging.result_room - used
            room -= sum(self._counter.part(part) for part in media)
            spare = self._paging.spare if alone else self._paging.room_for_messages
            spare -= used + sum(entry.tokens for entry in self._following(media))
            spare -= self._least(served[index + 1 :]) + self._reply(call, "").tokens
            content, parts = yield from self.answer(asked[index], Room(room, spare), alone)
            media += parts
            exchange.append(self._reply(call, content))
        return exchange + self._following(media)

    def read(self, call: Call) -> Asked:
        """What a call asks for: its tool by its name, else by its arguments."""
        tool, text = self._paging.channel.tool((call.get("function") or {}).get("name")), _arguments(call)
        if tool != SEARCH_PAGES:
            fault = parse_fault_args(text)
            if tool is not None or isinstance(fault, FaultArgs):
                return PAGE_FAULT, fault
        search = parse_search_args(text)
        if tool is not None or isinstance(search, SearchArgs):
            return SEARCH_PAGES, search
        return None, _NO_TOOL

    def _listed(self, call: Call, tool: str | None) -> Call:
        """A call of ours under the name that the request lists: an API takes no other spelling."""
        body = call.get("function")
        body = body if isinstance(body, dict) else {}
        name = self._paging.channel.names.get(tool) if tool is not None else None
        if name is None:  # of no tool that there is
            name = re.sub(r"[^A-Za-z0-9_-]", "_", str(body.get("name") or "unknown"))[:_NAME_CHARS]
        if body.get("name") == name:
            return call
        rest = {k: v for k, v in call.items() if k != "custom"}
        named = {"arguments": _arguments(call), **body, "name": name}
        return {**rest, "type": "function", "function": named}

    def _least(self, calls: Sequence[Mapping[str, Any]]) -> int:
        """Tokens of the shortest results that these calls can have."""
        return sum(self._reply(call, NO_ROOM).tokens for call in calls)

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

    # -- one call

    def answer(self, asked: Asked, room: Room, media: bool = True) -> Generator[Effect, Any, Served]:
        """The result of one call. `media` false: no message may follow, so images stay words."""
        tool, args = asked
        if isinstance(args, FaultArgs):
            return (yield from self._fault(args, room, media))
        if isinstance(args, SearchArgs):
            return (yield from self._search(args, room)), ()
        if tool == SEARCH_PAGES:
            self.searches.append(SearchReport("", []))
            return self._says(args, room)
        return self._error("", 0, args, room)

    def _error(self, page_id: str, level: int, message: str, room: Room) -> Served:
        self.faults.append(FaultReport(page_id, int(level), 0, message))
        return self._says(message, room)

    def _says(self, message: str, room: Room) -> Served:
        """A sentence for the model, the shortest one where there is no room for it."""
        said = error_result(message)
        return (said if self._counter.text(said) <= room.spare_tokens else NO_ROOM), ()

    def _fault(self, args: FaultArgs, room: Room, media: bool) -> Generator[Effect, Any, Served]:
        page_id, level = args
        ids = self._pages.expand(page_id)
        if not ids:
            last = self._pages[len(self._pages.path) - 1].ids[0]
            error = f"There is no page {page_id}: pages are msg_0001 to {last}."
            return self._error(page_id, level, error, room)
        within = room
        if self._pages.medium(ids[0]) is not None:
            within = Room(room.tokens, room.spare_tokens - _MEDIA_OVERHEAD)
            level = level if media else max(level, CompressionLevel.ABSTRACT)
        reason, asked = self._paging.fault_reason, self._asked_about() if within is room else ()
        result = yield from self._handler.resolve(page_id, level, reason, within, asked)
        if result.resident:
            self.faults.append(FaultReport(page_id, int(level), 0, reason="resident"))
            return self._says(f"{page_id} is already loaded: you have it above.", room)
        if result.page is None:
            return self._error(page_id, level, result.error or "", room)
        shown = int(result.page.compression_level)
        self.faults.append(FaultReport(page_id, shown, result.tokens, refault=result.refault, reason=reason.value))
        return self._handler.build_tool_result(result.page, level).model_dump_json(), result.parts

    def _asked_about(self) -> list[str]:
        """What a page is asked for: the last search of this turn, and the user's newest message."""
        path = self._pages.path
        user = next((p for p in range(len(path) - 1, -1, -1) if path[p].role == "user"), None)
        searched = [search.query for search in self.searches[-1:]]
        return list(filter(None, [*searched, "" if user is None else self._pages[user].own_text]))

    def _search(self, args: SearchArgs, room: Room) -> Generator[Effect, Any, str]:
        before = len(self._pages.path) - 1
        before += any(self._outside(i) for i in self._pages[before].ids)  # it was cut: search it too
        timeline = Timeline(self._pages, before, self._paging.context)
        positions, note = timeline.positions(args)
        limit = min(args.limit, self._limits.search_results)
        hits: list[Hit] = yield Search(
            [args.query], _FOUND, before, lambda p, part: p not in positions or self._loaded_at(p, part), timeline.seen_s
        )
        pages = self._found(hits, positions, args.modality)
        asked = int(_RESULT_SIZE * limit * self._limits.snippet_tokens)
        most = min(self._handler.tokens_left or 0, int(room.tokens * _SEARCH_SHARE), room.spare_tokens, asked)
        derived = self._pages.derived
        found = SearchToolResult(total_available=before + len(derived.pages), note=note)
        self._fill(found, pages, args.query, limit, most)
        if len(positions) == before:
            found.results += self._derived(args, most)
        timeline.tell(found)
        while True:
            told = [*(entry.page_id for entry in found.results), *(page.page_id for page in found.also)]
            found.left_out = len(set(islice(pages, limit)).difference(told))
            result = found.model_dump_json()
            if not told or self._counter.text(result) <= most:
                break
            for _ in range(1 + len(found.also) // 8):
                (found.also or found.results).pop()
        if self._counter.text(result) > most or (found.left_out and not found.results):
            result = NO_ROOM
        self._handler.charge(self._counter.text(result))
        self.searches.append(SearchReport(args.query, told))
        whole = [(entry.page_id, entry.hint) for entry in found.results if entry.complete]
        for page_id, text in (*whole, *((page.page_id, page.text) for page in found.also)):
            self._map(page_id, self._counter.text(text))  # the model has all of it now: the next search looks further
        return result

    def _found(self, hits: Sequence[Hit], positions: range, modality: Modality | None) -> dict[str, float]:
        """Page id -> score of what a search found, best first. Of pages that are shown whole as evidence at most the
        very best: the search is for what is not there yet, but what it names has to be found."""
        pages: dict[str, float] = {}
        for hit in hits:
            page_id = self._pages.id_of(hit.position, hit.part)
            if self._pages.position(page_id) not in positions or page_id in pages:
                continue  # a medium is found by its message and by the answer to it
            if pages and self._is_evidence(page_id):
                continue
            if modality is None or self._pages.modality(page_id) is modality:
                pages[page_id] = hit.score
        return pages

    def _fill(self, found: SearchToolResult, pages: Mapping[str, float], query: str, limit: int, most: int) -> None:
        """The result of a search in about `most` tokens: the best pages one by one, then those that are short, whole
        and in few tokens each, then what else of the first `limit` has room."""
        count, snippet = self._counter.text, self._limits.snippet_tokens
        asked = list(islice(pages, limit))
        found.left_out = len(asked)
        left = most - count(found.model_dump_json())
        leads = left - most // _LEADS_SHARE
        results: dict[str, SearchResultEntry] = {}

        def add(page_id: str, least_left: int) -> bool:
            nonlocal left
            share = _SHOWN_SHARE if self._is_evidence(page_id) else 1
            entry = self._entry_of(page_id, pages[page_id], query, most // share)
            tokens = count(entry.model_dump_json()) + 1
            if left - tokens < least_left:
                return False
            results[page_id] = entry
            left -= tokens
            return True

        for page_id in asked:
            if not add(page_id, 0 if len(results) < _LEADS else leads):
                break
        for page_id in pages:
            if left < _LINE_TOKENS:
                break
            text = "" if page_id in results else self._pages.text(page_id)
            if not text or len(text) > snippet * _MOST_CHARS_PER_TOKEN or self._pages.medium(page_id) is not None:
                continue
            who = prefix_of(self._pages.role(page_id), self._pages.modality(page_id)).value
            page = FurtherPage(page_id=page_id, who=who, text=text)
            tokens = count(quote_json(page.line())) + 1
            if tokens <= min(left, snippet + _LINE_TOKENS):
                found.also.append(page)
                left -= tokens
        beside = {page.page_id for page in found.also}
        for page_id in asked:
            if page_id not in results and page_id not in beside:
                add(page_id, 0)
        found.results = [results[page_id] for page_id in asked if page_id in results]

    def _derived(self, args: SearchArgs, most: int) -> list[SearchResultEntry]:
        """Summaries and claims about the query that are not in the window."""
        derived = self._pages.derived
        if not derived.pages or args.modality not in (None, Modality.TEXT):
            return []
        found = derived.words.ranked(args.query)
        outside = [(i, score) for i, score in found if self._outside(i)]
        return [self._entry_of(i, score, args.query, most) for i, score in outside[:_DERIVED_RESULTS]]

    def _loaded_at(self, position: int, part: int) -> bool:
        page_id = self._pages.id_of(position, part)
        return self._is_whole(page_id) and page_id not in self._paging.evidence

    def _is_evidence(self, page_id: str) -> bool:
        """It stands in the window as evidence, all of it: of a long page only passages do, and a search for other
        words shows others."""
        return page_id in self._paging.evidence and self._is_whole(page_id)

    def _is_whole(self, page_id: str) -> bool:
        entry = self._table.in_window(page_id)
        return entry is not None and entry.level is CompressionLevel.FULL

    def _outside(self, page_id: str) -> bool:
        entry = self._table.lookup(page_id)
        return bool(entry and entry.tier is not StorageTier.L0)

    def _map(self, page_id: str, tokens: int) -> None:
        if self._table.lookup(page_id) is not None:
            self._paging.apply(
                PageMutation(
                    MutationType.MAP, page_id, self._paging.turn, CompressionLevel.FULL,
                    StorageTier.L0, tokens, Actor.MODEL, FaultReason.RESOLVE_REFERENCE,
                )
            )  # fmt: skip

    def _entry_of(self, page_id: str, score: float, query: str, most: int) -> SearchResultEntry:
        """`hint` is the whole text when it is short (`complete`), else the passages about the query."""
        text, count = self._pages.text(page_id), self._counter.text
        snippet = max(_LEAST_SNIPPET_TOKENS, min(self._limits.snippet_tokens, most - _ERROR_TOKENS))
        hint = passage(text, [query], snippet, count)
        return SearchResultEntry(
            page_id=page_id,
            modality=self._pages.modality(page_id).value,
            hint=hint,
            complete=hint == text and self._pages.medium(page_id) is None,
            relevance=round(score, 3),
        )


def _arguments(call: Call) -> str:
    arguments = (call.get("function") or {}).get("arguments")
    return arguments if isinstance(arguments, str) else _json(arguments).decode()


def _without_arguments(call: Call) -> Call:
    """A call too long to stay in the window; its result still says what came of it."""
    body = call.get("function")
    return {**call, "function": {**body, "arguments": "{}"}} if isinstance(body, dict) else call
