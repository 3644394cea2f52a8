"""Smaller versions of media: made once, found again, made again when they are lost or damaged."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy import keys
from proxy.api.decoding import Decoders, Killed, Patience
from proxy.api.memory import Memory
from proxy.api.renditions import WRITTEN, Renditions
from proxy.config import Config, load_config
from proxy.conversation.effects import Load
from proxy.conversation.pages import PathPages
from proxy.conversation.tree import Identity, TenantKey
from proxy.errors import StorageError
from proxy.media.decoders import Codec, decode
from proxy.memory import MemoryPage
from proxy.memory.models import CompressionLevel
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
ONE, OTHER = (Identity(bytes(32)).tenant(key, "") for key in ("one", "another"))
THUMBNAIL = Load("img_0001_1", CompressionLevel.REDUCED)


class Counting(Decoders):
    """Decodes in this process, and counts. `broken`: nothing can be decoded; `busy`: not now."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.made = 0
        self.broken = self.busy = self.hangs = False
        self.gate: asyncio.Event | None = None

    async def decode(self, tenant: bytes, codec: Codec, data: bytes) -> dict[str, Any] | None:
        if self.busy:
            return None
        self.made += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.hangs:
            raise Killed("it took more than its time")
        return {} if self.broken else decode(codec, data)


class Room:
    """One process's memory and pages."""

    def __init__(self, path: Path, written: bool) -> None:
        flags: dict[str, object] = {
            "tiers.l2.path": str(path / "data"),
            **({"compression.model": "small-writer"} if written else {}),
        }  # fmt: skip
        config = load_config(None, {}, flags)
        self.memory = Memory(config)
        self.decoders = Counting(config)
        self.renditions = Renditions(config, self.memory, self.decoders)
        raws = [(json.dumps(m).encode(), m) for m in HISTORY]
        self.pages_of = {
            tenant: PathPages(Identity(bytes(32)).extend(tenant, [], raws), COUNTER, 1024) for tenant in (ONE, OTHER)
        }
        self.pages = self.pages_of[ONE]

    async def load(self, effect: Load = THUMBNAIL, tenant: TenantKey = ONE) -> MemoryPage:
        page = await self.renditions.load(tenant, effect, self.pages_of[tenant])
        assert page is not None
        return page

    async def write(self, page_id: str, level: CompressionLevel, text: str) -> None:
        page = self.pages.page(page_id)
        made = page.model_copy(update={"content": text, "compression_level": level, "size_tokens": 2})
        await self.renditions.keep(self.pages.owner, page, made, WRITTEN)


@asynccontextmanager
async def room(path: Path, written: bool = False) -> Any:
    found = Room(path, written)
    try:
        yield found
    finally:
        await found.memory.close()


def kept(room: Room) -> dict[bytes, bytes]:
    return dict(room.memory.store.scan(keys.RENDITION))


async def test_a_thumbnail_is_made_once_and_found_after_a_restart(tmp_path: Path) -> None:
    async with room(tmp_path) as first:
        made = await first.load()
        assert made.content["image_url"]["detail"] == "low"
        assert (await first.load()).content == made.content
        first.memory.forget()
        assert (await first.load()).content == made.content
        assert first.decoders.made == 1 and len(kept(first)) == 1
    async with room(tmp_path) as second:
        found = await second.load()
        assert second.decoders.made == 0
    assert found == made


async def test_what_cannot_be_decoded_is_kept_too_and_what_waits_is_not(tmp_path: Path) -> None:
    async with room(tmp_path) as first:
        first.decoders.busy = True
        plain = await first.load()
        assert plain.content["image_url"]["detail"] == "low" and first.decoders.made == 0
        first.decoders.busy, first.decoders.broken = False, True
        assert (await first.load()).content == plain.content  # the provider may read it
        assert first.decoders.made == 1
    async with room(tmp_path) as second:
        assert (await second.load()).content == plain.content
        assert second.decoders.made == 0 and len(kept(second)) == 1


async def test_a_medium_that_hangs_is_tried_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with room(tmp_path) as here:
        here.decoders.hangs = True
        for tries in (1, 2, 2):
            assert (await here.load()).content["image_url"]["detail"] == "low"
            assert here.decoders.made == tries
    assert "took more than its time" in caplog.text


async def test_requests_at_once_have_a_medium_decoded_once(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.decoders.gate = asyncio.Event()
        loading = [asyncio.ensure_future(here.load()) for _ in range(3)]
        async with asyncio.timeout(60):
            while not here.decoders.made:
                await asyncio.sleep(0)
            loading[0].cancel()  # its client left: another one's request goes on
            while here.decoders.made < 2:
                await asyncio.sleep(0)
        here.decoders.gate.set()
        one, other = await asyncio.gather(*loading[1:])
        assert one == other and here.decoders.made == 2


async def test_a_request_waits_for_all_its_media_together(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        here.decoders.gate, patience = asyncio.Event(), Patience(0.05)
        for tries in (1, 1):  # the second finds no patience left
            page = await here.renditions.load(ONE, THUMBNAIL, here.pages, patience)
            assert page is not None and page.content["image_url"]["detail"] == "low"
            assert here.decoders.made == tries and patience.left_s < 0.01
        here.decoders.gate.set()
        assert (await here.load()).content != page.content and here.decoders.made == 2


async def test_words_are_not_stored(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        caption = await here.load(Load("img_0001_1", CompressionLevel.ABSTRACT))
        assert caption.content == "A steel bridge.; image 800x600 PNG 42 kB"
        text = await here.load(Load("msg_0003", CompressionLevel.ABSTRACT))
        assert text.content == here.pages.at("msg_0003", 2).content
        assert not kept(here)


async def test_invariant_09_a_thumbnail_is_made_again_when_it_is_lost(tmp_path: Path) -> None:
    async with room(tmp_path) as here:
        made = await here.load()
        await here.memory.store.commit((), drops=list(kept(here)))
        for _ in range(2):
            here.memory.forget()
            assert (await here.load()).content == made.content
            assert here.decoders.made == 2, "it was not kept the second time"


@pytest.mark.parametrize("bytes_", [b"", b"{}", b"\xff\xfe", b'{"format":1,"page":{}}'])
async def test_a_damaged_artifact_is_said_and_made_again(
    tmp_path: Path, bytes_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with room(tmp_path) as here:
        made = await here.load()
        ((key, whole),) = kept(here).items()
        await here.memory.store.commit([(key, bytes_)])
        here.memory.forget()
        with caplog.at_level(logging.WARNING):
            assert (await here.load()).content == made.content
        assert "made again" in caplog.text and kept(here) == {key: whole}
        caplog.clear()
        here.memory.forget()
        assert (await here.load()).content == made.content
        assert here.decoders.made == 2 and not caplog.text


async def test_without_a_store_the_turn_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with room(tmp_path) as here:
        async def full(*_: object) -> None:
            raise StorageError("The disk is full.")

        monkeypatch.setattr(here.memory.store, "commit", full)
        assert (await here.load()).content["image_url"]["detail"] == "low"
    assert "cannot be kept: The disk is full." in caplog.text


async def test_invariant_06_each_tenant_has_its_own(tmp_path: Path) -> None:
    async with room(tmp_path, written=True) as here:
        await here.load()
        await here.load(tenant=OTHER)
        assert here.decoders.made == 2
        await here.write("img_0001_1", CompressionLevel.ABSTRACT, "What a model saw.")
        abstract = Load("img_0001_1", CompressionLevel.ABSTRACT)
        assert (await here.load(abstract)).content.startswith("What a model saw.; image 800x600")
        assert (await here.load(abstract, OTHER)).content.startswith("A steel bridge.; image")
        assert "What a model saw." not in str(await here.load(tenant=OTHER))


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
