"""One turn: from a request's path to its answer, as a generator of effects. Pure.

Promises: what fits is passed through untouched (invariant 2); every upstream request stays within
the budget (3); each turn is stored whole before its answer ends (5); a request that we changed and
upstream refuses is sent once more unchanged when it would fit (1), or without what was refused; a
prompt that is too long for the model shrinks once. The shell performs the effects; tests play it
as a dialogue.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from proxy.conversation.audio import with_transcripts
from proxy.conversation.capability import LEAST_WINDOW_TOKENS, Capabilities
from proxy.conversation.channel import Channel, choose_channel, tools_array, vm_tools_tokens
from proxy.conversation.commit import Stored, answered_by, append_effect, new_records
from proxy.conversation.compose import (
    answer_budget,
    as_input,
    is_cut,
    request_body,
    response_body,
    shown_messages,
    spent_tokens,
    stream_options,
    total_usage,
)
from proxy.conversation.effects import Complete, Effect, Load, Refused, Said
from proxy.conversation.paging import TurnWindow
from proxy.conversation.pathpages import PathPages
from proxy.conversation.refusal import learn, repairable, unchanged_fits
from proxy.conversation.repair import Model, fixed_tokens, one_system, unlisted
from proxy.conversation.report import TurnReport
from proxy.conversation.room import anchor_tokens
from proxy.conversation.textcalls import PREAMBLE_CHARS, is_silent, said_text
from proxy.conversation.tree import Record
from proxy.conversation.turn_input import Answer, TurnInput
from proxy.conversation.vmcalls import VMCalls, split_calls, understood
from proxy.conversation.window import Window
from proxy.errors import ApiError
from proxy.memory.core import MemoryCore
from proxy.memory.page_table import PageTable
from proxy.memory.pages import message_text
from proxy.memory.segments import Segment
from proxy.memory.tlb import TLBWithPageTable
from proxy.memory.vm_prompts import PAGE_FAULT, SEARCH_PAGES
from proxy.tokens import PER_REPLY

__all__ = ["Answer", "Turn", "TurnInput"]

_LEAST_ROOM_TOKENS = 256  # for messages: with less, nothing could be paged
_ASKED_AGAIN = 2  # times that a model that gave no answer is asked once more, without tools
_TOOL_NAMES = (PAGE_FAULT.encode(), SEARCH_PAGES.encode())
_ENDED = (None, "stop", "tool_calls", "function_call")  # of the model's own will
_json = msgspec.json.encode
_NO_ANSWER = Refused(502, ApiError(
    502, "The model only called tools that it was told not to call, and gave no answer; send the request "
    "again, or use another model.", "api_error", "no_answer",
).body())  # fmt: skip


class Turn:
    """Runs one turn. After it, `path`, `table`, `record` and `window` are the state to cache."""

    def __init__(self, given: TurnInput) -> None:
        self._in = given
        self._model = Model.of(Capabilities(), given.limits, given.decoded)
        self._fixed_tokens = given.fixed_tokens
        self.path = given.path
        self._answered, self.turn = answered_by(given.path, given.record)
        self.pages = PathPages(
            self.path, given.counter, given.limits.page_tokens, given.derived,
            get_record=given.get_record,
        )
        table = given.table
        if table is None:
            table = TLBWithPageTable(PageTable(load=given.load_block))
        self.table = table
        self.record: Record | None = None
        self.settled: tuple[Record, Stored] | None = None  # of the last answer that the request brought
        self._channel: Channel | None = None
        self._paging: TurnWindow | None = None
        self._responses: list[Said] = []
        self._too_long: Refused | None = None  # the refusal of the client's own bytes
        self._report = TurnReport(str(given.decoded.get("model")), "bypass", self.turn)
        self._report.budget_tokens = given.limits.budget_tokens

    @property
    def window(self) -> Window | None:
        """The window as it stands; None while the turn does not page."""
        return self._paging.window if self._paging else None

    @property
    def segments(self) -> Sequence[Segment]:
        """What this turn's epochs closed."""
        return self._paging.segments if self._paging else ()

    @property
    def shown(self) -> Sequence[Load]:
        """Older pages that this turn put into the window in our own words."""
        return self._paging.shown if self._paging else ()

    @property
    def channel(self) -> Channel | None:
        """Whose the calls of this turn's rounds are; None while all are the client's."""
        return self._channel

    def talks_of_tools(self) -> bool:
        """The conversation itself speaks of the VM tools by name: its people may want to read one."""
        raws = [*self._in.system, *(node.raw for node in self.path)]
        return any(tool in raw for raw in raws for tool in _TOOL_NAMES)

    def run(self) -> Generator[Effect, Any, Answer]:
        given = self._in
        untouched = given.window is None and given.floor == 0
        if not untouched or len(given.body) > LEAST_WINDOW_TOKENS:  # else every model takes it
            self._model = Model.of(given.capabilities(), given.limits, given.decoded)
        surely = given.surely_fits and len(given.body) <= self._model.limits.budget_tokens
        if given.surely_fits and not surely:  # not counted: it was small for the assumed window
            self._count_fixed()
        if untouched and (surely or self._fits()):
            answer = yield from self._pass_through(self._unchanged_body(), None)
            if answer.refused is None or not self._shrinks(answer.refused):
                return answer
            self._too_long = answer.refused
        channel = choose_channel(given.decoded, self._model.limits)
        if given.given_answers:
            channel = replace(channel, client_calls=True)
        self._channel = channel
        self._report.channel = channel.name
        self._report.budget_tokens = self._model.limits.budget_tokens
        paging = self._turn_window(channel)
        try:
            yield from paging.open()
        except ApiError:
            if self._too_long is not None:
                return Answer(self._report, refused=self._too_long)
            if paging.room_for_messages < _LEAST_ROOM_TOKENS:
                raise  # system messages and tools alone exceed the window
            return (yield from self._unpaged(None))  # media, say, by our rule: upstream may know better
        self._paging = paging
        yield from paging.prefetch()
        return (yield from self._rounds(paging, VMCalls(paging)))

    def _shrinks(self, refused: Refused) -> bool:
        """The client's own bytes are too long for the model: what it takes is known now."""
        if self._in.surely_fits:
            self._count_fixed()
        return self._model.shrink(refused, self._unchanged())

    def _count_fixed(self) -> None:
        self._fixed_tokens = fixed_tokens(self._in.system, self._in.fields, self._in.counter)

    # -- without paging

    def _fits(self) -> bool:
        total = self._fixed_tokens + PER_REPLY + anchor_tokens(self._in.anchors, self._in.counter)
        for position in range(len(self.path)):
            total += self.pages.tokens(position)
            if total > self._model.limits.budget_tokens:
                return False
        self._report.used_tokens = total
        return True

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

    def _turn_window(self, channel: Channel) -> TurnWindow:
        given, limits = self._in, self._model.limits
        added = vm_tools_tokens(channel, given.counter)
        return TurnWindow(
            pages=self.pages,
            memory=MemoryCore(
                config=limits.working_set, policy=given.policy, counts=given.counter,
                table=self.table, registry=self.pages.registry,
            ),
            counter=given.counter,
            limits=limits,
            channel=channel,
            anchors=given.anchors,
            substitutes=given.substitutes,
            start=given.start,
            floor=given.floor,
            before=given.window,
            turn=self.turn,
            whole_room_tokens=limits.budget_tokens - self._fixed_tokens - PER_REPLY - added,
            report=self._report,
            answered=self._answered,
            record=given.record,
            get_record=given.get_record,
            json_mode=(given.decoded.get("response_format") or {}).get("type", "text") != "text",
            agent=bool(given.decoded.get("tools")),
        )

    def _rounds(self, paging: TurnWindow, vm_calls: VMCalls) -> Generator[Effect, Any, Answer]:
        """The fault loop: rounds until the model answers, calls a client's tool, or has to answer."""
        said: Any = None
        full = False
        again = 0
        told = 0  # characters that the client has read
        number = 0  # of rounds that were answered; refused ones are bounded by what can be repaired
        while True:
            last = full or number >= self._model.limits.max_rounds - 1
            stop = (last and number > 0) or self._stop(number, paging, vm_calls)
            body = yield from self._request(paging, stop)
            channel = paging.channel
            said = yield Complete(body, channel.offer and not stop, through=self._many())
            if isinstance(said, Refused):
                if self._repaired(said, paging):
                    continue
                return (yield from self._refused(said))
            number += 1
            if said.messages and not (self._many() or self._in.given_answers):
                said = understood(said, channel, self.talks_of_tools)
            self._responses.append(said)
            if not said.messages:
                break
            vm, client = self._split(said, channel)
            empty = number > 1 and said.finish_reason in _ENDED and is_silent(said.messages[0])
            empty = empty and not self._in.given_answers
            if not vm and (client or not (said.unread or empty)):
                yield self._append(shown_messages(said, client), ())
                break
            words = said_text(said.shown)[told:] if said.shown else said_text(said.messages[0])
            told += len(words)
            if not client and (stop or last or not vm or not channel.listed):
                spoke = bool(words.strip() and said_text(said.messages[0])) and not empty and not said.unread
                given_up = again == _ASKED_AGAIN and (spoke or empty or self._told())
                if given_up or (spoke and len(words) > PREAMBLE_CHARS) or self._in.given_answers:
                    yield self._append(shown_messages(said, client), ())
                    break  # what it said has to do
                if again == _ASKED_AGAIN:  # nothing that it said is for the client
                    return Answer(self._report, refused=_NO_ANSWER)
                again += 1
                full = True  # it is asked once more, without tools
                paging.channel = unlisted(channel)
                continue
            if not client and self._is_cut(said, vm):
                if self._in.decoded.get("tools"):  # these may still be called
                    paging.channel = unlisted(paging.channel)
                full = True
                continue
            if not client and (full := not vm_calls.takes(said.messages[0], vm)):
                continue  # it is asked once more, without tools
            exchange = yield from vm_calls.serve(said.messages[0], vm, len(self._responses))
            if client:
                raws = [entry.raw for entry in exchange]
                yield self._append(shown_messages(said, client), raws)
                break
            paging.extend(exchange)
        return self._answer(said, paging, vm_calls)

    def _split(
        self, said: Said, channel: Channel
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The VM's calls and the client's; what goes through as it came is all the client's."""
        if self._many():
            return [], list(said.messages[0].get("tool_calls") or ())
        return split_calls(said.messages[0], channel)

    def _is_cut(self, said: Said, vm: Sequence[Mapping[str, Any]]) -> bool:
        """The client's `stop` or its length limit ended the round within a VM call."""
        limited = said.finish_reason == "length" or bool(self._in.decoded.get("stop"))
        return limited and any(is_cut(call) for call in vm)

    def _many(self) -> bool:
        return int(self._in.decoded.get("n") or 1) > 1

    def _stop(self, number: int, paging: TurnWindow, vm_calls: VMCalls) -> bool:
        """No more faults: the model has to answer. With tools of the client's it may still call
        those, so there the VM calls get an error instead until the last round."""
        full = paging.result_room <= 0
        if self._in.decoded.get("tools"):
            return full and number > 0
        return full or vm_calls.server.exhausted

    def _request(self, paging: TurnWindow, stop: bool) -> Generator[Effect, Any, bytes]:
        """The upstream body of one round."""
        given, channel, model = self._in, paging.channel, self._model.capabilities
        messages = yield from paging.messages(given.system)
        messages = with_transcripts(
            messages, self.path, given.get_record, given.now_s, self._model.audio
        )
        if not model.mid_system:
            messages = one_system(messages)
        changed: dict[str, bytes | None] = {}
        if channel.listed:
            raw = given.fields.get("tools")
            changed["tools"] = tools_array(bytes(raw) if raw is not None else None, channel)
            forced = given.decoded.get("tool_choice") not in (None, "auto")
            if not forced and (stop or not channel.offer):
                changed["tool_choice"] = b'"none"'
        if given.decoded.get("stream") is True and model.stream_usage and not self._many():
            changed.update(stream_options(given.decoded))
        if model.prompt_cache_key and given.cache_key and "prompt_cache_key" not in given.fields:
            changed["prompt_cache_key"] = _json(given.cache_key.decode())
        if self._responses:
            changed.update(answer_budget(given.decoded, spent_tokens(self._responses, given.counter.message)))
        return request_body(given.fields, given.order, messages, changed)

    # -- the end

    def _append(self, answers: Sequence[dict[str, Any]], substitute: Sequence[bytes]) -> Effect:
        given = self._in
        last: dict[str, object] = {"echo": self._echo(), "substitute": list(substitute)}
        blocks: dict[bytes, bytes] = {}
        before = self._paging.settled if self._paging is not None else None
        settled = before.fields(given.window, given.record) if before is not None else None
        if self._paging is not None:
            self._paging.settle("\n".join(message_text(answer) for answer in answers))
            state = self._paging.snapshot()
            last.update(state.fields(given.window, given.record))
            blocks = {**state.blocks, **(before.blocks if before is not None else {})}
        heads = []
        for message in answers:
            shown = as_input(message)
            path = given.identity.extend(given.tenant, self.path, [(_json(shown), shown)])
            heads.append((path, new_records(path, given.record, last, settled)))
        self.path = heads[0][0]
        self.record = heads[0][1][-1]
        if before is not None:
            self.settled = heads[0][1][-2], before
        return append_effect(heads, given.identity, given.tenant, given.session_key, blocks)

    def _echo(self) -> bytes:
        """The previous answer in the bytes that the client has for it, when they are its own."""
        record = self._in.record
        if record is None:
            return b""
        raw = self._in.path[record.end - 1].raw
        return b"" if raw == record.raws[-1] else raw

    def _answer(self, said: Said, paging: TurnWindow, vm_calls: VMCalls) -> Answer:
        report = self._report
        report.rounds = len(self._responses)
        report.faults, report.searches = vm_calls.server.faults, vm_calls.server.searches
        report.reachable_tokens = paging.table.total_tokens
        if self._in.observed:
            paging.tell()
        usage = said.usage
        if len(self._responses) > 1:
            served = sum(1 for fault in report.faults if fault.error is None)
            usage = total_usage([s.usage for s in self._responses], served)
        reason = said.finish_reason
        vm, client = self._split(said, paging.channel) if said.messages else ([], [])
        if vm and not client and reason in ("tool_calls", "function_call"):
            reason = "stop"
        body = None
        first = self._responses[0].response
        if said.response is not None and first is not None and (len(self._responses) > 1 or vm):
            shown = shown_messages(said, client)[0]
            body = response_body(said.response, first, shown, reason, usage)
        return Answer(report, reason, usage, body, learned=dict(self._model.learned))

    def _repaired(self, refused: Refused, paging: TurnWindow) -> bool:
        """The next try is another request: smaller, or without what was refused."""
        model, given = self._model, self._in
        if self._told():
            return False
        if model.shrink(refused, self._report.used_tokens):
            paging.whole_room_tokens -= paging.limits.budget_tokens - model.limits.budget_tokens
            paging.limits = model.limits
            self._report.budget_tokens = model.limits.budget_tokens
            return paging.room_for_messages >= _LEAST_ROOM_TOKENS
        ours = {"stream_usage"} if stream_options(given.decoded) else set()
        if "prompt_cache_key" not in given.fields:
            ours.add("prompt_cache_key")
        if model.adapt(refused, ours):
            return True
        if unchanged_fits(self._unchanged(), given.limits) and self._too_long is None:
            return False  # the client's own bytes are the better second try
        channel = model.without(refused, paging.channel) if repairable(refused) else None
        if channel is None:
            return False
        self._channel, paging.channel, paging.limits = channel, channel, model.limits
        self._report.channel = channel.name
        return True

    def _told(self) -> bool:  # something of the answer reached the client
        return any((said.shown or {}).get("content") for said in self._responses)

    def _refused(self, refused: Refused) -> Generator[Effect, Any, Answer]:
        """Invariant 1: what our changes may have broken is tried once more without them."""
        fits = unchanged_fits(self._unchanged(), self._model.limits) and self._too_long is None
        if self._told() or not (repairable(refused) and fits):
            return Answer(self._report, refused=self._too_long or refused)
        learned = {**self._model.learned, **learn(refused.body, self._model.limits)}
        return (yield from self._unpaged(learned))

    def _unpaged(self, learned: dict[str, Any] | None) -> Generator[Effect, Any, Answer]:
        """The whole conversation as the client means it, after paging was begun."""
        self._channel = self._paging = None
        self._report.channel = "bypass"
        return (yield from self._pass_through(self._unchanged_body(), learned))

    def _unchanged_body(self) -> bytes:
        """The client's bytes; for a session's new messages, with the history that they follow."""
        alone = self._in.start > 0 and self._in.floor == 0
        return self._native_body() if alone else self._in.body

    def _unchanged(self) -> int:
        """Tokens of the unchanged request."""
        first = self._in.start if self._in.floor else 0
        total = self._fixed_tokens + PER_REPLY
        total += anchor_tokens(self._in.anchors, self._in.counter)
        return total + sum(self.pages.tokens(p) for p in range(first, len(self.path)))
