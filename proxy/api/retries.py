"""A request that is sent once more because its answer was lost on the way.

Promises: a client that sends its whole history needs nothing of this (the same history is the same
place in the tree); a session's client sends only what is new, so its retry is told by the SDKs' own
header and stands where the first try stood, instead of behind the answer that nobody read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from proxy.api.memory import Memory
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.tree import Anchor
from proxy.conversation.turn_input import TurnInput
from proxy.upstream import Header

_RETRY_COUNT = b"x-stainless-retry-count"


def is_retry(headers: Sequence[Header]) -> bool:
    """The client's SDK says that it sends this again."""
    return any(name == _RETRY_COUNT and value.isdigit() and int(value) > 0 for name, value in headers)


async def placed_as_retry(given: TurnInput, memory: Memory) -> TurnInput:
    """`given`, or, when the session's last turn answered these very messages, before that answer.

    Call it for a retry only: somebody may well say the same thing twice.
    """
    last, new = given.record, given.path[given.start :]
    if given.names.delta is None or given.floor or last is None or given.start != last.end:
        return given
    if [node.content for node in new] != last.contents[:-1]:
        return given
    parent = memory.get_record(last.parent) if last.parent else None
    state = await memory.state_after(parent) if parent is not None else None
    back = last.end - last.first
    return replace(
        given,
        path=memory.identity.rechain(given.path[: last.first], new, memory.identity.root(given.tenant)),
        start=last.first,
        anchors=[Anchor(a.position - back, a.raw) for a in given.anchors],
        record=parent,
        window=state.window if state else None,
        table=state.table if state else None,
        derived=state.derived if state else NO_DERIVED,
    )
