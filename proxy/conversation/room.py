"""How much of the window a turn has: what stands in it whatever leaves. Pure.

Promises: `spare_tokens` is what this turn's VM exchange may still take, to the last token: with that
much more in it, an epoch that keeps nothing else of older turns fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from proxy.conversation.pathpages import anchor_tokens, group_start, owner
from proxy.conversation.tree import Anchor, Node
from proxy.conversation.window import SYSTEM, Entry, Window
from proxy.memory.importance import PIN_TOKENS, is_standing
from proxy.memory.message_text import message_text
from proxy.tokens import TokenCounter

STANDING_TOKENS = 2 * PIN_TOKENS  # of standing instructions in front of a window, at most


def standing(
    anchors: Sequence[Anchor], counter: TokenCounter, max_tokens: int = STANDING_TOKENS
) -> list[Anchor]:
    """The standing instructions among these system messages, the newest ones within `max_tokens`.

    They stay in front of a window that does not hold them any more, as what a user said for all later
    answers stays in it.
    """
    found: list[Anchor] = []
    for anchor in reversed(anchors):
        if len(anchor.raw) > 16 * PIN_TOKENS:
            continue
        tokens = anchor_tokens(anchor, counter)
        message = msgspec.json.decode(anchor.raw)
        if is_standing(str(message.get("role")), message_text(message), tokens):
            max_tokens -= tokens
            if max_tokens < 0:
                break
            found.append(anchor)
    return found[::-1]


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


def spare_tokens(
    room_for_messages: int, rules_tokens: int, newest: Iterable[Entry], tail: Iterable[Entry]
) -> int:
    """Tokens that an epoch could make free for more of this turn's exchange (`tail`).

    `rules_tokens` are the developer message's with nothing in it.
    """
    kept = sum(entry.tokens for entry in newest)
    return room_for_messages - rules_tokens - kept - sum(entry.tokens for entry in tail)
