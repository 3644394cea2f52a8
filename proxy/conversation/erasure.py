"""What goes when somebody's words are to be gone, and what is told of it afterwards. Pure.

Promises: a conversation is all that stands under its owner, with all of its branches, and with every other conversation of
the tenant that goes on from it or reads its messages there (`records.link_key`): to a person they are one. One message is every
message in it that says the same. Of a message that was erased its role stays, and its calls' ids and names, so that what
stands around it is still a conversation; of the states made with it (windows, tables, what derives from messages) nothing
does, so the next turn begins anew from the messages. An `Erasure` holds hashes, counts and names, never a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any, Literal

import msgspec

from proxy import keys
from proxy.conversation.records import (
    GetRecord,
    Record,
    backwards,
    conversation_name,
    decode_record,
)
from proxy.conversation.tree import Identity

ERASED = "[erased]"  # in the place of a message's words
_STATE = frozenset({keys.BLOCK, keys.INDEX, keys.VECTOR, keys.NEAR, keys.RENDITION, keys.TITLE})  # made of a conversation's messages
_NUMBER_BYTES = 8

Actor = Literal["tenant", "operator", "retention"]
What = Literal["conversation", "message", "user", "key"]


class Erasure(msgspec.Struct, omit_defaults=True):
    """One erasure: while it is under way what is to go, and once it is done its receipt.

    `owners` are beginnings of `keys.owner`: of conversations, of a tenant or of a credential; `content`: of one message,
    the only one to go; `read`: those of the owners whose messages are in `messages` (SHA-256 of their bytes), `counts`
    (values, by kind) and `objects` (what was stored outside L2) already.
    """

    id: bytes
    what: What
    by: Actor
    began_s: int  # Unix time
    owners: list[bytes]
    content: bytes = b""
    read: list[bytes] = []
    messages: list[bytes] = []
    counts: dict[str, int] = {}
    objects: list[str] = []
    ended_s: int = 0

    def told(self) -> dict[str, Any]:
        """As JSON, for people."""
        names = [conversation_name(owner) for owner in self.owners if len(owner) == keys.OWNER_BYTES]
        state = {"ended_s": self.ended_s} if self.ended_s else {"under_way": True}
        return {
            "id": self.id.hex(), "what": self.what, "by": self.by, "began_s": self.began_s, **state,
            **({"conversations": names} if names else {}), "values": self.counts,
            "messages_sha256": [digest.hex() for digest in self.messages], "objects": self.objects,
        }  # fmt: skip

    def concerns(self, owner: bytes) -> bool:
        """Something of the tenant that an owner belongs to is to go."""
        tenant = owner[: keys.TENANT_BYTES]
        return any(one.startswith(tenant) or tenant.startswith(one) for one in self.owners)


encode_erasure = msgspec.msgpack.Encoder().encode
decode_erasure = msgspec.msgpack.Decoder(Erasure).decode


def erasing_key(erasure: Erasure) -> bytes:
    """Under which it stands while it is under way."""
    return keys.ERASING + erasure.id


def receipts(owner: bytes) -> list[bytes]:
    """What the keys of a tenant's receipts begin with: of its own, and of those of its whole credential."""
    return [keys.RECEIPT + owner[:end].ljust(keys.TENANT_BYTES, b"\0") for end in (keys.TENANT_BYTES, keys.SCOPE_BYTES)]


def receipt_key(erasure: Erasure, number: int) -> bytes:
    """`number`: of erasures in the store by then."""
    tenant = erasure.owners[0][: keys.TENANT_BYTES].ljust(keys.TENANT_BYTES, b"\0")
    return keys.RECEIPT + tenant + number.to_bytes(_NUMBER_BYTES, "big") + erasure.id


def number_key(prefix: bytes, number: int) -> bytes:
    """Behind which the receipts of later erasures stand."""
    return prefix + (number + 1).to_bytes(_NUMBER_BYTES, "big")


def prefixes(owner: bytes) -> list[bytes]:
    """What the keys begin with of all that is stored of an owner, but for its links (see `records.link_key`)."""
    kinds = set(keys.OF_CONVERSATION) - {keys.LINK}
    if len(owner) <= keys.TENANT_BYTES:
        kinds |= keys.OF_TENANT | {keys.LINK}
    if len(owner) <= keys.SCOPE_BYTES:
        kinds |= keys.OF_SCOPE
    return [kind + owner for kind in sorted(kinds)]


def state_prefixes(owner: bytes) -> list[bytes]:
    """Of what was made of its messages, beside their records."""
    return [kind + owner for kind in sorted(_STATE)]


def digests(record: Record, content: bytes = b"") -> Iterable[bytes]:
    """The hashes of a record's own messages, or of those that say one thing."""
    said = zip(record.contents, record.raws, strict=True)
    return (sha256(raw).digest() for what, raw in said if raw and content in (b"", what) and not is_tombstone(raw))


def pair_of(record: Record, get: GetRecord, identity: Identity) -> bytes | None:
    """The key of the set in which its answer is found by its words, if it is."""
    if record.sent is None:
        return None
    try:
        last = list(islice(backwards(record, get), 2))
    except LookupError:  # damaged
        return None
    return identity.pair(record.id, last[1].content, last[0].content) if len(last) == 2 else None


# -- one message


def tombstone(raw: bytes) -> bytes:
    """What stands in a message's place. Its own tombstone is itself."""
    message = msgspec.json.decode(raw)
    kept: dict[str, Any] = {"role": message.get("role"), "content": ERASED}
    for name in ("tool_call_id", "name")[: 2 if kept["role"] == "function" else 1]:
        if name in message:
            kept[name] = message[name]
    if isinstance(calls := message.get("tool_calls"), list) and calls:
        kept["tool_calls"] = [_call(call) for call in calls if isinstance(call, dict)]
    if isinstance(function := message.get("function_call"), dict):
        kept["function_call"] = {"name": function.get("name"), "arguments": "{}"}
    return msgspec.json.encode(kept)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(custom := call.get("custom"), dict):
        return {"id": call.get("id"), "type": "custom", "custom": {"name": custom.get("name"), "input": ""}}
    function = call.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return {"id": call.get("id"), "type": "function", "function": {"name": name, "arguments": "{}"}}


def is_tombstone(raw: bytes) -> bool:
    return ERASED.encode() in raw and tombstone(raw) == raw


def struck(record: Record, content: bytes, get: GetRecord) -> Record:
    """The record without what says `content`, and without its state; equal to it where nothing of these is in it."""
    raws = [
        tombstone(raw) if raw and what == content else raw
        for what, raw in zip(record.contents, record.raws, strict=True)
    ]
    tokens = [-1 if raw != old else n for raw, old, n in zip(raws, record.raws, record.tokens, strict=True)]
    parent = get(record.parent) if record.echo else None
    echoed = parent is not None and parent.contents[-1] != content
    return msgspec.structs.replace(
        record, raws=raws, tokens=tokens, echo=record.echo if echoed else b"", substitute=[], base=b"", based=b"",
        window=b"", mutations=b"", closing=b"", closed=b"", leaf=b"", request=None, unkept=record.unkept or bool(record.window),
    )  # fmt: skip


def read_records(rows: Sequence[tuple[bytes, bytes]]) -> list[Record]:
    """Those that can be read."""
    found: list[Record] = []
    for _, value in rows:
        try:
            found.append(decode_record(value))
        except (ValueError, LookupError):  # of a damaged store: it goes with the others, untold
            continue
    return found
