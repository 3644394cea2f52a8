"""The levels of every modality, behind one registry.

| level | text, file | image | audio | video | structured |
|---|---|---|---|---|---|
| 1 | a third of it | thumbnail, low detail | transcript | keyframes | fewer items, same schema |
| 2 | key points | caption | summary | scenes | key facts |
| 3 | topic tags, `file:{name}` | `image:{id}` | duration + topic | `video:{id}` | shape |

Promises of every compressor: a compressed page keeps its id, modality, type and provenance, and says
its level and its tokens; the page that it was made from is never changed; each level costs at most what
the level above it costs, whatever the content; the same page gives the same result; asking for more
detail than a page has returns the page itself.

Level 1 of a picture is a content part that any provider of the original takes, and costs less than the
original or is the original. Words about a medium come from the page's metadata where it has them
("caption", "transcript", "summary", "topic"), else from the medium's own facts. What has to be decoded for a
level (`codec_of`) is handed in as the page's metadata DECODED, by a shell whose decoders may be killed; only
for callers without one is it decoded here. No library makes these: what to keep of a page for a number of
tokens is ours.
"""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self

from proxy.media.decoders import Codec, decode
from proxy.media.headers import audio_seconds, file_text, image_info, is_pdf, video_info
from proxy.media.parts import Medium, read_part
from proxy.memory.compressor import ABSTRACT_TOKENS, clip, compress_text
from proxy.memory.levels_json import SHAPE_TOKENS, key_facts, parse_json, shape, truncated
from proxy.memory.models import CompressionLevel, Counts, MemoryPage, Modality, json_text

DECODED = "decoded"  # metadata: what `proxy.media.decoders.decode` gave for the page's medium; {}: nothing
AUDIO_REFERENCE_TOKENS = 16  # a duration and a topic
_TOPIC_TOKENS = 10
_NAME_CHARS = 80
_SCENES_AT = "; scenes at "
_LINK = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.\-]{1,15}://")


class CompressorRegistry:
    """Which compressor makes the levels of which modality."""

    def __init__(self) -> None:
        self._compressors: dict[Modality, Compressor] = {}

    @classmethod
    def default(cls) -> Self:
        """A new registry with the proxy's own compressor for every modality."""
        registry = cls()
        registry.register(Modality.TEXT, TextCompressor())
        registry.register(Modality.STRUCTURED, StructuredCompressor())
        registry.register(Modality.IMAGE, ImageCompressor())
        registry.register(Modality.AUDIO, AudioCompressor())
        registry.register(Modality.VIDEO, VideoCompressor())
        return registry

    def register(self, modality: Modality, compressor: Compressor) -> None:
        """Use `compressor` for `modality` from now on."""
        self._compressors[modality] = compressor

    def get(self, modality: Modality) -> Compressor:
        """The compressor of a modality; KeyError when none is registered."""
        return self._compressors[modality]

    def compress(
        self, page: MemoryPage, level: CompressionLevel | int, counts: Counts
    ) -> MemoryPage:
        """`page` at `level` (0..3, else ValueError); the page itself when it has no more detail than
        that.
        """
        return self.get(page.modality).compress(page, level, counts)


# ---------------------------------------------------------------- what all compressors share


class Step(NamedTuple):
    """One step down. `limit` is the most tokens that the result may have; `is_last` is False when
    only the size of this level matters, for the bound on the next one.
    """

    level: CompressionLevel
    limit: int
    counts: Counts
    is_last: bool


class Compressor(ABC):
    """Makes lower levels of the pages of one modality, one by one, so that none can cost more than the
    one above it.
    """

    def compress(
        self, page: MemoryPage, level: CompressionLevel | int, counts: Counts
    ) -> MemoryPage:
        """`page` at `level`; see `CompressorRegistry`."""
        target = CompressionLevel(level)
        if target <= page.compression_level:
            return page
        is_full = page.compression_level == CompressionLevel.FULL
        learned = self.learned(page) if is_full else {}
        source = page.model_copy(update={"metadata": {**page.metadata, **learned}})
        limit = page.size_tokens or content_tokens(page.content, counts)
        content: Any = page.content
        for number in range(page.compression_level + 1, target + 1):
            step = Step(CompressionLevel(number), limit, counts, number == target)
            content = self.content_at(source, step)
            if content is None:  # too dear to make for its size alone
                limit = min(limit, ABSTRACT_TOKENS)
            else:
                limit = min(limit, content_tokens(content, counts))
        about = {key: known for key, known in source.metadata.items() if key != DECODED}
        return source.model_copy(
            update={"content": content, "compression_level": target, "size_tokens": limit, "metadata": about}
        )

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """Metadata that a full page's lower levels need and their content will not tell."""
        return {}

    @abstractmethod
    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """The content of `page` at `step.level`, within `step.limit`.

        None is allowed when `not step.is_last`, and then promises that the level would cost at
        least min(step.limit, ABSTRACT_TOKENS).
        """


def content_tokens(content: Any, counts: Counts) -> int:
    """Tokens of a page's content: a text, a content part, a list of parts, or a JSON value."""
    if content is None:
        return 0
    if isinstance(content, str):
        return counts.text(content)
    if isinstance(content, dict) and isinstance(content.get("type"), str):
        return counts.part(content)
    if isinstance(content, list) and content and all(_is_part(item) for item in content):
        return sum(counts.part(item) for item in content)
    return counts.text(json_text(content))


def _is_part(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") in ("text", "image_url")


def codec_of(page: MemoryPage, level: CompressionLevel | int) -> tuple[Codec, Medium] | None:
    """What has to be decoded so that a full page can be shown at `level`; None for nothing."""
    medium = _file_of(page) if page.modality is Modality.TEXT else _medium_of(page, page.modality.value)
    if medium is None or medium.encoded is None or level == CompressionLevel.FULL:
        return None
    if medium.kind == "file":
        return ("pdf", medium) if medium.data is not None and is_pdf(medium.data) else None
    if medium.kind == "image":
        return ("image", medium) if level == CompressionLevel.REDUCED else None
    told = level == CompressionLevel.REFERENCE or (level == CompressionLevel.ABSTRACT and _said(page, "summary", "caption"))
    return ("video", medium) if medium.kind == "video" and not told else None


def _decoded(page: MemoryPage, codec: Codec, medium: Medium) -> dict[str, Any]:
    known = page.metadata.get(DECODED)
    if isinstance(known, dict):
        return known
    return decode(codec, medium.data) if medium.data is not None else {}


def _said(page: MemoryPage, *keys: str) -> str:
    """The first of `keys` in the page's metadata that has words; "" when none has."""
    values = (page.metadata.get(key) for key in keys)
    return next((v.strip() for v in values if isinstance(v, str) and v.strip()), "")


# ---------------------------------------------------------------- text, files, JSON


class TextCompressor(Compressor):
    """Text: a third of it, key points, topic tags. A `file` part: its words, then `file:{name}`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """A file's name and what is known of it."""
        medium = _file_of(page)
        if medium is None:
            return {}
        name = (medium.name or page.page_id)[:_NAME_CHARS]
        facts = [name, medium.mime, _size_shown(medium.data)]
        return {"file_name": name, "facts": _line(medium.kind, facts)}

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `Compressor`."""
        count = step.counts.text
        name = _said(page, "file_name")
        if name and step.level == CompressionLevel.REFERENCE:
            reference = f"file:{name}"
            if count(reference) <= step.limit:  # else the few words themselves say more
                return reference
        medium = _file_of(page)
        if medium is None:
            return compress_text(page.text(), step.level, step.limit, count)
        words = _said(page, "summary") if step.level == CompressionLevel.ABSTRACT else ""
        if not words and medium.data is not None:
            if is_pdf(medium.data):
                words = _decoded(page, "pdf", medium).get("text", "")
            else:
                words = file_text(medium.data, medium.mime, medium.name) or ""
        if words:
            return _words_at(words, step)
        return clip(_said(page, "summary", "caption", "facts"), min(step.limit, ABSTRACT_TOKENS), count)


class StructuredCompressor(Compressor):
    """JSON: fewer items of the same schema, key facts, shape. Any other text: as text."""

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `Compressor`."""
        return _words_at(page.text(), step)


def _file_of(page: MemoryPage) -> Medium | None:
    """The medium that the page still has; a JSON value of another kind is none."""
    return read_part(page.content) if isinstance(page.content, dict) else None


def _words_at(words: str, step: Step) -> str:
    """`words` at a level, as JSON when they are an object or an array, else as text."""
    count, limit = step.counts.text, step.limit
    value = parse_json(words)
    if value is None:
        return compress_text(words, step.level, limit, count)
    if step.level == CompressionLevel.REDUCED:
        short = truncated(value, words, limit, count)
        if short is not None:
            return short
        return words if count(words) <= limit else _outline(value, limit, step)
    if step.level == CompressionLevel.ABSTRACT:
        limit = min(limit, ABSTRACT_TOKENS)
        return key_facts(value, limit, count) or _outline(value, limit, step)
    return _outline(value, min(limit, SHAPE_TOKENS), step)


def _outline(value: Any, limit: int, step: Step) -> str:
    return shape(value, limit, step.counts.text) or clip("{…}", limit, step.counts.text)


# ---------------------------------------------------------------- images, sound, film


class ImageCompressor(Compressor):
    """Thumbnail at low detail, caption, `image:{page_id}`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """The picture's size and format."""
        medium = _medium_of(page, "image")
        if medium is None:
            return {}
        facts = [medium.name or ""]
        if medium.data is not None:
            info = image_info(medium.data)
            facts += [f"{info.width}x{info.height}", info.format] if info else [medium.mime]
        return {"facts": _line("image", [*facts, _size_shown(medium.data), _link_shown(medium)])}

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `Compressor`."""
        reference = f"image:{page.page_id}"
        if step.level == CompressionLevel.REFERENCE and step.counts.text(reference) <= step.limit:
            return reference
        medium = _medium_of(page, "image")
        if step.level == CompressionLevel.REDUCED and medium is not None:
            if not step.is_last:
                return None
            part = self._smaller(page, medium, step)
            if part is not None:
                return part
        return _caption(page, step, reference, "caption", "summary")

    def _smaller(self, page: MemoryPage, medium: Medium, step: Step) -> dict[str, Any] | None:
        """The first candidate at half the cost, else the cheapest; the original when none is
        cheaper, None when not even that fits.

        A picture is not made cheaper than a caption: below that, the caption says more.
        """
        best, best_cost, floor = None, step.limit, min(ABSTRACT_TOKENS, step.limit)
        for part in _smaller_images(page, medium):
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


class AudioCompressor(Compressor):
    """Transcript, summary, `audio 0:42, topic`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """The duration, and the transcript when the part carries it."""
        medium = _medium_of(page, "audio")
        if medium is None:
            return {}
        seconds = audio_seconds(medium.data, medium.format) if medium.data is not None else None
        duration = clock(seconds) if seconds is not None else ""
        learned = {"duration": duration} if duration else {}
        learned["facts"] = _line("audio", [duration, (medium.format or medium.mime).upper()])
        if medium.transcript and not _said(page, "transcript"):
            learned["transcript"] = medium.transcript
        return learned

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `Compressor`."""
        count = step.counts.text
        transcript = _said(page, "transcript")
        if not transcript and "facts" not in page.metadata:
            transcript = page.text()
        if step.level == CompressionLevel.REFERENCE:
            head = _line("audio", [_said(page, "duration")])
            if count(head) <= step.limit:  # else the few words themselves say more
                topic = _said(page, "topic") or compress_text(
                    _said(page, "summary", "caption") or transcript, step.level, _TOPIC_TOKENS, count
                )
                line = f"{head}, {topic}" if topic else head
                return clip(line, min(step.limit, AUDIO_REFERENCE_TOKENS), count)
        if step.level == CompressionLevel.REDUCED and transcript:
            if count(transcript) <= step.limit:
                return transcript
            return compress_text(transcript, step.level, step.limit, count)
        if transcript and not _said(page, "summary"):
            return compress_text(transcript, step.level, step.limit, count)
        return _caption(page, step, "", "summary", "caption")


class VideoCompressor(Compressor):
    """Keyframes with their times, scene descriptions, `video:{page_id}`."""

    def learned(self, page: MemoryPage) -> dict[str, Any]:
        """Duration, size and format."""
        medium = _medium_of(page, "video")
        if medium is None:
            return {}
        info = video_info(medium.data) if medium.data is not None else None
        facts = [clock(info.seconds), f"{info.width}x{info.height}"] if info is not None else []
        if medium.data is not None:
            facts.append(medium.mime.rpartition("/")[2].upper())
        return {"facts": _line("video", [*facts, _size_shown(medium.data), _link_shown(medium)])}

    def content_at(self, page: MemoryPage, step: Step) -> Any:
        """See `Compressor`."""
        reference = f"video:{page.page_id}"
        if step.level == CompressionLevel.REFERENCE and step.counts.text(reference) <= step.limit:
            return reference
        medium = _medium_of(page, "video")
        if step.level == CompressionLevel.REDUCED and medium is not None and medium.data:
            if not step.is_last:
                return None
            shown = self._frames(page, medium, step)
            if shown is not None:
                return shown
        # Looking for the scenes decodes the film: not for the sake of a size.
        if step.is_last and not _said(page, "summary", "caption"):
            facts = self._scenes(page, medium)
            page = page.model_copy(update={"metadata": {**page.metadata, **facts}})
        return _caption(page, step, reference, "summary", "caption")

    def _frames(self, page: MemoryPage, medium: Medium, step: Step) -> list[dict[str, Any]] | None:
        """As many frames as are cheaper than the film, at the largest size that is."""
        frames = _decoded(page, "video", medium).get("frames", [])
        for count in range(len(frames), 0, -1):
            kept = [frames[index * len(frames) // count] for index in range(count)]
            parts: list[dict[str, Any]] = [{"type": "text", "text": self._facts(page, kept)}]
            for images in zip(*(images for _, images in kept), strict=True):  # of one size
                shown = [*parts, *map(_image_part, map(_jpeg_url, images))]
                cost = content_tokens(shown, step.counts)
                if min(ABSTRACT_TOKENS, step.limit) <= cost < step.limit:
                    return shown
        return None

    def _scenes(self, page: MemoryPage, medium: Medium | None) -> dict[str, str]:
        """The facts with the times of the scenes: from the film, or from level 1's own text."""
        if medium is None:
            first = page.content[0] if isinstance(page.content, list) and page.content else None
            line = first.get("text") if isinstance(first, dict) else None
            return {"facts": line} if isinstance(line, str) and _SCENES_AT in line else {}
        frames = _decoded(page, "video", medium).get("frames", [])
        return {"facts": self._facts(page, frames)} if len(frames) > 1 else {}

    def _facts(self, page: MemoryPage, frames: list[Any]) -> str:
        times = ", ".join(clock(second) for second, _ in frames)
        return f"{_said(page, 'facts')}{_SCENES_AT}{times}"


def _medium_of(page: MemoryPage, kind: Literal["image", "audio", "video"]) -> Medium | None:
    """The medium in the page's content: a part, or a link or data URL as a string; else None."""
    content = page.content
    if isinstance(content, str) and _LINK.match(content):
        content = {"type": f"{kind}_url", f"{kind}_url": {"url": content}}
    medium = read_part(content) if isinstance(content, dict) else None
    return medium if medium is not None and medium.kind == kind else None


def _caption(page: MemoryPage, step: Step, reference: str, *keys: str) -> str:
    """What was said of the medium, else its facts and topic, else what the page says.

    Words shorter than the reference are joined by the facts: level 3 must not cost more.
    """
    count, facts = step.counts.text, _said(page, "facts")
    line, more = _said(page, *keys), facts
    if not line:
        line, more = facts, _said(page, "topic")
    elif count(line) >= count(reference):
        more = ""
    if not line:
        return compress_text(page.text(), step.level, step.limit, count)
    return clip(f"{line}; {more}" if more else line, min(step.limit, ABSTRACT_TOKENS), count)


def _smaller_images(page: MemoryPage, medium: Medium) -> Iterator[dict[str, Any]]:
    """Candidates for level 1, most detailed first."""
    images = _decoded(page, "image", medium).get("images")
    if images:
        yield from map(_image_part, map(_jpeg_url, images))
    elif medium.url is not None:
        yield _image_part(medium.url)
    elif medium.data is not None:  # a format that only the provider reads
        yield _image_part(_data_url(medium.mime or "image/png", medium.data))


def _image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def _data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _jpeg_url(encoded: str) -> str:
    return f"data:image/jpeg;base64,{encoded}"


# ---------------------------------------------------------------- facts for people


def clock(seconds: float) -> str:
    """0:42, 12:05, 1:02:03; tenths below ten seconds where there are any: 0:02.5."""
    whole = int(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    shown = f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    tenth = int((seconds - whole) * 10)
    return f"{shown}.{tenth}" if tenth and seconds < 10 else shown


def _line(head: str, facts: list[str]) -> str:
    return " ".join(filter(None, [head, *facts]))


def _size_shown(data: bytes | None) -> str:
    """"812 B", "85 kB", "3.4 MB"; "" for a medium whose bytes are elsewhere."""
    size = len(data or b"")
    if size < 1_000:
        return f"{size} B" if data is not None else ""
    return f"{size / 1_000:.0f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


def _link_shown(medium: Medium) -> str:
    """A link's host and last name, without what may be secret in its query; "" without a link."""
    plain = (medium.url or "").partition("?")[0].partition("#")[0]
    host = plain.partition("://")[2].partition("/")[0].rpartition("@")[2]
    return f"{host}/{plain.rpartition('/')[2][:60]}" if "/" in plain.partition("://")[2] else host
