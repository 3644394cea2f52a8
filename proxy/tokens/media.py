"""What one content part that holds a medium costs: images, sounds, films, files.

Promises: the providers' published rules, by model family (OpenAI's and Anthropic's vision guides,
Google's token guide; where the guides leave rounding open, what the API was seen to bill); real sizes
and durations where a header tells them, the rule's upper bound or a named estimate where none does; of
a large medium only the first _HEAD_CHARS of base64 are decoded (about a millisecond, however large it
is); no count passes `largest_medium` plus one a character of the part, so that a bound of a whole body
needs no parsing; nothing raises on odd parts. tiktoken counts text only; litellm has image rules among
its private functions, and takes seconds to import.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from proxy.media.headers import audio_seconds, file_text, image_info, is_pdf, video_info
from proxy.media.parts import Medium, read_part
from proxy.tokens.cards import plain_name

Size = tuple[int, int]  # width and height in pixels
Text = Callable[[str], int]

# ---------------------------------------------------------------- images: a rule for each family


@dataclass(frozen=True, slots=True, eq=False)
class ImageRule:
    """How one family counts images: `tokens(size, detail)`, at most `max_tokens`, which is also what
    an image of unknown size costs. A small picture (512 px) costs `low_tokens`.
    """

    name: str
    max_tokens: int
    low_tokens: int
    tokens: Callable[[Size | None, str | None], int]


def _tiles(base: int, tile: int) -> ImageRule:
    """gpt-4o and its kin: `base`, and `tile` for each 512 px tile of the shrunk image.

    Fit into a 2048 px square, then the shorter side to 768 px, never enlarged. detail low: `base`.
    """
    max_tokens = base + 8 * tile  # 2048 x 768

    def tokens(size: Size | None, detail: str | None) -> int:
        if detail == "low":
            return base
        if size is None:
            return max_tokens
        size = _shrunk(size, 2048 / max(size))  # rounded, as 2049x513 is billed
        size = _shrunk(size, 768 / min(size))
        return base + tile * _squares(size, 512)

    return ImageRule(f"tile-{base}-{tile}", max_tokens, base, tokens)


def _patches(
    family: str, multiplier: float, patch_px: int = 32, max_patches: int = 1536, max_side_px: int = 0,
    original_patches: int = 0,
) -> ImageRule:  # fmt: skip
    """Patches of `patch_px` square, at most `max_patches` (the image is shrunk to that), times
    `multiplier`. `max_side_px` bounds the longer side first (0: no bound).

    detail original has `original_patches` where a family offers it. Whether detail low is cheaper
    is not published for these families: it is counted as high, which is never too little.
    """

    def tokens(size: Size | None, detail: str | None) -> int:
        most = max_patches
        if detail == "original" and original_patches:
            most = original_patches
        elif size is not None and max_side_px:
            size = _shrunk(size, max_side_px / max(size))
        return math.ceil((most if size is None else min(most, shown(size, most))) * multiplier)

    def shown(size: Size, most: int) -> int:
        if _squares(size, patch_px) <= most:
            return _squares(size, patch_px)
        # Shrink to the area of `most` patches, then until a whole number of them fits one side.
        scale = math.sqrt(most * patch_px**2 / (size[0] * size[1]))
        fits = [side * scale / patch_px for side in size]
        scale *= min(max(1, math.floor(fit)) / fit for fit in fits)
        return _squares(_shrunk(size, scale), patch_px)

    max_tokens = math.ceil(max(max_patches, original_patches) * multiplier)
    name = f"{family}-{patch_px}-{max_patches}-{multiplier:g}"
    return ImageRule(name, max_tokens, tokens((512, 512), "low"), tokens)


def _gemini(size: Size | None, detail: str | None) -> int:
    """258 tokens for an image up to 384 px, else for each 768 px tile of at most 3072 x 3072."""
    if size is None:
        return 16 * 258
    if max(size) <= 384:
        return 258
    return 258 * _squares(_shrunk(size, 3072 / max(size)), 768)


def _squares(size: Size, side_px: int) -> int:
    return math.ceil(size[0] / side_px) * math.ceil(size[1] / side_px)


def _shrunk(size: Size, scale: float) -> Size:
    """`size` times `scale`, in whole pixels; never enlarged."""
    if scale >= 1:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


_GPT_4O = _tiles(85, 170)
_LATEST_CLAUDE = _patches("claude", 1.0, 28, 4784, 2576)
_FAMILIES: tuple[tuple[str, ImageRule], ...] = (  # the first pattern that fits a model's name
    ("gpt-4o-mini*", _tiles(2833, 5667)),
    ("gpt-4.1-mini*", _patches("patch", 1.62)),
    ("gpt-4.1-nano*", _patches("patch", 2.46)),
    ("gpt-5*-mini*", _patches("patch", 1.62)),
    ("gpt-5*-nano*", _patches("patch", 2.46)),
    ("o4-mini*", _patches("patch", 1.72)),
    ("gpt-5.[2-9]*", _patches("patch", 1.2, original_patches=10_000)),
    ("gpt-5*", _tiles(70, 140)),
    ("o1*", _tiles(75, 150)),
    ("o3*", _tiles(75, 150)),
    ("computer-use-preview*", _tiles(65, 129)),
    ("*claude-opus-4[-.][78]*", _LATEST_CLAUDE),
    ("*claude-sonnet-5*", _LATEST_CLAUDE),
    ("*claude-fable-*", _LATEST_CLAUDE),
    ("*claude-mythos-*", _LATEST_CLAUDE),
    ("*claude*", _patches("claude", 1.0, 28, 1568, 1568)),
    ("*gemini*", ImageRule("gemini-258", 16 * 258, 258, _gemini)),
)


@lru_cache(maxsize=1024)
def image_rule(model: str) -> ImageRule:
    """The rule of a model's family; gpt-4o's for a model that no pattern names."""
    name = plain_name(model)
    fitting = (rule for pattern, rule in _FAMILIES if fnmatch.fnmatchcase(name, pattern))
    return next(fitting, _GPT_4O)


# ---------------------------------------------------------------- any medium

AUDIO_TOKENS_PER_SECOND = 10  # what OpenAI bills for a user's sound: one each 100 ms
SPEECH_TOKENS_PER_SECOND = 20  # the same for the model's own voice
SPEECH_TOKENS_PER_CHAR = 2  # ten characters a second, as seen in billed answers
SPEECH_REFERENCE_TOKENS = 400  # an answer's sound of which only the id is known: 20 seconds
AUDIO_UNKNOWN_SECONDS = 60
VIDEO_UNKNOWN_SECONDS = 60
VIDEO_MAX_FRAMES = 600  # one a second, each at low detail
FILE_TOKENS_PER_KB = 80  # of base64, where the words cannot be counted
FILE_UNKNOWN_TOKENS = 512  # a file named by its id: a page of text; not to be left out on a guess
_PDF_PAGE_TEXT_TOKENS = 500
_PDF_PAGE_PX = (1024, 1325)  # OpenAI shows each page as text and as an image
_LARGEST_OTHER = 16_384  # floor of `largest_medium`: no sound, film or file without data is larger

_HEAD_CHARS = 65_536  # of base64: a multiple of 4
_WHOLE_CHARS = 262_144  # of base64: media up to this size are decoded whole
_SAMPLE_CHARS = 4_096  # of a large text file, to learn its tokens per byte
_UNKNOWN_AUDIO_BYTES_PER_SECOND = 4_000  # 32 kbit/s, compressed speech
_UNKNOWN_VIDEO_BYTES_PER_SECOND = 125_000
_MAX_COMPRESSED_BYTES_PER_SECOND = 48_000  # more is no compressed sound
_PDF_PAGE = re.compile(rb"/Type\s*/Page\b")
_WAV_HEADER_BYTES = 44
_URL_CHARS = 256  # a data URL's head, up to its comma


def largest_medium(rule: ImageRule) -> int:
    """Tokens that a part may cost beyond one for each of its characters."""
    return max(rule.max_tokens, _LARGEST_OTHER)


def count_medium(part: Mapping[str, Any], rule: ImageRule, text: Text) -> int | None:
    """Tokens of the medium in a part; None when the part holds none."""
    head, chars, clipped = _clip(part, _WHOLE_CHARS, _HEAD_CHARS)
    medium = read_part(head)
    if medium is None:
        return None
    ratio = chars / clipped if clipped else 1.0
    if medium.kind == "image":
        tokens = rule.tokens(_image_size(medium, part, ratio), medium.detail)
    elif medium.kind == "audio":
        seconds = _audio_seconds(medium, ratio)
        seconds = AUDIO_UNKNOWN_SECONDS if seconds is None else seconds
        tokens = math.ceil(seconds * AUDIO_TOKENS_PER_SECOND)
    elif medium.kind == "video":
        tokens = _video_tokens(medium, ratio, rule)
    else:
        tokens = _file_tokens(medium, chars, ratio, rule, text)
    return max(1, min(tokens, chars + largest_medium(rule)))


def count_speech(audio: Mapping[str, Any], text: Text) -> int:
    """Tokens of an assistant message's `audio`: its words and its sound, which go in again."""
    words = audio.get("transcript")
    if isinstance(words, str) and words:
        return text(words) + SPEECH_TOKENS_PER_CHAR * len(words)
    if not isinstance(audio.get("data"), str):
        return SPEECH_REFERENCE_TOKENS
    head, chars, clipped = _clip(audio, _WHOLE_CHARS, _HEAD_CHARS)
    medium = read_part({"type": "input_audio", "input_audio": head})
    seconds = _audio_seconds(medium, chars / clipped if clipped else 1.0) if medium else None
    if seconds is None:
        return SPEECH_REFERENCE_TOKENS
    return min(math.ceil(seconds * SPEECH_TOKENS_PER_SECOND), chars + SPEECH_REFERENCE_TOKENS)


def _clip(
    value: Mapping[str, Any], whole_chars: int, head_chars: int, depth: int = 3
) -> tuple[dict[str, Any], int, int]:
    """(the part with long strings cut to their head, the longest string's length before and after).

    A data URL is cut behind a multiple of 4 characters of base64, so that its head decodes.
    """
    out: dict[str, Any] = {}
    longest, kept = 0, 0
    for key, item in value.items():
        chars, after = 0, 0
        if isinstance(item, str):
            chars = after = len(item)
            if chars > whole_chars:
                start = item.find(",", 0, _URL_CHARS) + 1
                item = item[: start + head_chars]
                chars, after = chars - start, head_chars
        elif isinstance(item, Mapping) and depth:
            item, chars, after = _clip(item, whole_chars, head_chars, depth - 1)
        if chars > longest:
            longest, kept = chars, after
        out[key] = item
    return out, longest, kept


def _image_size(medium: Medium, part: Mapping[str, Any], ratio: float) -> Size | None:
    if medium.data is None:
        return None
    info = image_info(medium.data)
    if info is None and ratio > 1:  # a JPEG's profile and preview may stand before its size
        longer = read_part(_clip(part, _WHOLE_CHARS, _WHOLE_CHARS)[0])
        info = image_info(longer.data) if longer and longer.data else None
    return info[:2] if info and min(info[:2]) > 0 else None


def _audio_seconds(medium: Medium, ratio: float) -> float | None:
    """The sound's length; from its head when it is large. None for a link or an id."""
    data = medium.data
    if data is None:
        return None
    seconds = audio_seconds(data, medium.format)
    if seconds is None:
        return len(data) * ratio / _UNKNOWN_AUDIO_BYTES_PER_SECOND
    if ratio == 1:
        return seconds
    if data[:4] == b"RIFF":
        samples = len(data) - _WAV_HEADER_BYTES
        return seconds * (len(data) * ratio - _WAV_HEADER_BYTES) / max(1, samples)
    # Some headers state the whole sound's length, others only tell how fast the bytes go by. If
    # the whole sound in the stated time were denser than sound gets, the time is the head's.
    density = len(data) * ratio / seconds
    states_all = data[:4] == b"fLaC" or density <= _MAX_COMPRESSED_BYTES_PER_SECOND
    return seconds if states_all else seconds * ratio


def _video_tokens(medium: Medium, ratio: float, rule: ImageRule) -> int:
    seconds: float = VIDEO_UNKNOWN_SECONDS
    if medium.data is not None:
        info = video_info(medium.data)
        if info is not None and info.seconds > 0:
            seconds = info.seconds
        else:
            seconds = len(medium.data) * ratio / _UNKNOWN_VIDEO_BYTES_PER_SECOND
    frames = min(VIDEO_MAX_FRAMES, max(1, math.ceil(seconds)))
    return frames * rule.low_tokens


def _file_tokens(medium: Medium, chars: int, ratio: float, rule: ImageRule, text: Text) -> int:
    data, page = medium.data, _PDF_PAGE_TEXT_TOKENS + rule.tokens(_PDF_PAGE_PX, None)
    if data is None:
        return FILE_UNKNOWN_TOKENS
    if is_pdf(data):
        pages = math.ceil(len(_PDF_PAGE.findall(data)) * ratio)
        return pages * page if pages else max(page, chars * FILE_TOKENS_PER_KB // 1024)
    words = file_text(data, medium.mime, medium.name)
    if words is None:
        return 1 + chars * FILE_TOKENS_PER_KB // 1024
    if ratio == 1:
        return text(words)
    sample = words[:_SAMPLE_CHARS]
    return math.ceil(text(sample) / max(1, len(sample)) * len(words) * ratio)
