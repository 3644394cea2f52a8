"""A message larger than the window: shown by its ends, the middle stays in pages. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.memory.compressor import clip
from proxy.tokens import TokenCounter

_HEAD_SHARE = 0.6  # of what is shown; the rest is the end, where a question often stands
_NOTICE_TOKENS = 48


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
