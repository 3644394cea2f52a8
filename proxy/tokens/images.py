"""What an image costs: the providers' published rules, by model family.

Promises: arithmetic on sizes only; a rule's count never passes its `max_tokens`; an image whose
size is not known costs the rule's maximum. Sources: OpenAI's and Anthropic's vision guides,
Google's token guide; where the guides leave rounding open, what the API was seen to bill.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from proxy.tokens.names import plain_name

Size = tuple[int, int]  # width and height in pixels


class ImageRule(Protocol):
    """How one family counts images. `low_tokens` is what a small picture (512 px) costs."""

    @property
    def name(self) -> str: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def low_tokens(self) -> int: ...
    def tokens(self, size: Size | None, detail: str | None) -> int: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TileRule:
    """gpt-4o and its kin: `base`, and `tile` for each 512 px tile of the shrunk image.

    Fit into a 2048 px square, then the shorter side to 768 px, never enlarged. detail low: `base`.
    """

    base: int
    tile: int

    @property
    def name(self) -> str:
        return f"tile-{self.base}-{self.tile}"

    @property
    def max_tokens(self) -> int:
        return self.base + 8 * self.tile  # 2048 x 768

    @property
    def low_tokens(self) -> int:
        return self.base

    def tokens(self, size: Size | None, detail: str | None) -> int:
        if detail == "low":
            return self.base
        if size is None:
            return self.max_tokens
        width, height = _shrunk(size, 2048 / max(size))  # rounded, as 2049x513 is billed
        width, height = _shrunk((width, height), 768 / min(width, height))
        return self.base + self.tile * math.ceil(width / 512) * math.ceil(height / 512)


@dataclass(frozen=True, slots=True)
class PatchRule:
    """Patches of `patch_px` square, at most `max_patches` (the image is shrunk to that), times
    `multiplier`. `max_side_px` bounds the longer side first (0: no bound).

    detail original has `original_patches` where a family offers it. Whether detail low is cheaper
    is not published for these families: it is counted as high, which is never too little.
    """

    family: str
    multiplier: float
    patch_px: int = 32
    max_patches: int = 1536
    max_side_px: int = 0
    original_patches: int = 0

    @property
    def name(self) -> str:
        return f"{self.family}-{self.patch_px}-{self.max_patches}-{self.multiplier:g}"

    @property
    def max_tokens(self) -> int:
        return math.ceil(max(self.max_patches, self.original_patches) * self.multiplier)

    @property
    def low_tokens(self) -> int:
        return self.tokens((512, 512), "low")

    def tokens(self, size: Size | None, detail: str | None) -> int:
        most = self.max_patches
        if detail == "original" and self.original_patches:
            most = self.original_patches
        elif size is not None and self.max_side_px:
            size = _shrunk(size, self.max_side_px / max(size))
        patches = most if size is None else min(most, self._patches(size, most))
        return math.ceil(patches * self.multiplier)

    def _patches(self, size: Size, most: int) -> int:
        across, down = (math.ceil(side / self.patch_px) for side in size)
        if across * down <= most:
            return across * down
        # Shrink to the area of `most` patches, then until a whole number of them fits one side.
        scale = math.sqrt(most * self.patch_px**2 / (size[0] * size[1]))
        fits = [side * scale / self.patch_px for side in size]
        scale *= min(max(1, math.floor(fit)) / fit for fit in fits)
        width, height = _shrunk(size, scale)
        return math.ceil(width / self.patch_px) * math.ceil(height / self.patch_px)


@dataclass(frozen=True, slots=True)
class GeminiRule:
    """258 tokens for an image up to 384 px, else for each 768 px tile of at most 3072 x 3072."""

    tile: int = 258

    @property
    def name(self) -> str:
        return f"gemini-{self.tile}"

    @property
    def max_tokens(self) -> int:
        return 16 * self.tile

    @property
    def low_tokens(self) -> int:
        return self.tile

    def tokens(self, size: Size | None, detail: str | None) -> int:
        if size is None:
            return self.max_tokens
        if max(size) <= 384:
            return self.tile
        width, height = _shrunk(size, 3072 / max(size))
        return self.tile * math.ceil(width / 768) * math.ceil(height / 768)


def _shrunk(size: Size, scale: float) -> Size:
    """`size` times `scale`, in whole pixels; never enlarged."""
    if scale >= 1:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


GPT_4O = TileRule(85, 170)
_FAMILIES: tuple[tuple[str, ImageRule], ...] = (  # the first pattern that fits a model's name
    ("gpt-4o-mini*", TileRule(2833, 5667)),
    ("gpt-4.1-mini*", PatchRule("patch", 1.62)),
    ("gpt-4.1-nano*", PatchRule("patch", 2.46)),
    ("gpt-5*-mini*", PatchRule("patch", 1.62)),
    ("gpt-5*-nano*", PatchRule("patch", 2.46)),
    ("o4-mini*", PatchRule("patch", 1.72)),
    ("gpt-5.[2-9]*", PatchRule("patch", 1.2, original_patches=10_000)),
    ("gpt-5*", TileRule(70, 140)),
    ("o1*", TileRule(75, 150)),
    ("o3*", TileRule(75, 150)),
    ("computer-use-preview*", TileRule(65, 129)),
    *(
        (pattern, PatchRule("claude", 1.0, 28, 4784, 2576))
        for pattern in (
            "*claude-opus-4[-.][78]*",
            "*claude-sonnet-5*",
            "*claude-fable-*",
            "*claude-mythos-*",
        )
    ),
    ("*claude*", PatchRule("claude", 1.0, 28, 1568, 1568)),
    ("*gemini*", GeminiRule()),
)


@lru_cache(maxsize=1024)
def image_rule(model: str) -> ImageRule:
    """The rule of a model's family; gpt-4o's for a model that no pattern names."""
    name = plain_name(model)
    for pattern, rule in _FAMILIES:
        if fnmatch.fnmatchcase(name, pattern):
            return rule
    return GPT_4O
