"""One turn: from a request's path to its answer, as a generator of effects. Pure.

Promises: what fits is passed through untouched (invariant 2); every upstream request stays within
the budget (3); each turn is stored whole before its answer ends (5); a request that we changed and
upstream refuses is sent once more unchanged when it would fit (1), or without what was refused; a
prompt that is too long for the model, or may be, shrinks once, and is answered within two further
calls or ends with upstream's own words. The shell performs the effects; tests play it as a dialogue.

What a turn is in, and what takes it further:

  state      the request that goes up        answered          refused
  untouched  the client's bytes              done              too long, or may be: paging, in a smaller window;
                                                               else: done, with upstream's words
  paging     the window's messages (rounds)  VM calls: the     too long, or may be: paging, in a smaller window (once);
                                             next round;       what we added, or the form: paging, without it (each once);
                                             else: done        else: unchanged, where that fits, or done
  unchanged  the client's bytes, after all   done              for the form: paging, repaired; else: done

`_run` begins; `_rounds` is paging; `_repaired` is the way back into it, `_refused` and `_as_it_is` the ways to
unchanged. Each row is left forward a bounded number of times, so a turn ends.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import msgspec
import xxhash

from proxy.conversation.bill import (
    Account,
    Head,
    Others,
    Reason,
    Sizes,
    Turned,
    Usage,
    accounted,
    usage_of,
)
from proxy.conversation.body import counted_fields
from proxy.conversation.calibration import (
    LEAST_WINDOW_TOKENS,
    SERIES,
    TOKENS_FACTOR,
    Bill,
    Calibration,
    plateau,
)
from proxy.conversation.calling import Calling
from proxy.conversation.channel import Channel, choose_channel, tools_array, unlisted
from proxy.conversation.compose import (
    answer_budget,
    around_messages,
    as_input,
    is_cut,
    request_body,
    response_body,
    shown_messages,
    spent_tokens,
    stream_options,
    total_usage,
    with_transcripts,
)
from proxy.conversation.context import TurnContext
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.effects import (
    OFFLOAD,
    Append,
    Complete,
    Effect,
    Lesson,
    Load,
    Refused,
    Said,
)
from proxy.conversation.envelope import Envelope, enclosed, untouched
from proxy.conversation.faults import VMCalls, split_calls, understood
from proxy.conversation.limits import Limits, stretched
from proxy.conversation.model_facts import Capabilities, Model
from proxy.conversation.pages import PathPages, anchor_tokens
from proxy.conversation.records import (
    NO_LARGE,
    Record,
    Stored,
    answered_by,
    append_effect,
    difference,
    find_alike,
    indexed,
    large_messages,
    load_path,
    new_records,
    owner_of,
)
from proxy.conversation.refusals import repairable, unchanged_fits
from proxy.conversation.report import TurnReport, as_it_is, stretched_window
from proxy.conversation.textcalls import PREAMBLE_CHARS, is_silent, said_text
from proxy.conversation.tree import Node, NodeId
from proxy.conversation.turn_window import SETTLED, TurnWindow
from proxy.conversation.window import Window
from proxy.errors import ApiError
from proxy.memory.message_text import message_text
from proxy.memory.table import PageTable
from proxy.memory.vm_tools import PAGE_FAULT, SEARCH_PAGES
from proxy.tokens import PER_REPLY

_LONG_BYTES = 1 << 19  # of a request, or of what frames its window: to keep it takes milliseconds
_SURELY = 2  # times the budget: some of the table's sizes may be estimates
_LEAST_ROOM_TOKENS = 256  # for messages: with less, nothing could be paged
_USUAL_BYTES = 4  # of a request's body, for each of its tokens
_ASKED_AGAIN = 2  # times that a model that gave no answer is asked once more, without tools
_TOOL_NAMES = (PAGE_FAULT.encode(), SEARCH_PAGES.encode())
_ENDED = (None, "stop", "tool_calls", "function_call")  # of the model's own will
_FURTHER_CALLS = 2  # for a prompt that may be too long
_MOST_BYTES = 7  # with more for each billed token, what is surely small is counted after all ...
_COUNTED_BYTES = 262_144  # ... when that takes no longer than some milliseconds
_json = msgspec.json.encode
_NO_ANSWER = Refused(502, ApiError(
    502, "The model only called tools that it was told not to call, and gave no answer; send the request "
    "again, or use another model.", "api_error", "no_answer",
).body())  # fmt: skip


@dataclass(slots=True)
class Answer:
    """How the turn ended. `body` is the response of a non-streaming call (None: as upstream said, but for
    the `usage` where that is `ours`)."""

    report: TurnReport
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    body: bytes | None = None
    ours: bool = False
    refused: Refused | None = None
    learned: dict[str, Any] = field(default_factory=dict)  # about the model, from a refusal
    doubted_tokens: int = 0  # a window that is learned when it shows once more
    unexplained: bool = False  # a refusal was, of a request that may have been too large


class Turn:
    """Runs one turn. After it, `path`, `table`, `record` and `window` are the state to cache, and
    `settled` those of answers that the request brought, in their order."""

    def __init__(self, context: TurnContext) -> None:
        place, state = context.place, context.state
        self._context = context
        self._fixed_tokens = 0 if context.surely_fits else context.fixed_tokens()
        self.path = place.path
        self._answered = answered_by(place.path, place.record)
        turn = (place.record.turn if place.record else 0) + len(self._answered) + 1
        self.table = state.table if state else PageTable()
        self.record: Record | None = None
        self.settled: list[tuple[Record, Stored]] = []
        self.unremembered: Exception | None = None  # why the answer cannot be stored: what it goes on from is damaged
        self.channel: Channel | None = None  # whose the calls of its rounds are; None: all the client's
        self._paging: TurnWindow | None = None
        self._vm_calls: VMCalls | None = None
        self._responses: list[Said] = []
        self._too_long: Refused | None = None  # the refusal that made the window smaller
        self._unchanged_refused: Refused | None = None  # of the client's own bytes, for their form
        self._sent_unchanged = False
        self._request_sent: tuple[bytes, Envelope, bytes] | None = None  # the last one, its envelope and its patch
        self._many = int(context.decoded.get("n") or 1) > 1  # choices
        self._refusals = 0
        self.report = TurnReport(str(context.decoded.get("model")), "bypass", turn)
        self.report.budget_tokens = context.limits.budget_tokens

    @cached_property
    def pages(self) -> PathPages:
        """The path's; a turn that surely fits asks for none."""
        context = self._context
        place, derived = context.place, context.state.derived if context.state else NO_DERIVED
        return PathPages(
            place.path, context.counter, context.limits.page_tokens, derived, context.get_record, place.anchors
        )

    @property
    def _limits(self) -> Limits:
        """This request's: the model's as known by now, stretched by what cannot be paged."""
        return stretched(self._model.limits, self._fixed_tokens, self._model.max_tokens)

    @property
    def window(self) -> Window | None:
        """The window as it stands; None while the turn does not page."""
        return self._paging.window if self._paging else None

    @property
    def shown(self) -> Sequence[Load]:
        """Older pages that this turn put into the window in our own words, and summaries that nobody has
        written: what a model may write about."""
        return self._paging.shown if self._paging else ()

    def was_stored(self) -> None:
        """All its records are new in the store: what they have need not be looked up."""
        known = self._context.place.record
        for position in range(known.end - 1 if known else 0, len(self.path) - 1):  # the answer may be echoed otherwise
            self.path[position].stored = True

    def talks_of_tools(self) -> bool:
        """The conversation itself speaks of the VM tools by name: its people may want to read one."""
        raws = [*self._context.sent.system, *(node.raw for node in self.path)]
        return any(tool in raw for raw in raws for tool in _TOOL_NAMES)

    def ending(self, said: Said) -> NodeId | None:
        """The node that this answer is if it ends the turn; None where it does not, or cannot be remembered."""
        if not said.messages:
            return None
        vm, client = self._split(said, self.channel) if self.channel is not None else ([], [])
        if vm and not client:
            return None
        shown = as_input(shown_messages(said, client)[0] if vm else said.messages[0])
        identity = self._context.identity
        return identity.child(self.path[-1].id, identity.content(shown))

    def run(self) -> Generator[Effect, Any, Answer]:
        answer = yield from self._run()
        answer.unexplained = self._model.unexplained
        answer.doubted_tokens = self._model.doubted_tokens
        return answer

    def _run(self) -> Generator[Effect, Any, Answer]:
        context, place = self._context, self._context.place
        paged = context.state is not None
        whole = place.floor == 0 and (not paged or place.start == 0)
        small = not paged and whole and len(context.body) <= LEAST_WINDOW_TOKENS  # every model takes it
        self._model = Model(Capabilities() if small else context.capabilities(), context.limits, context.decoded)
        surely = context.surely_fits and len(context.body) <= self._limits.budget_tokens
        if context.surely_fits and not surely:  # not counted: it was small for the assumed window
            self._fixed_tokens = context.fixed_tokens()
        limits = self._limits
        self.report.budget_tokens = limits.budget_tokens
        if limits.working_set.max_l0_tokens > self._model.limits.working_set.max_l0_tokens:
            self.report.warning = stretched_window(self._model.limits)
        if whole and (surely or self._fits()):
            answer = yield from self._pass_through(self._unchanged_body(), None)
            if answer.refused is None or not self._shrinks(answer.refused):
                return answer
        channel = choose_channel(context.decoded, limits)
        if context.given_answers:
            channel = replace(channel, client_calls=True)
        self.channel = channel
        self.report.channel = channel.name
        self.report.budget_tokens = self._limits.budget_tokens
        paging = TurnWindow(
            context, self.pages, self.table, channel, self._limits, self._next_limits(), self._fixed_tokens,
            self.report, self._answered,
        )  # fmt: skip
        try:
            yield from paging.open()
        except ApiError:
            return (yield from self._as_it_is())
        self._paging, self.channel = paging, paging.channel  # an epoch may have begun with another
        self._vm_calls = VMCalls(paging)
        yield from paging.bring()
        return (yield from self._rounds(paging, self._vm_calls))

    def _shrinks(self, refused: Refused) -> bool:
        """The client's own bytes are too long for the model: what it takes is known now."""
        if self._context.surely_fits:
            self._fixed_tokens = self._context.fixed_tokens()
        return self._shrunk(refused, self._unchanged())

    def _shrunk(self, refused: Refused, tokens: int) -> bool:
        """Whether the window is smaller now. `tokens`: of what was refused."""
        if self._model.shrink(refused, tokens, self._context.seen()):
            self._too_long = refused
            return True
        return False

    # -- without paging

    def _fits(self) -> bool:
        """All that the client sent fits, also when it did not in an earlier turn (invariant 2)."""
        limits = self._limits
        if self._context.state is not None and self.table.total_tokens > _SURELY * limits.budget_tokens:
            return False  # what it was paged for, as nearly always
        total = self._fixed_tokens + PER_REPLY
        total += sum(anchor_tokens(anchor, self._context.counter) for anchor in self._context.place.anchors)
        for position in range(len(self.path) - 1, -1, -1):  # what is near is counted for the window, too
            total += self.pages.tokens(position)
            if total > limits.budget_tokens:
                return False
        self.report.used_tokens = total
        return True

    def _native_body(self) -> bytes:
        """All of a session's history for a client that sent only its new messages."""
        sent, anchors = self._context.sent, self._context.place.anchors
        raws = [*sent.system]
        for position, node in enumerate(self.path):
            raws.extend(a.raw for a in anchors if a.position == position)
            raws.append(node.raw)
        raws.extend(a.raw for a in anchors if a.position == len(self.path))
        return request_body(sent.fields, sent.order, b"[" + b",".join(raws) + b"]", {})

    def _pass_through(
        self, body: bytes, learned: dict[str, Any] | None
    ) -> Generator[Effect, Any, Answer]:
        said = yield Complete(body, through=True)
        self._sent_unchanged, self._request_sent = True, None
        if isinstance(said, Refused):
            self._refusals += 1
            return Answer(self.report, refused=said)
        self.report.rounds = 1
        if said.messages:
            place, first = self._context.place, self._first_sent()
            if len(body) > _LONG_BYTES:
                yield OFFLOAD
            self._request_sent = body, *untouched(body, self.path, first, place.anchors)
            yield from self._remember(said, said.messages, learned=learned)
        if learned is None:
            learned = dict(self._model.learned)
        return Answer(self.report, said.finish_reason, said.usage, learned=learned)

    # -- with paging

    def _next_limits(self) -> Limits | None:
        """The bounds of the next epoch; what upstream has just refused binds this one, too."""
        context = self._context
        if context.next_limits is None or self._too_long is not None:
            return None
        limits = Model(self._model.capabilities, context.next_limits, context.decoded).limits
        return stretched(limits, self._fixed_tokens, self._model.max_tokens)

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
            try:
                body = yield from self._request(paging, stop)
            except ApiError:  # the window shrank in this turn, or what must stay in it has grown
                if self._told():
                    raise
                return (yield from self._as_it_is())
            channel = paging.channel
            said = yield Complete(body, channel.offer and not stop, through=self._many)
            if isinstance(said, Refused):
                self._refusals += 1
                if self._repaired(said, paging):
                    continue
                answer = yield from self._refused(said)
                if self._form_refused(answer) and self._repaired(said, paging):
                    self._paging, self.channel = paging, paging.channel
                    self.report.channel = paging.channel.name
                    continue
                return answer
            number += 1
            if said.messages and not (self._many or self._context.given_answers):
                said = understood(said, channel, self.talks_of_tools)
            self._responses.append(said)
            if not said.messages:
                break
            vm, client = self._split(said, channel)
            empty = number > 1 and said.finish_reason in _ENDED and is_silent(said.messages[0])
            empty = empty and not self._context.given_answers
            if not vm and (client or not (said.unread or empty)):
                yield from self._remember(said, shown_messages(said, client))
                break
            words = said_text(said.shown)[told:] if said.shown else said_text(said.messages[0])
            told += len(words)
            if not client and (stop or last or not vm or not channel.listed):
                spoke = bool(words.strip() and said_text(said.messages[0])) and not empty and not said.unread
                given_up = again == _ASKED_AGAIN and (spoke or empty or self._told())
                if given_up or (spoke and len(words) > PREAMBLE_CHARS) or self._context.given_answers:
                    yield from self._remember(said, shown_messages(said, client))
                    break  # what it said has to do
                if again == _ASKED_AGAIN:  # nothing that it said is for the client
                    return Answer(self.report, refused=_NO_ANSWER)
                again += 1
                full = True  # it is asked once more, without tools
                paging.channel = unlisted(channel)
                continue
            if not client and self._is_cut(said, vm):
                if self._context.decoded.get("tools"):  # these may still be called
                    paging.channel = unlisted(paging.channel)
                full = True
                continue
            if not client and (full := not vm_calls.takes(said.messages[0], vm)):
                continue  # it is asked once more, without tools
            exchange = yield from vm_calls.serve(said.messages[0], vm, len(self._responses))
            if client:
                raws = [entry.raw for entry in exchange]
                yield from self._remember(said, shown_messages(said, client), raws)
                break
            paging.extend(exchange)
        return self._answer(said, paging, vm_calls)

    def _split(
        self, said: Said, channel: Channel
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The VM's calls and the client's; what goes through as it came is all the client's."""
        if self._many:
            return [], list(said.messages[0].get("tool_calls") or ())
        return split_calls(said.messages[0], channel)

    def _is_cut(self, said: Said, vm: Sequence[Mapping[str, Any]]) -> bool:
        """The client's `stop` or its length limit ended the round within a VM call."""
        limited = said.finish_reason == "length" or bool(self._context.decoded.get("stop"))
        return limited and any(is_cut(call) for call in vm)

    def _stop(self, number: int, paging: TurnWindow, vm_calls: VMCalls) -> bool:
        """No more faults: the model has to answer. With tools of the client's it may still call
        those, so there the VM calls get an error instead until the last round."""
        full = not paging.takes_results
        if self._context.decoded.get("tools"):
            return full and number > 0
        return full or vm_calls.exhausted

    def _request(self, paging: TurnWindow, stop: bool) -> Generator[Effect, Any, bytes]:
        """The upstream body of one round."""
        context, channel, model = self._context, paging.channel, self._model.capabilities
        fields, decoded = context.sent.fields, context.decoded
        envelope = yield from paging.envelope(self._model.form)
        messages = written = envelope.window_messages(paging.window)
        if b'"audio"' in messages:
            messages = with_transcripts(
                messages, self.path, context.get_record, context.now_s, self._model.audio
            )
        changed: dict[str, bytes | None] = {}
        if channel.listed:
            raw = fields.get("tools")
            changed["tools"] = tools_array(bytes(raw) if raw is not None else None, channel)
            forced = decoded.get("tool_choice") not in (None, "auto")
            if not forced and (stop or not channel.offer):
                changed["tool_choice"] = b'"none"'
        if decoded.get("stream") is True and model.stream_usage and not self._many:
            changed.update(stream_options(decoded))
        if model.prompt_cache_key and context.cache_key and "prompt_cache_key" not in fields:
            changed["prompt_cache_key"] = _json(context.cache_key())
        if self._responses:
            changed.update(answer_budget(decoded, spent_tokens(self._responses, context.counter.message)))
        before, after = around_messages(fields, context.sent.order, changed)
        body, patch = before + messages + after, b""
        if messages is not written:
            patch = difference(body, before + written + after)
        self._request_sent = body, msgspec.structs.replace(envelope, before=before, after=after), patch
        return body

    # -- the end

    def _remember(
        self,
        said: Said,
        answers: Sequence[dict[str, Any]],
        substitute: Sequence[bytes] = (),
        learned: Mapping[str, Any] | None = None,
    ) -> Generator[Effect, Any, None]:
        """An answer is there: whatever became of the storage, its client gets it (invariant 6)."""
        framed = self._request_sent is not None and self._request_sent[1].size_bytes > _LONG_BYTES
        if framed or self.report.new_epoch:  # and what left with it is stored, too
            yield OFFLOAD
        try:
            effect = self._append(said, answers, substitute, learned)
        except (LookupError, ValueError) as error:
            self.unremembered, self.record, self.settled = error, None, []
            return
        yield effect

    def _append(
        self,
        said: Said,
        answers: Sequence[dict[str, Any]],
        substitute: Sequence[bytes],
        learned: Mapping[str, Any] | None,
    ) -> Append:
        context, record = self._context, self._context.place.record
        self._model.passed(self.report.used_tokens)
        began = context.next_limits or context.limits
        usages = self._usages(said)
        bill, lesson = self._billed(usages[-1])
        account = self._account(usages)
        last: dict[str, object] = {
            "echo": self._echo(), "substitute": list(substitute), "sent": context.place.sent, "bill": bill,
            "account": account, "answered_s": int(said.ended_s or context.now_s),
        }  # fmt: skip
        blocks: dict[bytes, bytes] = {}
        came = context.state.window if context.state else None
        anchors = self._anchors()

        def rewound(end: int) -> Account | None:
            return account.rewound(end, self.pages, anchors) if end in self._answered[-SETTLED:] else None

        settled: list[Stored] = []
        states: list[Stored] = []
        alike, large = None, NO_LARGE
        if context.place.alike is not None:
            other, end = context.place.alike
            alike = find_alike(self.path, record.end if record else 0, end, other, context.get_record)
            large = large_messages(other, context.get_record)
        if self._paging is not None:
            if self._paging.brought:
                self._paging.settle("\n".join(message_text(answer) for answer in answers))
            for state in self._paging.settled:
                blocks.update(state.blocks)
            if alike is not None and any(end <= alike.first for end in self._answered):
                epochs = [state.window.epoch for state in self._paging.settled if state.end <= alike.first]
                if epochs[-1:] != [self._paging.window.epoch]:  # the request, when it comes again, would begin
                    alike = None  # its epoch there and not where it did
            if any(context.get_record(self.path[state.end - 1].id) for state in self._paging.settled):
                self._paging.unsettle(0)
            elif alike is not None:
                self._paging.unsettle(alike.first)
            settled = self._paging.settled
            if alike is not None and alike.again and self.report.new_epoch and not settled:
                last["unkept"], blocks = True, {}
            else:
                states = [*settled, self._paging.snapshot(len(self.path) + 1)]
                blocks.update(states[-1].blocks)
        if self._request_sent is not None and "unkept" not in last:
            body, envelope, patch = self._request_sent
            owner = owner_of(self.path[0].id)
            last["request"], new = enclosed(body, envelope, patch, owner, record, context.get_block)
            blocks.update(new)
        before_calls = Calling.of(context.facts)
        calls = self._calling(before_calls)
        last["bill"] = msgspec.structs.replace(bill, calls=calls.offered)
        heads: list[tuple[Sequence[Node], list[Record]]] = []
        stored: Sequence[Node] = ()
        if record is not None and states:
            stored = load_path(record, context.get_record, context.get_block, context.identity)
        for message in answers:
            shown = as_input(message)
            path = context.identity.extend(context.tenant, self.path, [(_json(shown), shown)])
            known = Bill(bill.model, began.tokens_factor, calls=began.calls)
            made = new_records(
                path, record, last, states, came, known, alike, large, int(context.now_s), rewound, stored
            )
            made, leaves = indexed(made, record, context.get_record, context.get_block)
            blocks.update(leaves)
            heads.append((path, made))
        self.path = heads[0][0]
        self.record = heads[0][1][-1]
        ends = {made.end: made for made in heads[0][1]}
        self.settled = [(ends[state.end], state) for state in settled]
        effect = append_effect(heads, context.identity, context.tenant, context.names, blocks)
        effect.facts = dict(self._model.learned if learned is None else learned)
        effect.lesson = lesson
        effect.calls = calls if calls != before_calls else None
        return effect

    def _calling(self, known: Calling) -> Calling:
        """What is known of the model's calls after this turn, whose answer was settled."""
        paging, vm_calls = self._paging, self._vm_calls
        if paging is None or vm_calls is None:
            return known
        needed = paging.unserved and paging.channel.offer
        return known.after(needed=needed, helped=vm_calls.helped, began=self.report.new_epoch)

    def _usages(self, said: Said) -> list[Usage | None]:
        """What upstream billed for each round; the last one's answer is `said`."""
        guess = self.report.used_tokens or len(self._context.body) // _USUAL_BYTES
        rounds = [one for one in self._responses if one is not said]
        return [usage_of(one.usage, self._context.known_factor * guess) for one in (*rounds, said)]

    def _account(self, usages: Sequence[Usage | None]) -> Account:
        """What the path was billed, with this turn."""
        context, report, record = self._context, self.report, self._context.place.record
        before = record.account if record is not None else None
        frame = context.place.sent.frame[:8] if context.place.sent is not None else b""
        tools = xxhash.xxh3_64_digest(b"".join(counted_fields(context.sent.fields)))
        head = Head(frame, tools, self.channel is not None and self.channel.listed)
        if report.rewritten_at is None and record is not None and self._answered:
            report.rewritten_at = record.end  # answers came that were not given here
        why = None
        if report.new_epoch:
            why = Reason.EPOCH
        elif report.rewritten_at is not None:
            why = Reason.REWRITTEN
        elif report.evidence_left:
            why = Reason.EVIDENCE
        others = None
        if self._paging is not None:
            anchors = self._anchors()
            sizes = before.sizes if before is not None else None
            if sizes is None or record is None or record.counter != context.counter.name:
                end = 0 if record is None else record.end - (record.sent is not None)
                sizes = Sizes().at(end, self.pages, anchors)
            others = Others(self.pages, anchors, self._fixed_tokens, report.budget_tokens, sizes)
        at = report.rewritten_at if why is Reason.REWRITTEN and report.rewritten_at is not None else -1
        turn = Turned(report.turn, report.model, usages, report.used_tokens, head, why, at)
        account, report.billed = accounted(before, record.id if record is not None else b"", turn, others)
        report.broke = account.broke
        return account

    def _anchors(self) -> list[tuple[int, int]]:
        """Where the client's system messages stand on the path, and their tokens."""
        counter = self._context.counter
        return [(anchor.position, anchor_tokens(anchor, counter)) for anchor in self._context.place.anchors]

    def _billed(self, usage: Usage | None) -> tuple[Bill, Lesson | None]:
        """The last round's bill beside our count, and what it teaches."""
        context, model, factor = self._context, self.report.model, self._context.known_factor
        counted, size = self.report.used_tokens, len(context.body)
        guess = size // _USUAL_BYTES
        billed = usage.prompt if usage is not None else 0
        if context.calibration is None or not billed:
            return Bill(model, factor, counted), None
        if not counted and billed < LEAST_WINDOW_TOKENS:
            return Bill(model, factor, guess, billed), None  # no window is that small
        if not counted and _MOST_BYTES * billed < size <= _COUNTED_BYTES:
            self._fixed_tokens = context.fixed_tokens()
            counted = self._unchanged()
        bill, earlier = Bill(model, factor, counted or guess, billed), self._bills()
        if not counted and plateau(bill, earlier) is None:
            return bill, None  # surely small, and billed as such
        before = context.calibration()
        now = before.learn(bill, earlier, context.limits.window_known, guessed=not counted)
        if now == before:
            return msgspec.structs.replace(bill, factor=now.factor), None
        facts: dict[str, Any] = {}
        if now.factor != before.factor:
            facts[TOKENS_FACTOR] = now.factor
        if now.window_tokens != before.window_tokens:
            facts.update(self._cut(before, now))
        return msgspec.structs.replace(bill, factor=now.factor), Lesson(
            now, facts, now.doubt(before, bill)
        )

    def _cut(self, before: Calibration, now: Calibration) -> dict[str, Any]:
        """The fact that a bill changed: the window of an upstream that cuts; what a refusal taught stays."""
        known = self._context.capabilities().window_tokens
        if now.window_tokens and (known is None or now.window_tokens < known or known == before.window_tokens):
            return {"window_tokens": now.window_tokens}
        return {"window_tokens": None} if known == before.window_tokens else {}

    def _bills(self) -> list[Bill]:
        """Of the turns before this one, the newest first, as far as they are told."""
        bills: list[Bill] = []
        record = self._context.place.record
        while record is not None and record.bill is not None and len(bills) < SERIES - 1:
            bills.append(record.bill)
            record = self._context.get_record(record.parent) if record.parent else None
        return bills

    def _echo(self) -> bytes:
        """The previous answer in the bytes that the client has for it, when they are its own."""
        record = self._context.place.record
        if record is None:
            return b""
        raw = self._context.place.path[record.end - 1].raw
        return b"" if raw == record.raws[-1] else raw

    def _answer(self, said: Said, paging: TurnWindow, vm_calls: VMCalls) -> Answer:
        report = self.report
        report.rounds = len(self._responses)
        report.faults, report.searches = vm_calls.faults, vm_calls.searches
        report.reachable_tokens = paging.table.total_tokens
        if self._context.observed:
            paging.tell()
        served = sum(1 for fault in report.faults if fault.error is None)
        account = self.record.account if self.record is not None else None
        usage = said.usage
        if not self._many:  # else it goes through as it came
            usage = total_usage([s.usage for s in self._responses], served, account)
        reason = said.finish_reason
        vm, client = self._split(said, paging.channel) if said.messages else ([], [])
        if vm and not client and reason in ("tool_calls", "function_call"):
            reason = "stop"
        body = None
        first = self._responses[0].response
        if said.response is not None and first is not None and (len(self._responses) > 1 or vm):
            shown = shown_messages(said, client)[0]
            body = response_body(said.response, first, shown, reason, usage)
        ours = usage is not said.usage
        return Answer(report, reason, usage, body, ours, learned=dict(self._model.learned))

    def _repaired(self, refused: Refused, paging: TurnWindow) -> bool:
        """The next try is another request: smaller, or without what was refused."""
        model, context = self._model, self._context
        model.limits = paging.limits  # an epoch may have brought others
        if self._told() or self._given_up():
            return False
        if self._shrunk(refused, self.report.used_tokens):
            paging.resize(self._limits)
            return paging.room_for_messages >= _LEAST_ROOM_TOKENS
        ours = {"stream_usage"} if stream_options(context.decoded) else set()
        if "prompt_cache_key" not in context.sent.fields:
            ours.add("prompt_cache_key")
        channel = None
        if self._responses:
            channel = model.without_exchange(refused, paging.channel, words=True)
        if channel is not None:
            return self._go_on(channel, paging)
        if model.adapt(refused, ours):
            return True
        if unchanged_fits(self._unchanged(), context.limits) and not (self._sent_unchanged or self._too_long):
            return False  # the client's own bytes are the better second try
        channel = model.without(refused, paging.channel) if repairable(refused) else None
        if channel is None and self._responses:
            channel = model.without_exchange(refused, paging.channel, words=False)
        return channel is not None and self._go_on(channel, paging)

    def _go_on(self, channel: Channel, paging: TurnWindow) -> bool:
        self.channel, paging.channel, paging.limits = channel, channel, self._limits
        self.report.channel = channel.name
        return True

    def _given_up(self) -> bool:
        return self._too_long is not None and self._refusals > _FURTHER_CALLS

    def _form_refused(self, answer: Answer) -> bool:
        """The client's own bytes were the second try, and the template takes them no better (a system
        message for a model without that role): only a repaired request can pass."""
        if answer.refused is None or self._paging is not None or self._too_long is not None:
            return False
        if self._unchanged_refused is not None:
            return False
        self._unchanged_refused = answer.refused
        return bool(self._model.says(answer.refused))

    def _told(self) -> bool:  # something of the answer reached the client
        return any((said.shown or {}).get("content") for said in self._responses)

    def _refused(self, refused: Refused) -> Generator[Effect, Any, Answer]:
        """Invariant 1: what our changes may have broken is tried once more without them."""
        model = self._model
        limits = self._context.limits if model.blind else model.limits  # the smaller window was wrong
        explained = self._too_long is not None and not model.blind
        done = self._sent_unchanged or explained or self._given_up() or self._told()
        if done or not (repairable(refused) and unchanged_fits(self._unchanged(), limits)):
            return Answer(self.report, refused=self._too_long or self._unchanged_refused or refused)
        learned = {**model.learned, **model.says(refused)}
        if model.blind:
            learned = {k: v for k, v in learned.items() if k not in ("window_tokens", "refused_tokens")}
        answer = yield from self._unpaged(learned)
        if answer.refused is not None and self._too_long is not None:
            answer.refused = self._too_long  # nothing helped: what was said first
        return answer

    def _as_it_is(self) -> Generator[Effect, Any, Answer]:
        """What cannot be paged leaves no room: upstream's own word on the request is the best one."""
        if self._too_long is not None:
            return Answer(self.report, refused=self._too_long)
        self.report.warning = as_it_is(self._model.limits)
        return (yield from self._unpaged(dict(self._model.learned)))

    def _unpaged(self, learned: dict[str, Any] | None) -> Generator[Effect, Any, Answer]:
        """The whole conversation as the client means it, after paging was begun."""
        self.channel = self._paging = None
        self.report.channel = "bypass"
        self.report.used_tokens = self._unchanged()
        return (yield from self._pass_through(self._unchanged_body(), learned))

    def _unchanged_body(self) -> bytes:
        """The client's bytes; for a session's new messages, with the history that they follow."""
        alone = self._context.place.start > 0 and self._context.place.floor == 0
        return self._native_body() if alone else self._context.body

    def _first_sent(self) -> int:
        """Where the unchanged request begins on the path."""
        place = self._context.place
        return place.start if place.floor else 0

    def _unchanged(self) -> int:
        """Tokens of the unchanged request."""
        place, first = self._context.place, self._first_sent()
        total = self._fixed_tokens + PER_REPLY
        total += sum(anchor_tokens(anchor, self._context.counter) for anchor in place.anchors)
        return total + sum(self.pages.tokens(p) for p in range(first, len(self.path)))
