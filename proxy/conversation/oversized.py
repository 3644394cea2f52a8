"""The newest messages when they are larger than the window: media first, then the middle of texts. Pure.

Promises: what is shown of them together stays within its limit where that is possible at all; what is
not shown is named, and can be faulted in.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from proxy.conversation.effects import Effect
from proxy.conversation.pages import Page, anchor_tokens
from proxy.conversation.window import NATIVE, SYSTEM, Entry
from proxy.memory.compressor import clip
from proxy.memory.context import context_parts
from proxy.memory.models import CompressionLevel
from proxy.memory.planner import Group
from proxy.tokens import TokenCounter

if TYPE_CHECKING:
    from proxy.conversation.epoch import Epoch

# What is shown in place of a message, (its position, 0), or of the n-th system message of its page.
Cuts = dict[tuple[int, int], Entry]

_LOWER = (CompressionLevel.REDUCED, CompressionLevel.ABSTRACT, CompressionLevel.REFERENCE)
_HEAD_SHARE = 0.6  # of what is shown; the rest is the end, where a question often stands
_NOTICE_TOKENS = 48


def cut_newest(epoch: Epoch, groups: Sequence[Group], limit: int) -> Generator[Effect, Any, Cuts]:
    """The mandatory groups' messages, cut so that together they stay within `limit` tokens, with the
    system messages of their pages.

    A mixed call is reduced to the client's part of it first.
    """
    pages, counter = epoch.pages, epoch.turn.context.counter
    positions = [p for g in groups if g.mandatory for p in range(g.first, g.last)]
    notes = [(p, n) for p in positions for n in range(1, len(pages[p].notes) + 1)]
    limit -= sum(epoch.sent[p].tokens for p in positions if p in epoch.sent)  # cut before, in this turn
    positions = [p for p in positions if p not in epoch.sent]
    places = [*((p, 0) for p in positions), *notes]
    sizes = [pages.tokens(p) for p in positions]
    sizes += [anchor_tokens(pages[p].notes[n - 1], counter) for p, n in notes]
    cuts = {
        (p, 0): Entry(pages.path[p].raw, pages.tokens(p), p)
        for p in positions
        if pages.path[p].role == "assistant"
    }
    for (position, n), size, share in zip(places, sizes, fair_shares(sizes, limit), strict=True):
        if share >= size:
            continue
        texts = [page.id for page in pages[position].texts]
        if n:
            note = pages[position].notes[n - 1]
            message = cut_message(msgspec.json.decode(note.raw), texts, share, counter)
            place = (note.position, SYSTEM, note.said)
        else:
            message = yield from _degrade(epoch, position, share)
            message = cut_message(message, texts, share, counter)
            place = (position, NATIVE, b"")
        cuts[position, n] = Entry(msgspec.json.encode(message), counter.message(message), *place)
    return cuts


def _degrade(epoch: Epoch, position: int, max_tokens: int) -> Generator[Effect, Any, dict[str, Any]]:
    """The message with its media at the first level at which it fits, else at the last one."""
    message = epoch.pages[position].message
    runs = _adjacent(epoch.pages[position].media)
    for level in _LOWER if runs else ():
        parts = list(message["content"])
        for first, run in reversed(runs):
            shown = []
            for page in run:
                shown.append((yield from epoch.show(page.id, level)))
            parts[first : first + len(run)] = context_parts(epoch.pages.packer.pack(shown).parts)
        lower = {**message, "content": parts}
        if epoch.turn.context.counter.message(lower) <= max_tokens or level is _LOWER[-1]:
            return lower
    return message


def _adjacent(media: Sequence[Page]) -> list[tuple[int, list[Page]]]:
    """Media side by side in a message's content, which share one block of context, from which index."""
    runs: list[tuple[int, list[Page]]] = []
    for page in media:
        if page.medium is None or page.medium.index < 0:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == page.medium.index:
            runs[-1][1].append(page)
        else:
            runs.append((page.medium.index, [page]))
    return runs


def fair_shares(sizes: Sequence[int], budget: int) -> list[int]:
    """How much each may keep so that the sum is within `budget`: the largest give way first."""
    if sum(sizes) <= budget:
        return list(sizes)
    left, shares = budget, dict[int, int]()
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    for done, i in enumerate(order):
        shares[i] = min(sizes[i], max(0, left) // (len(sizes) - done))
        left -= shares[i]
    return [shares[i] for i in range(len(sizes))]


def cut_message(
    message: dict[str, Any], ids: Sequence[str], max_tokens: int, counter: TokenCounter
) -> dict[str, Any]:
    """The message with its longest text cut to about `max_tokens` in all; the notice names `ids`.

    Unchanged when it fits, or when there is no text to cut.
    """
    content = message.get("content")
    over = counter.message(message) - max_tokens
    if over <= 0:
        return message
    if isinstance(content, str):
        return {**message, "content": _cut(content, over, ids, counter)}
    if not isinstance(content, list):
        return message
    texts = [
        (len(part["text"]), -i)
        for i, part in enumerate(content)
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]
    if not texts:
        return message
    longest = -max(texts)[1]
    parts = list(content)
    parts[longest] = {**parts[longest], "text": _cut(parts[longest]["text"], over, ids, counter)}
    return {**message, "content": parts}


def _cut(text: str, over_tokens: int, ids: Sequence[str], counter: TokenCounter) -> str:
    """The head and the end of a text; the middle stays in its pages."""
    total = counter.text(text)
    keep = max(16, total - over_tokens - _NOTICE_TOKENS)
    if keep >= total:
        return text
    head = clip(text, int(keep * _HEAD_SHARE), counter.text)
    tail_chars = int(len(text) * keep * (1 - _HEAD_SHARE) / total)
    while tail_chars > 0 and counter.text(text[-tail_chars:]) > keep * (1 - _HEAD_SHARE):
        tail_chars = int(tail_chars * 0.9)
    tail = text[-tail_chars:] if tail_chars else ""
    span = ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
    return f"{head}\n[... about {total - keep} tokens are not shown; the whole is in {span} ...]\n{tail}"
