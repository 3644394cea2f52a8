"""From Chat Completions messages to pages: ids, readable text, modality and the parts of a long
message.

Promises: a message's id and its position are one-to-one; any JSON object that can stand in `messages` has a
text (nothing raises on unknown parts); `split_text` loses and adds no character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from proxy.memory.models import MEDIA_PART, ContextPrefix, Modality


class Doc(NamedTuple):
    """One page's bare text and place. Part 0 is a whole message; 1, 2, ... are the parts of one too
    large for a page."""

    position: int
    part: int
    role: str
    name: str
    text: str


class Hit(NamedTuple):
    """One page found. `score` orders the hits of one search (higher is better) and has no unit.

    `evidence`: the summed rarity of the query's content terms that the page itself contains, in
    units of a term that stands on one page only. It tells a question from small talk ("Tell me
    more" has one common term); 0 for a page found by its neighbours alone.
    """

    position: int
    part: int
    score: float
    evidence: float = 0.0


MIN_SPLIT_TOKENS = 8  # one character can be several tokens; below this a part could not hold one
_MAX_ID_DIGITS = 9


_MEDIA_ID_PREFIXES = ("img", "aud", "vid", "file")


def page_id(position: int, part: int = 0) -> str:
    """The id of the message at the 0-based `position` along the path: 0 -> "msg_0001"; part 2 ->
    "msg_0001.2". A medium's id is `media_page_id`'s to make: ValueError.
    """
    if not part:
        return f"msg_{position + 1:04d}"
    if part >= MEDIA_PART:
        raise ValueError("a medium's page id needs its prefix: see media_page_id")
    return f"msg_{position + 1:04d}.{part}"


def media_page_id(position: int, number: int, prefix: str) -> str:
    """The id of the `number`-th medium (from 1, all kinds counted together) of the message at
    `position`: (41, 1, "img") -> "img_0042_1". The prefix is img, aud, vid or file, else ValueError.
    """
    if prefix not in _MEDIA_ID_PREFIXES or number < 1:
        raise ValueError(f"no medium has the page id prefix {prefix!r} and the number {number}")
    return f"{prefix}_{position + 1:04d}_{number}"


def parse_page_id(text: str) -> tuple[int, int] | None:
    """(position, part) of a message's or a medium's page id, leading zeros optional; a medium's part
    is MEDIA_PART + its number. None for other strings, derived pages included.
    """
    if text.startswith("msg_"):
        number, mark, part = text[4:].partition(".")
        first = 0
    else:
        prefix, _, rest = text.partition("_")
        if prefix not in _MEDIA_ID_PREFIXES:
            return None
        number, mark, part = rest.partition("_")
        if not mark:
            return None
        first = MEDIA_PART
    if not (_is_number(number) and (not mark or _is_number(part))):
        return None
    position, piece = int(number) - 1, int(part) if mark else 0
    if position < 0 or piece >= MEDIA_PART or (mark and piece < 1):
        return None
    return position, first + piece


def canonical_page_id(text: str) -> str:
    """A message's or a medium's page id in the form that we write ("msg_42" -> "msg_0042",
    "img_42_01" -> "img_0042_1"); any other string as it is.
    """
    place = parse_page_id(text)
    if place is None:
        return text
    position, part = place
    if part < MEDIA_PART:
        return page_id(position, part)
    return media_page_id(position, part - MEDIA_PART, text.partition("_")[0])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_ID_DIGITS


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
        pieces.append(content)
    elif isinstance(content, list):
        pieces.extend(_part_text(part, media.get(i, "")) for i, part in enumerate(content))
    elif content is not None:
        pieces.append(_compact(content))
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
        return _compact(part)
    for key in ("text", "refusal"):
        value = part.get(key)
        if isinstance(value, str):
            return value
    modality = _part_modality(part)
    if modality is not None:
        return _placeholder(modality.value, page)
    if part.get("type") == "file":
        file = part.get("file")
        name = file.get("filename") or file.get("file_id") if isinstance(file, Mapping) else None
        shown = f"{page} {name}".strip() if isinstance(name, str) else page
        return _placeholder("file", shown)
    return f"[{part.get('type', 'part')}]"


def _call_text(call: Any) -> str:
    if not isinstance(call, Mapping):
        return _compact(call)
    function = call.get("function")
    if isinstance(function, Mapping):
        return _function_text(function)
    custom = call.get("custom")
    if isinstance(custom, Mapping):
        return f"{custom.get('name', '')}({custom.get('input', '')})"
    return _compact(call)


def _function_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments", "")
    shown = arguments if isinstance(arguments, str) else _compact(arguments)
    return f"{function.get('name', '')}({shown})"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


_PART_MODALITY = {
    "image_url": Modality.IMAGE,
    "image": Modality.IMAGE,
    "input_image": Modality.IMAGE,
    "input_audio": Modality.AUDIO,
    "audio": Modality.AUDIO,
    "video_url": Modality.VIDEO,
    "video": Modality.VIDEO,
    "input_video": Modality.VIDEO,
}


def _part_modality(part: Mapping[str, Any]) -> Modality | None:
    kind = part.get("type")
    return _PART_MODALITY.get(kind) if isinstance(kind, str) else None


def modality_of(message: Mapping[str, Any]) -> Modality:
    """TEXT for anything with words of its own; else the first medium; JSON in a tool's result is
    STRUCTURED.
    """
    content = message.get("content")
    if isinstance(content, str):
        if message.get("role") in ("tool", "function") and _looks_like_json(content):
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
            first = first or _part_modality(part)
    if first is None and isinstance(message.get("audio"), Mapping):
        first = Modality.AUDIO
    return first or Modality.TEXT


def _looks_like_json(text: str) -> bool:
    stripped = text.strip()
    return (stripped[:1], stripped[-1:]) in (("{", "}"), ("[", "]"))


_MEDIA_PREFIX = {
    Modality.IMAGE: ContextPrefix.IMAGE,
    Modality.AUDIO: ContextPrefix.AUDIO,
    Modality.VIDEO: ContextPrefix.VIDEO,
    Modality.STRUCTURED: ContextPrefix.STRUCTURED,
}
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
    medium = _MEDIA_PREFIX.get(modality)
    return medium if medium is not None else _ROLE_PREFIX.get(role, ContextPrefix.SUMMARY)


_SENTENCE_END = re.compile(r"[.!?。！？…][\"')\]”’]*\s+|[。！？]")
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
