"""Pages as artifacts: what comes back is what was stored, or a clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.artifacts_bridge import (
    ArtifactError,
    ArtifactsBridge,
    InMemoryBackend,
    decode_page,
    encode_page,
)
from proxy.memory.models import CompressionLevel, MemoryPage, Modality, PageType, StorageTier
from tests.examples import examples

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
pages = st.builds(
    MemoryPage,
    page_id=st.text(min_size=1, max_size=10),
    modality=st.sampled_from(Modality),
    page_type=st.sampled_from(PageType),
    content=anything | st.text(st.characters()),
    storage_tier=st.sampled_from(StorageTier),
    compression_level=st.sampled_from(CompressionLevel),
    size_tokens=st.none() | st.integers(0, 9000),
    provenance=st.lists(st.text(max_size=5), max_size=3),
    importance=st.floats(0, 1),
    pinned=st.booleans(),
    metadata=st.dictionaries(st.text(max_size=5), anything, max_size=2),
    session_id=st.none() | st.text(max_size=5),
)
_PLACE = {"storage_tier": StorageTier.L1, "artifact_id": None}


def page(content: Any = "body", name: str = "msg_0001") -> MemoryPage:
    return MemoryPage(page_id=name, content=content)


@examples(60)
@given(pages)
def test_invariant_04_a_page_comes_back_as_it_was_stored(stored: MemoryPage) -> None:
    back = decode_page(encode_page(stored))
    assert back == stored.model_copy(update=_PLACE)
    assert type(back.content) is type(stored.content)


async def test_the_same_page_has_the_same_id_wherever_it_lives() -> None:
    bridge = ArtifactsBridge()
    first = await bridge.store_page(page())
    elsewhere = page().model_copy(update={"storage_tier": StorageTier.L0, "artifact_id": first})
    assert await bridge.store_page(elsewhere) == first
    assert await ArtifactsBridge(InMemoryBackend()).store_page(page()) == first
    others = {await bridge.store_page(p) for p in (page("b"), page(name="msg_0002"), page(["b"]))}
    assert len(others - {first}) == 3
    loaded = await bridge.load_page(first)
    assert loaded is not None and loaded.artifact_id == first
    assert loaded.storage_tier is StorageTier.L3 and loaded.content == "body"


async def test_half_a_surrogate_pair_and_an_image_part_are_kept_exactly() -> None:
    bridge = ArtifactsBridge()
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO\ud83d"}}
    loaded = await bridge.load_page(await bridge.store_page(page(part)))
    assert loaded is not None and loaded.content == part


async def test_what_is_not_there_is_none_and_ids_are_no_paths() -> None:
    bridge = ArtifactsBridge()
    stored = await bridge.store_page(page())
    for wrong in ("", "page_", "../../etc/passwd", f"page_{'0' * 40}", stored + "0"):
        assert await bridge.load_page(wrong) is None
        assert not await bridge.delete(wrong)
    assert await bridge.delete(stored)
    assert await bridge.load_page(stored) is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", b'{"format":1,"page":{}}'])
async def test_a_damaged_artifact_is_an_error_and_not_silence(damage: bytes) -> None:
    backend = InMemoryBackend()
    bridge = ArtifactsBridge(backend)
    stored = await bridge.store_page(page())
    backend._data[stored] = damage
    with pytest.raises(ArtifactError, match="damaged"):
        await bridge.load_page(stored)
    with pytest.raises(ArtifactError):
        decode_page(damage)


def test_a_later_format_is_refused() -> None:
    later = json.loads(encode_page(page())) | {"format": 2}
    with pytest.raises(ArtifactError, match="format 1"):
        decode_page(json.dumps(later).encode())


@pytest.mark.parametrize(
    "content",
    [{1: "a"}, (1, 2), {"a": {3}}, object(), float("nan"), page(), b"bytes"],
)
def test_content_that_would_come_back_changed_is_refused(content: Any) -> None:
    with pytest.raises(ArtifactError, match="exactly"):
        encode_page(page(content))


async def test_a_checkpoint_gives_its_pages_back_in_order() -> None:
    bridge = ArtifactsBridge()
    kept = [page(f"text {n}", f"msg_{n:04d}") for n in range(3)]
    name = "topic_checkpoint_2026-01-01T12:00:00.000001"
    made = await bridge.checkpoint(pages=kept, name=name)
    assert [p.content for p in await bridge.load_checkpoint(made)] == ["text 0", "text 1", "text 2"]
    assert await bridge.checkpoint(kept, name) == made
    await bridge.delete(await bridge.store_page(kept[1]))
    with pytest.raises(ArtifactError, match="not there"):
        await bridge.load_checkpoint(made)
    with pytest.raises(ArtifactError, match="no checkpoint"):
        await bridge.load_checkpoint("checkpoint_x")
    assert await bridge.load_page(made) is None
