"""What of a turn's upstream request stands neither in its window nor on its path, so that the request can be shown again. Pure.

Promises: the request that upstream answered comes back byte for byte, on any replica, or it is known that it does not
(`Request.digest`). An envelope is the same in most turns of a conversation and stored once; one that differs a little (a date
in the system message) is stored as its difference to a whole one. Nothing of it ever goes into a later request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b

import msgspec
import xxhash

from proxy.conversation.form import Form
from proxy.conversation.records import (
    GetRecord,
    GetStoredBlock,
    Record,
    Request,
    difference,
    load_path,
    other,
    owner_of,
)
from proxy.conversation.tree import HASH_BYTES, Anchor, Node
from proxy.conversation.window import Window, render
from proxy.memory.table import GetBlock
from proxy.memory.vm_tools import without_citations

_GAP_BYTES = 64  # between two messages, at most
_LEAST_SAVED = 2  # times that a difference is smaller than the whole


class Envelope(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """`before` and `after` the messages. Of a window: the system messages in front of it, and how it was written
    (`render`; `plain`: without citations). Of an untouched request, which begins with the position `first` of its path:
    what stood `between` its messages, and the system messages among them."""

    before: bytes
    after: bytes
    head: list[bytes] = []
    role: str = ""
    as_text: bool = False
    plain: bool = False
    form: tuple[bool, bool, bool, bool] = (False, True, True, False)
    first: int = -1  # -1: a window's
    between: bytes = b","
    notes: list[tuple[int, bytes]] = []

    @property
    def size_bytes(self) -> int:
        return len(self.before) + len(self.after) + sum(map(len, self.head)) + sum(len(raw) for _, raw in self.notes)

    def window_messages(self, window: Window) -> bytes:
        """The messages array with a window."""
        if self.plain:  # no citation may get into the JSON
            window = msgspec.structs.replace(window, developer=without_citations(window.developer))
        return render(self.head, window, self.role, self.as_text, Form(*self.form))

    def path_messages(self, path: Sequence[Node]) -> bytes:
        """The untouched messages, without the brackets."""
        return self.between.join(_raws(path, self.first, self.notes))


class _Block(msgspec.Struct, array_like=True, gc=False):
    """An encoded envelope, or what makes it of the one in the block `base`."""

    base: bytes
    data: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Envelope).decode
_decode_block = msgspec.msgpack.Decoder(_Block).decode


def _raws(path: Sequence[Node], first: int, notes: Sequence[tuple[int, bytes]]) -> list[bytes]:
    if not notes:
        return [path[at].raw for at in range(first, len(path))]
    out: list[bytes] = []
    for at in range(first, len(path) + 1):
        out += [raw for position, raw in notes if position == at]
        out += [path[at].raw] if at < len(path) else []
    return out


def untouched(body: bytes, path: Sequence[Node], first: int, anchors: Sequence[Anchor]) -> tuple[Envelope, bytes]:
    """Of a request that went up as it came: its envelope, and the patch where that and the path do not make it."""
    notes = [(anchor.position, anchor.raw) for anchor in anchors]
    raws = _raws(path, first, notes)
    at, between = body.find(raws[0]), b","
    end = at + len(raws[0])
    if len(raws) > 1 and (next_at := body.find(raws[1], end, end + _GAP_BYTES + len(raws[1]))) > 0:
        between = body[end:next_at]
    messages = between.join(raws)
    if at < 0 or not body.startswith(messages, at):
        return Envelope(b"", b"", first=first, notes=notes), difference(body, b",".join(raws))
    return Envelope(body[:at], body[at + len(messages) :], first=first, between=between, notes=notes), b""


def enclosed(
    body: bytes, envelope: Envelope, patch: bytes, owner: bytes, before: Record | None, get_stored: GetStoredBlock
) -> tuple[Request, dict[bytes, bytes]]:
    """What a record keeps of the request, and the blocks that are new. `before`: the record that the turn goes on from."""
    data, ref = _encode(envelope), before.request.envelope if before is not None and before.request else b""
    blocks: dict[bytes, bytes] = {}

    def get(ref: bytes) -> bytes | None:
        return get_stored(owner, ref)

    base, known = _read(ref, get)
    if known != data:
        block = _Block(b"", data)
        whole = known if base == ref else _read(base, get)[1]
        if whole is not None and len(change := difference(data, whole)) * _LEAST_SAVED < len(data):
            block = _Block(base, change)
        made = _encode(block)
        blocks[ref := blake2b(made, digest_size=HASH_BYTES).digest()] = made
    return Request(ref, xxhash.xxh3_64_digest(body), patch), blocks


def _read(ref: bytes, get: GetBlock) -> tuple[bytes, bytes | None]:
    """The whole block that an envelope rests on, itself where it is one, and the encoded envelope; None: it is not there."""
    if not ref or (found := get(ref)) is None:
        return b"", None
    block = _decode_block(found)
    if not block.base:
        return ref, block.data
    base = get(block.base)
    return block.base, None if base is None else other(block.data, _decode_block(base).data)


class UpstreamRequest(msgspec.Struct, frozen=True):
    """A turn's request as upstream got it, and what it is made of. `exact`: it is surely the same bytes."""

    body: bytes
    exact: bool
    envelope: Envelope
    window: Window | None


def request_of(
    record: Record, get: GetRecord, get_block: GetStoredBlock, get_window: Callable[[Record], Window | None]
) -> UpstreamRequest | None:
    """The request that the record's answer was given to: of several rounds the last. None: it is not stored (the answer
    came in a request, or an earlier version stored it, or its client changes all of its history each time). LookupError
    for a damaged store."""
    asked = record.request
    if asked is None or record.unkept:
        return None
    _, data = _read(asked.envelope, lambda ref: get_block(owner_of(record.id), ref))
    if data is None:
        return None
    envelope, window = _decode(data), None
    if envelope.first < 0:
        window = get_window(record)
        if window is None:
            return None
        messages = envelope.window_messages(window)
    else:
        messages = envelope.path_messages(load_path(record, get, get_block, None)[: record.end - 1])
    body = envelope.before + messages + envelope.after
    if asked.patch:
        with suppress(LookupError):  # it is of other bytes: then this is not exact
            body = other(asked.patch, body)
    return UpstreamRequest(body, xxhash.xxh3_64_digest(body) == asked.digest, envelope, window)
