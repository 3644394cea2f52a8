"""What holds after an answered turn: window, page table and derived pages, from storage. Pure.

Promises: the same record gives the same state on any replica, before and after a restart (7, 9); the
table is opened at the last segment that was closed and only what happened since is replayed, so the
cost does not grow with the conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from proxy.conversation.derived import NO_DERIVED, Derived, grown, table_root
from proxy.conversation.tree import GetRecord, Record
from proxy.conversation.window import Window, restore
from proxy.memory.mutation_log import MutationLogLite
from proxy.memory.mutation_log import decode as decode_mutations
from proxy.memory.page_table import PageTable
from proxy.memory.tlb import TLBWithPageTable

GetBlock = Callable[[bytes], bytes | None]


class State(NamedTuple):
    """The state after a turn. The table is the caller's to change."""

    window: Window | None
    table: TLBWithPageTable
    derived: Derived


def restore_state(head: Record, get: GetRecord, get_block: GetBlock) -> State:
    """The state after `head`; LookupError when a part of it is missing from storage."""
    table = restore_table(head, get, get_block)
    return State(restore(head, get), table, _derived(head, get))


def restore_table(head: Record, get: GetRecord, get_block: GetBlock) -> TLBWithPageTable:
    """The page table of that state, a new one; LookupError as above."""
    logs: list[bytes] = []
    at: Record | None = head
    while at is not None and not at.closing:
        logs.append(at.mutations)
        at = _need(at.base, get) if at.base else None
    if at is None:
        table = PageTable()
    else:
        table = PageTable.open(table_root(at.closing), get_block)
    for log in reversed(logs):
        table.replay(decode_mutations(msgspec.msgpack.decode(log)))
    return TLBWithPageTable(table)


def _derived(head: Record, get: GetRecord) -> Derived:
    """All that the closed segments left, from the first to the last."""
    closings: list[bytes] = []
    at: Record | None = head
    while at is not None:
        if at.closing:
            closings.append(at.closing)
        at = _need(at.closed, get) if at.closed else None
    derived = NO_DERIVED
    for closing in reversed(closings):
        derived = grown(derived, closing)
    return derived


def history(head: Record, get: GetRecord) -> MutationLogLite:
    """The whole mutation log of a path, from its first page to `head`."""
    logs: list[bytes] = []
    at: Record | None = head
    while at is not None:
        logs.append(at.mutations)
        at = _need(at.base, get) if at.base else None
    log = MutationLogLite()
    for encoded in reversed(logs):
        if encoded:
            log.extend(decode_mutations(msgspec.msgpack.decode(encoded)))
    return log


def _need(record_id: bytes, get: GetRecord) -> Record:
    found = get(record_id)
    if found is None:  # written in one commit with or after it, so: a damaged store
        raise LookupError("a record that a window continues is missing from storage")
    return found
