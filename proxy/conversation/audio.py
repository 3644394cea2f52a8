"""Spoken answers in later requests: by their id while upstream keeps them, then by their words. Pure.

Promises: an id that upstream still knows goes as it came; one that it does not is replaced by the
transcript that it gave with the answer; an id whose answer was never seen here stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from proxy.conversation.records import Record
from proxy.conversation.tree import Node

_decode, _encode = msgspec.json.decode, msgspec.json.encode
GetRecord = Callable[[bytes], Record | None]


def with_transcripts(
    messages: bytes, path: Sequence[Node], get: GetRecord | None, now_s: float, usable: bool
) -> bytes:
    """The messages array with words in place of audio that is gone.

    `usable` False: upstream refused an id, so all of them are replaced. `now_s` is compared with each
    answer's `expires_at` (Unix seconds). Bytes without assistant audio come back as they are.
    """
    if get is None or b'"audio"' not in messages:
        return messages
    decoded = _decode(messages)
    spoken = [m for m in decoded if m.get("role") == "assistant" and _audio_id(m) is not None]
    if not spoken:
        return messages
    wanted = {_audio_id(m) for m in spoken}
    known = _answers(path, get, wanted)
    changed = False
    for message in spoken:
        audio = message["audio"]
        answer = known.get(_audio_id(message), audio)
        words = answer.get("transcript")
        if isinstance(words, str) and (not usable or _expired(answer, now_s)):
            del message["audio"]
            text = message.get("content")
            message["content"] = f"{text}\n\n{words}" if isinstance(text, str) and text else words
            changed = True
        elif len(audio) > 1:  # an answer of ours, whole: a request names only its id
            message["audio"] = {"id": audio["id"]}
            changed = True
    return _encode(decoded) if changed else messages


def _answers(
    path: Sequence[Node], get: GetRecord, wanted: set[str | None]
) -> dict[str | None, dict[str, Any]]:
    """The audio of the answers on the path, as upstream gave it, by id."""
    found: dict[str | None, dict[str, Any]] = {}
    for node in reversed(path):
        if node.role != "assistant" or b'"audio"' not in node.raw:
            continue
        record = get(node.id)
        raw = record.raws[-1] if record is not None else node.raw
        message = _decode(raw)
        audio_id = _audio_id(message)
        if audio_id in wanted:
            found[audio_id] = message["audio"]
            if len(found) == len(wanted):
                break
    return found


def _audio_id(message: dict[str, Any]) -> str | None:
    audio = message.get("audio")
    found = audio.get("id") if isinstance(audio, dict) else None
    return found if isinstance(found, str) else None


def _expired(audio: dict[str, Any], now_s: float) -> bool:
    expires = audio.get("expires_at")
    return isinstance(expires, int | float) and expires <= now_s
