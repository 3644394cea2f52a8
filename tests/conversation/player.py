"""Plays turns of the conversation core as dialogues: dicts for storage, a function for the model.

`Player.ask` takes what a client would send, places it as proxy/api does, performs the turn's effects
and returns every upstream body. `forget` drops all that is only cached; `restart` leaves a player
with nothing but the stored bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from proxy.conversation.body import HistoryCache, recognise, remembered, split_body
from proxy.conversation.calling import VM_CALLS, offered
from proxy.conversation.context import TurnContext
from proxy.conversation.derived import unwritten_page
from proxy.conversation.effects import (
    OFFLOAD,
    Append,
    Complete,
    Effect,
    Load,
    Refused,
    Said,
    Search,
)
from proxy.conversation.form import Form
from proxy.conversation.identify import Library, Place, chain, place
from proxy.conversation.limits import Limits
from proxy.conversation.model_facts import Seen, capabilities
from proxy.conversation.records import (
    Record,
    SessionNames,
    State,
    block_key,
    decode_record,
    load_path,
    record_key,
    restore_state,
)
from proxy.conversation.sieve import Sieve
from proxy.conversation.tree import ID_BYTES, Identity, Node
from proxy.conversation.turn import Answer, Turn
from proxy.conversation.window import render
from proxy.memory import ImportanceWeightedLRU, MemoryPage, VMMode, WorkingSetConfig
from proxy.search.paths import PathIndexes
from proxy.tokens import TokenCounter, get_counter
from tests.bench.token_error import Published

Message = dict[str, Any]
Model = Callable[[Message], "Message | Refused"]  # the decoded upstream request -> its answer
SECRET = bytes(range(32))


def limits_of(budget_tokens: int, **changes: Any) -> Limits:
    """Limits with a budget for whole requests; everything else as in the default configuration."""
    values: dict[str, Any] = {
        "working_set": WorkingSetConfig(max_l0_tokens=budget_tokens + 100, reserved_tokens=100),
        "window_tokens": 128_000,
        "window_known": True,
        "mode": VMMode.RELAXED,
        "model_takes_tools": True,
        "developer_role": "developer",
        "faults_per_turn": 3,
        "fault_tokens": 8192,
        "max_rounds": 8,
        "prefetch_pages": 5,
        "prefetch_tokens": 1024,
        "manifest_tokens": 1024,
        "page_tokens": 1024,
        "search_results": 10,
        "snippet_tokens": 64,
        "segment_messages": 512,
        "max_claims": 128,
    }
    return Limits(**{**values, **changes})


@dataclass
class Played:
    """One turn: the upstream bodies with the window's epoch at each, and what the client got."""

    answer: Answer
    place: Place
    turn: Turn
    bodies: list[bytes] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    replies: list[Any] = field(default_factory=list)
    stream: bytes = b""
    message: Message | None = None  # the answer as the client received it
    system: list[bytes] = field(default_factory=list)  # the client's, in front of its history

    @property
    def settled(self) -> bytes | None:
        """What the messages of a request begin with that says something else behind the last answer;
        None when the turn left no such state."""
        if not self.turn.settled:
            return None
        window = self.turn.settled[-1][1].window
        assert self.turn._paging is not None
        front, _ = self.turn._paging._standing(window.native_from)
        head = [*self.system, *(anchor.raw for anchor in front)]
        return render(head, window, "developer", False, Form(several=True))[:-1]

    @property
    def requests(self) -> list[Message]:
        return [json.loads(body) for body in self.bodies]

    def messages_bytes(self) -> list[bytes]:
        return [messages_bytes(body) for body in self.bodies]


def messages_bytes(body: bytes) -> bytes:
    """The messages array of a request body as it was written."""
    return bytes(msgspec.json.decode(body, type=dict[str, msgspec.Raw])["messages"])


class Player:
    """An installation: its storage, its caches, its limits."""

    def __init__(self, limits: Limits, reattach: bool = True) -> None:
        self.limits = limits
        self.reattach = reattach
        self.values: dict[bytes, bytes] = {}
        self.learned: dict[str, Any] | None = None  # a dict: what a turn learned holds for the next
        self.late: Callable[[], object] | None = None  # happens between a turn's last word and its commit
        self.facts: dict[str, Any] | None = None  # a dict: how the model calls is counted
        self.writes: Callable[[MemoryPage], MemoryPage | None] = lambda _: None  # a model, about a segment
        self.seen = Seen()
        self.bills: Callable[[Message], Message | None] | None = None  # an upstream request -> its usage
        self.now_s = 0.0
        self.identity = Identity(SECRET)
        self.forget()

    def forget(self) -> None:
        """Drop everything that is only cached."""
        self._records: dict[bytes, Record] = {}
        self._states: dict[bytes, State] = {}
        self.histories = HistoryCache(1 << 24)
        self.indexes = PathIndexes(20_000)

    # -- storage

    def get_record(self, node_id: bytes) -> Record | None:
        found = self._records.get(node_id)
        if found is None and (data := self.values.get(record_key(node_id))) is not None:
            found = self._records[node_id] = decode_record(data)
        return found

    def _substitutes(self, node_id: bytes) -> Sequence[bytes]:
        record = self.get_record(node_id)
        return record.substitute if record is not None else ()

    def _load_path(self, head: Record) -> Sequence[Node]:
        return load_path(head, self.get_record, self.get_block, self.identity)

    def _state_after(self, record: Record) -> State | None:
        if not record.window:
            return None
        if (kept := self._states.pop(record.id, None)) is not None:
            return kept
        return restore_state(record, self.get_record, self.get_block)

    def get_block(self, owner: bytes, ref: bytes) -> bytes | None:
        return self.values.get(block_key(owner, ref))

    def _append(self, effect: Append) -> None:
        if self.late is not None:
            late, self.late = self.late, None
            late()
        known = {record_key(r.id) for r in effect.records if record_key(r.id) in self.values}
        for key, value in effect.puts:
            if key not in known:
                self.values[key] = value
        for key, node_id in effect.joins:
            old = self.values.get(key, b"")
            ids = [old[i : i + ID_BYTES] for i in range(0, len(old), ID_BYTES)]
            if node_id not in ids:
                self.values[key] = b"".join([*ids, node_id][-32:])
        if self.facts is not None and effect.calls is not None and record_key(effect.records[-1].id) not in known:
            self.facts[VM_CALLS] = effect.calls
        for record in effect.records:
            if record_key(record.id) not in known:
                self._records[record.id] = record

    # -- a turn

    def place(
        self, body: bytes, key: str = "key", session: str | None = None
    ) -> tuple[Any, Place, bytes, SessionNames]:
        scope = self.identity.tenant(key, session or "")
        split = split_body(body, recognise(body, scope, self.histories))
        user = json.loads(bytes(split.fields["user"])) if "user" in split.fields else ""
        tenant = self.identity.tenant(key, user)
        session_key = self.identity.session(tenant, session) if session else None
        names = SessionNames(session and self.identity.label(tenant, session), session_key)
        tools = split.fields.get("tools")
        frame = self.identity.frame(split.system, bytes(tools) if tools is not None else b"")
        nodes, anchors = chain(split, self.identity, tenant)
        library = Library(self.identity, self.get_record, self._load_path, self.values.get, self.values.get)
        found = place(nodes, anchors, tenant, library, frame, session_key, self.reattach)
        if found.start == 0 and found.floor == 0 and session_key is None:
            known = remembered(split, found.path, found.anchors, tenant)
            if known is not None:
                self.histories.add(scope, known, split.continued)
        return split, found, tenant, names

    def ask(
        self,
        messages: Sequence[Message],
        model: Model,
        *,
        key: str = "key",
        session: str | None = None,
        body: bytes | None = None,
        break_off: bool = False,
        **extra: Any,
    ) -> Played:
        """One request from the client's bytes to the answer. `extra` are the body's other fields."""
        if body is None:
            body = json.dumps({"model": "gpt-4o", "messages": list(messages), **extra}).encode()
        split, found, tenant, names = self.place(body, key, session)
        decoded = {name: json.loads(bytes(raw)) for name, raw in split.fields.items()}
        try:
            state = self._state_after(found.record) if found.record else None
        except LookupError:  # as admission
            found.record, state = None, None
        counter = get_counter(decoded["model"])
        for at, node in enumerate(found.path if isinstance(found.path, list) else ()):  # as admission
            if node.tokens >= 0 and node.counter not in ("", counter.name):  # for another model
                found.path[at] = msgspec.structs.replace(node, tokens=-1, counter="")
        fixed = sum(counter.message(json.loads(raw)) for raw in split.system)
        fixed += counter.tools(decoded.get("tools") or ())
        known = capabilities({}, self.learned or {}, {})
        limits, following = self.limits, None
        if self.facts is not None:  # how the model calls is learned
            calls, later = offered(decoded["model"], self.facts, found.record, state.window if state else None)
            limits, following = (self.limits if called else self.limits.uncalled() for called in (calls, later))
            following = following if later != calls else None
        context = TurnContext(
            body=body, sent=split, decoded=decoded, place=found, state=state, limits=limits, next_limits=following,
            counter=counter, facts=self.facts or {},
            policy=ImportanceWeightedLRU(), identity=self.identity, tenant=tenant, names=names,
            fixed_tokens=lambda: fixed, substitutes=self._substitutes, get_record=self.get_record,
            get_block=self.get_block,
            capabilities=lambda: known, seen=lambda: self.seen, now_s=self.now_s,
        )
        turn = Turn(context)
        played = Played(None, found, turn, system=split.system)  # type: ignore[arg-type]
        self._perform(turn, context, played, model)
        return played

    def _perform(self, turn: Turn, context: TurnContext, played: Played, model: Model) -> None:
        shell = _Shell(turn, context, model, bool(context.decoded.get("stream")), self.bills)
        dialogue = turn.run()
        reply: Any = None
        try:
            while True:
                effect = dialogue.send(reply)
                if effect is OFFLOAD:
                    reply = None
                    continue
                played.effects.append(effect)
                if isinstance(effect, Complete):
                    played.bodies.append(effect.body)
                    played.epochs.append(turn.window.epoch if turn.window else 0)
                    reply = shell.complete(effect)
                elif isinstance(effect, Append):
                    reply = self._append(effect)
                elif isinstance(effect, Search):
                    ids = turn.pages.index_keys(effect.before)
                    reply = ids and self.indexes.search(
                        ids, turn.pages.docs, effect.queries, effect.limit, effect.skip, effect.seen_s
                    )
                else:
                    assert isinstance(effect, Load)
                    segment = unwritten_page(turn.pages, effect.page_id)
                    if segment is not None:
                        reply = self.writes(segment)
                    else:
                        reply = turn.pages.at(effect.page_id, effect.level)
                played.replies.append(reply)
        except StopIteration as end:
            played.answer = end.value
        if self.learned is not None and played.answer.refused is None:
            self.learned |= played.answer.learned
        played.message, played.stream = shell.received(played.answer)
        record = turn.record
        # An equal answer may have been stored before: then that turn's state is the one that counts.
        ours = [settled for settled, _ in turn.settled]
        if record and turn.window and all(self.get_record(r.id) is r for r in (*ours, record)):
            self._states[record.id] = State(turn.window, turn.table, turn.pages.derived)


class _Shell:
    """Performs `Complete`: whole answers, or streams through the sieve."""

    def __init__(
        self, turn: Turn, context: TurnContext, model: Model, stream: bool,
        bills: Callable[[Message], Message | None] | None,
    ) -> None:
        self._turn = turn
        self._count = context.counter.text
        self._model = model
        self._bills = bills
        self._stream = stream
        self._whole: dict[str, Any] | None = None
        self._out: list[bytes] = []
        self._through = False
        self._last: Message | None = None
        self._lazy: Sieve | None = None

    @property
    def _sieve(self) -> Sieve:
        if self._lazy is None:
            self._lazy = Sieve(
                self._turn.channel, 8, 500.0, False, True, self._count, self._turn.talks_of_tools
            )
        return self._lazy

    def complete(self, effect: Complete) -> Said | Refused:
        request = json.loads(effect.body)
        said = self._model(request)
        if isinstance(said, Refused):
            return said
        message = json.loads(json.dumps(said))
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        usage: Message | None = {"prompt_tokens": len(effect.body) // 4, "completion_tokens": 7, "total_tokens": 0}
        if self._bills is not None:
            usage = self._bills(request)
        if self._stream and not effect.through:
            self._sieve.begin_round(effect.offer)
            for chunk in sse_of(message, reason):
                self._out += self._sieve.feed(chunk, 0.0)
            ended, ready = self._sieve.end_round()
            self._out += ready
            shown = self._sieve.shown()
            return Said([ended.message], ended.finish_reason, usage, None, shown, ended.unread)
        self._last = message
        self._whole = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage,
        }
        return Said([message], reason, usage, self._whole)

    def received(self, answer: Answer) -> tuple[Message | None, bytes]:
        if answer.refused is not None:
            return None, b""
        if self._stream and self._last is None:
            self._out += self._sieve.finish(answer.finish_reason, answer.usage)
            return self._sieve.shown(), b"".join(self._out)
        if answer.body is not None:
            return json.loads(answer.body)["choices"][0]["message"], b""
        return self._last, b""


def sse_of(message: Message, reason: str) -> list[bytes]:
    """A message as OpenAI streams it."""
    deltas: list[Message] = [{"role": "assistant", "content": ""}]
    text = message.get("content") or ""
    deltas += [{"content": text[i : i + 9]} for i in range(0, len(text), 9)]
    if message.get("function_call"):
        deltas.append({"function_call": message["function_call"]})
    for index, call in enumerate(message.get("tool_calls") or ()):
        body = call["function"]
        deltas.append({"tool_calls": [{**call, "index": index, "function": {**body, "arguments": ""}}]})
        deltas.append({"tool_calls": [{"index": index, "function": {"arguments": body["arguments"]}}]})
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
    chunks = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    return [b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks] + [b"data: [DONE]\n\n"]


# -- what a model says


def says(text: str) -> Message:
    return {"role": "assistant", "content": text, "refusal": None}


def call(name: str, arguments: Any, call_id: str) -> Message:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def calls(*tool_calls: Message, text: str | None = None) -> Message:
    return {"role": "assistant", "content": text, "tool_calls": list(tool_calls)}


def script(*answers: Message | Refused) -> Model:
    """A model that says these in turn, and the last one for ever."""
    left = list(answers)

    def model(_: Message) -> Message | Refused:
        return left.pop(0) if len(left) > 1 else left[0]

    return model


def tool_messages(request: Message) -> list[Message]:
    """The results in a request."""
    return [message for message in request["messages"] if message["role"] == "tool"]


# -- what any upstream would check


def count_tokens(request: Message, counter: TokenCounter | None = None) -> int:
    """A whole request's tokens by OpenAI's published rules, written down independently."""
    text = (counter or get_counter("gpt-4o")).text
    total = 3
    for message in request["messages"]:
        total += 4
        content = message.get("content")
        if isinstance(content, str):
            total += text(content)
        for part in content if isinstance(content, list) else ():
            total += text(part["text"]) if part["type"] == "text" else 1445
        for one in message.get("tool_calls") or ():
            total += 3 + text(one["function"]["name"]) + text(one["function"]["arguments"])
        if message.get("name"):
            total += 1 + text(message["name"])
    return total + Published(str(request["model"])).tools(request.get("tools") or ())


def check_pairs(request: Message) -> None:
    """Every call has its result directly after it, once; no result stands alone."""
    waiting: list[str] = []
    for message in request["messages"]:
        if message["role"] == "tool":
            assert message["tool_call_id"] in waiting, f"orphaned result {message}"
            waiting.remove(message["tool_call_id"])
            continue
        assert not waiting, f"calls without results: {waiting} before {message}"
        waiting = [one["id"] for one in message.get("tool_calls") or ()]
        assert len(waiting) == len(set(waiting)), f"ids twice: {waiting}"
    assert not waiting, f"calls without results: {waiting}"
