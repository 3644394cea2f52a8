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
from proxy.conversation.window import Entry
from proxy.memory.context_packer import context_parts
from proxy.memory.models import CompressionLevel
from proxy.memory.planner import Group

_LOWER = (CompressionLevel.REDUCED, CompressionLevel.ABSTRACT, CompressionLevel.REFERENCE)


def cut_newest(
    request: EpochRequest, groups: Sequence[Group], limit: int
) -> Generator[Effect, Any, dict[int, Entry]]:
    """The mandatory groups' messages, by position, cut so that together they stay within `limit`
    tokens.

    A mixed call is reduced to the client's part of it first.
    """
    pages, counter = request.pages, request.counter
    positions = [p for g in groups if g.mandatory for p in range(g.first, g.last)]
    if request.newest is not None:  # cut before, in this turn
        positions = [p for p in positions if p != len(pages.path) - 1]
        limit -= request.newest.tokens
    sizes = [pages.tokens(p) for p in positions]
    cuts = {
        p: Entry(pages.path[p].raw, size, p)
        for p, size in zip(positions, sizes, strict=True)
        if pages.path[p].role == "assistant"
    }
    for position, size, share in zip(positions, sizes, fair_shares(sizes, limit), strict=True):
        if share < size:
            message = yield from _degrade(request, position, share)
            texts = pages.ids(position)[: len(pages.parts(position))]
            message = cut_message(message, texts, share, counter)
            cuts[position] = Entry(msgspec.json.encode(message), counter.message(message), position)
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
