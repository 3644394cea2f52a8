"""A path's messages seen as pages: ids, texts, levels and sizes. Pure; bodies are on the path.

Promises: a page's id and text depend only on its message and on `pages.max_tokens`, never on the
window; a page at level 0 is the whole text; a tool's result is never shown without its call, nor a
call without its results (invariant 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from proxy.conversation.tree import Node
from proxy.memory.compressor import compress_text
from proxy.memory.context_packer import context_line
from proxy.memory.models import CompressionLevel, Modality
from proxy.memory.pages import Doc, message_text, modality_of, page_id, parse_page_id, split_text
from proxy.tokens import TokenCounter

RESULT_ROLES = ("tool", "function")  # what answers a call stands after it, in one group

_KEPT_TEXTS = 2048  # compressed pages remembered: the same pages are shown epoch after epoch

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class PathPages:
    """Pages of `path`; texts are computed when asked for and kept for one request."""

    def __init__(self, path: Sequence[Node], counter: TokenCounter, page_tokens: int) -> None:
        self.path = path
        self._counter = counter
        self._page_tokens = page_tokens
        self._messages: dict[int, dict[str, Any]] = {}
        self._parts: dict[int, list[str]] = {}

    def message(self, position: int) -> dict[str, Any]:
        found = self._messages.get(position)
        if found is None:
            found = self._messages[position] = _decode(self.path[position].raw)
        return found

    def tokens(self, position: int) -> int:
        """Tokens of the native message; counted once in the node's life."""
        node = self.path[position]
        if node.tokens < 0:
            node.tokens = self._counter.message(self.message(position))
        return node.tokens

    def parts(self, position: int) -> list[str]:
        """The message's text, cut into pages when it is too large for one."""
        found = self._parts.get(position)
        if found is None:
            text = message_text(self.message(position))
            small = self.tokens(position) <= self._page_tokens or len(text) <= self._page_tokens
            found = [text] if small else split_text(text, self._page_tokens, self._counter.text)
            self._parts[position] = found
        return found

    def ids(self, position: int) -> tuple[str, ...]:
        """The page ids of a message: one, or one for each part."""
        count = 1 if self.tokens(position) <= self._page_tokens else len(self.parts(position))
        if count == 1:
            return (page_id(position),)
        return tuple(page_id(position, part) for part in range(1, count + 1))

    def modality(self, position: int) -> Modality:
        return modality_of(self.message(position))

    def locate(self, wanted: str) -> list[tuple[int, int]]:
        """(position, part) of each page that an id names: all parts for a cut message's own id."""
        place = parse_page_id(wanted)
        if place is None or place[0] >= len(self.path):
            return []
        position, part = place
        count = len(self.ids(position))
        if part == 0:
            return [(position, p) for p in (range(1, count + 1) if count > 1 else (0,))]
        return [(position, part if count > 1 else 0)] if part <= count else []

    def pages(self, first: int, last: int) -> Iterator[Doc]:
        """The pages of positions first..last-1, for the search index. Keeps nothing in memory."""
        for position in range(first, last):
            message = self.message(position)
            name = message.get("name")
            parts = self.parts(position)
            for index, text in enumerate(parts, 1):
                part = index if len(parts) > 1 else 0
                role = self.path[position].role
                yield Doc(position, part, role, name if isinstance(name, str) else "", text)
            self._messages.pop(position, None)
            self._parts.pop(position, None)

    def text(self, position: int, part: int, level: CompressionLevel | int) -> str:
        """A page at a level, shown with the call that it answers or the results of its calls."""
        parts = self.parts(position)
        text = parts[part - 1 if part else 0]
        if part <= 1:
            text = self._call_of(position) + text
        if part in (0, len(parts)):
            text += self._results_of(position)
        return _at_level(text, int(level), self._counter)

    def line(self, position: int, part: int, level: CompressionLevel | int) -> str:
        """The page as a line of <VM:CONTEXT>."""
        text = self.text(position, part, level)
        role = self.path[position].role
        return context_line(page_id(position, part), role, text, level, self.modality(position))

    def _call_of(self, position: int) -> str:
        """`name(arguments) -> ` for a tool's result."""
        if self.path[position].role != "tool":
            return ""
        call_id = self.message(position).get("tool_call_id")
        at = position - 1
        while at >= 0 and self.path[at].role == "tool":
            at -= 1
        for call in _calls(self.message(at)) if at >= 0 else ():
            if call.get("id") == call_id:
                text = message_text({"tool_calls": [call]})
                return compress_text(text, 0 if len(text) < 400 else 1, 100, self._count) + " -> "
        return ""

    def _results_of(self, position: int) -> str:
        """The results of an assistant message's calls, shortened when they are long."""
        if not _calls(self.message(position)):
            return ""
        out = ""
        at = position + 1
        while at < len(self.path) and self.path[at].role == "tool":
            text = message_text(self.message(at))
            level = 0 if len(text) < 400 else 1
            out += "\n-> " + compress_text(text, level, 100, self._count)
            at += 1
        return out

    @property
    def _count(self) -> Callable[[str], int]:
        return self._counter.text


@lru_cache(maxsize=_KEPT_TEXTS)
def _at_level(text: str, level: int, counter: TokenCounter) -> str:
    return compress_text(text, level, None, counter.text)


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def groups_of(path: Sequence[Node], first: int, last: int) -> list[tuple[int, int]]:
    """(first, last) of each group in positions first..last-1: a message with the results after it."""
    groups: list[tuple[int, int]] = []
    at = first
    while at < last:
        end = at + 1
        while end < last and path[end].role in RESULT_ROLES:
            end += 1
        groups.append((at, end))
        at = end
    return groups


def group_start(path: Sequence[Node], position: int) -> int:
    """Where the group of the message at `position` begins."""
    while position > 0 and path[position].role in RESULT_ROLES:
        position -= 1
    return position
