"""The media in a message: each image, sound, video and file is a page of its own. Pure.

Promises: a media page's content is the client's own part, untouched; its number counts the media of
its message from 1; nothing raises on parts that no provider has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.media.parts import read_part
from proxy.memory.ids import MEDIA_KINDS, media_page_id
from proxy.memory.models import MEDIA_PART, Modality
from proxy.tokens import TokenCounter


@dataclass(frozen=True, slots=True)
class MediaPage:
    """One medium. `part` is its place in a search hit; `content` a content part of a request."""

    page_id: str
    part: int
    index: int  # of the part in the message's content; -1 for an answer's own sound
    modality: Modality
    content: dict[str, Any]
    tokens: int
    name: str = ""
    transcript: str = ""


def media_pages(
    position: int, message: Mapping[str, Any], counter: TokenCounter
) -> tuple[MediaPage, ...]:
    """The media of the message at `position`, in order."""
    found: list[MediaPage] = []
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        medium = read_part(part) if isinstance(part, dict) else None
        if medium is None:
            continue
        prefix, modality = MEDIA_KINDS[medium.kind]
        number = len(found) + 1
        found.append(
            MediaPage(
                media_page_id(position, number, prefix),
                MEDIA_PART + number,
                index,
                modality,
                part,
                counter.part(part),
                medium.name or "",
            )
        )
    spoken = message.get("audio")
    if isinstance(spoken, Mapping) and isinstance(spoken.get("data"), str):
        number = len(found) + 1
        part = {"type": "input_audio", "input_audio": {"data": spoken["data"], "format": "wav"}}
        words = spoken.get("transcript")
        found.append(
            MediaPage(
                media_page_id(position, number, "aud"),
                MEDIA_PART + number,
                -1,
                Modality.AUDIO,
                part,
                counter.part(part),
                transcript=words if isinstance(words, str) else "",
            )
        )
    return tuple(found)
