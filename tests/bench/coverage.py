"""What of an old message a request shows, and whether an answer has what the gold answer says. Pure.

Promises: a message counts as shown where its whole text stands in the request's messages, whatever it is
wrapped in: as it was, JSON-quoted once or twice, with its blanks folded, or in consecutive pieces (a page is a
part of a long message). Nothing is known of the proxy's own formats, so that they may change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_ESCAPED = re.compile(r"\\+u([0-9a-fA-F]{4})")
_IDLE = re.compile(r"\\+[nrtbf]|[\\\s]+")  # an escape of a blank; blanks; what escapes a quote or itself
_PIECE_CHARS = 100  # of a piece at least, but the last: shorter ones stand anywhere
_WORD = re.compile(r"[a-z0-9]+")
_RIGHT_SHARE = 2 / 3
_STOP = frozenset(
    "a an and are as at be been but by did do does for from had has have he her hers him his i in is it its me my "
    "of on or our she so that the their them they this to was we were will with would you your".split()
)


def folded(text: str) -> str:
    """A text without blanks and JSON's escapes: equal for a text and for its quotation."""
    unescaped = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) if "\\" in text else text
    return _IDLE.sub("", unescaped)


def window_text(request: dict[str, Any]) -> str:
    """All that a request's messages say, folded; what they call their tools with too."""
    return folded("\n".join(_said(message) for message in request["messages"]))


def _said(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text") or "") for part in content)
    calls = message.get("tool_calls")
    return f"{content or ''}\n{json.dumps(calls, ensure_ascii=False) if calls else ''}"


def shows(window: str, text: str) -> bool:
    """Whether a `folded` text stands whole in the folded window."""
    if text in window:
        return True
    while len(text) > _PIECE_CHARS:
        if text[:_PIECE_CHARS] not in window:
            return False
        low, high = _PIECE_CHARS, len(text)  # the longest beginning that is there
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if text[:middle] in window else (low, middle - 1)
        text = text[low:]
    return text in window


def share_shown(window: str, texts: Sequence[str]) -> float:
    """0..1 of the folded texts that the folded window shows."""
    return sum(shows(window, text) for text in texts) / len(texts)


def is_right(answer: str, gold: str) -> bool:
    """Two thirds of the gold answer's key words (its words without stop words) stand in the answer."""
    words = _WORD.findall(gold.lower())
    keys = set(words) - _STOP or set(words)
    return len(keys & set(_WORD.findall(answer.lower()))) >= _RIGHT_SHARE * len(keys)
