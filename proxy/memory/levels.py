"""The levels of every modality, behind one registry.

Promises: `CompressorRegistry.default()` knows all five modalities; a registry only changes by
`register`; what holds for each compressor stands in `level_base`.

| level | text, file | image | audio | video | structured |
|---|---|---|---|---|---|
| 1 | a third of it | thumbnail, low detail | transcript | keyframes | fewer items, same schema |
| 2 | key points | caption | summary | scenes | key facts |
| 3 | topic tags, `file:{name}` | `image:{id}` | duration + topic | `video:{id}` | shape |
"""

from __future__ import annotations

from typing import Self

from proxy.memory.level_base import Compressor
from proxy.memory.level_media import AudioCompressor, ImageCompressor, VideoCompressor
from proxy.memory.level_text import StructuredCompressor, TextCompressor
from proxy.memory.models import CompressionLevel, Counts, MemoryPage, Modality

__all__ = [
    "AudioCompressor",
    "Compressor",
    "CompressorRegistry",
    "ImageCompressor",
    "StructuredCompressor",
    "TextCompressor",
    "VideoCompressor",
    "levels_of",
]


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
        self,
        page: MemoryPage,
        level: CompressionLevel | int,
        counts: Counts,
        max_tokens: int | None = None,
    ) -> MemoryPage:
        """`page` at `level` (0..3, else ValueError), at most `max_tokens` above level 0; the page
        itself when it has no more detail than that.

        KeyError when nothing is registered for its modality.
        """
        return self.get(page.modality).compress(page, level, counts, max_tokens)


def levels_of(page: MemoryPage) -> list[int]:
    """The levels that the page can be shown at, most detailed first: its own and all below it."""
    if page.content is None:
        return [int(page.compression_level)]
    return [int(level) for level in CompressionLevel if level >= page.compression_level]
