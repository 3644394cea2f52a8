"""A conversation without a server: the proxy's own turns, played against records in RAM.

Promises: a request is, byte for byte, what the proxy sends for the same history with the same limits;
a turn that is never answered leaves no trace.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from proxy.conversation.commit import NO_NAMES
from proxy.conversation.compose import as_input
from proxy.conversation.derived import NO_DERIVED, Derived
from proxy.conversation.effects import Append, Complete, Effect, Load, Said, Search
from proxy.conversation.limits import Limits
from proxy.conversation.newpages import new_pages
from proxy.conversation.pathpages import PathPages
from proxy.conversation.report import TurnReport
from proxy.conversation.state import State, restore_state
from proxy.conversation.tree import (
    Identity,
    Node,
    Record,
    block_key,
    decode_record,
    record_key,
)
from proxy.conversation.turn import Answer, Turn, TurnInput
from proxy.errors import ApiError
from proxy.memory.eviction_policy import EvictionPolicy
from proxy.memory.levels import CompressorRegistry
from proxy.memory.models import MemoryPage, MutationType, PageMutation
from proxy.memory.mutation_log import MutationLogLite
from proxy.memory.mutation_log import decode as decode_mutations
from proxy.memory.page_table import PageTable
from proxy.memory.pages import Hit
from proxy.memory.tlb import TLBWithPageTable
from proxy.search.paths import PathIndexes
from proxy.tokens import TokenCounter

Message = dict[str, Any]

_LASTING = (MutationType.PIN, MutationType.UNPIN, MutationType.UPDATE)
_json = msgspec.json.encode
_decode = msgspec.json.decode
_unpack = msgspec.msgpack.decode


@dataclass(slots=True)
class _Open:
    """A turn that waits for the model: its request, and whether VM calls are welcome."""

    turn: Turn
    dialogue: Generator[Effect, Any, Answer]
    request: dict[str, Any]
    offered: bool


class LocalConversation:
    """One conversation of one model. `system` are its system messages; `index_pages` bounds the
    search index.
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
        index_pages: int = 200_000,
    ) -> None:
        self.path: list[Node] = []
        self._model = model
        self._limits = limits
        self._counter = counter
        self._policy = policy
        self._registry = registry
        self._system = [_json(message) for message in system]
        self._fixed_tokens = sum(counter.message(m) for m in system)
        self._identity = Identity(blake2b(name.encode(), digest_size=32).digest())
        self._tenant = self._identity.tenant("", "")
        self._values: dict[bytes, bytes] = {}  # the store: records and the table's blocks
        self._indexes = PathIndexes(index_pages)
        self._record: Record | None = None
        self._state: State | None = None
        self._open: _Open | None = None
        self._log = MutationLogLite()
        self._unpaged: TLBWithPageTable | None = None
        self._entered = 0  # messages that are in `_unpaged`
        self._changes: list[PageMutation] = []  # the caller's, that no answered turn has yet

    # -- growing

    def add(self, *messages: Message) -> None:
        """Messages that were said, without a turn of their own; an open turn is given up."""
        self._give_up()
        pairs = [(_json(message), message) for message in messages]
        self.path = self._identity.extend(self._tenant, self.path, pairs)

    def answer(self, message: Message) -> TurnReport | None:
        """The model's answer to `request()`; a message that calls only tools of the caller's too.
        Returns what its turn did; None when nobody was asked."""
        if self._open is None and self.path and self.path[-1].role != "assistant":
            self._begin()
        if self._open is None:
            self.add(as_input(message))
            return None
        opened, self._open = self._open, None
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        self._play(opened.turn, opened.dialogue, Said([message], reason, None))
        turn = opened.turn
        self.path, self._record = turn.path, turn.record
        if turn.window is None or turn.record is None:
            self._state = None
            return turn.report
        self._state = State(turn.window, turn.table, turn.pages.derived)
        self._changes.clear()
        if not turn.record.base:  # the first turn that pages
            self._log, self._unpaged = MutationLogLite(), None
        self._log.extend(decode_mutations(_unpack(turn.record.mutations)))
        return turn.report

    # -- showing

    def request(self) -> dict[str, Any]:
        """The body of the next request: `model`, `messages`, and `tools` when the VM's are on offer."""
        if not self.path:
            return {"model": self._model, "messages": [_decode(raw) for raw in self._system]}
        if self.path[-1].role != "assistant":
            return (self._open or self._begin()).request
        shown = self._begin().request  # nobody is asked yet: as it would look
        self._give_up()
        return shown

    @property
    def open_report(self) -> TurnReport | None:
        """What the open turn has done so far; None when none is open."""
        return self._open.turn.report if self._open is not None else None

    @property
    def paged(self) -> bool:
        """Whether the conversation outgrew its window."""
        opened = self._open is not None and self._open.turn.window is not None
        return opened or self._state is not None

    @property
    def table(self) -> TLBWithPageTable:
        """The table of the open turn, else that after the last answer. While everything fits no turn
        has one: then it is what the first turn that pages will find."""
        if self._open is not None and self._open.turn.window is not None:
            return self._open.turn.table
        if self._state is not None:
            return self._state.table
        return self._view()

    @property
    def log(self) -> MutationLogLite:
        """All mutations up to the last answer; while everything fits, those that made `table`."""
        if not self.paged:
            self._view()
        return self._log

    def _view(self) -> TLBWithPageTable:
        """What the first turn that pages will find."""
        if self._unpaged is None:
            self._log, self._entered = MutationLogLite(), 0
            self._unpaged = TLBWithPageTable(PageTable(self._log.append))
        turn = 1 + sum(node.role == "assistant" for node in self.path[: self._entered])
        for position in range(self._entered, len(self.path)):
            pages = self._pages(self.path[: position + 1])
            for mutation in new_pages(pages, position, 0, turn):
                self._unpaged.apply(mutation)
            turn += self.path[position].role == "assistant"
        self._entered = len(self.path)
        return self._unpaged

    @property
    def derived(self) -> Derived:
        """Summaries and claims after the last answer."""
        return self._state.derived if self._state is not None else NO_DERIVED

    def pages(self, page_id: str) -> list[MemoryPage]:
        """The pages that an id names, level 0: all parts for a long message's own; [] for none."""
        pages = self._pages(self.path)
        return [pages.page(i) for i in pages.expand(page_id)]

    def _pages(self, path: Sequence[Node]) -> PathPages:
        return PathPages(path, self._counter, self._limits.page_tokens, self.derived)

    # -- changing

    def change(self, mutation: PageMutation) -> None:
        """A pin or an importance of the caller's: it holds at once, and in the log from the next
        answered turn on. KeyError for an unknown page, ValueError for another operation."""
        if mutation.op not in _LASTING:
            raise ValueError(f"{mutation.op.value} is the turns' own to do")
        self.table.apply(mutation)
        self._changes.append(mutation)

    def vm_calls(self, calls: Sequence[Mapping[str, Any]], content: Any = None) -> list[Message] | None:
        """Answer VM calls that the model made in one message: a tool message for each that is
        answered, then their media in a user message. None when no VM call is welcome now.
        """
        asked = self._open
        if asked is None or not asked.offered:
            return None
        said = {"role": "assistant", "content": content, "tool_calls": [dict(c) for c in calls]}
        again = self._play(asked.turn, asked.dialogue, Said([said], "tool_calls", None))
        if again is None:  # the turn took it for its answer
            self._give_up()
            return None
        self._open = _opened(asked.turn, asked.dialogue, again)
        after, ids = self._open.request["messages"], {call.get("id") for call in calls}
        at = len(after)
        while at and after[at - 1].get("role") != "assistant":
            at -= 1
        made = after[at - 1].get("tool_calls") if at else None
        return after[at:] if made and made[0].get("id") in ids else []  # no room: it was left out

    # -- turns

    def _begin(self) -> _Open:
        """A turn up to its first request."""
        turn = Turn(self._input())
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
            self._state.table.replay(self._changes)

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
                    reply = self._search(turn.pages, effect)
                else:
                    assert isinstance(effect, Load)
                    reply = turn.pages.at(effect.page_id, effect.level)
        except StopIteration:
            return None

    def _input(self) -> TurnInput:
        state, record = self._state, self._record
        raws = b",".join([*self._system, *(node.raw for node in self.path)])
        body = b'{"model":' + _json(self._model) + b',"messages":[' + raws + b"]}"
        return TurnInput(
            body=body,
            fields={"model": msgspec.Raw(_json(self._model))},
            order=["model", "messages"],
            decoded={"model": self._model},
            system=self._system,
            path=self.path,
            start=0,
            floor=0,
            anchors=(),
            given_answers=True,
            record=record,
            window=state.window if state else None,
            table=state.table if state else None,
            limits=self._limits,
            counter=self._counter,
            identity=self._identity,
            tenant=self._tenant,
            names=NO_NAMES,
            policy=self._policy,
            substitutes=self._substitutes,
            fixed_tokens=self._fixed_tokens,
            get_record=self._get,
            derived=self.derived,
            changes=self._changes,
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

    def _search(self, pages: PathPages, effect: Search) -> list[Hit]:
        ids = pages.index_keys(effect.before)
        return self._indexes.search(ids, pages.docs, effect.query, effect.limit, effect.skip)


def _opened(turn: Turn, dialogue: Generator[Effect, Any, Answer], effect: Complete) -> _Open:
    return _Open(turn, dialogue, _decode(effect.body), effect.offer)
