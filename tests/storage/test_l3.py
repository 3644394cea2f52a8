"""Artifacts behind URLs: whole or not at all, and never other bytes under the same key."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path

import pytest

from proxy.errors import ConfigError
from proxy.memory.artifacts_bridge import ArtifactError, ArtifactsBridge
from proxy.memory.models import MemoryPage
from proxy.storage.l2 import StorageError
from proxy.storage.l3 import ArtifactStore


@pytest.fixture(params=["path", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    urls = {
        "path": str(tmp_path / "artifacts"),
        "file": f"file://{tmp_path}/artifacts",
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return ArtifactStore(urls[request.param])


async def test_what_is_put_is_found_and_deleted(store: ArtifactStore) -> None:
    assert await store.get("page_1") is None
    await store.put("page_1", b"\x00one")
    assert await store.get("page_1") == b"\x00one"
    assert await store.delete("page_1") and not await store.delete("page_1")
    assert await store.get("page_1") is None


async def test_invariant_04_a_key_never_changes_its_bytes(store: ArtifactStore) -> None:
    await store.put("page_1", b"one")
    await store.put("page_1", b"one")
    with pytest.raises(StorageError, match="other bytes"):
        await store.put("page_1", b"two")
    assert await store.get("page_1") == b"one"


@pytest.mark.parametrize("key", ["", ".", "..", "../up", "a/b", "a\\b", "/etc/x", ".tmp", "a\x00", "x" * 129])
async def test_a_key_is_no_path(store: ArtifactStore, key: str) -> None:
    for work in (store.put(key, b"x"), store.get(key), store.delete(key)):
        with pytest.raises(ValueError, match="key"):
            await work


async def test_a_bridge_over_it_survives_a_restart_and_tells_damage(tmp_path: Path) -> None:
    page = MemoryPage(page_id="msg_0001", content={"type": "text", "text": "kept \ud83d"})
    stored = await ArtifactsBridge(ArtifactStore(str(tmp_path))).store_page(page)
    again = ArtifactsBridge(ArtifactStore(str(tmp_path)))
    loaded = await again.load_page(stored)
    assert loaded is not None and loaded.content == page.content
    (file,) = (p for p in tmp_path.rglob("page_*") if p.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        await again.load_page(stored)


def test_many_writers_of_one_key_leave_one_whole_file(tmp_path: Path) -> None:
    data = b"x" * 200_000
    threads = [
        threading.Thread(target=ArtifactStore(str(tmp_path))._put, args=("page_1", data))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ArtifactStore(str(tmp_path))._get("page_1") == data
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["page_1"]


def test_a_kill_in_the_middle_of_writing_leaves_no_half_artifact(tmp_path: Path) -> None:
    code = """
        import sys
        from proxy.storage.l3 import ArtifactStore
        store = ArtifactStore(sys.argv[1])
        print("ready", flush=True)
        for n in range(10_000):
            store._put(f"page_{n}", bytes([n % 251]) * 300_000)
            print(n, flush=True)
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert writer.stdout is not None
    written = [writer.stdout.readline() for _ in range(6)]
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    store = ArtifactStore(str(tmp_path))
    keys = [path.name for path in tmp_path.rglob("page_*") if path.is_file()]
    assert len(keys) >= len(written) - 1
    for key in keys:
        number = int(key.removeprefix("page_"))
        assert store._get(key) == bytes([number % 251]) * 300_000


@pytest.mark.parametrize("url", ["nosuchscheme://x/y", "s3://bucket/prefix"])
def test_a_url_that_nothing_opens_is_one_sentence(url: str) -> None:
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed, so s3:// can be opened")
    with pytest.raises(ConfigError, match="artifact store") as told:
        ArtifactStore(url)
    assert str(told.value).endswith(".") and "\n" not in str(told.value)


async def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="page_1"):
        await ArtifactStore(str(tmp_path / "file")).put("page_1", b"x")
