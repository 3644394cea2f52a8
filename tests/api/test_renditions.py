"""Smaller versions of media: made once, found again, made again when they are lost or damaged."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.api.memory import Memory
from proxy.api.renditions import WRITTEN, Renditions
from proxy.config import load_config
from proxy.conversation.effects import Load
from proxy.conversation.pages import PathPages
from proxy.conversation.tree import Identity
from proxy.memory import MemoryPage, Modality
from proxy.memory.levels import CompressorRegistry, ImageCompressor
from proxy.memory.models import CompressionLevel, Counts
from proxy.tokens import get_counter
from tests.media import samples

COUNTER = get_counter("gpt-4o")
PICTURE = samples.image_part(samples.png(800, 600))
SOUND = samples.audio_part(samples.wav(30))
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "The bridge."}, PICTURE, SOUND]},
    {"role": "assistant", "content": "A steel bridge."},
    {"role": "user", "content": f"And its numbers: {', '.join(str(n * n) for n in range(90))}."},
]
ONE, OTHER = b"one tenant", b"another one"
THUMBNAIL = Load("img_0001_1", CompressionLevel.REDUCED)


class Counting(ImageCompressor):
    """The image compressor, which counts what it makes and in which thread."""

    def __init__(self) -> None:
        self.made = 0
        self.threads: set[int] = set()
        self.gate: threading.Event | None = None

    def compress(
        self, page: MemoryPage, level: CompressionLevel | int, counts: Counts
    ) -> MemoryPage:
        self.made += 1
        self.threads.add(threading.get_ident())
        assert self.gate is None or self.gate.wait(5), "nothing else ran meanwhile"
        return super().compress(page, level, counts)


class Room:
    """One process's memory, L3 and pages."""

    def __init__(self, path: Path, written: bool) -> None:
        flags: dict[str, object] = {
            "tiers.l2.path": str(path / "data"), "tiers.l3.url": str(path / "artifacts"),
            **({"compression.model": "small-writer"} if written else {}),
        }  # fmt: skip
        config = load_config(None, {}, flags)
        self.memory = Memory(config)
        self.renditions = Renditions(config, self.memory)
        self.compressor = Counting()
        registry = CompressorRegistry.default()
        registry.register(Modality.IMAGE, self.compressor)
        raws = [(json.dumps(m).encode(), m) for m in HISTORY]
        path_ = Identity(bytes(32)).extend(b"t", [], raws)
        self.pages = PathPages(path_, COUNTER, 1024)
        self.pages.registry = registry

    async def load(self, effect: Load = THUMBNAIL, tenant: bytes = ONE) -> MemoryPage:
        page = await self.renditions.load(tenant, effect, self.pages)
        assert page is not None
        return page

    async def write(self, page_id: str, level: CompressionLevel, text: str) -> None:
        page = self.pages.page(page_id)
        made = page.model_copy(update={"content": text, "compression_level": level, "size_tokens": 2})
        await self.renditions.keep(ONE, page, made, WRITTEN)


@asynccontextmanager
async def room(path: Path, written: bool = False) -> Any:
    found = Room(path, written)
    try:
        yield found
    finally:
        await found.memory.close()


def artifacts(path: Path) -> Iterator[Path]:
    yield from (file for file in (path / "artifacts").rglob("*") if file.is_file())


async def test_a_thumbnail_is_made_once_and_found_after_a_restart(tmp_path: Path) -> None:
    async with room(tmp_path) as first:
        made = await first.load()
        assert made.content["image_url"]["detail"] == "low"
        assert (await first.load()).content == made.content
        first.memory.forget()
        assert (await first.load()).content == made.content
        assert first.compressor.made == 1
    assert len(list(artifacts(tmp_path))) == 1
    async with room(tmp_path) as second:
        found = await second.load()
        assert second.compressor.made == 0
    assert found.model_dump(exclude={"storage_tier", "artifact_id"}) == made.model_dump(
        exclude={"storage_tier", "artifact_id"}
    )


async def test_words_are_not_stored(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        caption = await here.load(Load("img_0001_1", CompressionLevel.ABSTRACT))
        assert caption.content == "A steel bridge.; image 800x600 PNG 42 kB"
        text = await here.load(Load("msg_0003", CompressionLevel.ABSTRACT))
        assert text.content == here.pages.at("msg_0003", 2).content
    assert not list(artifacts(tmp_path))


async def test_invariant_09_a_thumbnail_is_made_again_when_l3_was_emptied(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        made = await here.load()
        here.memory.forget()
        shutil.rmtree(tmp_path / "artifacts")
        assert (await here.load()).content == made.content
        assert here.compressor.made == 2
        here.memory.forget()
        assert (await here.load()).content == made.content
        assert here.compressor.made == 2, "it was not kept the second time"


@pytest.mark.parametrize("bytes_", [b"", b"{}", b"\xff\xfe", b'{"format":1,"page":{}}'])
async def test_a_damaged_artifact_is_said_and_made_again(
    tmp_path: Path, bytes_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with room(tmp_path) as here:
        made = await here.load()
        here.memory.forget()
        (file,) = artifacts(tmp_path)
        whole = file.read_bytes()
        file.write_bytes(bytes_)
        with caplog.at_level(logging.WARNING):
            assert (await here.load()).content == made.content
        assert "damaged" in caplog.text
        assert file.read_bytes() == whole
        caplog.clear()
        here.memory.forget()
        assert (await here.load()).content == made.content
        assert here.compressor.made == 2
        assert not caplog.text


async def test_without_l3_the_turn_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "artifacts").write_bytes(b"a file where a directory should be")
    async with room(tmp_path) as here:
        assert (await here.load()).content["image_url"]["detail"] == "low"
    assert "cannot be kept" in caplog.text


async def test_invariant_06_each_tenant_has_its_own(tmp_path: Path) -> None:
    async with room(tmp_path, written=True) as here:
        await here.load()
        await here.load(tenant=OTHER)
        assert here.compressor.made == 2
        await here.write("img_0001_1", CompressionLevel.ABSTRACT, "What a model saw.")
        abstract = Load("img_0001_1", CompressionLevel.ABSTRACT)
        assert (await here.load(abstract)).content.startswith("What a model saw.; image 800x600")
        assert (await here.load(abstract, OTHER)).content.startswith("A steel bridge.; image")
        assert "What a model saw." not in str(await here.load(tenant=OTHER))


async def test_decoding_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.compressor.gate = threading.Event()
        loading = asyncio.ensure_future(here.load())
        while not here.compressor.made:
            await asyncio.sleep(0.001)
        assert not loading.done()
        here.compressor.gate.set()  # by the loop, which is free
        await loading
        assert threading.get_ident() not in here.compressor.threads


async def test_invariant_04_level_0_is_the_original_whatever_was_written(tmp_path: Path) -> None:
    async with room(tmp_path, written=True) as here:
        for level in (CompressionLevel.FULL, CompressionLevel.REDUCED, CompressionLevel.ABSTRACT):
            await here.write("img_0001_1", level, "Not the picture.")
            await here.write("msg_0003", level, "Not the text.")
        assert (await here.load(Load("img_0001_1", 0))).content == PICTURE
        assert (await here.load(Load("msg_0003", 0))).content == HISTORY[2]["content"]


async def test_what_a_model_wrote_is_shown_at_its_level_and_below(tmp_path: Path) -> None:
    async with room(tmp_path, written=True) as here:
        extractive = (await here.load(Load("msg_0003", 1))).content
        await here.write("msg_0003", CompressionLevel.ABSTRACT, "Squares of 0 to 89.")
        assert (await here.load(Load("msg_0003", 1))).content == extractive
        assert (await here.load(Load("msg_0003", 2))).content == "Squares of 0 to 89."
        assert (await here.load(Load("msg_0003", 3))).compression_level == 3
        await here.write("img_0001_1", CompressionLevel.ABSTRACT, "Steel, at dawn.")
        thumbnail = await here.load()
        assert thumbnail.content["image_url"]["detail"] == "low"
        assert thumbnail.metadata["caption"] == "Steel, at dawn."
        assert (await here.load(Load("img_0001_1", 3))).content == "image:img_0001_1"
        await here.write("aud_0001_2", CompressionLevel.REDUCED, "The tide is rising at the wall.")
        assert (await here.load(Load("aud_0001_2", 1))).content == "The tide is rising at the wall."
        assert (await here.load(Load("aud_0001_2", 3))).content.startswith("audio 0:30")
    async with room(tmp_path, written=False) as plain:
        assert (await plain.load(Load("msg_0003", 2))).content != "Squares of 0 to 89."
