"""A conversation without a server: the proxy's own turns, played against records in RAM. Pure.

Promises: what is sent is what the proxy would send for the same history; a turn that is never
answered leaves no trace; searching is by the words of the pages (`PageSearchHandler`), as there is
no index. For programs that hold their conversation themselves (`proxy.SessionManager`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from proxy.conversation.body import Body
from proxy.conversation.compose import as_input
from proxy.conversation.context import TurnContext
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.effects import Append, Complete, Effect, Load, Said, Search
from proxy.conversation.identify import Place
from proxy.conversation.limits import Limits
from proxy.conversation.pages import PathPages
from proxy.conversation.records import (
    Record,
    State,
    block_key,
    decode_record,
    record_key,
    restore_state,
)
from proxy.conversation.tree import Identity, Node
from proxy.conversation.turn import Answer, Turn
from proxy.errors import ApiError
from proxy.memory.eviction import EvictionPolicy
from proxy.memory.levels import CompressorRegistry
from proxy.memory.manifest import AvailablePageEntry
from proxy.memory.models import MemoryPage
from proxy.memory.pages import Hit
from proxy.memory.search_handler import PageSearchHandler
from proxy.memory.table import MutationLogLite, decode_log
from proxy.tokens import TokenCounter

Message = dict[str, Any]

_json = msgspec.json.encode
_decode = msgspec.json.decode
_unpack = msgspec.msgpack.decode


@dataclass(slots=True)
class _Open:
    """A turn that waits for the model: its request's messages, and whether VM calls are welcome."""

    turn: Turn
    dialogue: Generator[Effect, Any, Answer]
    messages: list[Message]
    offered: bool


class LocalConversation:
    """One conversation of one model. `system` are its system messages, `extra_tokens` what the
    caller adds to each request besides.
    """

    def __init__(
        self,
        name: str,
        model: str,
        limits: Limits,
        counter: TokenCounter,
        policy: EvictionPolicy,
        registry: CompressorRegistry | None = None,
        system: Sequence[Message] = (),
        extra_tokens: int = 0,
    ) -> None:
        self.limits = limits
        self.path: list[Node] = []
        self._model = model
        self._counter = counter
        self._policy = policy
        self._registry = registry
        self._system = [_json(message) for message in system]
        self._fixed_tokens = extra_tokens + sum(counter.message(m) for m in system)
        self._identity = Identity(blake2b(name.encode(), digest_size=32).digest())
        self._tenant = self._identity.tenant("", "")
        self._values: dict[bytes, bytes] = {}  # the store: records and the table's blocks
        self._record: Record | None = None
        self._state: State | None = None
        self._open: _Open | None = None
        self._log = MutationLogLite()
        self._index = PageSearchHandler()
        self._indexed = 0
        self._places: dict[str, tuple[int, int]] = {}

    # -- growing

    def add(self, *messages: Message) -> None:
        """Messages that were said, without a turn of their own; an open turn is given up."""
        self._give_up()
        pairs = [(_json(message), message) for message in messages]
        self.path = self._identity.extend(self._tenant, self.path, pairs)

    def answer(self, message: Message) -> None:
        """The model's answer to `request()`; a message that calls only tools of the caller's too."""
        if self._open is None and self.path and self.path[-1].role != "assistant":
            self._begin()
        if self._open is None:
            self.add(as_input(message))
            return
        open_turn, self._open = self._open, None
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        self._play(open_turn.turn, open_turn.dialogue, Said([message], reason, None))
        self.path = open_turn.turn.path
        self._record = open_turn.turn.record
        turn = open_turn.turn
        paged = turn.window is not None
        self._state = State(turn.window, turn.table, turn.pages.derived) if paged else None
        if paged and turn.record is not None:
            if not turn.record.base:  # the first turn that pages
                self._log = MutationLogLite()
            self._log.extend(decode_log(turn.record.mutations))

    # -- showing

    def request(self) -> list[Message]:
        """The messages of the next request."""
        if not self.path:
            return [_decode(raw) for raw in self._system]
        if self.path[-1].role != "assistant":
            return (self._open or self._begin()).messages
        shown = self._begin().messages  # nobody is asked yet: as it would look
        self._give_up()
        return shown

    @property
    def paged(self) -> bool:
        """Whether the conversation outgrew its window."""
        return self._state is not None or (
            self._open is not None and self._open.turn.window is not None
        )

    @property
    def state(self) -> State | None:
        """The window and the table after the last answer; None while everything fits."""
        return self._state

    @property
    def offers_tools(self) -> bool:
        """Whether the open request may be answered with a VM call."""
        return self._open is not None and self._open.offered

    def page(self, page_id: str) -> MemoryPage | None:
        """A page of the path or derived from it, level 0; None for one that is not there."""
        derived = self._state.derived if self._state is not None else NO_DERIVED
        pages = PathPages(self.path, self._counter, self.limits.page_tokens, derived)
        found = pages.expand(page_id)
        return pages.page(found[0]) if len(found) == 1 else None

    @property
    def log(self) -> MutationLogLite:
        """All mutations up to the last answer."""
        return self._log

    def vm_call(self, call: Mapping[str, Any]) -> tuple[Message, list[Message]] | None:
        """Answer one VM call of the model's: the tool message, and messages that follow it. None when
        no VM call is welcome now.
        """
        if not self.offers_tools:
            return None
        assert self._open is not None
        asked = self._open
        said = {"role": "assistant", "content": None, "tool_calls": [dict(call)]}
        again = self._play(asked.turn, asked.dialogue, Said([said], "tool_calls", None))
        if again is None:  # the turn took it for its answer
            self._give_up()
            return None
        self._open = _opened(asked.turn, asked.dialogue, again)
        after = self._open.messages
        at = next(i for i in range(len(after) - 1, -1, -1) if after[i].get("role") == "tool")
        return after[at], after[at + 1 :]

    # -- turns

    def _begin(self) -> _Open:
        """A turn up to its first request."""
        turn = Turn(self._context())
        if self._registry is not None:
            turn.pages.registry = self._registry
        dialogue = turn.run()
        effect = self._play(turn, dialogue, None)
        if effect is None:
            raise ApiError(500, "A turn ended without a request.")
        self._open = _opened(turn, dialogue, effect)
        return self._open

    def _give_up(self) -> None:
        """Forget the open turn; the table that it changed comes back from the records."""
        if self._open is None:
            return
        self._open.dialogue.close()
        self._open = None
        if self._state is not None and self._record is not None:
            self._state = restore_state(self._record, self._get, self._block)

    def _play(
        self, turn: Turn, dialogue: Generator[Effect, Any, Answer], reply: Any
    ) -> Complete | None:
        """Perform effects up to the next request; None when the turn has ended."""
        try:
            while True:
                effect = dialogue.send(reply)
                if isinstance(effect, Complete):
                    return effect
                if isinstance(effect, Append):
                    for key, value in effect.puts:
                        self._values.setdefault(key, value)
                    reply = None
                elif isinstance(effect, Search):
                    reply = self._search(turn, effect)
                else:
                    assert isinstance(effect, Load)
                    reply = turn.pages.at(effect.page_id, effect.level)
        except StopIteration:
            return None

    def _context(self) -> TurnContext:
        raws = b",".join([*self._system, *(node.raw for node in self.path)])
        model = msgspec.Raw(_json(self._model))
        return TurnContext(
            body=b'{"model":' + bytes(model) + b',"messages":[' + raws + b"]}",
            sent=Body({"model": model}, ["model", "messages"], self._system, None, 0, [], None),
            decoded={"model": self._model},
            place=Place(self.path, 0, 0, [], self._record),
            state=self._state,
            limits=self.limits,
            counter=self._counter,
            policy=self._policy,
            identity=self._identity,
            tenant=self._tenant,
            fixed_tokens=lambda: self._fixed_tokens,
            substitutes=self._substitutes,
            get_record=self._get,
            given_answers=True,
        )

    # -- the store

    def _get(self, node_id: bytes) -> Record | None:
        data = self._values.get(record_key(node_id))
        return None if data is None else decode_record(data)

    def _block(self, ref: bytes) -> bytes | None:
        return self._values.get(block_key(ref))

    def _substitutes(self, node_id: bytes) -> Sequence[bytes]:
        record = self._get(node_id)
        return record.substitute if record is not None else ()

    def _search(self, turn: Turn, effect: Search) -> list[Hit]:
        """By the words of the pages; `evidence` in units of a word that one page has."""
        if effect.before > self._indexed:
            for doc in turn.pages.docs(self._indexed, effect.before):
                name = turn.pages.id_of(doc.position, doc.part)
                self._index.add(AvailablePageEntry(page_id=name, hint=doc.text))
                self._places[name] = doc.position, doc.part
            self._indexed = effect.before
        unit = math.log(1.0 + len(self._places))
        hits: list[Hit] = []
        for name, score, evidence in self._index.ranked(effect.query):
            position, part = self._places[name]
            if position < effect.before and not effect.skip(position, part):
                hits.append(Hit(position, part, score, evidence / unit))
            if len(hits) == effect.limit:
                break
        return hits


def _opened(turn: Turn, dialogue: Generator[Effect, Any, Answer], effect: Complete) -> _Open:
    body = _decode(effect.body)
    return _Open(turn, dialogue, body["messages"], effect.offer)
