"""Gives a request's messages the form that its model's chat template reads. Pure.

Promises: nothing is lost, and what the client sent stays as it is unless a refusal said otherwise;
the memory's text stands where it is surely read: in the one system message in front, or, for a
template without a system role, in front of the first user message; our own messages never put two of
one role in a row. The same messages have the same bytes from turn to turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from proxy.conversation.body import is_system
from proxy.memory.models import SYSTEM_ROLES

_decode, _encode = msgspec.json.decode, msgspec.json.encode
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """`several`: a system message of our own beside the client's is surely read. `late`: the client's
    may stand after the beginning. `system`: the template has such a role. `alternate`: the client's
    own neighbours of one role become one, too."""

    several: bool = False
    late: bool = True
    system: bool = True
    alternate: bool = False


@dataclass(slots=True)
class Piece:
    """A message behind the beginning as it is sent; `ours`: the client has none there."""

    raw: bytes
    ours: bool = False


def formed(head: Sequence[bytes], text: str, role: str, pieces: Sequence[Piece], form: Form) -> list[bytes]:
    """The messages: the client's system messages (`head`) and the memory's `text`, which is a message
    of `role` where it stands alone, then `pieces`."""
    if form.several:
        own = [_encode({"role": role, "content": text})] if text else []
        return [*head, *own, *(piece.raw for piece in pieces)]
    if not form.late:
        pieces = [_as_user(piece) for piece in pieces]
    front = _one([_decode(raw) for raw in head], text, role)
    if front is not None and not form.system:
        front["role"] = "user"
        pieces, front = [Piece(_encode(front), ours=True), *pieces], None
    raws = _alternating(pieces, form.alternate)
    return raws if front is None else [_encode(front), *raws]


def _one(head: Sequence[Message], text: str, role: str) -> Message | None:
    """One message of several, under the first one's name and role."""
    own: list[Message] = [{"role": role, "content": text}] if text else []
    merged: Message | None = None
    for message in (*head, *own):
        merged = message if merged is None else _merged(merged, message)
    return merged


def _merged(first: Message, second: Mapping[str, Any]) -> Message:
    """Two messages as one: their texts a blank line apart, or the parts of both where there is more in
    them. Of several text parts some templates read the first only, so that text is one text."""
    one, other = _text(first.get("content")), _text(second.get("content"))
    if one is not None and other is not None:
        return {**first, "content": "\n\n".join(text for text in (one, other) if text)}
    return {**first, "content": [*_parts(first.get("content")), *_parts(second.get("content"))]}


def _text(content: Any) -> str | None:
    """None: there is more in it than text."""
    if not content or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    plain = all(isinstance(part, dict) and part.keys() == {"type", "text"} for part in parts)
    return "\n\n".join(str(part["text"]) for part in parts) if plain else None


def _parts(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _as_user(piece: Piece) -> Piece:
    """A system message after the beginning speaks as the user."""
    if not any(b'"%b"' % role.encode() in piece.raw for role in SYSTEM_ROLES):
        return piece
    message = _decode(piece.raw)
    if not is_system(message):
        return piece
    return Piece(_encode({**message, "role": "user"}), ours=True)


def _alternating(pieces: Sequence[Piece], everywhere: bool) -> list[bytes]:
    """No two user messages in a row of which one is ours; `everywhere`: no two of one role, the
    client's own either. Only neighbours of ours are decoded."""
    out: list[Piece] = []
    last: Message | None = None  # out[-1], decoded
    for piece in pieces:
        now: Message | None = None
        if out and (everywhere or piece.ours or out[-1].ours):
            last = last if last is not None else _decode(out[-1].raw)
            now = _decode(piece.raw)
            same = last.get("role") == now.get("role")
            calls = last.get("tool_calls") or now.get("tool_calls")
            if same and (now.get("role") == "user" or (now.get("role") == "assistant" and not calls)):
                last = _merged(last, now)
                out[-1] = Piece(_encode(last), piece.ours)
                continue
        out.append(piece)
        last = now
    return [piece.raw for piece in out]
