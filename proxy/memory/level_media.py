"""Levels of images, sound and film: a smaller picture or the words, a caption, a reference.

Promises: level 1 of a picture is a content part that any provider of the original takes, and costs
less than the original or is the original; words come from the page's metadata where it has them
("caption", "transcript", "summary", "topic"), else from the medium's own facts; levels 2 and 3 are
text. See `level_base` for what holds for every compressor.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any, Literal

from proxy.media.clips import Frame, audio_seconds, keyframes, video_info
from proxy.media.images import image_format, image_size, thumbnail
from proxy.media.parts import Medium, read_part
from proxy.memory.compressor import ABSTRACT_TOKENS, clip, compress_text
from proxy.memory.level_base import Step, StepCompressor, content_tokens, said, words_of
from proxy.memory.level_text import size_shown
from proxy.memory.models import CompressionLevel, MemoryPage

MAX_KEYFRAMES = 4
REFERENCE_TOKENS = 16  # a duration and a topic
_TOPIC_TOKENS = 10
_SIDES_PX = (512, 384, 256, 192, 128)  # 512: what low detail is scaled to where it has a rule
_SCENES_AT = "; scenes at "
_LINK = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.\-]{1,15}://")
_PART_KEYS = {"image": "image_url", "audio": "audio_url", "video": "video_url"}


class ImageCompressor(StepCompressor):
    """Thumbnail at low detail, caption, `image:{page_id}`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """The picture's size and format."""
        medium = medium_of(page, "image")
        if medium is None:
            return {}
        facts = [medium.name] if medium.name else []
        data = medium.data
        if data is not None:
            size = image_size(data)
            facts += [f"{size[0]}x{size[1]}"] if size else []
            facts += [image_format(data) or medium.mime, size_shown(len(data))]
        elif medium.url:
            facts.append(_shown_link(medium.url))
        return {"facts": _line("image", facts)}

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `level_base`."""
        count = step.counts.text
        reference = f"image:{page.page_id}"
        if step.level == CompressionLevel.REFERENCE and count(reference) <= step.limit:
            return reference
        medium = medium_of(page, "image")
        if step.level == CompressionLevel.REDUCED and medium is not None:
            if not step.is_last:
                return None
            part = self._smaller(page, medium, step)
            if part is not None:
                return part
        return _words(page, step, reference, "caption", "summary")

    def _smaller(self, page: MemoryPage, medium: Medium, step: Step) -> dict[str, Any] | None:
        """The first candidate at half the cost, else the cheapest; the original when none is
        cheaper, None when not even that fits.

        A picture is not made cheaper than a caption: below that, the caption says more.
        """
        best, best_cost, floor = None, step.limit, min(ABSTRACT_TOKENS, step.limit)
        for part in _smaller_images(medium):
            cost = step.counts.part(part)
            if not floor <= cost <= step.limit:
                continue
            if cost * 2 <= step.limit:
                return part
            if cost < best_cost or best is None:
                best, best_cost = part, cost
        if best is None and isinstance(page.content, dict):
            cost = step.counts.part(page.content)
            return page.content if floor <= cost <= step.limit else None
        return best


class AudioCompressor(StepCompressor):
    """Transcript, summary, `audio 0:42, topic`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """The duration, and the transcript when the part carries it."""
        medium = medium_of(page, "audio")
        if medium is None:
            return {}
        data = medium.data
        seconds = audio_seconds(data, medium.format) if data is not None else None
        facts = [clock(seconds)] if seconds is not None else []
        learned = {"duration": clock(seconds)} if seconds is not None else {}
        learned["facts"] = _line("audio", [*facts, (medium.format or medium.mime).upper()])
        if medium.transcript and not said(page.metadata, "transcript"):
            learned["transcript"] = medium.transcript
        return learned

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `level_base`."""
        count = step.counts.text
        transcript = said(page.metadata, "transcript")
        if not transcript and "facts" not in page.metadata:
            transcript = words_of(page.content)
        if step.level == CompressionLevel.REFERENCE:
            head = _line("audio", [said(page.metadata, "duration")])
            topic = _topic(page, transcript, step)
            if count(head) <= step.limit:  # else the few words themselves say more
                line = f"{head}, {topic}" if topic else head
                return clip(line, min(step.limit, REFERENCE_TOKENS), count)
        if step.level == CompressionLevel.REDUCED and transcript:
            if count(transcript) <= step.limit:
                return transcript
            return compress_text(transcript, step.level, step.limit, count)
        if transcript and not said(page.metadata, "summary"):
            return compress_text(transcript, step.level, step.limit, count)
        return _words(page, step, "", "summary", "caption")


class VideoCompressor(StepCompressor):
    """Keyframes with their times, scene descriptions, `video:{page_id}`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """Duration, size and format."""
        medium = medium_of(page, "video")
        if medium is None:
            return {}
        data, facts, head = medium.data, [], "video"
        info = video_info(data) if data is not None else None
        if info is not None:
            head = f"video {clock(info.seconds)}"
            facts.append(f"{info.width}x{info.height}")
        if data is not None:
            facts += [medium.mime.rpartition("/")[2].upper(), size_shown(len(data))]
        elif medium.url:
            facts.append(_shown_link(medium.url))
        return {"facts": _line(head, facts)}

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `level_base`."""
        reference = f"video:{page.page_id}"
        is_reference = step.level == CompressionLevel.REFERENCE
        if is_reference and step.counts.text(reference) <= step.limit:
            return reference
        medium = medium_of(page, "video")
        if step.level == CompressionLevel.REDUCED and medium is not None and medium.data:
            if not step.is_last:
                return None
            shown = self._frames(page, medium.data, step)
            if shown is not None:
                return shown
        # Looking for the scenes decodes the film: not for the sake of a size.
        if step.is_last and not said(page.metadata, "summary", "caption"):
            page = page.model_copy(update={"metadata": {**page.metadata, **_scenes(page, medium)}})
        return _words(page, step, reference, "summary", "caption")

    def _frames(self, page: MemoryPage, data: bytes, step: Step) -> list[dict[str, Any]] | None:
        """As many frames as are cheaper than the film, at the largest size that is."""
        frames = keyframes(data, MAX_KEYFRAMES, _SIDES_PX[0])
        for count in range(len(frames), 0, -1):
            kept = [frames[index * len(frames) // count] for index in range(count)]
            times = ", ".join(clock(frame.second) for frame in kept)
            line = f"{said(page.metadata, 'facts')}{_SCENES_AT}{times}"
            for side in _SIDES_PX[::2]:
                images = [_image_part(_frame_url(frame, side)) for frame in kept]
                parts: list[dict[str, Any]] = [{"type": "text", "text": line}, *images]
                cost = content_tokens(parts, step.counts)
                if min(ABSTRACT_TOKENS, step.limit) <= cost < step.limit:
                    return parts
        return None


def medium_of(page: MemoryPage, kind: Literal["image", "audio", "video"]) -> Medium | None:
    """The medium in the page's content: a part, or a link or data URL as a string; else None."""
    content = page.content
    if isinstance(content, str) and _LINK.match(content):
        key = _PART_KEYS[kind]
        content = {"type": key, key: {"url": content}}
    medium = read_part(content) if isinstance(content, dict) else None
    return medium if medium is not None and medium.kind == kind else None


def clock(seconds: float) -> str:
    """0:42, 12:05, 1:02:03; tenths below ten seconds where there are any: 0:02.5."""
    whole = int(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    shown = f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    tenth = int((seconds - whole) * 10)
    return f"{shown}.{tenth}" if tenth and seconds < 10 else shown


def _smaller_images(medium: Medium) -> Iterator[dict[str, Any]]:
    """Candidates for level 1, most detailed first."""
    made = False
    if medium.data is not None:
        for side in _SIDES_PX:
            small = thumbnail(medium.data, side)
            if small is None:
                break
            made = True
            yield _image_part(_data_url(small.mime, small.data))
    if made:
        return
    if medium.url is not None:
        yield _image_part(medium.url)
    elif medium.data is not None:  # a format that only the provider reads
        yield _image_part(_data_url(medium.mime or "image/png", medium.data))


def _image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def _data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _frame_url(frame: Frame, side: int) -> str:
    small = thumbnail(frame.data, side) if max(frame.width, frame.height) > side else None
    return _data_url("image/jpeg", small.data if small is not None else frame.data)


def _words(page: MemoryPage, step: Step, reference: str, *keys: str) -> str:
    """What was said of the medium, else its facts and topic, else what the page says.

    Words shorter than the reference are joined by the facts: level 3 must not cost more.
    """
    count, facts = step.counts.text, said(page.metadata, "facts")
    line, more = said(page.metadata, *keys), facts
    if not line:
        line, more = facts, said(page.metadata, "topic")
    elif count(line) >= count(reference):
        more = ""
    if not line:
        return compress_text(words_of(page.content), step.level, step.limit, count)
    return clip(f"{line}; {more}" if more else line, min(step.limit, ABSTRACT_TOKENS), count)


def _topic(page: MemoryPage, transcript: str, step: Step) -> str:
    topic = said(page.metadata, "topic")
    if topic:
        return topic
    words = said(page.metadata, "summary", "caption") or transcript
    return compress_text(words, CompressionLevel.REFERENCE, _TOPIC_TOKENS, step.counts.text)


def _scenes(page: MemoryPage, medium: Medium | None) -> dict[str, str]:
    """The facts with the times of the scenes: from the film, or from level 1's own text."""
    if medium is None:
        first = page.content[0] if isinstance(page.content, list) and page.content else None
        line = first.get("text") if isinstance(first, dict) else None
        return {"facts": line} if isinstance(line, str) and _SCENES_AT in line else {}
    frames = keyframes(medium.data, MAX_KEYFRAMES, _SIDES_PX[-1]) if medium.data else []
    if len(frames) < 2:
        return {}
    times = ", ".join(clock(frame.second) for frame in frames)
    return {"facts": f"{said(page.metadata, 'facts')}{_SCENES_AT}{times}"}


def _line(head: str, facts: list[str]) -> str:
    return " ".join([head, *(fact for fact in facts if fact)])


def _shown_link(url: str) -> str:
    """A link's host and last name, without what may be secret in its query."""
    plain = url.partition("?")[0].partition("#")[0]
    host = plain.partition("://")[2].partition("/")[0].rpartition("@")[2]
    return f"{host}/{plain.rpartition('/')[2][:60]}" if "/" in plain.partition("://")[2] else host
