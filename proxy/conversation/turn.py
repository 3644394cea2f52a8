"""One turn: from a request's path to its answer, as a generator of effects. Pure.

Promises: what fits is passed through untouched (invariant 2); every upstream request stays within
the budget (3); each turn is stored whole before its answer ends (5); a request that we changed and
upstream refuses is sent once more unchanged when it would fit (1). The shell performs the effects;
tests play it as a dialogue.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from proxy.conversation.body import Fields
from proxy.conversation.channel import choose_channel, tools_array, vm_tools_tokens
from proxy.conversation.commit import append_effect, new_records
from proxy.conversation.compose import (
    as_input,
    request_body,
    response_body,
    total_usage,
    with_context,
)
from proxy.conversation.effects import Complete, Effect, Refused, Said
from proxy.conversation.epoch import (
    EpochRequest,
    anchored,
    begin_epoch,
    context_length_exceeded,
    native_entries,
)
from proxy.conversation.faults import FaultServer
from proxy.conversation.limits import Limits
from proxy.conversation.pathpages import PathPages, group_start
from proxy.conversation.prefetch import Prefetch
from proxy.conversation.report import TurnReport
from proxy.conversation.tree import Anchor, Identity, Node, Record
from proxy.conversation.window import NATIVE, SYSTEM, VM, Entry, Window, encode_change, render
from proxy.memory.context_packer import context_block
from proxy.memory.eviction_policy import EvictionPolicy
from proxy.memory.importance import importance_of, is_standing
from proxy.memory.models import (
    MutationType,
    PageMutation,
    StorageTier,
    VMMode,
)
from proxy.memory.mutation_log import encode as encode_mutations
from proxy.memory.page_table import DEFAULT_IMPORTANCE, PageTable
from proxy.memory.pages import page_id
from proxy.memory.vm_prompts import PAGE_FAULT, SEARCH_PAGES
from proxy.memory.working_set import watermarks
from proxy.tokens import PER_REPLY, TokenCounter

_REPAIRABLE = (400, 404, 413, 415, 422)  # refusals that our own changes may have caused
_CALLS_PER_ROUND = 8  # VM calls answered in one round; a model that makes more repeats itself
_ERROR_TOKENS = 64  # a VM result that says no
_FRAME_TOKENS = 400  # kept free beside VM results: rules, tags and the calls themselves
_RESULT_SHARE = 3  # one VM result takes at most 1/3 of the room
_json = msgspec.json.encode


@dataclass(slots=True)
class TurnInput:
    """A request that has found its place in the tree.

    `path` ends with the newest message; `start` is the position of the client's first message on it;
    messages before `floor` may not become native (a trimming client dropped them). `record` is the
    deepest answered ancestor, `window` and `table` the state after it (None: never evicted).
    """

    body: bytes
    fields: Fields
    order: Sequence[str]
    decoded: Mapping[str, Any]
    system: Sequence[bytes]
    path: list[Node]
    start: int
    floor: int
    anchors: Sequence[Anchor]
    record: Record | None
    window: Window | None
    table: PageTable | None
    limits: Limits
    counter: TokenCounter
    identity: Identity
    tenant: bytes
    session_key: bytes | None
    policy: EvictionPolicy
    substitutes: Callable[[bytes], Sequence[bytes]]
    fixed_tokens: int  # system messages and the client's tools
    surely_fits: bool = False  # so short that nothing had to be counted
    observed: bool = True  # somebody reads the report's page lists


@dataclass(slots=True)
class Answer:
    """How the turn ended. `body` is the response of a non-streaming call (None: as upstream said)."""

    report: TurnReport
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    body: bytes | None = None
    refused: Refused | None = None
    learned: dict[str, Any] = field(default_factory=dict)  # about the model, from a refusal


class Turn:
    """Runs one turn. After it, `path`, `table`, `record` and `window` are the state to cache."""

    def __init__(self, given: TurnInput) -> None:
        self._in = given
        self._limits = given.limits
        self._counter = given.counter
        self.path = given.path
        self.turn = (given.record.turn if given.record else 0) + 1
        self.pages = PathPages(self.path, given.counter, given.limits.page_tokens)
        self.table = given.table or PageTable()
        self.record: Record | None = None
        self.window: Window | None = None
        self._mutations: list[PageMutation] = []
        self._tail: list[Entry] = []  # this turn's VM exchange
        self._responses: list[Said] = []
        self._report = TurnReport(str(given.decoded.get("model")), "bypass", self.turn)
        self._report.budget_tokens = given.limits.budget_tokens

    def run(self) -> Generator[Effect, Any, Answer]:
        given = self._in
        if given.window is None and given.floor == 0 and (given.surely_fits or self._fits()):
            whole = given.start == 0
            body = given.body if whole else self._native_body()
            return (yield from self._pass_through(body, None))
        return (yield from self._paged())

    # -- without paging

    def _fits(self) -> bool:
        total = self._in.fixed_tokens + PER_REPLY + self._anchor_tokens()
        for position in range(len(self.path)):
            total += self.pages.tokens(position)
            if total > self._limits.budget_tokens:
                return False
        self._report.used_tokens = total
        return True

    def _anchor_tokens(self, before: int | None = None) -> int:
        """Tokens of the mid-conversation system messages that stand before a position."""
        decode = msgspec.json.decode
        anchors = [a for a in self._in.anchors if before is None or a.position < before]
        return sum(self._counter.message(decode(a.raw)) for a in anchors)

    def _native_body(self) -> bytes:
        """All of a session's history for a client that sent only its new messages."""
        raws = [*self._in.system]
        for position, node in enumerate(self.path):
            raws.extend(a.raw for a in self._in.anchors if a.position == position)
            raws.append(node.raw)
        raws.extend(a.raw for a in self._in.anchors if a.position == len(self.path))
        return request_body(self._in.fields, self._in.order, b"[" + b",".join(raws) + b"]", {})

    def _pass_through(
        self, body: bytes, learned: dict[str, Any] | None
    ) -> Generator[Effect, Any, Answer]:
        said = yield Complete(body, through=True)
        if isinstance(said, Refused):
            return Answer(self._report, refused=said)
        self._report.rounds = 1
        if said.messages:
            yield self._append(said.messages, ())
        return Answer(self._report, said.finish_reason, said.usage, learned=learned or {})

    # -- with paging

    def _paged(self) -> Generator[Effect, Any, Answer]:
        self._channel = choose_channel(self._in.decoded, self._limits)
        self._names = {name: tool for tool, name in self._channel.names.items()}
        self._report.channel = self._channel.name
        tools = tools_array(self._tools_raw(), self._channel)
        added = vm_tools_tokens(self._channel, self._counter)
        self._whole_room = self._limits.budget_tokens - self._in.fixed_tokens - PER_REPLY - added
        self._tools = tools
        self._open()
        yield from self._prefetch()
        self._server = FaultServer(
            self.pages, self.table, self._counter, self._limits, self.turn, self._apply
        )
        return (yield from self._rounds())

    @property
    def _room(self) -> int:
        """Tokens for the window: what system messages before it and the tools leave of the budget."""
        assert self.window is not None
        return self._whole_room - self._anchor_tokens(self.window.native_from)

    def _tools_raw(self) -> bytes | None:
        raw = self._in.fields.get("tools")
        return bytes(raw) if raw is not None else None

    def _apply(self, mutation: PageMutation) -> None:
        self.table.apply(mutation)
        self._mutations.append(mutation)

    def _open(self) -> None:
        """Append the new messages to the window, or begin an epoch when they do not fit."""
        before = self._in.window
        end = len(self.path)
        self._register(before.covered if before else 0, end)
        if before is None:
            self._begin_epoch(1)
            return
        entries: list[Entry] = []
        placed = [e.raw for e in before.entries if (e.kind, e.position) == (SYSTEM, before.covered)]
        for position in range(before.covered, end + 1):
            system = anchored(self._in.anchors, position, self._counter)
            entries.extend(system[len(placed) :] if position == before.covered else system)
            if position < end:
                entries.extend(
                    native_entries(self.pages, position, self._in.substitutes, self._counter)
                )
        self.window = before.append(entries, end)
        high, _ = watermarks(self._room, self._limits.working_set)
        if self.window.tokens + self._prefetcher().reserve() > high or self._anchors_moved(before, placed):
            self._begin_epoch(before.epoch + 1)

    def _register(self, first: int, last: int) -> None:
        """Enter new pages in the table; standing instructions are pinned."""
        for position in range(first, last):
            tier = StorageTier.L0 if position >= self._in.floor else StorageTier.L2
            ids, tokens = self.pages.ids(position), self.pages.tokens(position)
            role, text = self.path[position].role, self.pages.parts(position)[0]
            weight = importance_of(role, text)
            modality = self.pages.modality(position)
            for i in ids:
                self._apply(
                    PageMutation(
                        MutationType.CREATE, i, self.turn, None, tier, tokens // len(ids),
                        importance=None if weight == DEFAULT_IMPORTANCE else weight,
                        modality=modality,
                    )
                )
            if is_standing(role, text, tokens):
                self._apply(PageMutation(MutationType.PIN, ids[0], self.turn))

    def _anchors_moved(self, before: Window, last: Sequence[bytes]) -> bool:
        """The client's system messages inside the window are not what the window has.

        `last` stood behind the newest message. A client that always has one there moves it along:
        the old one may stay for a turn.
        """
        first, covered = max(before.native_from, self._in.start), before.covered
        sent = [e.raw for e in before.entries if e.kind == SYSTEM and first <= e.position < covered]
        now = [a.raw for a in self._in.anchors if first <= a.position < covered]
        here = [a.raw for a in self._in.anchors if a.position == covered]
        return sent != now or (bool(here) and here[: len(last)] != list(last))

    def _begin_epoch(self, number: int) -> None:
        room = self._whole_room - self._anchor_tokens()
        if room <= 0:
            raise context_length_exceeded(self._limits, self._limits.budget_tokens - room)
        end = len(self.path)
        newest = self._newest_entry() if self._tail else None
        before = self._in.window
        epoch = begin_epoch(
            EpochRequest(
                self.pages,
                self.table,
                self._in.policy,
                self._counter,
                self._limits,
                self._in.anchors,
                self._in.substitutes,
                self._channel.names,
                VMMode.PASSIVE if not self._channel.listed else self._limits.mode,
                self.turn,
                number,
                group_start(
                    self.path, min(max(self._in.floor, before.native_from if before else 0), end - 1)
                ),
                room,
                newest,
                tuple(self._tail),
            )
        )
        for mutation in epoch.mutations:
            self._apply(mutation)
        self.window = epoch.window
        report = self._report
        report.new_epoch = True
        report.evicted_pages += [
            m.page_id for m in epoch.mutations if m.op is MutationType.EVICT
        ]

    def _newest_entry(self) -> Entry | None:
        assert self.window is not None
        last = len(self.path) - 1
        return next((e for e in self.window.entries if e.position == last and e.kind == NATIVE), None)

    # -- pages brought in before the call

    def _prefetcher(self) -> Prefetch:
        offer = self._channel.offer
        return Prefetch(self.pages, self.table, self._counter, self._limits, offer, self._room)

    def _prefetch(self) -> Generator[Effect, Any, None]:
        """Pages that the newest user message is about go in front of its own text."""
        entry = self._newest_entry()
        if entry is None:
            return
        assert self.window is not None
        chosen = yield from self._prefetcher().choose(self._room - self.window.tokens)
        for page in chosen:
            i = page_id(page.position, page.part)
            self._report.prefetched_pages.append(i)
            if self.table.lookup(i) is not None:
                self._apply(
                    PageMutation(
                        MutationType.MAP, i, self.turn, page.level, StorageTier.L0, page.tokens
                    )
                )
        if chosen:
            self._replace_newest(entry, context_block(page.line for page in chosen))

    def _replace_newest(self, entry: Entry, block: str) -> None:
        assert self.window is not None
        message = with_context(msgspec.json.decode(entry.raw), block)
        new = Entry(_json(message), self._counter.message(message), entry.position)
        entries = tuple(new if e is entry else e for e in self.window.entries)
        self.window = msgspec.structs.replace(
            self.window, entries=entries, tokens=self.window.tokens + new.tokens - entry.tokens
        )

    # -- the fault loop

    def _rounds(self) -> Generator[Effect, Any, Answer]:
        said: Any = None
        full = False
        for number in range(self._limits.max_rounds):
            last = full or number == self._limits.max_rounds - 1
            stop = (last and number > 0) or self._stop(number)
            body = self._request(stop)
            offer = self._channel.offer and not stop
            said = yield Complete(body, offer, through=self._many())
            if isinstance(said, Refused):
                return (yield from self._refused(said, first=number == 0))
            self._responses.append(said)
            if not said.messages:
                break
            vm, client = self._split_calls(said.messages[0])
            if not vm:
                yield self._append(self._shown(said, client), ())
                break
            if (stop or last) and not client:  # it was told not to; what it said has to do
                yield self._append(self._shown(said, client), ())
                break
            if not client and (full := not self._takes(said.messages[0], vm)):
                continue  # it is asked once more, without tools
            exchange = yield from self._serve(said.messages[0], vm)
            if client:
                raws = [entry.raw for entry in exchange]
                yield self._append(self._shown(said, client), raws)
                break
            self._extend(exchange)
        return self._answer(said)

    def _many(self) -> bool:
        return int(self._in.decoded.get("n") or 1) > 1

    def _stop(self, number: int) -> bool:
        """No more faults: the model has to answer. With tools of the client's it may still call
        those, so there the VM calls get an error instead until the last round."""
        full = self._result_room() <= 0
        if self._in.decoded.get("tools"):
            return full and number > 0
        return full or self._server.exhausted

    def _takes(self, message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> bool:
        """The window could take these calls with at least an error for each."""
        said = as_input({**message, "tool_calls": list(calls[:_CALLS_PER_ROUND])})
        errors = _ERROR_TOKENS * len(calls[:_CALLS_PER_ROUND])
        return self._counter.message(said) + errors <= self._left()

    def _request(self, stop: bool) -> bytes:
        """The upstream body of one round; begins an epoch first when the log outgrew the room."""
        assert self.window is not None
        if self.window.tokens > self._room:
            self._begin_epoch(self.window.epoch + 1)
        assert self.window is not None
        self._report.used_tokens = self._limits.budget_tokens - self._room + self.window.tokens
        as_text = not self._channel.listed
        head = [*self._in.system]
        head += [a.raw for a in self._in.anchors if a.position < self.window.native_from]
        messages = render(head, self.window, self._limits.developer_role, as_text)
        changed: dict[str, bytes | None] = {}
        if self._channel.listed:
            changed["tools"] = self._tools
            forced = self._in.decoded.get("tool_choice") not in (None, "auto")
            if not forced and (stop or not self._channel.offer):
                changed["tool_choice"] = b'"none"'
        return request_body(self._in.fields, self._in.order, messages, changed)

    def _split_calls(
        self, message: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        vm: list[dict[str, Any]] = []
        client: list[dict[str, Any]] = []
        for call in message.get("tool_calls") or ():
            name = (call.get("function") or {}).get("name")
            (vm if self._channel.listed and name in self._names else client).append(call)
        return vm, client

    def _serve(
        self, message: dict[str, Any], calls: Sequence[dict[str, Any]]
    ) -> Generator[Effect, Any, list[Entry]]:
        """The exchange of one round: the model's message as it made it, and the VM results."""
        served = calls[:_CALLS_PER_ROUND]
        dropped = {id(call) for call in calls[_CALLS_PER_ROUND:]}
        kept = [call for call in message["tool_calls"] if id(call) not in dropped]
        ids = [call.get("id") for call in kept]
        for index, call in enumerate(served):
            if not call.get("id") or ids.count(call["id"]) > 1:  # some servers give none, or one
                call["id"] = f"call_vm_{self.turn}_{len(self._responses)}_{index}"
        said = as_input({**message, "tool_calls": kept})
        if self._counter.message(said) > self._result_room():
            ours = {id(call) for call in served}
            short = [_without_arguments(c) if id(c) in ours else c for c in kept]
            said = {**said, "content": None, "tool_calls": short}
        exchange = [Entry(_json(said), self._counter.message(said), -1, VM)]
        for call in served:
            body = call.get("function") or {}
            tool = PAGE_FAULT if self._names[body["name"]] == PAGE_FAULT else SEARCH_PAGES
            arguments = body.get("arguments")
            text = arguments if isinstance(arguments, str) else _json(arguments).decode()
            room = self._result_room() - sum(entry.tokens for entry in exchange)
            result = yield from self._server.serve(tool, text, room)
            reply = {"role": "tool", "tool_call_id": call["id"], "content": result}
            exchange.append(Entry(_json(reply), self._counter.message(reply), -1, VM))
        return exchange

    def _result_room(self) -> int:
        """Tokens that one VM result may take."""
        return min(self._room // _RESULT_SHARE, self._left())

    def _left(self) -> int:
        """Tokens that an epoch could make free for this turn's exchange, less a little."""
        assert self.window is not None
        last = len(self.path) - 1
        first = group_start(self.path, last)
        user = next((i for i in range(last, -1, -1) if self.path[i].role == "user"), last)
        stays = sum(
            e.tokens for e in self.window.entries if e.position >= first or e.position == user
        )
        stays += sum(entry.tokens for entry in self._tail) + _FRAME_TOKENS
        return self._room - stays

    def _extend(self, exchange: Sequence[Entry]) -> None:
        assert self.window is not None
        self._tail.extend(exchange)
        self.window = self.window.append(exchange)

    def _shown(
        self, said: Said, client: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The answer as the client receives it: without VM calls."""
        if said.shown is not None:
            return [said.shown]
        if len(said.messages) > 1 or not said.messages[0].get("tool_calls"):
            return said.messages
        message = {k: v for k, v in said.messages[0].items() if k != "tool_calls"}
        return [{**message, "tool_calls": list(client)} if client else message]

    # -- the end

    def _append(self, answers: Sequence[dict[str, Any]], substitute: Sequence[bytes]) -> Effect:
        given = self._in
        last: dict[str, object] = {"echo": self._echo(), "substitute": list(substitute)}
        if self.window is not None:
            if given.window is not None and given.record is not None:
                last["base"] = given.record.id
            last["window"] = encode_change(given.window, self.window)
            last["mutations"] = msgspec.msgpack.encode(encode_mutations(self._mutations))
        heads = []
        for message in answers:
            shown = as_input(message)
            path = given.identity.extend(given.tenant, self.path, [(_json(shown), shown)])
            heads.append((path, new_records(path, given.record, last)))
        self.path = heads[0][0]
        self.record = heads[0][1][-1]
        return append_effect(heads, given.identity, given.tenant, given.session_key)

    def _echo(self) -> bytes:
        """The previous answer in the bytes that the client has for it, when they are its own."""
        record = self._in.record
        if record is None:
            return b""
        raw = self._in.path[record.end - 1].raw
        return b"" if raw == record.raws[-1] else raw

    def _answer(self, said: Said) -> Answer:
        report = self._report
        report.rounds = len(self._responses)
        report.faults, report.searches = self._server.faults, self._server.searches
        window = self.window
        if window is not None and self._in.observed:
            report.epoch = window.epoch
            native = {e.position for e in window.entries if e.kind == NATIVE}
            report.native_pages = [i for p in sorted(native) for i in self.pages.ids(p)]
            report.context_pages = [
                e.page_id for e in self.table.resident() if e.position not in native
            ]
        usage = said.usage
        if len(self._responses) > 1:
            served = sum(1 for fault in report.faults if fault.error is None)
            usage = total_usage([s.usage for s in self._responses], served)
        reason = said.finish_reason
        vm, client = self._split_calls(said.messages[0]) if said.messages else ([], [])
        if vm and not client and reason == "tool_calls":
            reason = "stop"
        body = None
        first = self._responses[0].response
        if said.response is not None and first is not None and (len(self._responses) > 1 or vm):
            shown = self._shown(said, client)[0]
            body = response_body(said.response, first, shown, reason, usage)
        return Answer(report, reason, usage, body)

    def _refused(self, refused: Refused, first: bool) -> Generator[Effect, Any, Answer]:
        """Invariant 1: what our changes may have broken is tried once more without them."""
        if not first or refused.status not in _REPAIRABLE or not self._unchanged_fits():
            return Answer(self._report, refused=refused)
        self.window, self._mutations = None, []
        return (yield from self._pass_through(self._in.body, learn(refused.body, self._limits)))

    def _unchanged_fits(self) -> bool:
        if not self._limits.window_known:
            return True
        total = self._in.fixed_tokens + PER_REPLY + self._anchor_tokens()
        total += sum(self.pages.tokens(p) for p in range(self._in.start, len(self.path)))
        return total < self._limits.window_tokens


def _without_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call too long to stay in the window; its result still says what came of it."""
    body = call.get("function")
    return {**call, "function": {**body, "arguments": "{}"}} if isinstance(body, dict) else call


def learn(refusal: bytes, limits: Limits) -> dict[str, Any]:
    """What a refusal of our request says about the model (only true if the unchanged one passes)."""
    text = refusal.decode("utf-8", "replace").lower()
    if "developer" in text and limits.developer_role == "developer":
        return {"developer_role": "system"}
    if "tool" in text or "function" in text:
        return {"tools": False}
    return {}
