"""The window: a log of upstream messages in epochs. Pure.

Promises: within an epoch the log only grows at its end, so a request's messages begin with the exact
bytes of the one before; it is taken back only to where the client itself changed what stands in it
(`differs_at`), and then every page that was shown only behind that place is found, so that the table
can say that it is not in the window any more; the log is stored as changes per answered turn and comes
back byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import msgspec

from proxy.conversation.form import Form, Piece, formed
from proxy.conversation.pages import PathPages, anchor_tokens, group_start, owner
from proxy.conversation.tree import Anchor, Node
from proxy.tokens import PER_MESSAGE, TokenCounter

# What an entry of the log is.
NATIVE = 0  # a client's message, in its own role
SYSTEM = 1  # a client's system message from the middle of the conversation
VM = 2  # a message of the fault loop: the model's VM calls, or a result
MIXED = 3  # the model's own message with both VM calls and the client's, in place of its echo
KEPT = 4  # media kept from older turns, in a user message: a developer message takes only text; or
# the user message that a log begins with whose first message of the client's is an answer


_KIND, _RAW = attrgetter("kind"), attrgetter("raw")


class Entry(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """One upstream message as it was sent; `position` is its place on the path (-1: none), of a system
    message that of the message behind it. `whole` is the digest of a system message that was cut.
    `shown_tokens` of it are evidence, in front of a user's own text, with the pages `shown`."""

    raw: bytes
    tokens: int
    position: int = -1
    kind: int = NATIVE
    whole: bytes = b""
    shown_tokens: int = 0
    shown: tuple[str, ...] = ()

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
    tools: bool = True  # the VM tools are on offer in the epoch, where the request allows it
    began: int = 0  # the turn in which its epoch began
    crowded: int = 0  # the L0 of which it was said that it is too small for this conversation's traffic

    def append(self, entries: Iterable[Entry], covered: int | None = None) -> Window:
        new = tuple(entries)
        return msgspec.structs.replace(
            self,
            covered=self.covered if covered is None else covered,
            entries=self.entries + new,
            tokens=self.tokens + sum(entry.tokens for entry in new),
        )

    def taken_back(self, position: int) -> Window:
        """The log without what stands at `position` and behind it."""
        kept = next((i for i, e in enumerate(self.entries) if e.position >= position), len(self.entries))
        return self.until(kept, position)

    def until(self, kept: int, covered: int) -> Window:
        """The log taken back to its first `kept` entries, which cover the path up to `covered`."""
        gone = sum(entry.tokens for entry in self.entries[kept:])
        return msgspec.structs.replace(
            self, covered=covered, entries=self.entries[:kept], tokens=self.tokens - gone
        )

    def replaced(self, old: Entry, new: Entry) -> Window:
        """The log with another entry in the place of one."""
        entries = self.entries
        at = next(i for i in range(len(entries) - 1, -1, -1) if entries[i] is old)  # near the end, as a rule
        entries = (*entries[:at], new, *entries[at + 1 :])
        return msgspec.structs.replace(self, entries=entries, tokens=self.tokens + new.tokens - old.tokens)

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


# -- the client's messages as entries


def system_entry(anchor: Anchor, counter: TokenCounter) -> Entry:
    """A system message in mid-conversation as it stands in the log."""
    return Entry(anchor.raw, anchor_tokens(anchor, counter), anchor.position, SYSTEM)


def native_entries(
    pages: PathPages, position: int, substitutes: Callable[[bytes], Sequence[bytes]]
) -> list[Entry]:
    """A message in its own role; a mixed call as the model made it, with the VM results."""
    node = pages.path[position]
    raws = substitutes(node.id) if node.role == "assistant" else ()
    if not raws:
        return [Entry(node.raw, pages.tokens(position), position, NATIVE)]
    sizes = [pages.counter.message(msgspec.json.decode(raw)) for raw in raws]
    head = Entry(raws[0], sizes[0], position, MIXED)
    rest = zip(raws[1:], sizes[1:], strict=True)
    return [head, *(Entry(raw, size, -1, VM) for raw, size in rest)]


def client_entries(
    pages: PathPages, anchors: Sequence[Anchor], substitutes: Callable[[bytes], Sequence[bytes]],
    first: int, last: int, anchors_until: int,
) -> list[Entry]:  # fmt: skip
    """The client's messages at positions first..last-1, with its system messages that stand before
    them, and behind them, up to the position `anchors_until`."""
    entries: list[Entry] = []
    for position in range(first, last + 1):
        if position <= anchors_until:
            entries += [system_entry(a, pages.counter) for a in anchors if a.position == position]
        if position < last:
            entries += native_entries(pages, position, substitutes)
    return entries


def newest_entries(window: Window, path: Sequence[Node]) -> list[Entry]:
    """What no epoch of this turn can leave out: the newest group and the user's newest message,
    with the system messages of their pages."""
    last = len(path) - 1
    first = group_start(path, last)
    user = next((i for i in range(last, -1, -1) if path[i].role == "user"), last)
    found = []
    for entry in window.entries:
        at = owner(path, entry.position) if entry.kind == SYSTEM else entry.position
        if at >= first or at == user:
            found.append(entry)
    return found


def without_oldest_round(tail: Sequence[Entry]) -> tuple[Entry, ...]:
    """A turn's VM exchange less its first round: the model's message and all that answers it."""
    roles = [msgspec.json.decode(entry.raw)["role"] for entry in tail]
    second = next((i for i in range(1, len(tail)) if roles[i] == "assistant"), len(tail))
    return tuple(tail[second:])


# -- taken back to where the client changed what stands in it


def differs_at(
    before: Window, path: Sequence[Node], anchors: Sequence[Anchor], start: int, strict: bool = False
) -> int | None:
    """The first position at which the client's system messages are not what the window has; None
    when they agree. `start` is the position of the client's first message.

    Those behind the newest message of the turn before may stay for a turn (but for `strict`): a
    client that always has one there moves it along.
    """
    covered = before.covered
    if not anchors and SYSTEM not in map(_KIND, before.entries):
        return None
    native = {e.position for e in before.entries if e.kind in (NATIVE, MIXED)}
    sent = [(e.position, e.said) for e in before.entries if e.kind == SYSTEM and e.position > start]
    now = [
        (a.position, a.said)
        for a in anchors
        if start < a.position <= covered
        and (a.position == covered or owner(path, a.position) in native)
    ]
    last = [raw for position, raw in sent if position == covered]
    here = [raw for position, raw in now if position == covered]
    inside = [one for one in sent if one[0] < covered], [one for one in now if one[0] < covered]
    for old, new in zip(*inside, strict=False):
        if old != new:
            return min(old[0], new[0])
    shorter, longer = sorted(inside, key=len)
    if len(longer) > len(shorter):
        return longer[len(shorter)][0]
    return covered if (here or strict) and here[: len(last)] != last else None


_json = msgspec.json.encode


# -- as an upstream request


def render(
    system: Sequence[bytes], window: Window, role: str, vm_as_text: bool, form: Form
) -> bytes:
    """The messages array of an upstream request.

    `role` is developer or system; `vm_as_text` is for a request that must go without the VM tools.
    """
    if vm_as_text and any(entry.kind in (VM, MIXED) for entry in window.entries):
        pieces = _as_text(window.entries)
    elif form.several:  # each message as it is
        own = [_json({"role": role, "content": window.developer})] if window.developer else []
        return b"[" + b",".join([*system, *own, *map(_RAW, window.entries)]) + b"]"
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
