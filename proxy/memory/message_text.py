"""A message as text: its words, its modality, the letter of its line, and its parts when it is long.

Promises: any JSON object that can stand in `messages` has a text and a modality (nothing raises on
unknown parts); `split_text` loses and adds no character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from proxy.media.parts import kind_of, read_part
from proxy.memory.ids import MEDIA_KINDS
from proxy.memory.levels_json import looks_like_json
from proxy.memory.models import ContextPrefix, Modality, json_text
from proxy.memory.words import SENTENCE_END

MIN_SPLIT_TOKENS = 8  # one character can be several tokens; below this a part could not hold one

_NO_NAMES: Mapping[int, str] = {}


def message_text(message: Mapping[str, Any], media: Mapping[int, str] = _NO_NAMES) -> str:
    """Readable text of a message: content, placeholders for media, refusal, tool calls as
    `name(arguments)`.

    `media` gives page ids by the index of their part in the content (-1: the message's audio), which
    the placeholders then name.
    """
    pieces = []
    content = message.get("content")
    if isinstance(content, str):
        if len(message) == 2 and "role" in message:  # most are no more than that
            return content
        pieces.append(content)
    elif isinstance(content, list):
        pieces.extend(_part_text(part, media.get(i, "")) for i, part in enumerate(content))
    elif content is not None:
        pieces.append(json_text(content))
    refusal = message.get("refusal")
    if isinstance(refusal, str):
        pieces.append(refusal)
    audio = message.get("audio")
    if isinstance(audio, Mapping):
        transcript = audio.get("transcript")
        shown = _placeholder("audio", media.get(-1, ""))
        pieces.append(f"{shown} {transcript}" if isinstance(transcript, str) else shown)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        pieces.extend(_call_text(call) for call in calls)
    legacy = message.get("function_call")
    if isinstance(legacy, Mapping):
        pieces.append(_function_text(legacy))
    return "\n".join(piece for piece in pieces if piece)


def _placeholder(kind: str, name: str) -> str:
    return f"[{kind} {name}]" if name else f"[{kind}]"


def _part_text(part: Any, page: str = "") -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return json_text(part)
    for key in ("text", "refusal"):
        value = part.get(key)
        if isinstance(value, str):
            return value
    kind = kind_of(part)
    if kind is None:
        return f"[{part.get('type', 'part')}]"
    if kind == "file":
        medium = read_part(part)
        page = f"{page} {medium.name or ''}".strip() if medium else page
    return _placeholder(kind, page)


def _call_text(call: Any) -> str:
    if not isinstance(call, Mapping):
        return json_text(call)
    function = call.get("function")
    if isinstance(function, Mapping):
        return _function_text(function)
    custom = call.get("custom")
    if isinstance(custom, Mapping):
        return f"{custom.get('name', '')}({custom.get('input', '')})"
    return json_text(call)


def _function_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments", "")
    shown = arguments if isinstance(arguments, str) else json_text(arguments)
    return f"{function.get('name', '')}({shown})"


def modality_of(message: Mapping[str, Any]) -> Modality:
    """TEXT for anything with words of its own; else the first medium; JSON in a tool's result is
    STRUCTURED.
    """
    content = message.get("content")
    if isinstance(content, str):
        if message.get("role") in ("tool", "function") and looks_like_json(content):
            return Modality.STRUCTURED
        return Modality.TEXT
    first: Modality | None = None
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping):
                continue
            text = part.get("text")
            if isinstance(text, str) and text.strip():
                return Modality.TEXT
            kind = kind_of(part)
            first = first or (MEDIA_KINDS[kind].modality if kind and kind != "file" else None)
    if first is None and isinstance(message.get("audio"), Mapping):
        first = Modality.AUDIO
    return first or Modality.TEXT


_ROLE_PREFIX = {
    "user": ContextPrefix.USER,
    "assistant": ContextPrefix.ASSISTANT,
    "tool": ContextPrefix.TOOL,
    "function": ContextPrefix.TOOL,
}


def prefix_of(role: str, modality: Modality = Modality.TEXT) -> ContextPrefix:
    """The letter of a page in <VM:CONTEXT>: its medium, else its role; S (summary) for any other
    role.
    """
    if modality is not Modality.TEXT:
        return ContextPrefix[modality.name]
    return _ROLE_PREFIX.get(role, ContextPrefix.SUMMARY)


_SENTENCE_END = re.compile(SENTENCE_END)
_SPACE = re.compile(r"\s")
_FIRST_GUESS_CHARS_PER_TOKEN = 4.0
_MAX_CHARS_PER_TOKEN = 32.0


def split_text(text: str, max_tokens: int, count: Callable[[str], int]) -> list[str]:
    """Cut `text` into parts of at most `max_tokens` (as `count` counts) whose concatenation is the
    text.

    Cuts after a paragraph, line, sentence or word where one ends in the second half of the part,
    else between characters. Each call of `count` gets at most a few parts' worth of text.
    ValueError below MIN_SPLIT_TOKENS.
    """
    if max_tokens < MIN_SPLIT_TOKENS:
        raise ValueError(f"max_tokens must be at least {MIN_SPLIT_TOKENS}")
    parts: list[str] = []
    start, chars_per_token = 0, _FIRST_GUESS_CHARS_PER_TOKEN
    while start < len(text):
        part, tokens = _next_part(text, start, max_tokens, count, chars_per_token)
        parts.append(part)
        start += len(part)
        chars_per_token = min(_MAX_CHARS_PER_TOKEN, max(0.2, len(part) / max(1, tokens)))
    return parts or [""]


def _next_part(
    text: str, start: int, max_tokens: int, count: Callable[[str], int], chars_per_token: float
) -> tuple[str, int]:
    """The part that begins at `start`, and its tokens: guess a length, count, correct; a few counts
    at most.
    """
    length = max(1, int(max_tokens * chars_per_token * 0.95))
    best, best_tokens = "", 0
    for _ in range(4):
        window = text[start : start + length]
        at_end = start + length >= len(text)
        part = window if at_end else window[: _cut(window)]
        tokens = count(part)
        if tokens <= max_tokens:
            best, best_tokens = part, tokens
            if at_end or tokens >= 0.7 * max_tokens:
                return best, best_tokens
            longer = int(len(part) * min(8.0, 0.95 * max_tokens / max(1, tokens)))
            if longer <= len(window):
                return best, best_tokens
            length = longer
        elif best:
            return best, best_tokens
        else:
            length = max(1, min(len(part) - 1, int(len(part) * 0.95 * max_tokens / tokens)))
    while not best:
        part = text[start : start + length]
        tokens = count(part)
        if tokens <= max_tokens or length == 1:
            return part, tokens
        length = max(1, length // 2)
    return best, best_tokens


def _cut(window: str) -> int:
    """Where to end a part that may be as long as `window`: after the strongest boundary in its
    second half.
    """
    half = len(window) // 2
    for mark in ("\n\n", "\n"):
        at = window.rfind(mark, half)
        if at >= 0:
            return at + len(mark)
    for pattern in (_SENTENCE_END, _SPACE):
        last = 0
        for match in pattern.finditer(window, half):
            last = match.end()
        if last:
            return last
    return max(1, len(window))
