"""How much of the window a turn has: what stands in it whatever leaves. Pure.

Promises: `spare_tokens` is what this turn's VM exchange may still take, to the last token: with that
much more in it, an epoch that keeps nothing else of older turns fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from proxy.conversation.pathpages import group_start
from proxy.conversation.tree import Anchor, Node
from proxy.conversation.window import SYSTEM, Entry, Window
from proxy.tokens import TokenCounter


def anchor_tokens(
    anchors: Sequence[Anchor], counter: TokenCounter, before: int | None = None
) -> int:
    """Tokens of the mid-conversation system messages, or of those that stand before a position."""
    decode = msgspec.json.decode
    wanted = [a for a in anchors if before is None or a.position < before]
    return sum(counter.message(decode(a.raw)) for a in wanted)


def newest_entries(window: Window, path: Sequence[Node]) -> list[Entry]:
    """What no epoch of this turn can leave out: the newest group and the user's newest message,
    with the system messages beside them."""
    last = len(path) - 1
    first = group_start(path, last)
    user = next((i for i in range(last, -1, -1) if path[i].role == "user"), last)
    return [e for e in window.entries if e.position >= first or e.position == user]


def without_oldest_round(tail: Sequence[Entry]) -> tuple[Entry, ...]:
    """A turn's VM exchange less its first round: the model's message and all that answers it."""
    roles = [msgspec.json.decode(entry.raw)["role"] for entry in tail]
    second = next((i for i in range(1, len(tail)) if roles[i] == "assistant"), len(tail))
    return tuple(tail[second:])


def spare_tokens(
    room_for_messages: int, rules_tokens: int, newest: Iterable[Entry], tail: Iterable[Entry]
) -> int:
    """Tokens that an epoch could make free for more of this turn's exchange (`tail`).

    `room_for_messages` is without the client's system messages, wherever they stand; `rules_tokens`
    are the developer message's with nothing in it.
    """
    kept = sum(entry.tokens for entry in newest if entry.kind != SYSTEM)
    return room_for_messages - rules_tokens - kept - sum(entry.tokens for entry in tail)
