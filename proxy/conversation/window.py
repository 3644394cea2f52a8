"""The window: a log of upstream messages in epochs. Pure.

Promises: within an epoch the log only grows at its end, so a request's messages begin with the exact
bytes of the one before; it is taken back only to where the client itself changed what stands in it;
the log is stored as changes per answered turn and comes back byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from proxy.conversation.compose import Form, Piece, formed
from proxy.conversation.tree import Anchor, GetRecord, Record
from proxy.tokens import PER_MESSAGE, TokenCounter

# What an entry of the log is.
NATIVE = 0  # a client's message, in its own role
SYSTEM = 1  # a client's system message from the middle of the conversation
VM = 2  # a message of the fault loop: the model's VM calls, or a result
MIXED = 3  # the model's own message with both VM calls and the client's, in place of its echo
KEPT = 4  # media kept from older turns, in a user message: a developer message takes only text; or
# the user message that a log begins with whose first message of the client's is an answer


class Entry(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """One upstream message as it was sent; `position` is its place on the path (-1: none), of a system
    message that of the message behind it. `whole` is the digest of a system message that was cut."""

    raw: bytes
    tokens: int
    position: int = -1
    kind: int = NATIVE
    whole: bytes = b""

    @property
    def said(self) -> bytes:
        """Of a system message: what the client's own is known by (`Anchor.said`)."""
        return self.whole or Anchor(self.position, self.raw).said


class Window(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The log after some turn. Positions before `covered` are in it or evicted; those from
    `native_from` on are native without a gap."""

    epoch: int
    developer: str
    developer_tokens: int
    native_from: int
    covered: int
    entries: tuple[Entry, ...]
    tokens: int  # developer message and entries together
    counter: str = ""  # the name of the counter of all these tokens
    notes: bytes = b""  # what the client's system messages before `native_from` were (`notes_digest`)
    factor: float = 0.0  # billed tokens per counted one that the epoch's budget is in; 0.0: not known

    def append(self, entries: Iterable[Entry], covered: int | None = None) -> Window:
        new = tuple(entries)
        return msgspec.structs.replace(
            self,
            covered=self.covered if covered is None else covered,
            entries=self.entries + new,
            tokens=self.tokens + sum(entry.tokens for entry in new),
        )

    def until(self, kept: int, covered: int) -> Window:
        """The log taken back to its first `kept` entries, which cover the path up to `covered`."""
        gone = sum(entry.tokens for entry in self.entries[kept:])
        return msgspec.structs.replace(
            self, covered=covered, entries=self.entries[:kept], tokens=self.tokens - gone
        )

    def recount(self, counter: TokenCounter) -> Window:
        """The same log in another model's tokens."""
        entries = tuple(
            msgspec.structs.replace(entry, tokens=counter.message(msgspec.json.decode(entry.raw)))
            for entry in self.entries
        )
        developer = self.developer_tokens
        if self.developer:
            developer = PER_MESSAGE + counter.text(self.developer)
        total = developer + sum(entry.tokens for entry in entries)
        return msgspec.structs.replace(
            self, developer_tokens=developer, entries=entries, tokens=total, counter=counter.name
        )


class _Change(msgspec.Struct, array_like=True, omit_defaults=True):
    covered: int
    entries: tuple[Entry, ...] = ()
    snapshot: Window | None = None
    kept: int = -1  # of the entries before, the first so many; -1: all of them


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Change).decode
_json = msgspec.json.encode


def encode_change(before: Window | None, after: Window) -> bytes:
    """What a turn stores: the entries added (behind those kept), or the whole window when a new
    epoch began in it, or when it was counted anew."""
    if before is None or _measure(before) != _measure(after):
        return _encode(_Change(after.covered, snapshot=after))
    old, new = before.entries, after.entries
    if len(new) >= len(old) and (not old or new[len(old) - 1] is old[-1]):
        return _encode(_Change(after.covered, new[len(old) :]))
    pairs = enumerate(zip(old, new, strict=False))
    kept = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
    return _encode(_Change(after.covered, new[kept:], kept=kept))


def _measure(window: Window) -> tuple[int, str, float]:
    return window.epoch, window.counter, window.factor


def restore(record: Record, get: GetRecord) -> Window | None:
    """The window after the record's turn; None for a conversation that was never evicted from."""
    changes: list[_Change] = []
    at: Record | None = record
    while at is not None and at.window:
        change = _decode(at.window)
        if change.snapshot is not None:
            window = change.snapshot
            for later in reversed(changes):
                if later.kept >= 0:
                    window = window.until(later.kept, later.covered)
                window = window.append(later.entries, later.covered)
            return window
        changes.append(change)
        at = get(at.base)
    if changes:
        raise LookupError("the beginning of an epoch's window is missing from storage")
    return None


def render(
    system: Sequence[bytes], window: Window, role: str, vm_as_text: bool, form: Form
) -> bytes:
    """The messages array of an upstream request.

    `role` is developer or system; `vm_as_text` is for a request that must go without the VM tools.
    """
    if vm_as_text and any(entry.kind in (VM, MIXED) for entry in window.entries):
        pieces = _as_text(window.entries)
    else:
        pieces = [Piece(entry.raw, entry.kind == KEPT) for entry in window.entries]
    return b"[" + b",".join(formed(system, window.developer, role, pieces, form)) + b"]"


def _as_text(entries: Sequence[Entry]) -> list[Piece]:
    """The log without VM calls: each exchange becomes one user message with the pages it brought."""
    out: list[Piece] = []
    at = 0
    while at < len(entries):
        if entries[at].kind not in (VM, MIXED):
            out.append(Piece(entries[at].raw, entries[at].kind == KEPT))
            at += 1
            continue
        run = [entries[at]]
        while at + len(run) < len(entries) and entries[at + len(run)].kind == VM:
            run.append(entries[at + len(run)])
        at += len(run)
        messages = [msgspec.json.decode(entry.raw) for entry in run]
        out.append(Piece(_json({"role": "user", "content": _results_text(messages)}), ours=True))
        media = [entry for entry, m in zip(run, messages, strict=True) if m["role"] == "user"]
        out.extend(Piece(entry.raw, ours=True) for entry in media)
        if run[0].kind == MIXED:
            answered = {m.get("tool_call_id") for m in messages if m["role"] == "tool"}
            calls = [c for c in messages[0]["tool_calls"] if c.get("id") not in answered]
            out.append(Piece(_json({**messages[0], "tool_calls": calls})))
    return out


def _results_text(messages: Sequence[dict[str, Any]]) -> str:
    """Results are JSON with every `<` escaped, so they cannot close the tags around them."""
    lines = [f"T (memory): {m['content']}" for m in messages if m["role"] == "tool"]
    return "\n".join(["<VM:CONTEXT>", *lines, "</VM:CONTEXT>"])
