"""The newest messages when they are larger than the window: media first, then the middle of texts.

Promises: pure; what is shown of them together stays within its limit where that is possible at all;
what is not shown is named, and can be faulted in.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import msgspec

from proxy.conversation.cut import cut_message, fair_shares
from proxy.conversation.effects import Effect
from proxy.conversation.epoch_request import EpochRequest, show
from proxy.conversation.mediapages import MediaPage
from proxy.conversation.pathpages import anchor_tokens
from proxy.conversation.window import NATIVE, SYSTEM, Entry
from proxy.memory.context import context_parts
from proxy.memory.models import CompressionLevel
from proxy.memory.planner import Group

# What is shown in place of a message, (its position, 0), or of the n-th system message of its page.
Cuts = dict[tuple[int, int], Entry]

_LOWER = (CompressionLevel.REDUCED, CompressionLevel.ABSTRACT, CompressionLevel.REFERENCE)


def cut_newest(
    request: EpochRequest, groups: Sequence[Group], limit: int
) -> Generator[Effect, Any, Cuts]:
    """The mandatory groups' messages, cut so that together they stay within `limit` tokens, with the
    system messages of their pages.

    A mixed call is reduced to the client's part of it first.
    """
    pages, counter = request.pages, request.counter
    positions = [p for g in groups if g.mandatory for p in range(g.first, g.last)]
    told = positions
    if request.newest is not None:  # cut before, in this turn
        positions = [p for p in positions if p != len(pages.path) - 1]
        limit -= request.newest.tokens
    notes = [(p, n) for p in told for n in range(1, len(pages.notes(p)) + 1)]
    places = [*((p, 0) for p in positions), *notes]
    sizes = [pages.tokens(p) for p in positions]
    sizes += [anchor_tokens(pages.notes(p)[n - 1], counter) for p, n in notes]
    cuts = {
        (p, 0): Entry(pages.path[p].raw, pages.tokens(p), p)
        for p in positions
        if pages.path[p].role == "assistant"
    }
    for (position, n), size, share in zip(places, sizes, fair_shares(sizes, limit), strict=True):
        if share >= size:
            continue
        texts = pages.ids(position)[: len(pages.parts(position))]
        if n:
            note = pages.notes(position)[n - 1]
            message = cut_message(msgspec.json.decode(note.raw), texts, share, counter)
            place = (note.position, SYSTEM, note.said)
        else:
            message = yield from _degrade(request, position, share)
            message = cut_message(message, texts, share, counter)
            place = (position, NATIVE, b"")
        cuts[position, n] = Entry(msgspec.json.encode(message), counter.message(message), *place)
    return cuts


def _degrade(
    request: EpochRequest, position: int, max_tokens: int
) -> Generator[Effect, Any, dict[str, Any]]:
    """The message with its media at the first level at which it fits, else at the last one."""
    message = request.pages.message(position)
    media = [medium for medium in request.pages.media(position) if medium.index >= 0]
    for level in _LOWER if media else ():
        parts = list(message["content"])
        for run in reversed(_adjacent(media)):
            shown = []
            for medium in run:
                shown.append((yield from show(request, medium.page_id, level)))
            packed = request.pages.packer.pack(shown)
            parts[run[0].index : run[-1].index + 1] = context_parts(packed.parts)
        lower = {**message, "content": parts}
        if request.counter.message(lower) <= max_tokens or level is _LOWER[-1]:
            return lower
    return message


def _adjacent(media: Sequence[MediaPage]) -> list[list[MediaPage]]:
    """Media side by side in a message's content, which share one block of context."""
    runs: list[list[MediaPage]] = []
    for medium in media:
        if runs and runs[-1][-1].index + 1 == medium.index:
            runs[-1].append(medium)
        else:
            runs.append([medium])
    return runs
